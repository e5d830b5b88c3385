// y[t] += sum_p sum_j s[t,p,j] w[n,j,:], in place; rows without a live slot are not touched.
// y (T,D), s (T,P,r), w (N,r,D). A warp owns 16 rows of one group and some strips of 64 columns; the warps of a block
// own tiles that follow each other or, where tiles are few, strips that do: then all multiprocessors have work.
//
// Order of the sum: live slots in order of p, each in k-steps of its own. fp32 and dropout: a slot on its own, in
// blocks of 256 ranks (fp32: a chain of fmaf each, the bits of the CPU), added to the total; else one accumulator, mma
// steps of 16 ranks. y + total is rounded once.
//
// Bound by reading and writing y: T = 8192, D = 4096, bf16: 134 MB, 45 us at 3.0 TB/s, below about 128 live ranks.
#include <algorithm>

#include "strip.cuh"

namespace s3t::cuda {

constexpr int kWarps = 4;

__device__ inline void add(Strip& total, const Strip& sum) {
#pragma unroll
    for (int i = 0; i < 32; ++i) total.of[i / 16][i % 16] = __fadd_rn(total.of[i / 16][i % 16], sum.of[i / 16][i % 16]);
}

// Adds a slot's sum to the total where dropout keeps it.
__device__ inline void add_kept(Strip& total, const Strip& sum, const s3t_dropout& dropout, const Span& span,
                                int64_t column, int64_t slot) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int64_t t = span.first + threadIdx.x % kWarp / 4 + 8 * h;
        if (t >= span.last) continue;
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            const uint32_t kept = kept4(dropout, span.group, t, (column + i) / 4, slot);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (kept >> j & 1) total.of[h][i + j] = __fadd_rn(total.of[h][i + j], sum.of[h][i + j]);
            }
        }
    }
}

template <typename X, bool Drops>
__device__ bool sum_slots(Strip& total, const s3t_expand_args& args, const Span& span, int64_t strip, bool wide) {
    constexpr bool kChained = !kIsFloat<X> && !Drops;
    const int lane = threadIdx.x % kWarp;
    const int64_t rank = args.pools.rank, dim = args.pools.dim, width = args.table.slots * rank;
    const bool fours = rank % 4 == 0 && reinterpret_cast<uintptr_t>(args.s) % 8 == 0;
    bool any = false;
    for (int64_t p = 0; p < args.table.slots; ++p) {
        const int64_t id = id_of(args.table, span.group, p);
        const Adapter w = adapter_of(args.pools, id);
        if (w.data == nullptr) continue;
        any = true;
        const int64_t size = w.is_float ? 4 : 2;
        const bool dropping = Drops && drops(args.dropout, id);
        Strip apart{};  // the sum of a slot of which dropout selects
        for (int64_t j = 0; j < rank; j += kBlock) {
            const X* s = static_cast<const X*>(args.s) + span.first * width + p * rank + j;
            const StripFactors<X> a{s, width, 1, static_cast<int>(span.last - span.first), fours};
            const StripRows b{
                w.data + (j * dim + strip) * size, dim * size, dim - strip, w.is_float, wide, {}, 0, 0, 0, 0};
            const int terms = static_cast<int>(rank - j < kBlock ? rank - j : kBlock);
            if constexpr (kChained) {
                multiply<X, false, 1>(total, a, b, terms);
            } else {
                Strip sum{};
                multiply<X, false, kIsFloat<X> && !Drops ? 2 : 1>(sum, a, b, terms);
                dropping ? add(apart, sum) : add(total, sum);
            }
        }
        if (dropping) add_kept(total, apart, args.dropout, span, strip + lane % 4 * 16, p);
    }
    return any;
}

template <typename X, bool Drops>
__global__ void __launch_bounds__(kWarps* kWarp, Drops || kIsFloat<X> ? 2 : 3)
    expand_kernel(s3t_expand_args args, int across) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, down = kWarps / across;
    const int64_t tile = static_cast<int64_t>(blockIdx.x) * down + warp % down;
    const Span span = find_span(args.table, args.rows, tile, kHeight);
    if (span.first >= span.last) return;

    const int64_t dim = args.pools.dim, bytes = dim * sizeof(X),
                  step = static_cast<int64_t>(gridDim.y) * across * kStrip;
    const bool wide_w = aligned16(args.pools.w, bytes) && aligned16(args.pools.w1, bytes);
    const bool wide_y = aligned16(args.y.data, args.y.stride * sizeof(X)) && bytes % 16 == 0;
    X* y = static_cast<X*>(args.y.data) + (span.first + lane / 4) * args.y.stride;
    const bool exists[2] = {span.first + lane / 4 < span.last, span.first + lane / 4 + 8 < span.last};
    for (int64_t strip = (blockIdx.y * across + warp / down) * kStrip; strip < dim; strip += step) {
        const int64_t column = strip + lane % 4 * 16;
        Eight<X> before[2][2] = {};  // asked for first: it comes while the slots are summed
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int h = i / 2;
            if (exists[h]) before[h][i % 2] = read8(y + 8 * h * args.y.stride, column + i % 2 * 8, dim, wide_y);
        }
        Strip total{};
        if (!sum_slots<X, Drops>(total, args, span, strip, wide_w)) return;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int h = i / 2;
            float sum[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                sum[j] = __fadd_rn(before[h][i % 2].at(j), total.of[h][i % 2 * 8 + j]);
            }
            if (exists[h]) write8(y + 8 * h * args.y.stride, sum, column + i % 2 * 8, dim, wide_y);
        }
    }
}

// --- launchers -------------------------------------------------------------------------------------------------------

template <typename X>
static cudaError_t launch_type(const s3t_expand_args& args, int device, void* stream) {
    const int64_t tiles = tile_numbers(args.rows, args.table.groups, kHeight);
    const int64_t strips = (args.pools.dim + kStrip - 1) / kStrip;
    int across = kWarps;
    while (across > 1 && tiles > kWarps / across) across /= 2;
    const int64_t down = kWarps / across, blocks = (tiles + down - 1) / down;
    // Eight blocks for each multiprocessor keep memory busy; more strips for each warp then save it the search for its
    // rows.
    const int64_t wanted = (8 * attribute(device, cudaDevAttrMultiProcessorCount) + blocks - 1) / blocks;
    const int64_t y = std::min((strips + across - 1) / across, std::max<int64_t>(wanted, 1));
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
    return with_type(args->y.type, [&](auto zero) { return launch_type<decltype(zero)>(*args, device, stream); });
}
