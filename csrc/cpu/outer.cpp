// dw[n] = sum over every (g,p) with ids[g,p] = n, and over the rows t of group g, of s[t,p]^T u[t]. A task owns a
// strip of panels of 32 columns of one adapter, or of some that stand side by side: their ranks are then those of one,
// in s as in dw. The rows of each occurrence are summed in blocks of 256 counted from the first row of its group, so
// that no other group can shift them. Bound by the fused multiply-adds from r = 8 on, below that by reading u.
#include "slots.h"

namespace s3t::S3T_ISA {

// Rows [t, t + k) of u, columns [c0, c0 + columns), with zeros where the slot drops an element.
static Panel panel_of_kept(const s3t_outer_args& args, int64_t group, int64_t slot, int64_t t, int64_t k, int64_t c0,
                           int64_t columns, float* scratch) {
    const s3t_type type = args.u.type;
    const int64_t size = size_of(type);
    alignas(64) char kept[kBlock * kPanel * sizeof(float)];
    for (int64_t i = 0; i < k; ++i) {
        char* row = kept + i * kPanel * size;
        std::memcpy(row, at(args.u.data, type, (t + i) * args.u.stride + c0), columns * size);
        each_dropped(args.dropout, group, t + i, slot, c0, columns,
                     [=](int64_t c) { std::memset(row + c * size, 0, size); });
    }
    return panel_of_rows(kept, type, type, kPanel, k, columns, kChunk, scratch);
}

void outer_task(const void* data, int64_t index) {
    const auto& tasks = *static_cast<const OuterTasks*>(data);
    const auto& args = *tasks.args;
    const int64_t strips = (panels_of(args.dim) + tasks.strip - 1) / tasks.strip;
    const int64_t n = tasks.run[index / strips], rank = (tasks.run[index / strips + 1] - n) * args.rank;
    const int64_t c0 = index % strips * tasks.strip * kPanel, columns = least(tasks.strip * kPanel, args.dim - c0);
    const int64_t width = args.table.slots * args.rank;
    const bool dropping = drops(args.dropout, args.first + n);
    const s3t_type type = args.u.type;
    Room& room = own_room();

    for (int64_t j = 0; j < rank; j += kChunk) {
        const int64_t ranks = least(kChunk, rank - j), apart = ranks * kPanel;
        std::memset(room.total, 0, panels_of(columns) * apart * sizeof(float));
        for (int64_t i = tasks.start[n]; i < tasks.start[n + 1]; ++i) {
            const int64_t group = tasks.group[i], slot = tasks.slot[i];
            const int64_t end = end_of(args.table, group, args.rows);
            for (int64_t t = args.table.offsets == nullptr ? 0 : args.table.offsets[group]; t < end; t += kBlock) {
                const int64_t k = least(kBlock, end - t);
                const Rows s{at(args.s, type, t * width + slot * args.rank + j), type, 1, width};
                const Left a = left_of(s, ranks, k, room.left);
                for (int64_t c = 0, next; c < columns; c = next) {
                    next = least(c + kPanel, columns);
                    const void* u = at(args.u.data, type, t * args.u.stride + c0 + c);
                    const Panel b =
                        dropping ? panel_of_kept(args, group, slot, t, k, c0 + c, next - c, room.panel)
                                 : panel_of_rows(u, type, type, args.u.stride, k, columns - c, ranks, room.panel);
                    if (b.data == u) next = columns;
                    const Block block{a, b, k};
                    add_blocks(&block, 1, ranks, next - c, room.total + c / kPanel * apart, apart);
                }
            }
        }
        for (int64_t row = 0; row < ranks; ++row) {
            for (int64_t c = 0; c < columns; c += kPanel) {
                const float* from = room.total + c / kPanel * apart + row * kPanel;
                void* to = at(args.dw, args.dw_type, (n * args.rank + j + row) * args.dim + c0 + c);
                store_row(to, args.dw_type, from, least(kPanel, columns - c));
            }
        }
    }
}

}  // namespace s3t::S3T_ISA
