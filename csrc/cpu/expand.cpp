// y[t] += sum_p sum_j s[t,p,j] w[n,j,:], in place. A task owns up to 256 rows of a strip of panels of 32 columns; each
// live slot is a block of its own, in order of p; y is added last, with one rounding. Rows without a live slot are not
// touched. Bound by reading and writing y below R = 32 live columns of s or so.
#include "slots.h"

namespace s3t::S3T_ISA {

void expand_task(const void* data, int64_t index) {
    const auto& grid = *static_cast<const Grid<s3t_expand_args>*>(data);
    const auto& args = *grid.args;
    const int64_t dim = args.pools.dim, strips = (panels_of(dim) + grid.strip - 1) / grid.strip;
    const int64_t t0 = index / strips * grid.chunk, t1 = least(args.rows, t0 + grid.chunk), chunk = (t1 - t0) * kPanel;
    const int64_t c0 = index % strips * grid.strip * kPanel, columns = least(grid.strip * kPanel, dim - c0);
    const s3t_type type = args.y.type;
    Room& room = own_room();
    std::memset(room.total, 0, panels_of(columns) * chunk * sizeof(float));
    add_slots(args.pools, args.table, args.dropout, args.s, type, args.rows, t0, t1, c0, columns, room);

    for (int64_t t = t0, group = group_of(args.table, t0); t < t1; ++group) {
        const int64_t end = least(t1, end_of(args.table, group, args.rows));
        const bool live = t < end && any_live(args.pools, args.table, group);
        for (; t < end; ++t) {
            if (!live) continue;
            const float* row = room.total + (t - t0) * kPanel;
            for (int64_t c = 0; c < columns; c += kPanel, row += chunk) {
                const int64_t here = least(kPanel, columns - c);
                float y[kPanel];
                void* to = at(args.y.data, type, t * args.y.stride + c0 + c);
                load_row(y, to, type, type, here);
                for (int64_t i = 0; i < here; ++i) y[i] += row[i];
                store_row(to, type, y, here);
            }
        }
    }
}

}  // namespace s3t::S3T_ISA
