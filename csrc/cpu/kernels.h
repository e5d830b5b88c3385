// What the launchers (compiled once, for the base instruction set) and the kernels (compiled once each) share. No
// inline function of external linkage may live here or in any header the kernels include outside the namespace S3T_ISA:
// the linker would keep one copy for all, perhaps the one with instructions this processor lacks.
#pragma once
#include "../philox.h"
#include "../s3t.h"

namespace s3t {

constexpr int64_t kBlock = 256;  // terms of one chain of the sum: part of the contract
constexpr int64_t kPanel = 32;   // columns of a panel of weights, the layout of pack()
constexpr int64_t kChunk = 256;  // rows of one task at most: enough to pay for filling a panel
constexpr int64_t kStrip = 4;    // panels of one task at most

// Does the part `index` of the work that `args` (a struct of s3t.h) describes.
using Task = void (*)(const void* args, int64_t index);

// Where adapter n is used: occurrences start[n - first] .. start[n - first + 1] of groups and slots, in order. A task
// takes the adapters run[i] .. run[i + 1], counted from the first: one, or several that stand side by side in slots of
// one group and nowhere else, which read the same rows.
struct OuterTasks {
    const s3t_outer_args* args;
    const int64_t *run, *start, *group, *slot;
    int64_t strip;
};

// An op shared out in tasks of `chunk` rows and `strip` panels (for shrink: one). Neither changes a bit.
template <typename Args>
struct Grid {
    const Args* args;
    int64_t chunk, strip;
};

// Heads of keys, of all records, in tasks of `chunk`: those beside each other lie so in memory too.
struct AttentionTasks {
    const s3t_attention_args* args;
    int64_t chunk;
};

#define S3T_KERNELS(isa)                                     \
    namespace isa {                                          \
    void shrink_task(const void* args, int64_t);             \
    void expand_task(const void* args, int64_t);             \
    void linear_task(const void* args, int64_t);             \
    void outer_task(const void* tasks, int64_t);             \
    void attention_task(const void* args, int64_t);          \
    void attention_backward_task(const void* args, int64_t); \
    }
S3T_KERNELS(portable)
S3T_KERNELS(avx2)
S3T_KERNELS(avx512)
S3T_KERNELS(avx512_bf16)
#undef S3T_KERNELS

}  // namespace s3t
