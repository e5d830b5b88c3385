// The base product and the adapters in one accumulator, and the whole layer in two launches that overlap. Which tile
// serves which T: the bits of a row are the same in all of them.
#include "linear_float.cuh"
#include "linear_half.cuh"

namespace s3t::cuda::linear {

static cudaError_t launch_linear(const s3t_linear_args& args, float, int, void* stream, bool overlap) {
    const bool wide = args.inner % 4 == 0 && aligned16(args.x.data, args.x.stride * 4) &&
                      aligned16(args.weight, (args.transposed ? args.outer : args.inner) * 4);
    if (args.transposed) {
        if (!wide) return launch_single<8, true, false>(args, stream, overlap);
        return args.rows <= 8 ? launch_single<8, true, true>(args, stream, overlap)
                              : launch_single<16, true, true>(args, stream, overlap);
    }
    if (!wide) return launch_single<8, false, false>(args, stream, overlap);
    return args.rows <= 8 ? launch_single<8, false, true>(args, stream, overlap)
                          : launch_single<16, false, true>(args, stream, overlap);
}

template <typename X>
static cudaError_t launch_linear(const s3t_linear_args& args, X, int arch, void* stream, bool overlap) {
    const bool wide = args.inner % 8 == 0 && aligned16(args.x.data, args.x.stride * 2) &&
                      aligned16(args.weight, (args.transposed ? args.outer : args.inner) * 2);
    if (args.transposed) {
        return wide ? launch_half<X, 2, 8, 1, true>(args, stream, overlap)
                    : launch_half<X, 2, 4, 1, true, false>(args, stream, overlap);
    }
    if (!wide) {
        return args.rows <= 16 ? launch_half<X, 1, 2, 1, false, false>(args, stream, overlap)
                               : launch_half<X, 2, 4, 1, false, false>(args, stream, overlap);
    }
    if (args.rows <= 8) return launch_half<X, 1, 1>(args, stream, overlap);
    if (args.rows <= 16) return launch_half<X, 1, 2>(args, stream, overlap);
    if (args.rows <= 32) return launch_half<X, 2, 4>(args, stream, overlap);
    return arch >= 900 ? launch_half<X, 2, 8, 2>(args, stream, overlap) : launch_half<X, 2, 8>(args, stream, overlap);
}

static int32_t run_linear(const s3t_linear_args& args, int device, void* stream, bool after_shrink) {
    if (args.packed) return status_of(cudaErrorInvalidValue);
    if (args.rows == 0 || args.outer == 0) return S3T_OK;
    const int arch = architecture(device);
    return with_type(args.x.type,
                     [&](auto type) { return launch_linear(args, type, arch, stream, after_shrink && arch >= 900); });
}

}  // namespace s3t::cuda::linear

int32_t s3t_linear_cuda(const s3t_linear_args* args, int32_t device, void* stream) {
    using namespace s3t::cuda;
    using s3t::cuda::linear::run_linear;
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return status_of(guard.status());
    return run_linear(*args, device, stream, false);
}

int32_t s3t_layer_cuda(const s3t_shrink_args* shrink, const s3t_linear_args* linear, int32_t device, void* stream) {
    using namespace s3t::cuda;
    using s3t::cuda::linear::run_linear;
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return status_of(guard.status());
    const int32_t status = s3t_shrink_cuda(shrink, device, stream);
    if (status != S3T_OK) return status;
    // Only after a launch of shrink's own: the kernel before that one may still be writing x.
    const bool launched = shrink->rows * shrink->table.slots * shrink->pools.rank > 0;
    return run_linear(*linear, device, stream, launched);
}
