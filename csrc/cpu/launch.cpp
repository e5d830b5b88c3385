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
    Task shrink, expand, linear, outer, attention, attention_backward;
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

#define S3T_ENTRY(isa, test) \
    {#isa,                   \
     test,                   \
     isa::shrink_task,       \
     isa::expand_task,       \
     isa::linear_task,       \
     isa::outer_task,        \
     isa::attention_task,    \
     isa::attention_backward_task}
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
// Panels of one task, of `all` in `chunks` of rows or adapters: few where many threads share few.
int64_t strip_of(int64_t chunks, int64_t all, int32_t threads) {
    const int64_t fair = chunks * all / (4 * threads);
    return fair < 1 ? 1 : fair > kStrip ? kStrip : fair;
}

template <typename Args>
int64_t count_of(const Grid<Args>& grid, int64_t panels) {
    return (grid.args->rows + grid.chunk - 1) / grid.chunk * ((panels + grid.strip - 1) / grid.strip);
}

// Shares out rows and panels: in large tasks, but at least one for each thread if they can be had.
template <typename Args>
Grid<Args> share_out(const Args* args, int64_t panels, int64_t strip, int32_t threads) {
    Grid<Args> grid{args, kChunk, strip};
    while (grid.chunk > 32 && count_of(grid, panels) < threads) grid.chunk /= 2;
    return grid;
}

}  // namespace
}  // namespace s3t

using s3t::chosen, s3t::count_of, s3t::kChunk, s3t::panels, s3t::parallel, s3t::share_out, s3t::strip_of;

int32_t s3t_shrink(const s3t_shrink_args* args, int32_t threads) {
    if (chosen() == nullptr) return S3T_BAD_CPU;
    const int64_t width = args->table.slots * args->pools.rank;
    const auto grid = share_out(args, panels(width), 1, threads);
    parallel(chosen()->shrink, &grid, count_of(grid, panels(width)), args->rows * width * args->pools.dim, threads);
    return S3T_OK;
}

int32_t s3t_expand(const s3t_expand_args* args, int32_t threads) {
    if (chosen() == nullptr) return S3T_BAD_CPU;
    const int64_t width = args->table.slots * args->pools.rank, all = panels(args->pools.dim);
    if (width == 0) return S3T_OK;
    const auto grid = share_out(args, all, strip_of((args->rows + kChunk - 1) / kChunk, all, threads), threads);
    parallel(chosen()->expand, &grid, count_of(grid, all), args->rows * width * args->pools.dim, threads);
    return S3T_OK;
}

int32_t s3t_linear(const s3t_linear_args* args, int32_t threads) {
    if (chosen() == nullptr) return S3T_BAD_CPU;
    const int64_t terms = args->inner + args->table.slots * args->pools.rank, all = panels(args->outer);
    // Few rows keep the processor busy with several panels at once only.
    const int64_t strip = args->rows <= 4 ? s3t::kStrip : strip_of((args->rows + kChunk - 1) / kChunk, all, threads);
    const auto grid = share_out(args, all, strip, threads);
    const int64_t rows = args->rows + (args->packed ? 4 : 16);  // to read a weight costs as much as about so many rows
    parallel(chosen()->linear, &grid, count_of(grid, all), rows * terms * args->outer, threads);
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
        if (next[n] == start[n + 1]) return;  // the table was changed meanwhile, against the rules
        group[next[n]] = g;
        slot[next[n]++] = p;
    });

    // To lay rows of u out costs as much as about twelve ranks: adapters that read the same rows share that.
    const int64_t fair = args->count * panels(args->dim) / (4 * threads);  // adapters of a run
    const auto alone = [&](int64_t n) {
        return start[n + 1] - start[n] == 1 && !s3t::drops(args->dropout, args->first + n);
    };
    std::vector<int64_t> run;
    for (int64_t n = 0; n < args->count; ++n) {
        const bool joins = n > 0 && n - run.back() < fair && (n + 1 - run.back()) * args->rank <= kChunk &&
                           alone(n - 1) && alone(n) && group[start[n]] == group[start[n - 1]] &&
                           slot[start[n]] == slot[start[n - 1]] + 1;
        if (!joins) run.push_back(n);
    }
    const int64_t runs = static_cast<int64_t>(run.size());
    run.push_back(args->count);

    const int64_t strip = strip_of(runs, panels(args->dim), threads);
    const s3t::OuterTasks tasks{args, run.data(), start.data(), group.data(), slot.data(), strip};
    const int64_t work = args->rows * table.slots * args->rank * args->dim;
    const int64_t strips = (panels(args->dim) + strip - 1) / strip;
    parallel(chosen()->outer, &tasks, runs * strips, work, threads);
    return S3T_OK;
}

int32_t s3t_attention(const s3t_attention_args* args, bool backward, int32_t threads) {
    if (chosen() == nullptr) return S3T_BAD_CPU;
    const int64_t work = args->records * args->heads * args->rows * args->keys * args->dim * (backward ? 5 : 2);
    const auto task = backward ? chosen()->attention_backward : chosen()->attention;
    const int64_t count = args->records * args->shared, fair = count / (4 * threads);
    const s3t::AttentionTasks tasks{args, fair < 1 ? 1 : fair < args->shared ? fair : args->shared};
    parallel(task, &tasks, (count + tasks.chunk - 1) / tasks.chunk, work, threads);
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
