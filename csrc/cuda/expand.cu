// y[t] += sum_p sum_j s[t,p,j] w[n,j,:], in place; rows without a live slot are not touched.
// y (T,D), s (T,P,r), w (N,r,D). A warp owns 16 rows of one group and 64 columns; the warps of a block own tiles that
// follow each other, or, where there are few tiles, strips of columns that do: then all multiprocessors have work.
// Order of the sum: each live slot on its own, in blocks of 256 ranks (fp32: one chain of fmaf; half types: mma steps
// of 16, in order), added in order of p to a total; y + total is rounded once. Bound by reading and writing y: T =
// 8192, D = 4096, bf16, 134 MB, 45 us at 3.0 TB/s, below about 128 live ranks.
#include "strip.cuh"

namespace s3t::cuda {

constexpr int kWarps = 8;

// Adds a slot's sum to the total where dropout keeps it.
template <bool Drops>
__device__ void add_slot(Strip& total, const Strip& sum, const s3t_dropout& dropout, bool dropped, const Span& span,
                         int64_t column, int64_t slot) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int64_t t = span.first + lane / 4 + 8 * h;
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            uint32_t kept = 0xf;
            if (Drops && dropped && t < span.last) kept = kept4(dropout, span.group, t, (column + i) / 4, slot);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (kept >> j & 1) total.of[h][i + j] = __fadd_rn(total.of[h][i + j], sum.of[h][i + j]);
            }
        }
    }
}

template <typename X, bool Drops>
__device__ bool sum_slots(Strip& total, const s3t_expand_args& args, const Span& span, int64_t strip, bool wide) {
    const int lane = threadIdx.x % kWarp;
    const int64_t rank = args.pools.rank, dim = args.pools.dim, width = args.table.slots * rank;
    bool any = false;
    for (int64_t p = 0; p < args.table.slots; ++p) {
        const int64_t id = id_of(args.table, span.group, p);
        const Adapter w = adapter_of(args.pools, id);
        if (w.data == nullptr) continue;
        any = true;
        const int64_t size = w.is_float ? 4 : 2;
        for (int64_t j = 0; j < rank; j += kBlock) {
            const X* s = static_cast<const X*>(args.s) + span.first * width + p * rank + j;
            const StripFactors<X> a{s, width, 1, static_cast<int>(span.last - span.first)};
            const StripRows b{
                w.data + (j * dim + strip) * size, dim * size, dim - strip, w.is_float, wide, {}, 0, 0, 0, 0};
            Strip sum{};
            multiply<X, false>(sum, a, b, rank - j < kBlock ? rank - j : kBlock);
            add_slot<Drops>(total, sum, args.dropout, Drops && drops(args.dropout, id), span, strip + lane % 4 * 16, p);
        }
    }
    return any;
}

template <typename X, bool Drops>
__global__ void __launch_bounds__(kWarps* kWarp) expand_kernel(s3t_expand_args args, int across) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, down = kWarps / across;
    const int64_t dim = args.pools.dim;
    const int64_t tile = static_cast<int64_t>(blockIdx.x) * down + warp % down;
    const int64_t strip = (static_cast<int64_t>(blockIdx.y) * across + warp / down) * kStrip;
    if (strip >= dim) return;
    const Span span = find_span(args.table, args.rows, tile, kHeight);
    if (span.first >= span.last) return;

    const int64_t bytes = dim * sizeof(X);
    const bool wide_w = aligned16(args.pools.w, bytes) && aligned16(args.pools.w1, bytes);
    const bool wide_y = aligned16(args.y.data, args.y.stride * sizeof(X)) && bytes % 16 == 0;
    Strip total{};
    if (!sum_slots<X, Drops>(total, args, span, strip, wide_w)) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int64_t t = span.first + lane / 4 + 8 * h;
        if (t >= span.last) continue;
        X* y = static_cast<X*>(args.y.data) + t * args.y.stride;
#pragma unroll
        for (int i = 0; i < 16; i += 8) {
            const int64_t column = strip + lane % 4 * 16 + i;
            float values[8];
            load8_widened(values, y, column, dim, wide_y);
#pragma unroll
            for (int j = 0; j < 8; ++j) values[j] = __fadd_rn(values[j], total.of[h][i + j]);
            store8(y, values, column, dim, wide_y);
        }
    }
}

// --- launchers -------------------------------------------------------------------------------------------------------

template <typename X>
static cudaError_t launch_type(const s3t_expand_args& args, void* stream) {
    const int64_t tiles = tile_numbers(args.rows, args.table.groups, kHeight);
    const int64_t strips = (args.pools.dim + kStrip - 1) / kStrip;
    int across = kWarps;
    while (across > 1 && tiles > kWarps / across) across /= 2;
    const int64_t down = kWarps / across, blocks = (tiles + down - 1) / down, y = (strips + across - 1) / across;
    if (y > 65535 || blocks > 0x7fffffff) return cudaErrorInvalidValue;
    const Launch how{dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(y)), dim3(kWarps * kWarp), 0, stream};
    if (args.dropout.seeds != nullptr) return launch(how, expand_kernel<X, true>, args, across);
    return launch(how, expand_kernel<X, false>, args, across);
}

}  // namespace s3t::cuda

int32_t s3t_expand_cuda(const s3t_expand_args* args, int32_t device, void* stream) {
    using namespace s3t::cuda;
    if (args->rows * args->pools.dim * args->table.slots * args->pools.rank == 0) return S3T_OK;
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return status_of(guard.status());
    return with_type(args->y.type, [&](auto zero) { return launch_type<decltype(zero)>(*args, stream); });
}
