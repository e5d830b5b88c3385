// y[t] = sum_k x[t,k] W[o,k] + sum_p sum_j s[t,p,j] w[n,j,o] + bias[o], or with W transposed; one accumulator, one
// rounding. A task owns up to 128 rows, of any groups, of one panel of 32 columns. The base comes first, in blocks of
// 256 of its sum; then each live slot as a block of its own, which keeps the bits of an absent and of a masked adapter
// the same. Bound by the fused multiply-adds from about 16 rows on, below that by reading the weight.
#include "slots.h"

namespace s3t::S3T_ISA {

// The block [k0, k0 + k) x [c0, c0 + columns) of the weight as a panel.
static Panel weight_panel(const s3t_linear_args& args, int64_t k0, int64_t k, int64_t c0, int64_t columns,
                          float* scratch) {
    const s3t_type type = args.x.type;
    const void* weight = args.weight;
    Column lines[kPanel];
    if (args.packed && !args.transposed) {
        const void* from = at(weight, type, c0 * args.inner + k0 * kPanel);
        return panel_of_rows(from, type, type, kPanel, k, kPanel, scratch);
    }
    if (args.transposed && !args.packed) {
        return panel_of_rows(at(weight, type, k0 * args.outer + c0), type, type, args.outer, k, columns, scratch);
    }
    if (!args.packed) {
        for (int64_t c = 0; c < columns; ++c) lines[c] = {at(weight, type, (c0 + c) * args.inner + k0), type};
        return panel_of_columns(lines, type, k, columns, scratch);
    }
    for (int64_t i = 0; i < k; i += kPanel) {  // packed along the sum: 32 of its terms lie together
        const void* from = at(weight, type, (k0 + i) * args.outer + c0 * kPanel);
        for (int64_t c = 0; c < columns; ++c) lines[c] = {at(from, type, c * kPanel), type};
        panel_of_columns(lines, type, least(kPanel, k - i), columns, scratch + i * kPanel);
    }
    return {scratch, kPanel};
}

void linear_task(const void* data, int64_t index) {
    const auto& args = *static_cast<const s3t_linear_args*>(data);
    const int64_t panels = (args.outer + kPanel - 1) / kPanel;
    const int64_t t0 = index / panels * kChunk, t1 = least(args.rows, t0 + kChunk);
    const int64_t c0 = index % panels * kPanel, columns = least(kPanel, args.outer - c0);
    const s3t_type type = args.x.type;
    alignas(64) float total[kChunk * kPanel], scratch[kBlock * kPanel];
    std::memset(total, 0, (t1 - t0) * kPanel * sizeof(float));

    for (int64_t k0 = 0; k0 < args.inner; k0 += kBlock) {
        const int64_t k = least(kBlock, args.inner - k0);
        const Panel b = weight_panel(args, k0, k, c0, columns, scratch);
        const Rows a{at(args.x.data, type, t0 * args.x.stride + k0), type, args.x.stride, 1};
        add_block(a, t1 - t0, b, k, columns, total);
    }
    add_slots(args.pools, args.table, args.dropout, args.s, type, args.rows, t0, t1, c0, columns, total, scratch);

    float bias[kPanel];
    if (args.bias != nullptr) load_row(bias, at(args.bias, type, c0), type, type, columns);
    for (int64_t t = t0; t < t1; ++t) {
        float* row = total + (t - t0) * kPanel;
        for (int64_t c = 0; args.bias != nullptr && c < columns; ++c) row[c] += bias[c];
        store_row(at(args.y.data, type, t * args.y.stride + c0), type, row, columns);
    }
}

}  // namespace s3t::S3T_ISA
