// The fp32 form of linear_half.cuh on CUDA cores, with the bits of the CPU kernels: blocks of 256 terms, in each one
// chain of fused multiply-adds from +0, added in order; then the slots' blocks, then the bias. A thread block owns 32
// outputs, one a lane, of kRows rows; a warp sums every eighth block of 256 and has 4 KB of W under way. Floor on H100
// at 3.0 TB/s: 4096 x 4096 22 us (67 MB); not measured. x comes through L1: 512 bytes to a warp's registers for each
// row and four terms, at 128 bytes a cycle as long as W takes at about 8 rows; tiles of 16 are bound by that, not by
// memory.
#pragma once
#include "linear.cuh"

namespace s3t::cuda::linear {

template <int kRows, bool kTransposed, bool kWide>
struct Single {
    static constexpr int kCols = 32, kPitch = kCols + 4, kSteps = kBlock / kWarp, kStages = 2;
    static constexpr int kQuads = kWide && kRows <= 8 ? 2 : 1;  // fours of terms for which x is asked at a time

    struct Shared {
        float4 ring[kWarps][kStages][kWarp * kSteps];
        float planes[kWarps][kRows * kPitch];
        Runs<kRows> runs;
    };

    const s3t_linear_args& args;
    Shared& shared;
    int64_t t0, c0;
    int rows, lane, warp;
    const float* lines[kRows];  // rows of x; past the last it is the last one again: their sums go nowhere

    __device__ explicit Single(const s3t_linear_args& args)
        : args(args), shared(cuda::shared<Shared>()), lane(threadIdx.x % kWarp), warp(threadIdx.x / kWarp) {
        const int64_t tiles = (args.rows + kRows - 1) / kRows;
        t0 = blockIdx.x % tiles * kRows;
        c0 = blockIdx.x / tiles * kCols;
        rows = static_cast<int>(min(static_cast<int64_t>(kRows), args.rows - t0));
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            lines[row] = static_cast<const float*>(args.x.data) + (t0 + min(row, rows - 1)) * args.x.stride;
        }
    }

    // First term of the i-th 32 that this warp reads: eight of them make a block.
    __device__ int64_t term_of(int64_t i) const { return (i / kSteps * kWarps + warp) * kBlock + i % kSteps * kWarp; }

    // Where a row of the tile keeps four values: a column of them lies in different banks.
    __device__ static int place(int row, int unit) { return row * 8 + (unit ^ (row & 7)); }

    // Sends for 32 x 32 values of the weight; rows of the tile are outputs, transposed they are terms.
    __device__ void fetch(int64_t i) const {
        const float* weight = static_cast<const float*>(args.weight);
        const int64_t term = term_of(i);
        if (term >= args.inner) return;
#pragma unroll
        for (int u = 0; u < 8; ++u) {
            const int row = (u * kWarp + lane) / 8, unit = lane % 8;
            const float* from;
            int64_t valid;
            if constexpr (kTransposed) {
                from = weight + (term + row) * args.outer + c0 + unit * 4;
                valid = term + row < args.inner ? args.outer - c0 - unit * 4 : 0;
            } else {
                from = weight + min(c0 + row, args.outer - 1) * args.inner + term + unit * 4;
                valid = args.inner - term - unit * 4;
            }
            float4* to = shared.ring[warp][i % kStages] + place(row, unit);
            if constexpr (kWide) {
                copy_async(to, valid > 0 ? from : weight,
                           static_cast<int>(max(min(valid, int64_t{4}), int64_t{0})) * 4);
            } else {
                *to = load4<false>({reinterpret_cast<const char*>(from), true}, 0, valid);
            }
        }
    }

    __device__ float4 load_weight(int64_t i, int quad) const {
        const float4* tile = shared.ring[warp][i % kStages];
        if constexpr (!kTransposed) {
            return tile[place(lane, quad)];
        } else {
            float w[4];
#pragma unroll
            for (int k = 0; k < 4; ++k)
                w[k] = reinterpret_cast<const float*>(tile + place(quad * 4 + k, lane / 4))[lane % 4];
            return make_float4(w[0], w[1], w[2], w[3]);
        }
    }

    // Adds fours of terms. All of x is asked for before the first product, so that its loads overlap. Past the last
    // term both factors are zero, which leaves a chain's value as it is.
    template <int kCount>
    __device__ void multiply_quads(float (&chain)[kRows], int64_t i, int first) const {
        const int64_t term = term_of(i) + first * 4;
        float4 x[kCount][kRows];
#pragma unroll
        for (int quad = 0; quad < kCount; ++quad) {
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
                const Row from{reinterpret_cast<const char*>(lines[row]), true};
                x[quad][row] = load4<kWide>(from, term + quad * 4, args.inner);
            }
        }
#pragma unroll
        for (int quad = 0; quad < kCount; ++quad) {
            const float4 w = load_weight(i, first + quad);
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
                chain[row] = __fmaf_rn(x[quad][row].x, w.x, chain[row]);
                chain[row] = __fmaf_rn(x[quad][row].y, w.y, chain[row]);
                chain[row] = __fmaf_rn(x[quad][row].z, w.z, chain[row]);
                chain[row] = __fmaf_rn(x[quad][row].w, w.w, chain[row]);
            }
        }
    }

    __device__ void multiply(float (&chain)[kRows], int64_t i) const {
        const int64_t left = args.inner - term_of(i);
        if (left >= kWarp) {
            for (int quad = 0; quad < 8; quad += kQuads) multiply_quads<kQuads>(chain, i, quad);
        } else {
            for (int quad = 0; quad * 4 < left; ++quad) multiply_quads<1>(chain, i, quad);
        }
    }

    // Eight blocks of 256 at a time, one a warp, are added in order; past the last they are +0.
    __device__ void base(Outputs& outputs) const {
        const int64_t blocks = (args.inner + kBlock - 1) / kBlock;
        fetch(0);
        commit_copies();
        shared.runs.find(args.table, t0, rows);
        prefetch_adapters(args, shared.runs, c0);
        int64_t i = 0;
        for (int64_t block = 0; block < blocks; block += kWarps) {
            float chain[kRows] = {};
            for (int step = 0; step < kSteps; ++step, ++i) {
                __syncwarp();  // the last tile has been read
                fetch(i + 1);
                commit_copies();
                wait_copies<1>();
                __syncwarp();
                multiply(chain, i);
            }
#pragma unroll
            for (int row = 0; row < kRows; ++row) shared.planes[warp][row * kPitch + lane] = chain[row];
            __syncthreads();
            for (int w = 0; outputs.used && w < kWarps; ++w) {
                outputs.add(shared.planes[w] + outputs.row * kPitch + outputs.column);
            }
            __syncthreads();
        }
        wait_copies<0>();
    }

    __device__ void slots(int64_t v0, int count) const {
        const Pieces<kBlock> pieces(args);
        const int64_t column = c0 + lane;
        for (int at = warp; at < shared.runs.count * count; at += kWarps) {
            const int64_t v = v0 + at % count;
            const Piece piece = pieces.at(args, shared.runs, at / count, v, at % count);
            if (piece.w.data == nullptr || column >= args.outer) continue;
            const float* w = reinterpret_cast<const float*>(piece.w.data) + column;
            for (int row = piece.first; row < piece.end; ++row) {
                const int64_t from = ((t0 + row) * args.table.slots + pieces.slot(v)) * pieces.rank;
                const float* s = static_cast<const float*>(args.s) + from;
                float chain = 0.0f;
                for (int j = piece.j0; j < piece.j1; ++j) chain = __fmaf_rn(s[j], w[j * args.outer], chain);
                shared.planes[piece.plane][row * kPitch + lane] = chain;
            }
        }
    }
};

template <int kRows, bool kTransposed, bool kWide>
__global__ void __launch_bounds__(kThreads, kRows > 8 ? 1 : 2)
    single_kernel(const __grid_constant__ s3t_linear_args args) {
    using Tile = Single<kRows, kTransposed, kWide>;
    Tile tile(args);
    Outputs outputs(Tile::kCols, tile.rows);
    tile.base(outputs);
    wait_for_kernel_before();
    add_slots<kBlock, Tile::kPitch>(args, tile.shared.runs.group, tile.shared.planes, outputs, tile.t0, tile.c0, kWarps,
                                    [&](int64_t v0, int count) { tile.slots(v0, count); });
    outputs.write<float>(args, tile.t0 + outputs.row, tile.c0 + outputs.column);
}

template <int kRows, bool kTransposed, bool kWide>
cudaError_t launch_single(const s3t_linear_args& args, void* stream, bool overlap) {
    using Tile = Single<kRows, kTransposed, kWide>;
    const int64_t blocks = (args.rows + kRows - 1) / kRows * ((args.outer + Tile::kCols - 1) / Tile::kCols);
    if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
    const Launch how{
        dim3(static_cast<unsigned>(blocks)), dim3(kThreads), sizeof(typename Tile::Shared), stream, 1, overlap};
    return launch(how, single_kernel<kRows, kTransposed, kWide>, args);
}

}  // namespace s3t::cuda::linear
