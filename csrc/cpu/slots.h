// The routing table: which rows belong to which group, which slots of a group are live, and the sum over them.
#pragma once
#include <memory>

#include "layout.h"

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

// What a task keeps: its totals, panel after panel, and room to lay A and B out in.
struct Room {
    alignas(64) float total[kChunk * kStrip * kPanel];
    alignas(64) float panel[kBlock * kPanel];
    alignas(64) float left[kRoom];
};

// The calling thread's own, kept for its life: some stacks are too small for it.
static inline Room& own_room() {
    static thread_local const std::unique_ptr<Room> room(new Room);
    return *room;
}

// Rows [t, end), of one group, of s and of what its slots add to the columns from c0 on.
struct Here {
    const s3t_pools& pools;
    const void* s;
    s3t_type type;
    int64_t width, t, end, c0, columns;

    int64_t rows() const { return end - t; }
    Rows left(int64_t p, int64_t j) const { return {at(s, type, t * width + p * pools.rank + j), type, width, 1}; }
};

// Blocks of live slots that are added in one go: a call for each would cost as much as its sums. Together they have no
// more terms than a block, whose room they share.
struct Waiting {
    static constexpr int64_t kMost = 32;
    int64_t count = 0, terms = 0;
    Left a[kMost];
    Column w[kMost];
    int64_t k[kMost];
};

static inline void add_waiting(Waiting& wait, const Here& here, float* total, int64_t apart, float* room) {
    Block blocks[Waiting::kMost];
    // Few rows take several panels at once, if the copies of all have room.
    const int64_t fit = here.rows() <= kFew && wait.count > 0 ? kBlock / wait.terms : 1;
    for (int64_t c = 0, next; c < here.columns && wait.count > 0; c = next) {
        next = least(c + fit * kPanel, here.columns);
        float* to = room;
        for (int64_t i = 0; i < wait.count; to += wait.k[i++] * kPanel) {
            const Column& w = wait.w[i];
            const auto panel = [&](int64_t at_c, float* copy) {
                return panel_of_rows(at(w.data, w.type, here.c0 + at_c), w.type, here.type, here.pools.dim, wait.k[i],
                                     here.columns - at_c, here.rows(), copy);
            };
            blocks[i] = {wait.a[i], panel(c, to), wait.k[i]};
            if (blocks[i].b.data != to) {
                next = here.columns;
                continue;
            }
            blocks[i].b.panel = wait.terms * kPanel * 4;
            for (int64_t q = c + kPanel; q < next; q += kPanel) panel(q, to + (q - c) * wait.terms);
        }
        add_blocks(blocks, wait.count, here.rows(), next - c, total + c / kPanel * apart, apart);
    }
    wait.count = wait.terms = 0;
}

// Lets slot p wait in blocks of its own; what waits already is added first where they have not all in common.
static inline void add_slot(Waiting& wait, const Here& here, int64_t p, Column w, float* total, int64_t apart,
                            Room& room) {
    for (int64_t j = 0; j < here.pools.rank; j += kBlock) {
        const int64_t k = least(kBlock, here.pools.rank - j), terms = k + k % 2;
        if (wait.count == Waiting::kMost || wait.terms + terms > kBlock ||
            (wait.count > 0 && wait.w[0].type != w.type)) {
            add_waiting(wait, here, total, apart, room.panel);
        }
        wait.a[wait.count] = left_of(here.left(p, j), here.rows(), k, room.left + wait.terms);
        wait.w[wait.count] = {at(w.data, w.type, j * here.pools.dim), w.type};
        wait.k[wait.count++] = k;
        wait.terms += terms;
    }
}

// Adds a slot under dropout: summed apart, panel by panel, and what is kept of it is added.
static inline void add_kept_slot(const Here& here, const s3t_dropout& dropout, int64_t group, int64_t p, Column w,
                                 float* total, int64_t apart, Room& room) {
    alignas(64) float sums[kChunk * kPanel];
    for (int64_t c = 0; c < here.columns; c += kPanel) {
        const Here part{here.pools, here.s,   here.type,   here.width,
                        here.t,     here.end, here.c0 + c, least(kPanel, here.columns - c)};
        std::memset(sums, 0, part.rows() * kPanel * sizeof(float));
        Waiting wait;
        add_slot(wait, part, p, w, sums, 0, room);
        add_waiting(wait, part, sums, 0, room.panel);
        float *to = total + c / kPanel * apart, *sum = sums;
        for (int64_t t = part.t; t < part.end; ++t, to += kPanel, sum += kPanel) {
            each_dropped(dropout, group, t, p, part.c0, part.columns, [sum](int64_t i) { sum[i] = 0; });
            for (int64_t i = 0; i < part.columns; ++i) to[i] += sum[i];
        }
    }
}

// Adds sum_p s[t,p] @ w[n] for rows [t0, t1) and columns [c0, c0 + columns), each live slot in blocks of its own, in
// order of p.
static inline void add_slots(const s3t_pools& pools, const s3t_table& table, const s3t_dropout& dropout, const void* s,
                             s3t_type type, int64_t rows, int64_t t0, int64_t t1, int64_t c0, int64_t columns,
                             Room& room) {
    const int64_t width = table.slots * pools.rank, apart = (t1 - t0) * kPanel;
    if (width == 0) return;
    for (int64_t t = t0, group = group_of(table, t0); t < t1; ++group) {
        const int64_t end = least(t1, end_of(table, group, rows));
        if (end <= t) continue;
        const Here here{pools, s, type, width, t, end, c0, columns};
        float* total = room.total + (t - t0) * kPanel;
        Waiting wait;
        for (int64_t p = 0; p < table.slots; ++p) {
            const int64_t id = id_of(table, group, p);
            const Column w = adapter(pools, id);
            if (w.data == nullptr) continue;
            if (drops(dropout, id)) {
                add_waiting(wait, here, total, apart, room.panel);
                add_kept_slot(here, dropout, group, p, w, total, apart, room);
            } else {
                add_slot(wait, here, p, w, total, apart, room);
            }
        }
        add_waiting(wait, here, total, apart, room.panel);
        t = end;
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
