// s[t,p,j] = scale_n * sum_d w[n,j,d] u[t,d], one rounding; exactly zero where slot p is dead. A task owns up to 256
// rows and the i-th 32 of the live pairs (p,j) of each of their groups: dead slots cost nothing. The sum runs over d in
// blocks of 256. Bound by the fused multiply-adds; filling a panel costs as much as about 12 rows.
#include "slots.h"

namespace s3t::S3T_ISA {

// Up to 32 live pairs (p,j) of a group: the columns of one panel, and where and how they are written.
struct Pairs {
    int64_t count = 0;
    Column column[kPanel];
    int64_t place[kPanel];  // p * r + j
    float scale[kPanel];
};

static void find_pairs(const s3t_shrink_args& args, int64_t group, int64_t first, Pairs& pairs) {
    const int64_t rank = args.pools.rank, dim = args.pools.dim;
    int64_t before = 0;
    for (int64_t p = 0; p < args.table.slots && before < first + kPanel; ++p) {
        const int64_t id = id_of(args.table, group, p);
        const Column w = adapter(args.pools, id);
        if (w.data == nullptr) continue;
        for (int64_t j = before < first ? least(rank, first - before) : 0; j < rank && pairs.count < kPanel; ++j) {
            pairs.column[pairs.count] = {at(w.data, w.type, j * dim), w.type};
            pairs.place[pairs.count] = p * rank + j;
            pairs.scale[pairs.count++] = args.scales == nullptr ? args.scale : args.scales[id];
        }
        before += rank;
    }
}

// The pairs [from, to) alone.
static Pairs some(const Pairs& pairs, int64_t from, int64_t to) {
    Pairs part;
    for (int64_t c = from; c < to; ++c, ++part.count) {
        part.column[part.count] = pairs.column[c];
        part.place[part.count] = pairs.place[c];
        part.scale[part.count] = pairs.scale[c];
    }
    return part;
}

// Adds one block of the sum for rows [t, end) and columns [d, d + k) of u, less what the pairs' slot drops.
static void add_kept(const s3t_shrink_args& args, int64_t group, int64_t slot, int64_t t, int64_t end, int64_t d,
                     int64_t k, const Panel& b, int64_t columns, float* total, float* room) {
    const int64_t size = size_of(args.u.type);
    alignas(64) char kept[kRows * kBlock * sizeof(float)];
    for (; t < end; t += kRows, total += kRows * kPanel) {
        const int64_t rows = least(kRows, end - t);
        for (int64_t i = 0; i < rows; ++i) {
            char* row = kept + i * kBlock * size;
            std::memcpy(row, at(args.u.data, args.u.type, (t + i) * args.u.stride + d), k * size);
            each_dropped(args.dropout, group, t + i, slot, d, k,
                         [=](int64_t c) { std::memset(row + c * size, 0, size); });
        }
        const Block block{left_of({kept, args.u.type, kBlock, 1}, rows, k, room), b, k};
        add_blocks(&block, 1, rows, columns, total, 0);
    }
}

static void write_rows(const s3t_shrink_args& args, const Pairs& pairs, int64_t t0, int64_t t1, float* total) {
    const int64_t width = args.table.slots * args.pools.rank;
    for (int64_t t = t0; t < t1; ++t, total += kPanel) {
        for (int64_t c = 0; c < pairs.count; ++c) total[c] *= pairs.scale[c];
        for (int64_t c = 0, next; c < pairs.count; c = next) {  // places that follow each other are written together
            for (next = c + 1; next < pairs.count && pairs.place[next] == pairs.place[next - 1] + 1;) ++next;
            store_row(at(args.s, args.u.type, t * width + pairs.place[c]), args.u.type, total + c, next - c);
        }
    }
}

static void clear_dead(const s3t_shrink_args& args, int64_t group, int64_t t0, int64_t t1) {
    const int64_t rank = args.pools.rank, width = args.table.slots * rank;
    for (int64_t p = 0; p < args.table.slots; ++p) {
        if (adapter(args.pools, id_of(args.table, group, p)).data != nullptr) continue;
        for (int64_t t = t0; t < t1; ++t) {
            std::memset(at(args.s, args.u.type, t * width + p * rank), 0, rank * size_of(args.u.type));
        }
    }
}

// Sums and writes the pairs of rows [t, end), all in one group; under dropout all of one slot.
static void sum_pairs(const s3t_shrink_args& args, const Pairs& pairs, int64_t group, bool dropping, int64_t t,
                      int64_t end) {
    const int64_t dim = args.pools.dim;
    const s3t_type type = args.u.type;
    Room& room = own_room();
    float *const total = room.total, *const scratch = room.panel;
    std::memset(total, 0, (end - t) * kPanel * sizeof(float));
    for (int64_t d = 0; d < dim; d += kBlock) {
        const int64_t k = least(kBlock, dim - d);
        Column columns[kPanel];
        for (int64_t c = 0; c < pairs.count; ++c) {
            columns[c] = {at(pairs.column[c].data, pairs.column[c].type, d), pairs.column[c].type};
        }
        const Rows a{at(args.u.data, type, t * args.u.stride + d), type, args.u.stride, 1};
        if (!dropping && end - t <= kFew) {
            add_lines(left_of(a, end - t, k, room.left), end - t, lines_of(columns, type, k, pairs.count, scratch),
                      total);
            continue;
        }
        const Panel b = panel_of_columns(columns, type, k, pairs.count, scratch);
        if (dropping) {
            add_kept(args, group, pairs.place[0] / args.pools.rank, t, end, d, k, b, pairs.count, total, room.left);
        } else {
            const Block block{left_of(a, end - t, k, room.left), b, k};
            add_blocks(&block, 1, end - t, pairs.count, total, 0);
        }
    }
    write_rows(args, pairs, t, end, total);
}

void shrink_task(const void* data, int64_t index) {
    const auto& grid = *static_cast<const Grid<s3t_shrink_args>*>(data);
    const auto& args = *grid.args;
    const int64_t rank = args.pools.rank, panels = panels_of(args.table.slots * rank);
    const int64_t first = index / panels * grid.chunk, last = least(args.rows, first + grid.chunk);
    const int64_t part = index % panels;

    for (int64_t t = first, group = group_of(args.table, first); t < last; ++group) {
        const int64_t end = least(last, end_of(args.table, group, args.rows));
        if (end <= t) continue;
        Pairs pairs;
        find_pairs(args, group, part * kPanel, pairs);
        if (part == 0) clear_dead(args, group, t, end);
        if (args.dropout.seeds == nullptr && pairs.count > 0) sum_pairs(args, pairs, group, false, t, end);
        for (int64_t c = 0, next; args.dropout.seeds != nullptr && c < pairs.count; c = next) {  // a slot at a time
            const int64_t slot = pairs.place[c] / rank;
            for (next = c + 1; next < pairs.count && pairs.place[next] / rank == slot;) ++next;
            const bool dropping = drops(args.dropout, id_of(args.table, group, slot));
            sum_pairs(args, some(pairs, c, next), group, dropping, t, end);
        }
        t = end;
    }
}

}  // namespace s3t::S3T_ISA
