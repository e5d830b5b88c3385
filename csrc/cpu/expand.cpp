// y[t] += sum_p sum_j s[t,p,j] w[n,j,:], in place. A task owns up to 128 rows of one panel of 32 columns; each live
// slot is a block of its own, in order of p; y is added last, with one rounding. Rows without a live slot are not
// touched. Bound by reading and writing y below R = 32 live columns of s or so.
#include "slots.h"

namespace s3t::S3T_ISA {

void expand_task(const void* data, int64_t index) {
    const auto& args = *static_cast<const s3t_expand_args*>(data);
    const int64_t dim = args.pools.dim, panels = (dim + kPanel - 1) / kPanel;
    const int64_t t0 = index / panels * kChunk, t1 = least(args.rows, t0 + kChunk);
    const int64_t c0 = index % panels * kPanel, columns = least(kPanel, dim - c0);
    const s3t_type type = args.y.type;
    alignas(64) float total[kChunk * kPanel], scratch[kBlock * kPanel];
    std::memset(total, 0, (t1 - t0) * kPanel * sizeof(float));
    add_slots(args.pools, args.table, args.dropout, args.s, type, args.rows, t0, t1, c0, columns, total, scratch);

    for (int64_t t = t0, group = group_of(args.table, t0); t < t1; ++group) {
        const int64_t end = least(t1, end_of(args.table, group, args.rows));
        const bool live = t < end && any_live(args.pools, args.table, group);
        for (; t < end; ++t) {
            if (!live) continue;
            float y[kPanel], *row = total + (t - t0) * kPanel;
            void* to = at(args.y.data, type, t * args.y.stride + c0);
            load_row(y, to, type, type, columns);
            for (int64_t c = 0; c < columns; ++c) y[c] += row[c];
            store_row(to, type, y, columns);
        }
    }
}

}  // namespace s3t::S3T_ISA
