// y[t] = sum_k x[t,k] W[o,k] + sum_p sum_j s[t,p,j] w[n,j,o] + bias[o], or with W transposed; fp16 and bf16, one
// rounding. x (T,K), W (O,K), s (T,P,r), w (N,r,O). A block of 8 warps owns 16 MT outputs of 8 NT rows; mma.m16n8k16
// with W as its A, of which 8 rows of x cost no more than one. Order of a sum: terms in chunks of 64, chunk c belongs
// to share c mod 8; a share adds its chunks in ascending order, each 32 of their terms as two steps of 16; the 8 shares
// are added in order; then each live slot, an accumulator of its own in steps of 16 up to rank 128; then the bias. T, G
// and the size of the tile are not in it. Memory bound up to T = 64: W passes once, 96, 128, 64 KB (T <= 16, 32, 64) in
// flight a multiprocessor of sm_90; x comes from L2, for T > 32 on sm_90 once for the two blocks of a cluster, which
// take half of K each. Floor on H100 at 3.0 TB/s: 4096 x 4096 11.2 us (33.6 MB), 4096 x 14336 39 us; not measured.
#pragma once
#include "linear.cuh"

namespace s3t::cuda::linear {

constexpr int kChunk = 64;   // terms: 128 bytes, a whole line of each row
constexpr int kPiece = 128;  // ranks of a slot that are summed at a time

// Eight values, zero from the `valid`-th on; wide: aligned, and all of them or none are there.
template <bool kWide, typename X>
__device__ inline uint4 load8(const X* from, int64_t valid) {
    if (valid <= 0) return make_uint4(0, 0, 0, 0);
    if constexpr (kWide) {
        return *reinterpret_cast<const uint4*>(from);
    } else {
        return load8_singly<X>(reinterpret_cast<const char*>(from), false, 0, valid);
    }
}

template <bool kWide, typename X>
__device__ inline void copy8(uint4* to, const X* from, int64_t valid) {
    if constexpr (kWide) {
        copy_async(to, from, valid > 0 ? 16 : 0);
    } else {
        *to = load8<false>(from, valid);
    }
}

__device__ inline uint32_t word(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

template <typename X, int MT, int NT, int kSplit, bool kTransposed, bool kWide>
struct Half {
    static constexpr int kRows = 8 * NT, kCols = 16 * MT, kPitch = kCols + 4, kUnits = 4 * MT;
    static constexpr int kStages = MT == 1 ? 4 : 3, kShares = kWarps / kSplit, kAhead = NT <= 4 ? 2 : 4;
    static constexpr int kRing = kWarps * kStages * kUnits * kWarp, kPlane = kRows * kPitch;
    static constexpr int kCopy = kRing - kWarps * kPlane / 4;  // room for s beside the planes, in 16 bytes
    static_assert(kCopy * 8 >= kRows * (kPiece + 8));

    struct Shared {
        union {
            uint4 ring[kWarps][kStages][kUnits * kWarp];
            struct {
                float planes[kWarps][kPlane];
                uint4 s[kCopy];
            };
        };
        Runs<kRows> runs;
    };

    const s3t_linear_args& args;
    Shared& shared;
    const X* s;              // (rows, P, r) of this tile
    const X* lines[2 * MT];  // rows of a plain weight that this lane reads
    int64_t t0, c0;
    int rows, rank, lane, warp, i, q;  // rank: in the cluster; i, q: the lane's row and quarter of a fragment

    __device__ explicit Half(const s3t_linear_args& args)
        : args(args),
          shared(cuda::shared<Shared>()),
          rank(blockIdx.x % kSplit),
          lane(threadIdx.x % kWarp),
          warp(threadIdx.x / kWarp),
          i(lane / 4),
          q(lane % 4) {
        const int64_t tiles = (args.rows + kRows - 1) / kRows, pair = blockIdx.x / kSplit;
        t0 = pair % tiles * kRows;
        c0 = (pair / tiles * kSplit + rank) * kCols;
        rows = static_cast<int>(min(static_cast<int64_t>(kRows), args.rows - t0));
        s = static_cast<const X*>(args.s) + t0 * args.table.slots * args.pools.rank;
#pragma unroll
        for (int m = 0; m < 2 * MT; ++m) {
            const int64_t output = min(base_column() + m * 8 + i, args.outer - 1);
            lines[m] = static_cast<const X*>(args.weight) + output * args.inner;
        }
    }

    // The base product of this warp is for the columns of block warp % kSplit of its cluster.
    __device__ int64_t base_column() const { return c0 + (warp % kSplit - rank) * kCols; }

    // Where a row of the transposed tile keeps its unit: rows that one ldmatrix reads lie in different banks.
    __device__ static int place(int row, int unit) { return row * 2 * MT + (unit ^ (row >> 3 & (2 * MT - 1))); }

    // Sends for a chunk of the weight. Plain: a lane sends for 16 bytes of k of the rows whose fragments it holds, so
    // that it alone writes and reads them; the order of terms in a step follows from that, for x too.
    __device__ void fetch(int stage, int64_t chunk) const {
        uint4* to = shared.ring[warp][stage];
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            if constexpr (kTransposed) {
                const int row = (u * kWarp + lane) / (2 * MT), unit = (u * kWarp + lane) % (2 * MT);
                const int64_t term = chunk * kChunk + row, column = base_column() + unit * 8;
                const X* weight = static_cast<const X*>(args.weight);
                const bool exists = term < args.inner && column < args.outer;
                copy8<kWide>(to + place(row, unit), weight + (exists ? term * args.outer + column : 0),
                             exists ? args.outer - column : 0);
            } else {
                const int64_t term = chunk * kChunk + u % 2 * 32 + q * 8;
                copy8<kWide>(to + u * kWarp + lane, lines[u / 2] + (term < args.inner ? term : 0), args.inner - term);
            }
        }
    }

    // Rows past the last are the last one again: their sums go nowhere.
    __device__ void load_rows(uint4 (&x)[2][NT], int64_t chunk) const {
        const int64_t term = chunk * kChunk + q * 8;
        const X* from = static_cast<const X*>(args.x.data) + t0 * args.x.stride + term;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const X* row = from + min(n * 8 + i, rows - 1) * args.x.stride;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                x[half][n] = load8<kWide>(row + half * 32, args.inner - term - half * 32);
            }
        }
    }

    __device__ void load_weight(uint32_t (&a)[2][MT][4], int stage, int half) const {
        const uint4* from = shared.ring[warp][stage];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            if constexpr (kTransposed) {
                const int matrix = lane / 8, row = half * 32 + lane % 8 / 2 * 8 + lane % 2 + matrix / 2 * 2;
                load_matrices<true>(a[0][m], from + place(row, 2 * m + matrix % 2));
                load_matrices<true>(a[1][m], from + place(row + 4, 2 * m + matrix % 2));
            } else {
                const uint4 low = from[(4 * m + half) * kWarp + lane], high = from[(4 * m + 2 + half) * kWarp + lane];
#pragma unroll
                for (int step = 0; step < 2; ++step) {
                    a[step][m][0] = word(low, 2 * step), a[step][m][1] = word(high, 2 * step);
                    a[step][m][2] = word(low, 2 * step + 1), a[step][m][3] = word(high, 2 * step + 1);
                }
            }
        }
    }

    __device__ void multiply(float (&sum)[MT][NT][4], const uint4 (&x)[2][NT], int stage) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t a[2][MT][4];
            load_weight(a, stage, half);
#pragma unroll
            for (int step = 0; step < 2; ++step) {
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    const uint32_t b[2] = {word(x[half][n], 2 * step), word(x[half][n], 2 * step + 1)};
#pragma unroll
                    for (int m = 0; m < MT; ++m) mma<X>(sum[m][n], a[step][m], b);
                }
            }
        }
    }

    // Leaves the rows first..end-1 of a sum in a plane.
    __device__ void store(float* plane, const float (&sum)[4], int m, int n, int first, int end) const {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int row = n * 8 + q * 2 + e % 2;
            if (row >= first && row < end) plane[row * kPitch + m * 16 + e / 2 * 8 + i] = sum[e];
        }
    }

    // The share of this warp, through a ring that it alone uses.
    __device__ void base() const {
        const int64_t chunks = (args.inner + kChunk - 1) / kChunk;
        int64_t chunk = rank * kShares + warp / kSplit;
        float sum[MT][NT][4] = {};
#pragma unroll
        for (int stage = 0; stage < kStages - 1; ++stage) {
            if (chunk + stage * kWarps < chunks) fetch(stage, chunk + stage * kWarps);
            commit_copies();
        }
        shared.runs.find(args.table, t0, rows);
        prefetch_adapters(args, shared.runs, c0);
        for (int stage = 0; chunk < chunks; chunk += kWarps, stage = stage == kStages - 1 ? 0 : stage + 1) {
            uint4 x[2][NT];
            load_rows(x, chunk);
            wait_copies<kStages - 2>();
            __syncwarp();  // transposed, lanes read what others fetched
            const int64_t next = chunk + (kStages - 1) * kWarps;
            if (next < chunks) fetch(stage == 0 ? kStages - 1 : stage - 1, next);
            commit_copies();
            multiply(sum, x, stage);
        }
        wait_copies<0>();
        __syncthreads();  // the planes lie over the ring
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int n = 0; n < NT; ++n) store(shared.planes[warp], sum[m][n], m, n, 0, kRows);
        }
    }

    // Adds the shares in order; share k lies in block k / kShares of the cluster.
    __device__ void add_shares(Outputs& outputs) const {
        kSplit > 1 ? cluster_sync() : __syncthreads();
        for (int k = 0; outputs.used && k < kWarps; ++k) {
            float* plane = shared.planes[k % kShares * kSplit + rank] + outputs.row * kPitch + outputs.column;
            outputs.add(kSplit > 1 ? in_block(plane, k / kShares) : plane);
        }
        __syncwarp();  // the barrier of a cluster wants whole warps
        kSplit > 1 ? cluster_sync() : __syncthreads();
    }

    // Ranks of a piece in shared memory: whole steps; and the bytes of a row, which put rows in different banks.
    __device__ int width() const { return min(kPiece, static_cast<int>((args.pools.rank + 15) / 16 * 16)); }
    __device__ int pitch() const { return width() + 8; }

    // Planes that fit at a time, with s beside them.
    __device__ int most() const { return min(kWarps, kCopy * 8 / (kRows * pitch())); }

    // Brings s of `count` pieces to shared memory, zero past the last rank.
    __device__ void copy_s(const Pieces<kPiece>& pieces, int64_t v0, int count) const {
        const int units = width() / 8;
        const bool aligned = aligned16(args.s, args.pools.rank * 2);
        for (int at = threadIdx.x; at < rows * count * units; at += kThreads) {
            const int unit = at % units, plane = at / units % count, row = at / units / count;
            const int j = pieces.begin(v0 + plane) + unit * 8, valid = pieces.rank - j;
            const X* from = s + (row * args.table.slots + pieces.slot(v0 + plane)) * pieces.rank + j;
            uint4& to = shared.s[(plane * kRows + row) * pitch() / 8 + unit];
            to = aligned && valid >= 8 ? load8<true>(from, valid) : load8<false>(from, valid);
        }
    }

    template <typename W>
    __device__ void load_values(uint32_t (&raw)[8], const W* w, int j, int j1, int64_t column) const {
        const W* from = w + (j + q * 2) * args.outer + column;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int k = e % 2 + e / 4 * 8, c = e / 2 % 2 * 8;
            raw[e] = j + q * 2 + k < j1 && column + c < args.outer ? from[k * args.outer + c] : 0;
        }
    }

    // Reads a fragment of an adapter as it lies, to be rounded by `pair`: loads that nothing waits for yet.
    __device__ void load_adapter(uint32_t (&raw)[8], const Piece& piece, int m, int j) const {
        const int64_t column = c0 + m * 16 + i;
        if (piece.w.is_float) {
            load_values(raw, reinterpret_cast<const uint32_t*>(piece.w.data), j, piece.j1, column);
        } else {
            load_values(raw, reinterpret_cast<const uint16_t*>(piece.w.data), j, piece.j1, column);
        }
    }

    __device__ static uint32_t pair(const uint32_t* raw, bool is_float) {
        return is_float ? pack2<X>(__uint_as_float(raw[0]), __uint_as_float(raw[1])) : raw[0] | raw[1] << 16;
    }

    // Rows of other groups pass through the tensor core too, each in a column of its own that is not stored.
    __device__ void multiply_piece(const Piece& piece, uint32_t (&raw)[8], int m) const {
        if (piece.w.data == nullptr) return;
        float sum[NT][4] = {};
        const uint32_t* from = reinterpret_cast<const uint32_t*>(shared.s) + piece.plane * kRows * pitch() / 2;
        for (int j = piece.j0; j < piece.j1; j += 16) {
            if (j > piece.j0) load_adapter(raw, piece, m, j);
            uint32_t a[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) a[e] = pair(raw + 2 * e, piece.w.is_float);
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                if (n * 8 + 8 <= piece.first || n * 8 >= piece.end) continue;
                const uint32_t* at = from + ((n * 8 + i) * pitch() + j - piece.j0) / 2 + q;
                const uint32_t b[2] = {at[0], at[4]};
                mma<X>(sum[n], a, b);
            }
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) store(shared.planes[piece.plane], sum[n], m, n, piece.first, piece.end);
    }

    // The pieces of `count` planes, dealt to the warps kAhead at a time so that their loads overlap.
    __device__ void slots(int64_t v0, int count) const {
        const Pieces<kPiece> pieces(args);
        copy_s(pieces, v0, count);
        __syncthreads();
        const int m = warp % MT;
        int run = 0, plane = warp / MT;
        while (run < shared.runs.count) {
            Piece piece[kAhead];
            uint32_t raw[kAhead][8];
#pragma unroll
            for (int a = 0; a < kAhead; ++a, plane += kWarps / MT) {
                for (; plane >= count; plane -= count) ++run;
                piece[a].w.data = nullptr;
                if (run >= shared.runs.count) continue;
                piece[a] = pieces.at(args, shared.runs, run, v0 + plane, plane);
                if (piece[a].w.data != nullptr) load_adapter(raw[a], piece[a], m, piece[a].j0);
            }
#pragma unroll
            for (int a = 0; a < kAhead; ++a) multiply_piece(piece[a], raw[a], m);
        }
    }
};

template <typename X, int MT, int NT, int kSplit, bool kTransposed, bool kWide>
__global__ void __launch_bounds__(kThreads, NT <= 4 ? 2 : 1) half_kernel(const __grid_constant__ s3t_linear_args args) {
    using Tile = Half<X, MT, NT, kSplit, kTransposed, kWide>;
    Tile tile(args);
    tile.base();
    Outputs outputs(Tile::kCols, tile.rows);
    tile.add_shares(outputs);
    wait_for_kernel_before();
    add_slots<kPiece, Tile::kPitch>(args, tile.shared.runs.group, tile.shared.planes, outputs, tile.t0, tile.c0,
                                    tile.most(), [&](int64_t v0, int count) { tile.slots(v0, count); });
    outputs.write<X>(args, tile.t0 + outputs.row, tile.c0 + outputs.column);
}

template <typename X, int MT, int NT, int kSplit = 1, bool kTransposed = false, bool kWide = true>
cudaError_t launch_half(const s3t_linear_args& args, void* stream, bool overlap) {
    using Tile = Half<X, MT, NT, kSplit, kTransposed, kWide>;
    const int64_t across = (args.outer + Tile::kCols * kSplit - 1) / (Tile::kCols * kSplit);
    const int64_t blocks = (args.rows + Tile::kRows - 1) / Tile::kRows * across * kSplit;
    if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
    const Launch how{
        dim3(static_cast<unsigned>(blocks)), dim3(kThreads), sizeof(typename Tile::Shared), stream, kSplit, overlap};
    return launch(how, half_kernel<X, MT, NT, kSplit, kTransposed, kWide>, args);
}

}  // namespace s3t::cuda::linear
