// What the kernels of linear.cu share: the runs of groups in a tile of rows, the sums that warps leave in shared memory
// (planes), and how a thread adds these up in their fixed order, drops what dropout says, and writes.
#pragma once
#include "rows.cuh"

namespace s3t::cuda::linear {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kOutputs = 8;  // outputs that one thread adds up: one store of 16 bytes in a half type

// Rows of a tile in runs of one group each; a run is what shares adapters.
template <int kRows>
struct Runs {
    static constexpr int kStaged = 256;
    int32_t group[kRows];
    int32_t first[kRows + 1];  // of each run; after the last, the number of rows
    int32_t count;
    int32_t offsets[kStaged];  // of the table, where they fit: a search in global memory waits for it at every step

    __device__ void find(s3t_table table, int64_t t0, int rows) {
        const int thread = threadIdx.x;
        if (table.offsets != nullptr && table.groups < kStaged) {
            for (int g = thread; g <= table.groups; g += kThreads) offsets[g] = table.offsets[g];
            table.offsets = offsets;
        }
        __syncthreads();
        if (thread < rows) group[thread] = static_cast<int32_t>(group_of(table, t0 + thread));
        __syncthreads();
        if (thread < kWarp) {
            int found = 0;
            for (int row = thread; row - thread < kRows; row += kWarp) {
                const bool begins = row < rows && (row == 0 || group[row] != group[row - 1]);
                const unsigned all = __ballot_sync(0xffffffff, begins);
                if (begins) first[found + __popc(all & ((1u << thread) - 1))] = row;
                found += __popc(all);
            }
            if (thread == 0) first[found] = rows, count = found;
        }
        __syncthreads();
    }
};

__device__ inline void prefetch(const char* address) {
#ifdef S3T_EMULATE
    (void)*const_cast<const volatile char*>(address);
#else
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// Asks for the columns from c0 on of every adapter that the tile will need, while the base product streams.
template <int kRows>
__device__ void prefetch_adapters(const s3t_linear_args& args, const Runs<kRows>& runs, int64_t c0) {
    const int slots = static_cast<int>(args.table.slots);
    for (int i = threadIdx.x / kWarp; i < runs.count * slots; i += kWarps) {
        const Adapter w = adapter_of(args.pools, id_of(args.table, runs.group[runs.first[i / slots]], i % slots));
        if (w.data == nullptr || c0 >= args.outer) continue;
        for (int64_t j = threadIdx.x % kWarp; j < args.pools.rank; j += kWarp) {
            prefetch(w.data + (j * args.pools.dim + c0) * (w.is_float ? 4 : 2));
        }
    }
}

// A share of the slots' work: ranks j0..j1-1 of one slot, for the rows first..end-1 of the tile, which are one group's.
struct Piece {
    Adapter w;  // no data where dead
    int first, end, plane, j0, j1;
};

// The pieces of a group, P * ceil(r / kLength) of them in the order in which they are added.
template <int kLength>
struct Pieces {
    int rank, each;  // pieces of a slot
    int64_t all;

    __device__ explicit Pieces(const s3t_linear_args& args)
        : rank(static_cast<int>(args.pools.rank)), each((rank + kLength - 1) / kLength), all(args.table.slots * each) {}

    __device__ int slot(int64_t v) const { return each == 1 ? static_cast<int>(v) : static_cast<int>(v) / each; }
    __device__ int begin(int64_t v) const { return each == 1 ? 0 : static_cast<int>(v) % each * kLength; }

    // Piece v of a run, which goes to a plane.
    template <int kRows>
    __device__ Piece at(const s3t_linear_args& args, const Runs<kRows>& runs, int run, int64_t v, int plane) const {
        const int first = runs.first[run], j0 = begin(v);
        const int64_t id = id_of(args.table, runs.group[first], slot(v));
        return {adapter_of(args.pools, id), first, runs.first[run + 1], plane, j0, min(j0 + kLength, rank)};
    }
};

// Outputs column..column+7 of a row of the tile.
struct Outputs {
    int row, column;
    bool used;
    float total[kOutputs] = {};

    __device__ Outputs(int columns, int rows)
        : row(static_cast<int>(threadIdx.x) / (columns / kOutputs)),
          column(static_cast<int>(threadIdx.x) % (columns / kOutputs) * kOutputs),
          used(row < rows) {}

    __device__ void add(const float* plane) { add_to(total, plane); }

    __device__ static void add_to(float (&sum)[kOutputs], const float* plane) {
#pragma unroll
        for (int i = 0; i < kOutputs; i += 4) {
            const float4 v = *reinterpret_cast<const float4*>(plane + i);
            sum[i] = __fadd_rn(sum[i], v.x), sum[i + 1] = __fadd_rn(sum[i + 1], v.y);
            sum[i + 2] = __fadd_rn(sum[i + 2], v.z), sum[i + 3] = __fadd_rn(sum[i + 3], v.w);
        }
    }

    // Adds what dropout keeps of a slot's sum: selected, so that what is dropped may be anything. t, c: as below.
    __device__ void add_kept(const float (&sum)[kOutputs], const s3t_dropout& dropout, int64_t group, int64_t t,
                             int64_t c, int64_t slot) {
#pragma unroll
        for (int i = 0; i < kOutputs; i += 4) {
            const uint32_t kept = kept4(dropout, group, t, (c + i) / 4, slot);
#pragma unroll
            for (int j = 0; j < 4; ++j) total[i + j] = __fadd_rn(total[i + j], kept >> j & 1 ? sum[i + j] : 0.0f);
        }
    }

    // Adds the bias, rounds once and stores; t, c: the row and the first column in y.
    template <typename X>
    __device__ void write(const s3t_linear_args& args, int64_t t, int64_t c) const {
        if (!used) return;
        alignas(16) X values[kOutputs];
        const X* bias = static_cast<const X*>(args.bias);
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
            const bool biased = bias != nullptr && c + i < args.outer;
            values[i] = narrow<X>(biased ? __fadd_rn(total[i], widen(bias[c + i])) : total[i]);
        }
        X* to = static_cast<X*>(args.y.data) + t * args.y.stride + c;
        if (aligned16(args.y.data, args.y.stride * sizeof(X)) && c + kOutputs <= args.outer) {
#pragma unroll
            for (int i = 0; i < static_cast<int>(sizeof values / 16); ++i) {
                reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(values)[i];
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
            if (c + i < args.outer) to[i] = values[i];
        }
    }
};

// Adds the slots, which come last and in their order: work(v0, count) leaves piece v0 + i of every row in plane i.
template <int kLength, int kPitch, typename Planes, typename Work>
__device__ void add_slots(const s3t_linear_args& args, const int32_t* groups, const Planes& planes, Outputs& outputs,
                          int64_t t0, int64_t c0, int most, Work work) {
    const s3t_dropout& dropout = args.dropout;
    const Pieces<kLength> pieces(args);
    float apart[kOutputs] = {};  // the sum of a slot under dropout
    for (int64_t v0 = 0; v0 < pieces.all; v0 += most) {
        const int count = static_cast<int>(min(static_cast<int64_t>(most), pieces.all - v0));
        work(v0, count);
        __syncthreads();
        for (int i = 0; outputs.used && i < count; ++i) {
            const int64_t slot = pieces.slot(v0 + i), group = groups[outputs.row];
            const int64_t id = id_of(args.table, group, slot);
            if (adapter_of(args.pools, id).data == nullptr) continue;
            const float* plane = planes[i] + outputs.row * kPitch + outputs.column;
            if (!drops(dropout, id)) {
                outputs.add(plane);
                continue;
            }
#pragma unroll
            for (int j = 0; j < kOutputs; ++j) apart[j] = pieces.begin(v0 + i) == 0 ? 0.0f : apart[j];
            Outputs::add_to(apart, plane);
            if (pieces.begin(v0 + i) + kLength < pieces.rank) continue;
            outputs.add_kept(apart, dropout, group, t0 + outputs.row, c0 + outputs.column, slot);
        }
        __syncthreads();  // before the planes are written again
    }
}

}  // namespace s3t::cuda::linear
