// The fp32 form of linear_half.cuh on CUDA cores, with the bits of the CPU kernels: blocks of 256 terms, in each one
// chain of fused multiply-adds from +0, added in order; then the slots' blocks, then the bias. A thread block owns 32
// outputs, one a lane, of kRows rows; a warp sums every eighth block of 256. Memory bound below about 16 rows: 32 KB of
// W in flight a multiprocessor; 4096 x 4096: 67 MB, 22 us on H100 at 3.0 TB/s. From there on by reading shared memory.
#pragma once
#include "linear.cuh"

namespace s3t::cuda::linear {

template <int kRows, bool kTransposed>
struct Single {
    static constexpr int kCols = 32, kPitch = kCols + 4, kSteps = kBlock / kWarp, kStages = 2;

    struct Shared {
        float4 ring[kWarps][kStages][kWarp * kSteps];
        float planes[kWarps][kRows * kPitch];
        Runs<kRows> runs;
    };

    const s3t_linear_args& args;
    Shared& shared;
    int64_t t0, c0;
    int rows, lane, warp;
    bool wide_x, wide_w;

    __device__ explicit Single(const s3t_linear_args& args)
        : args(args), shared(cuda::shared<Shared>()), lane(threadIdx.x % kWarp), warp(threadIdx.x / kWarp) {
        const int64_t tiles = (args.rows + kRows - 1) / kRows;
        t0 = blockIdx.x % tiles * kRows;
        c0 = blockIdx.x / tiles * kCols;
        rows = static_cast<int>(min(static_cast<int64_t>(kRows), args.rows - t0));
        wide_x = args.inner % 4 == 0 && aligned16(args.x.data, args.x.stride * 4);
        wide_w = aligned16(args.weight, (kTransposed ? args.outer : args.inner) * 4);
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
            if (wide_w) {
                copy_async(to, valid > 0 ? from : weight,
                           static_cast<int>(max(min(valid, int64_t{4}), int64_t{0})) * 4);
            } else {
                *to = load4({reinterpret_cast<const char*>(from), true}, 0, valid, false);
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

    // Past the last term both factors are zero, which leaves a chain's value as it is.
    __device__ void multiply(float (&chain)[kRows], int64_t i) const {
        const float* x = static_cast<const float*>(args.x.data);
        for (int quad = 0; quad < 8; ++quad) {
            const int64_t term = term_of(i) + quad * 4;
            if (term >= args.inner) return;
            const float4 w = load_weight(i, quad);
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
                const float* from = x + (t0 + min(row, rows - 1)) * args.x.stride;
                const float4 v = load4({reinterpret_cast<const char*>(from), true}, term, args.inner, wide_x);
                chain[row] = __fmaf_rn(v.x, w.x, chain[row]);
                chain[row] = __fmaf_rn(v.y, w.y, chain[row]);
                chain[row] = __fmaf_rn(v.z, w.z, chain[row]);
                chain[row] = __fmaf_rn(v.w, w.w, chain[row]);
            }
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

template <int kRows, bool kTransposed>
__global__ void __launch_bounds__(kThreads, kRows > 8 ? 1 : 2)
    single_kernel(const __grid_constant__ s3t_linear_args args) {
    using Tile = Single<kRows, kTransposed>;
    Tile tile(args);
    Outputs outputs(Tile::kCols, tile.rows);
    tile.base(outputs);
    wait_for_kernel_before();
    add_slots<kBlock, Tile::kPitch>(args, tile.shared.runs.group, tile.shared.planes, outputs, tile.t0, tile.c0, kWarps,
                                    [&](int64_t v0, int count) { tile.slots(v0, count); });
    outputs.write<float>(args, tile.t0 + outputs.row, tile.c0 + outputs.column);
}

template <int kRows, bool kTransposed>
cudaError_t launch_single(const s3t_linear_args& args, void* stream, bool overlap) {
    using Tile = Single<kRows, kTransposed>;
    const int64_t blocks = (args.rows + kRows - 1) / kRows * ((args.outer + Tile::kCols - 1) / Tile::kCols);
    if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
    const Launch how{
        dim3(static_cast<unsigned>(blocks)), dim3(kThreads), sizeof(typename Tile::Shared), stream, 1, overlap};
    return launch(how, single_kernel<kRows, kTransposed>, args);
}

}  // namespace s3t::cuda::linear
