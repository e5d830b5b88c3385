// Chooses the instruction set once and shares each op out as tasks.
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "threads.h"

namespace s3t {
namespace {

struct Kernels {
    const char* name;
    bool (*runs_here)();
    Task shrink, expand, linear, outer;
};

#if defined(__x86_64__)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}
bool has_avx512_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif
bool always() {
    return true;
}

#define S3T_ENTRY(isa, test) {#isa, test, isa::shrink_task, isa::expand_task, isa::linear_task, isa::outer_task}
constexpr Kernels kAll[] = {
#if defined(__x86_64__)
    S3T_ENTRY(avx512_bf16, has_avx512_bf16),
    S3T_ENTRY(avx512, has_avx512),
    S3T_ENTRY(avx2, has_avx2),
#endif
    S3T_ENTRY(portable, always),
};
#undef S3T_ENTRY

const Kernels* choose() {
    const char* wanted = std::getenv("S3T_CPU");
    const bool any = wanted == nullptr || *wanted == '\0';
    for (const Kernels& kernels : kAll) {
        if ((any || std::strcmp(wanted, kernels.name) == 0) && kernels.runs_here()) return &kernels;
    }
    return nullptr;
}

const Kernels* chosen() {
    static const Kernels* const kernels = choose();
    return kernels;
}

int64_t panels(int64_t columns) {
    return (columns + kPanel - 1) / kPanel;
}
int64_t chunks(int64_t rows) {
    return (rows + kChunk - 1) / kChunk;
}

// Panels of one task, `all` counted over chunks of rows or adapters: few where many threads share few of them, and
// whole tiles of few rows.
int64_t strip_of(int64_t all, int32_t threads, int64_t least = 1) {
    const int64_t fair = all / (4 * threads);
    return fair < least ? least : fair > kStrip ? kStrip : fair;
}
int64_t strips(int64_t columns, int64_t strip) {
    return (panels(columns) + strip - 1) / strip;
}

}  // namespace
}  // namespace s3t

using s3t::chosen, s3t::chunks, s3t::panels, s3t::parallel, s3t::strip_of, s3t::strips;

int32_t s3t_shrink(const s3t_shrink_args* args, int32_t threads) {
    if (chosen() == nullptr) return S3T_BAD_CPU;
    const int64_t width = args->table.slots * args->pools.rank;
    parallel(chosen()->shrink, args, chunks(args->rows) * panels(width), args->rows * width * args->pools.dim, threads);
    return S3T_OK;
}

int32_t s3t_expand(const s3t_expand_args* args, int32_t threads) {
    if (chosen() == nullptr) return S3T_BAD_CPU;
    const int64_t width = args->table.slots * args->pools.rank, dim = args->pools.dim;
    if (width == 0) return S3T_OK;
    const s3t::ExpandTasks tasks{args, strip_of(chunks(args->rows) * panels(dim), threads)};
    parallel(chosen()->expand, &tasks, chunks(args->rows) * strips(dim, tasks.strip), args->rows * width * dim,
             threads);
    return S3T_OK;
}

int32_t s3t_linear(const s3t_linear_args* args, int32_t threads) {
    if (chosen() == nullptr) return S3T_BAD_CPU;
    const int64_t terms = args->inner + args->table.slots * args->pools.rank;
    const int64_t all = chunks(args->rows) * panels(args->outer);
    const s3t::LinearTasks tasks{args, strip_of(all, threads, args->rows <= 4 ? 4 : 1)};
    const int64_t count = chunks(args->rows) * strips(args->outer, tasks.strip);
    const int64_t rows = args->rows + (args->packed ? 4 : 16);  // to read a weight costs as much as about so many rows
    parallel(chosen()->linear, &tasks, count, rows * terms * args->outer, threads);
    return S3T_OK;
}

int32_t s3t_layer(const s3t_shrink_args* shrink, const s3t_linear_args* linear, int32_t threads) {
    const int32_t status = s3t_shrink(shrink, threads);
    return status == S3T_OK ? s3t_linear(linear, threads) : status;
}

int32_t s3t_outer(const s3t_outer_args* args, int32_t threads) {
    if (chosen() == nullptr) return S3T_BAD_CPU;
    const s3t_table& table = args->table;
    std::vector<int64_t> start(args->count + 1), group, slot;
    const auto each = [&](auto&& visit) {
        for (int64_t g = 0; g < table.groups; ++g) {
            for (int64_t p = 0; p < table.slots; ++p) {
                const int64_t n = table.ids[g * table.group_stride + p * table.slot_stride] - args->first;
                if (n >= 0 && n < args->count) visit(n, g, p);
            }
        }
    };
    each([&](int64_t n, int64_t, int64_t) { ++start[n + 1]; });
    for (int64_t n = 0; n < args->count; ++n) start[n + 1] += start[n];
    group.resize(start.back());
    slot.resize(start.back());
    std::vector<int64_t> next(start);
    each([&](int64_t n, int64_t g, int64_t p) {
        group[next[n]] = g;
        slot[next[n]++] = p;
    });

    const int64_t strip = strip_of(args->count * panels(args->dim), threads);
    const s3t::OuterTasks tasks{args, start.data(), group.data(), slot.data(), strip};
    const int64_t work = args->rows * table.slots * args->rank * args->dim;
    parallel(chosen()->outer, &tasks, args->count * strips(args->dim, strip), work, threads);
    return S3T_OK;
}

const char* s3t_cpu(void) {
    return chosen() == nullptr ? nullptr : chosen()->name;
}

const char* s3t_cpus(void) {
    static const std::string names = [] {
        std::string list;
        for (const auto& kernels : s3t::kAll) {
            if (kernels.runs_here()) list += (list.empty() ? "" : " ") + std::string(kernels.name);
        }
        return list;
    }();
    return names.c_str();
}
