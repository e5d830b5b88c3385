// s[t,p,j] = scale_n * sum_d w[n,j,d] u[t,d], one rounding; exactly zero where slot p is dead.
// u (T,D), w (N,r,D), s (T,P,r). A cluster of C blocks owns 8 NT rows of one group and 16 MT of the P r columns (p,j).
// D is cut in blocks of 256, whatever T and C are. Block b of the sum is one warp's (warp b / C % 8 of block b % C of
// the cluster), which loads its part of the rows once, straight into the registers of the tensor cores.
//
// Order of the sum: the blocks' sums are added in order. Inside a block fp32 is one chain of fmaf, the bits of the CPU;
// half types are mma steps over d = 32 i + {0-3, 8-11, 16-19, 24-27}, then over the same + 4, i ascending.
//
// Bound by reading u once: T = 8192, D = 4096, bf16: 67 MB, 22 us at 3.0 TB/s. T <= 64: by latency, hence C up to 8.
#include "rows.cuh"

// No anonymous namespace: nvcc would put a hash of the build's path in the names, and no two builds would be the same.
namespace s3t::cuda {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;

template <int MT, int NT>
struct Parts {
    float of[kWarps][8 * NT][16 * MT + 4];  // (warp, row, column); 4 more columns: no bank conflicts
};

// One lane's view of a tile: columns l / 4 and l / 4 + 8 of each 16 (a), and the rows that its part of the sum needs
// (b).
template <typename X, int MT, int NT>
struct Operands {
    static constexpr int kRows = kIsFloat<X> ? 2 : 1;
    Row a[MT][2];
    Row b[NT][kRows];
    bool wide_a, wide_b;
    Rows what;                       // of a; not Any: b is wide too, and of type X
    s3t_dropout dropout;             // MT = 1: of the one slot of the tile; no seeds where nothing drops
    int64_t group, slot, row, last;  // rows row..last-1
    bool live;                       // the lane has a column that is

    // Loads then do not branch: what does not exist is the first row of u, or the row of a live column that some lane
    // has. What comes of it is not written.
    __device__ void stand_in(const s3t_matrix& u, int64_t first) {
        unsigned long long some = 0;
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
            if (a[i / 2][i % 2].data != nullptr) some = reinterpret_cast<uintptr_t>(a[i / 2][i % 2].data);
        }
        const int from = __ffs(__ballot_sync(0xffffffff, live)) - 1;
        some = __shfl_sync(0xffffffff, some, from & 31);
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
            if (a[i / 2][i % 2].data == nullptr) a[i / 2][i % 2].data = reinterpret_cast<const char*>(some);
        }
#pragma unroll
        for (int i = 0; i < NT * kRows; ++i) {
            const char* row = static_cast<const char*>(u.data) + first * u.stride * sizeof(X);
            if (b[i / kRows][i % kRows].data == nullptr) b[i / kRows][i % kRows].data = row;
        }
    }
};

// Adds terms k0..k1-1 on tensor cores, 32 at a time: lane l % 4 brings terms l % 4 * 8 .. + 7.
template <typename X, int MT, int NT, bool Drops, Rows What>
__device__ void add_steps(const Operands<X, MT, NT>& in, int64_t k0, int64_t k1, float (&c)[MT][NT][4]) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll(What == Rows::kAny ? 1 : MT * NT == 1 ? 8 : What == Rows::kSame ? 2 : 1)
    for (; k0 < k1; k0 += 32) {
        const int64_t k = k0 + lane % 4 * 8;
        uint4 a[MT][2], b[NT];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            a[m][0] = load8<X, What>(in.a[m][0], k, k1, in.wide_a);
            a[m][1] = load8<X, What>(in.a[m][1], k, k1, in.wide_a);
        }
#pragma unroll
        for (int n = 0; n < NT; ++n)
            b[n] = load8<X, What == Rows::kAny ? What : Rows::kSame>(in.b[n][0], k, k1, in.wide_b);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const int64_t row = in.row + n * 8 + lane / 4;
            if (Drops && in.dropout.seeds != nullptr && row < in.last) {
                const uint32_t low = kept4(in.dropout, in.group, row, k / 4, in.slot);
                b[n] = select8(b[n], low | kept4(in.dropout, in.group, row, k / 4 + 1, in.slot) << 4);
            }
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                mma<X>(c[m][n], {a[m][0].x, a[m][1].x, a[m][0].y, a[m][1].y}, {b[n].x, b[n].y});
                mma<X>(c[m][n], {a[m][0].z, a[m][1].z, a[m][0].w, a[m][1].w}, {b[n].z, b[n].w});
            }
        }
    }
}

// Adds terms k0..k1-1 in one chain of fmaf for each output.
template <int NT, bool Drops, bool kWide>
__device__ void add_chain(const Operands<float, 1, NT>& in, int64_t k0, int64_t k1, float (&c)[1][NT][4]) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll(!kWide ? 1 : NT == 1 ? 4 : Drops ? 2 : 1)
    for (int64_t k = k0; k < k1; k += 4) {
        const float4 a[2] = {load4<kWide>(in.a[0][0], k, k1), load4<kWide>(in.a[0][1], k, k1)};
        const int terms = kWide || k1 - k >= 4 ? 4 : static_cast<int>(k1 - k);
        float4 b[2 * NT];
#pragma unroll
        for (int i = 0; i < 2 * NT; ++i) b[i] = load4<kWide>(in.b[i / 2][i % 2], k, k1);
#pragma unroll
        for (int i = 0; i < 2 * NT; ++i) {
            const int64_t row = in.row + i / 2 * 8 + lane % 4 * 2 + i % 2;
            uint32_t kept = 0xf;
            if (Drops && in.dropout.seeds != nullptr && row < in.last) {
                kept = kept4(in.dropout, in.group, row, k / 4, in.slot);
            }
#pragma unroll
            for (int d = 0; d < 4; ++d) {
                const float x = kept >> d & 1 ? (&b[i].x)[d] : 0.0f;
                float &low = c[0][i / 2][i % 2], &high = c[0][i / 2][i % 2 + 2];
                if (d < terms) low = __fmaf_rn((&a[0].x)[d], x, low);
                if (d < terms) high = __fmaf_rn((&a[1].x)[d], x, high);
            }
        }
    }
}

template <typename X, int MT, int NT, bool Drops>
__device__ void add_block(const Operands<X, MT, NT>& in, int64_t k0, int64_t k1, float (&c)[MT][NT][4]) {
    if constexpr (kIsFloat<X>) {
        in.what == Rows::kAny ? add_chain<NT, Drops, false>(in, k0, k1, c) : add_chain<NT, Drops, true>(in, k0, k1, c);
    } else {
        const int64_t whole = in.what == Rows::kAny ? k0 : k0 + (k1 - k0) / 32 * 32;
        if (in.what == Rows::kSingle) {
            add_steps<X, MT, NT, Drops, Rows::kSingle>(in, k0, whole, c);
        } else {
            add_steps<X, MT, NT, Drops, Rows::kSame>(in, k0, whole, c);
        }
        add_steps<X, MT, NT, Drops, Rows::kAny>(in, whole, k1, c);
    }
}

// The place of a column in s: slot, rank, and the adapter that the slot names.
struct Place {
    int slot, j;
    int64_t id;
    Adapter adapter;  // no data: the column is dead, or past the last
};

// A slot takes `width` columns: r, or r rounded up to 16 where the columns of a tile must share a mask.
__device__ inline Place place_of(const s3t_shrink_args& args, int64_t group, int column, int width) {
    Place place{column / width, column % width, -1, {nullptr, false}};
    if (place.slot < args.table.slots && place.j < args.pools.rank) {
        place.id = id_of(args.table, group, place.slot);
        place.adapter = adapter_of(args.pools, place.id);
    }
    return place;
}

template <typename X, int MT, int NT, bool Drops>
__device__ Operands<X, MT, NT> operands_of(const s3t_shrink_args& args, const Span& span, int column, int width) {
    const int lane = threadIdx.x % kWarp;
    const int64_t dim = args.pools.dim;
    Operands<X, MT, NT> in{};
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) {
        const Place place = place_of(args, span.group, column + i * 8 + lane / 4, width);
        const Adapter& w = place.adapter;
        in.live = in.live || w.data != nullptr;
        in.a[i / 2][i % 2] = {w.data == nullptr ? nullptr : w.data + place.j * dim * (w.is_float ? 4 : 2), w.is_float};
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int i = 0; i < in.kRows; ++i) {  // a sum on tensor cores takes row l / 4, a chain rows l % 4 * 2 and + 1
            const int64_t t = span.first + n * 8 + (in.kRows == 1 ? lane / 4 : lane % 4 * 2 + i);
            const char* row = static_cast<const char*>(args.u.data) + t * args.u.stride * sizeof(X);
            in.b[n][i] = {t < span.last ? row : nullptr, kIsFloat<X>};
        }
    }
    const int64_t bytes = dim * sizeof(X);
    in.wide_a = aligned16(args.pools.w, bytes) && aligned16(args.pools.w1, bytes);
    in.wide_b = aligned16(args.u.data, args.u.stride * sizeof(X)) && bytes % 16 == 0;
    in.what = rows_of(args.pools, in.wide_a && in.wide_b);
    if (in.what != Rows::kAny) in.stand_in(args.u, span.first);
    in.group = span.group, in.row = span.first, in.last = span.last, in.slot = column / width;
    in.dropout = args.dropout;
    const bool in_table = Drops && in.slot < args.table.slots;
    if (!in_table || !drops(args.dropout, id_of(args.table, span.group, in.slot))) in.dropout.seeds = nullptr;
    return in;
}

template <typename X, int MT, int NT, bool Drops>
__global__ void __launch_bounds__(kThreads, MT* NT == 1 ? 2 : 1) shrink_kernel(s3t_shrink_args args, int width) {
    let_kernel_after_begin();
    constexpr int kColumns = 16 * MT, kOutputs = 8 * NT * kColumns, kMine = (kOutputs + kThreads - 1) / kThreads;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int size = cluster_size(), rank = cluster_rank();
    const Span span = find_span(args.table, args.rows, blockIdx.x / size, 8 * NT);
    if (span.first >= span.last) return;  // for the whole cluster
    const int column = static_cast<int>(blockIdx.y) * kColumns;
    const int64_t dim = args.pools.dim;
    const auto in = operands_of<X, MT, NT, Drops>(args, span, column, width);
    const int blocks = __any_sync(0xffffffff, in.live) ? static_cast<int>((dim + kBlock - 1) / kBlock) : 0;

    auto& parts = shared<Parts<MT, NT>>();
    float total[kMine] = {};
    for (int first = 0; first < blocks; first += kWarps * size) {
        const int64_t k0 = static_cast<int64_t>(first + warp * size + rank) * kBlock;
        if (k0 < dim) {
            const int64_t k1 = k0 + kBlock < dim ? k0 + kBlock : dim;
            float c[MT][NT][4] = {};
            add_block<X, MT, NT, Drops>(in, k0, k1, c);
#pragma unroll
            for (int i = 0; i < MT * NT * 4; ++i) {
                const int m = i / 4 / NT, n = i / 4 % NT, e = i % 4;
                parts.of[warp][n * 8 + lane % 4 * 2 + e % 2][m * 16 + lane / 4 + e / 2 * 8] = c[m][n][e];
            }
        }
        size > 1 ? cluster_sync() : __syncthreads();
        const int count = min(blocks - first, kWarps * size);
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
            const int output = i * kThreads + static_cast<int>(threadIdx.x);
            if (i % size != rank || output >= kOutputs) continue;
            for (int b = 0; b < count; ++b) {
                float* part = &parts.of[b / size][output / kColumns][output % kColumns];
                total[i] = __fadd_rn(total[i], size > 1 ? *in_block(part, b % size) : *part);
            }
        }
        size > 1 ? cluster_sync() : __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < kMine; ++i) {
        const int output = i * kThreads + static_cast<int>(threadIdx.x);
        const int64_t t = span.first + output / kColumns;
        if (i % size != rank || output >= kOutputs || t >= span.last) continue;
        const Place place = place_of(args, span.group, column + output % kColumns, width);
        if (place.slot >= args.table.slots || place.j >= args.pools.rank) continue;
        float value = 0.0f;
        if (place.adapter.data != nullptr) {
            value = __fmul_rn(total[i], args.scales == nullptr ? args.scale : args.scales[place.id]);
        }
        X* s = static_cast<X*>(args.s) + (t * args.table.slots + place.slot) * args.pools.rank;
        s[place.j] = narrow<X>(value);
    }
}

// --- launchers -------------------------------------------------------------------------------------------------------

template <typename X, int MT, int NT, bool Drops>
static cudaError_t launch_tiles(const s3t_shrink_args& args, int width, int device, void* stream) {
    const int64_t tiles = tile_numbers(args.rows, args.table.groups, 8 * NT);
    const int64_t columns = (args.table.slots * width + 16 * MT - 1) / (16 * MT);
    if (columns > 65535 || tiles > (1 << 27)) return cudaErrorInvalidValue;
    unsigned cluster = 1;
    if (architecture(device) >= 900) {
        const int64_t processors = attribute(device, cudaDevAttrMultiProcessorCount);
        const int64_t blocks = (args.pools.dim + kBlock - 1) / kBlock;
        while (cluster < 8 && tiles * columns * cluster < processors && cluster * 2 <= blocks) cluster *= 2;
    }
    const dim3 grid(static_cast<unsigned>(tiles * cluster), static_cast<unsigned>(columns));
    return launch({grid, dim3(kThreads), sizeof(Parts<MT, NT>), stream, cluster}, shrink_kernel<X, MT, NT, Drops>, args,
                  width);
}

// The tile follows the sizes; no bit of the result follows the tile.
template <typename X>
static cudaError_t launch_type(const s3t_shrink_args& args, int device, void* stream) {
    const int rank = static_cast<int>(args.pools.rank);
    if (args.dropout.seeds != nullptr) {
        return launch_tiles<X, 1, 4, true>(args, (rank + 15) / 16 * 16, device, stream);
    }
    if (args.rows <= 64) return launch_tiles<X, 1, 1, false>(args, rank, device, stream);
    if constexpr (kIsFloat<X>) {
        return launch_tiles<X, 1, 4, false>(args, rank, device, stream);
    } else {
        if (args.table.slots * rank <= 16) return launch_tiles<X, 1, 8, false>(args, rank, device, stream);
        return launch_tiles<X, 4, 4, false>(args, rank, device, stream);
    }
}

}  // namespace s3t::cuda

int32_t s3t_shrink_cuda(const s3t_shrink_args* args, int32_t device, void* stream) {
    using namespace s3t::cuda;
    if (args->rows == 0 || args->table.slots * args->pools.rank == 0) return S3T_OK;
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return status_of(guard.status());
    return with_type(args->u.type, [&](auto zero) { return launch_type<decltype(zero)>(*args, device, stream); });
}

const char* s3t_cuda_error(int32_t status) {
    return cudaGetErrorString(static_cast<cudaError_t>(status - S3T_CUDA_ERROR));
}
