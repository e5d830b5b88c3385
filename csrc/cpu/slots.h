// The routing table: which rows belong to which group, which slots of a group are live, and the sum over them.
#pragma once
#include "tile.h"

namespace s3t::S3T_ISA {

// Finds the (never empty) group of a row: the first one that ends after it.
static inline int64_t group_of(const s3t_table& table, int64_t row) {
    int64_t low = 0, high = table.offsets == nullptr ? 0 : table.groups - 1;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (table.offsets[middle + 1] > row) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

static inline int64_t end_of(const s3t_table& table, int64_t group, int64_t rows) {
    return table.offsets == nullptr ? rows : table.offsets[group + 1];
}

static inline int64_t id_of(const s3t_table& table, int64_t group, int64_t slot) {
    return table.ids[group * table.group_stride + slot * table.slot_stride];
}

// Finds adapter `id`, (r, D); its data is null where the id is dead.
static inline Column adapter(const s3t_pools& pools, int64_t id) {
    const int64_t size = pools.rank * pools.dim;
    if (id >= 0 && id < pools.n) return {at(pools.w, pools.w_type, id * size), pools.w_type};
    if (id >= pools.n && id < pools.n + pools.m) {
        return {at(pools.w1, pools.w1_type, (id - pools.n) * size), pools.w1_type};
    }
    return {nullptr, S3T_F32};
}

// Calls drop(c) for every dropped column c of [0, columns); c0 is the first one's number, a multiple of four.
template <typename Drop>
static inline void each_dropped(const s3t_dropout& dropout, int64_t group, int64_t row, int64_t slot, int64_t c0,
                                int64_t columns, Drop drop) {
    const uint64_t seed = dropout.seeds[group], key = dropout.rows[row];
    for (int64_t c = 0; c < columns; c += 4) {
        const Words words = philox(seed, key, static_cast<uint32_t>((c0 + c) / 4), static_cast<uint32_t>(slot));
        for (int64_t i = 0; i < 4 && c + i < columns; ++i) {
            if (words.at[i] < dropout.threshold) drop(c + i);
        }
    }
}

// Adds sum_p s[t,p] @ w[n] for rows [t0, t1) and columns [c0, c0 + columns), each live slot in blocks of its own. A
// slot under dropout is summed apart, and what is kept of it is added.
static inline void add_slots(const s3t_pools& pools, const s3t_table& table, const s3t_dropout& dropout, const void* s,
                             s3t_type type, int64_t rows, int64_t t0, int64_t t1, int64_t c0, int64_t columns,
                             float* total, float* scratch) {
    alignas(64) float apart[kChunk * kPanel];
    const int64_t rank = pools.rank, width = table.slots * rank;
    if (width == 0) return;
    for (int64_t t = t0, group = group_of(table, t0); t < t1; ++group) {
        const int64_t end = least(t1, end_of(table, group, rows));
        for (int64_t p = 0; p < table.slots && t < end; ++p) {
            const int64_t id = id_of(table, group, p);
            const Column w = adapter(pools, id);
            if (w.data == nullptr) continue;
            const bool dropping = drops(dropout, id);
            float *here = total + (t - t0) * kPanel, *sum = dropping ? apart : here;
            if (dropping) std::memset(apart, 0, (end - t) * kPanel * sizeof(float));
            for (int64_t j = 0; j < rank; j += kBlock) {
                const int64_t k = least(kBlock, rank - j);
                const Panel b =
                    panel_of_rows(at(w.data, w.type, j * pools.dim + c0), w.type, type, pools.dim, k, columns, scratch);
                const Rows a{at(s, type, t * width + p * rank + j), type, width, 1};
                add_block(a, end - t, b, k, columns, sum);
            }
            for (int64_t i = 0; dropping && i < end - t; ++i, here += kPanel, sum += kPanel) {
                each_dropped(dropout, group, t + i, p, c0, columns, [sum](int64_t c) { sum[c] = 0; });
                for (int64_t c = 0; c < columns; ++c) here[c] += sum[c];
            }
        }
        t = end > t ? end : t;
    }
}

// Says whether a group has a live slot.
static inline bool any_live(const s3t_pools& pools, const s3t_table& table, int64_t group) {
    for (int64_t p = 0; p < table.slots; ++p) {
        if (adapter(pools, id_of(table, group, p)).data != nullptr) return true;
    }
    return false;
}

}  // namespace s3t::S3T_ISA
