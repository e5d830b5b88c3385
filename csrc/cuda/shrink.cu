// s[t,p,j] = scale_n * sum_d w[n,j,d] u[t,d], one rounding; exactly zero where slot p is dead.
// u (T,D), w (N,r,D), s (T,P,r). A warp owns one row t, one slot p and 32 of its r columns; lane = column j. Tiles of
// 32 x 32 of w and 32 values of u pass through shared memory, so that global reads are coalesced. Order of the sum: d
// ascending, one chain of fmaf a block of 256, blocks added in order: the bits of the CPU kernels. Bound by reading w
// once a row, from L2.
#include "common.cuh"

// No anonymous namespace: nvcc would put a hash of the build's path in the names, and no two builds would be the same.
namespace s3t::cuda {

constexpr int kWarp = 32, kWarps = 4;

template <typename X>
__global__ void __launch_bounds__(kWarp* kWarps) shrink_kernel(s3t_shrink_args args) {
    __shared__ float tiles[kWarps][kWarp][kWarp + 1];  // one column of padding: no bank conflicts
    const int lane = threadIdx.x;
    float (*tile)[kWarp + 1] = tiles[threadIdx.y];
    const int64_t rank = args.pools.rank, dim = args.pools.dim, slots = args.table.slots;
    const int64_t j0 = static_cast<int64_t>(blockIdx.y) * kWarp, j = j0 + lane;
    const int64_t pairs = args.rows * slots;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;

    for (int64_t pair = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y; pair < pairs; pair += stride) {
        const int64_t t = pair / slots, p = pair % slots;
        const int64_t group = group_of(args.table, t);
        const int64_t id = args.table.ids[group * args.table.group_stride + p * args.table.slot_stride];
        const bool first = id < args.pools.n;
        const bool live = id >= 0 && id < args.pools.n + args.pools.m;
        X* s = static_cast<X*>(args.s) + pair * rank;
        if (!live) {  // the same for a whole warp, as t, p and id are
            if (j < rank) s[j] = narrow<X>(0.0f);
            continue;
        }
        const void* w = first ? args.pools.w : args.pools.w1;
        const bool is_float = (first ? args.pools.w_type : args.pools.w1_type) == S3T_F32;
        const int64_t base = (first ? id : id - args.pools.n) * rank * dim;
        const X* u = static_cast<const X*>(args.u.data) + t * args.u.stride;

        float total = 0.0f;
        for (int64_t block = 0; block < dim; block += kBlock) {
            const int64_t end = min(block + kBlock, dim);
            float chain = 0.0f;
            for (int64_t d = block; d < end; d += kWarp) {
                const int64_t column = d + lane;
                for (int row = 0; row < kWarp && j0 + row < rank && column < end; ++row) {
                    tile[row][lane] = read_pool<X>(w, is_float, base + (j0 + row) * dim + column);
                }
                const float mine = column < end ? widen(u[column]) : 0.0f;
                __syncwarp();
                const int terms = static_cast<int>(min(static_cast<int64_t>(kWarp), end - d));
                for (int i = 0; i < terms; ++i) {  // every lane takes part in the shuffle; lanes past r are not written
                    chain = __fmaf_rn(__shfl_sync(0xffffffff, mine, i), tile[lane][i], chain);
                }
                __syncwarp();
            }
            total = __fadd_rn(total, chain);
        }
        const float scale = args.scales == nullptr ? args.scale : args.scales[id];
        if (j < rank) s[j] = narrow<X>(__fmul_rn(total, scale));
    }
}

template <typename X>
static cudaError_t launch(const s3t_shrink_args& args, cudaStream_t stream) {
    const int64_t blocks = (args.rows * args.table.slots + kWarps - 1) / kWarps,
                  tiles = (args.pools.rank + kWarp - 1) / kWarp;
    if (blocks == 0 || tiles == 0) return cudaSuccess;
    if (tiles > 65535) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff), static_cast<unsigned>(tiles));
    shrink_kernel<X><<<grid, dim3(kWarp, kWarps), 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace s3t::cuda

int32_t s3t_shrink_cuda(const s3t_shrink_args* args, int32_t device, void* stream) {
    using namespace s3t::cuda;
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return status_of(guard.status());
    const auto on = static_cast<cudaStream_t>(stream);
    switch (args->u.type) {
        case S3T_F32:
            return status_of(launch<float>(*args, on));
        case S3T_F16:
            return status_of(launch<__half>(*args, on));
        default:
            return status_of(launch<__nv_bfloat16>(*args, on));
    }
}

const char* s3t_cuda_error(int32_t status) {
    return cudaGetErrorString(static_cast<cudaError_t>(status - S3T_CUDA_ERROR));
}
