// dw[n] = sum over every (g,p) with ids[g,p] = n, and over the rows t of group g, of s[t,p]^T u[t]; zero if unnamed.
// s (T,P,r), u (T,D), dw (count,r,D). A cluster of blocks owns 16 ranks of one adapter and some strips of 64 columns.
// Its warps walk the table together and deal out, in order, chunks of rows counted from the first row of each group.
//
// Order of the sum: a chunk is 256 rows in fp32 (one chain of fmaf, the bits of the CPU), 128 in half types (mma steps
// of 16 rows, in order); chunks are added in order: g ascending, then p, then rows. No atomics, no workspace.
//
// Bound by reading u once for each slot (from L2 but for the first) and writing dw: T = 8192, D = 4096, P = 1, bf16:
// 67 MB, 22 us at 3.0 TB/s.
#include "strip.cuh"

namespace s3t::cuda {

constexpr int kWarps = 8;
template <typename X>
constexpr int kChunk = kIsFloat<X> ? kBlock : 128;

// The sums of one deal: unit i of a lane is eight neighbours of its strip, c.of[i / 2][i % 2 * 8 ..].
struct Deal {
    float4 of[kWarps][4][2][kWarp];  // (warp, unit, half, lane)
};

// How a cluster shares its work: `parts` hands take a chunk each, for every strip; a hand is a warp of one of the
// blocks.
struct Hands {
    int size, rank;        // blocks of the cluster
    int down, warp, part;  // hands in a block, for a strip

    __device__ int all() const { return size * down; }
    __device__ bool takes(int chunk) const { return chunk % size == rank && chunk / size == part; }
    __device__ void sync() const {
        if (size > 1) {
            cluster_sync();
        } else if (down > 1) {
            __syncthreads();
        } else {
            __syncwarp();
        }
    }
};

__device__ inline void put(Deal& deal, const Strip& sum, int warp) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float* from = sum.of[i / 2] + i % 2 * 8 + half * 4;
            deal.of[warp][i][half][lane] = make_float4(from[0], from[1], from[2], from[3]);
        }
    }
}

// Adds the first `count` sums of a deal in order; a unit belongs to one hand.
__device__ inline void add_deal(float (&total)[4][8], Deal& deal, const Hands& hands, int count) {
    const int lane = threadIdx.x % kWarp, me = hands.part * hands.size + hands.rank;
    hands.sync();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (i % hands.all() != me) continue;
        for (int chunk = 0; chunk < count; ++chunk) {
            const int warp = hands.warp - hands.part + chunk / hands.size;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float4* at = &deal.of[warp][i][half][lane];
                const float4 part = hands.size > 1 ? *in_block(at, chunk % hands.size) : *at;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    total[i][half * 4 + j] = __fadd_rn(total[i][half * 4 + j], (&part.x)[j]);
                }
            }
        }
    }
    hands.sync();
}

// Sums one chunk: rows first.. of a group, for slot p.
template <typename X, bool Drops>
__device__ void sum_chunk(Strip& sum, const s3t_outer_args& args, int64_t id, int64_t group, int64_t slot,
                          int64_t first, int64_t last, int64_t j, int64_t strip) {
    const int64_t width = args.table.slots * args.rank, stride = args.u.stride * sizeof(X);
    const int64_t ranks = args.rank - j < kHeight ? args.rank - j : kHeight;
    const X* s = static_cast<const X*>(args.s) + first * width + slot * args.rank + j;
    const StripFactors<X> a{s, 1, width, static_cast<int>(ranks), false};
    const char* u = static_cast<const char*>(args.u.data) + first * stride + strip * sizeof(X);
    const bool wide = aligned16(args.u.data, stride) && args.dim * sizeof(X) % 16 == 0;
    StripRows b{u, stride, args.dim - strip, kIsFloat<X>, wide, args.dropout, group, slot, first, strip};
    if (!Drops || !drops(args.dropout, id)) b.dropout.seeds = nullptr;
    multiply<X, Drops, 2>(sum, a, b, static_cast<int>(last - first));
}

template <typename X, bool Drops>
__global__ void __launch_bounds__(kWarps* kWarp, 1) outer_kernel(s3t_outer_args args, int across) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, down = kWarps / across;
    const Hands hands{static_cast<int>(cluster_size()), static_cast<int>(cluster_rank()), down, warp, warp % down};
    const int64_t n = blockIdx.x / hands.size, id = args.first + n, j = static_cast<int64_t>(blockIdx.z) * kHeight;
    const int64_t strip = (static_cast<int64_t>(blockIdx.y) * across + warp / down) * kStrip;
    const int64_t slots = args.table.slots, entries = args.table.groups * slots;

    auto& deal = shared<Deal>();
    float total[4][8] = {};
    int chunk = 0;
    for (int64_t base = 0; base < entries; base += kWarp) {  // the same walk in every warp of the cluster
        const int64_t entry = base + lane;
        uint32_t named =
            __ballot_sync(0xffffffff, entry < entries && id_of(args.table, entry / slots, entry % slots) == id);
        for (; named != 0; named &= named - 1) {
            const int64_t at = base + __ffs(named) - 1, group = at / slots;
            const int64_t last = row_of(args.table, args.rows, group + 1);
            for (int64_t t = row_of(args.table, args.rows, group); t < last; t += kChunk<X>) {
                if (hands.takes(chunk) && strip < args.dim) {
                    Strip sum{};
                    const int64_t end = t + kChunk<X> < last ? t + kChunk<X> : last;
                    sum_chunk<X, Drops>(sum, args, id, group, at % slots, t, end, j, strip);
                    put(deal, sum, warp);
                }
                if (++chunk < hands.all()) continue;
                add_deal(total, deal, hands, chunk);
                chunk = 0;
            }
        }
    }
    if (chunk > 0) add_deal(total, deal, hands, chunk);

#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int64_t row = j + lane / 4 + i / 2 * 8, column = strip + lane % 4 * 16 + i % 2 * 8;
        if (i % hands.all() != hands.part * hands.size + hands.rank || row >= args.rank) continue;
        const int64_t at = (n * args.rank + row) * args.dim;
        if (args.dw_type == S3T_F32) {
            float* dw = static_cast<float*>(args.dw);
            write8(dw + at, total[i], column, args.dim, aligned16(dw, args.dim * 4));
        } else {
            X* dw = static_cast<X*>(args.dw);
            write8(dw + at, total[i], column, args.dim, aligned16(dw, args.dim * sizeof(X)));
        }
    }
}

// --- launchers -------------------------------------------------------------------------------------------------------

// Hands follow the sizes; no bit of the result follows the hands.
template <typename X>
static cudaError_t launch_type(const s3t_outer_args& args, int device, void* stream) {
    const int64_t strips = (args.dim + kStrip - 1) / kStrip, ranks = (args.rank + kHeight - 1) / kHeight;
    const int64_t processors = attribute(device, cudaDevAttrMultiProcessorCount);
    const int64_t chunks = (args.rows / kChunk<X> + args.table.groups) * args.table.slots / args.count;  // an adapter's
    int across = kWarps;
    while (across > 1 && (chunks > kWarps / across || args.count * (strips / across) * ranks < processors)) across /= 2;
    const int64_t y = (strips + across - 1) / across, blocks = args.count * y * ranks;
    unsigned cluster = 1;
    if (architecture(device) >= 900) {
        while (cluster < 8 && blocks * cluster < processors && chunks > kWarps * cluster) cluster *= 2;
    }
    if (y > 65535 || ranks > 65535 || args.count * cluster > 0x7fffffff) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>(args.count * cluster), static_cast<unsigned>(y),
                    static_cast<unsigned>(ranks));
    const Launch how{grid, dim3(kWarps * kWarp), sizeof(Deal), stream, cluster};
    if (args.dropout.seeds != nullptr) return launch(how, outer_kernel<X, true>, args, across);
    return launch(how, outer_kernel<X, false>, args, across);
}

}  // namespace s3t::cuda

int64_t s3t_outer_workspace(const s3t_outer_args*) {
    return 0;
}

int32_t s3t_outer_cuda(const s3t_outer_args* args, void*, int32_t device, void* stream) {
    using namespace s3t::cuda;
    if (args->count * args->rank * args->dim == 0) return S3T_OK;
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return status_of(guard.status());
    return with_type(args->u.type, [&](auto zero) { return launch_type<decltype(zero)>(*args, device, stream); });
}
