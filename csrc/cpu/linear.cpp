// y[t] = sum_k x[t,k] W[o,k] + sum_p sum_j s[t,p,j] w[n,j,o] + bias[o], or with W transposed; one accumulator, one
// rounding. A task owns up to 256 rows, of any groups, of a strip of panels of 32 columns. The base comes first, in
// blocks of 256 of its sum; then each live slot as a block of its own, which keeps the bits of an absent and of a
// masked adapter the same. Bound by the fused multiply-adds from about 16 rows on, below that by reading the weight.
#include "slots.h"

namespace s3t::S3T_ISA {

// Panels packed along the sum: term k0 + i, column c lies at panel (k0 + i) / 32. Laid out anew, 32 terms at a time.
static Panel turned_panel(const s3t_linear_args& args, int64_t k0, int64_t k, int64_t c0, int64_t columns,
                          float* scratch) {
    const s3t_type type = args.x.type;
    const bool pairs = type == S3T_BF16;
    const int64_t width = pairs ? (args.outer + 1) / 2 * 2 : args.outer;
    uint16_t split[kPanel][kPanel];
    Column lines[kPanel];
    for (int64_t i = 0; i < k; i += kPanel) {
        const void* panel = at(args.weight, type, (k0 + i) * width);
        for (int64_t c = 0; c < columns; ++c) {
            lines[c] = {at(panel, type, (c0 + c) * kPanel), type};
            if (!pairs) continue;
            const auto* pair = static_cast<const uint16_t*>(panel) + (c0 + c) / 2 * 2 * kPanel + (c0 + c) % 2;
            for (int64_t j = 0; j < kPanel; ++j) split[c][j] = pair[2 * j];
            lines[c].data = split[c];
        }
        panel_of_columns(lines, type, least(kPanel, k - i), columns, scratch + (pairs ? i / 2 : i) * kPanel);
    }
    return {scratch, pairs ? Format::kPairs : Format::kFloat, kPanel * 4, 0};
}

// Columns [c0, c0 + columns) of the plain weight, from term k0 on.
static void columns_of(const s3t_linear_args& args, int64_t k0, int64_t c0, int64_t columns, Column* lines) {
    for (int64_t c = 0; c < columns; ++c) {
        lines[c] = {at(args.weight, args.x.type, (c0 + c) * args.inner + k0), args.x.type};
    }
}

// The block [k0, k0 + k) x [c0, c0 + columns) of the weight: all columns where they lie in panels, else the first 32.
static Panel weight_panel(const s3t_linear_args& args, int64_t k0, int64_t k, int64_t c0, int64_t columns, int64_t rows,
                          float* scratch) {
    const s3t_type type = args.x.type;
    if (args.packed && !args.transposed) {
        const int64_t inner = type == S3T_BF16 ? (args.inner + 1) / 2 * 2 : args.inner, size = size_of(type);
        const Format format = type == S3T_BF16 ? Format::kPairs : type == S3T_F16 ? Format::kHalf : Format::kFloat;
        const void* from = at(args.weight, type, c0 * inner + k0 * kPanel);
        const void* next = k0 + k < args.inner ? at(from, type, k * kPanel) : nullptr;
        return {from, format, kPanel * (type == S3T_F16 ? 2 : 4), kPanel * inner * size, next};
    }
    columns = least(columns, kPanel);
    if (args.packed) return turned_panel(args, k0, k, c0, columns, scratch);
    if (args.transposed) {
        const void* from = at(args.weight, type, k0 * args.outer + c0);
        return panel_of_rows(from, type, type, args.outer, k, columns, rows, scratch);
    }
    Column lines[kPanel];
    columns_of(args, k0, c0, columns, lines);
    return panel_of_columns(lines, type, k, columns, scratch);
}

// Adds the base product of rows [t0, t1) and columns [c0, c0 + columns).
static void add_base(const s3t_linear_args& args, int64_t t0, int64_t t1, int64_t c0, int64_t columns, Room& room) {
    const s3t_type type = args.x.type;
    const int64_t rows = t1 - t0, apart = rows * kPanel;
    const auto left = [&](int64_t k0, int64_t k) {
        return left_of({at(args.x.data, type, t0 * args.x.stride + k0), type, args.x.stride, 1}, rows, k, room.left);
    };
    if (rows <= kFew && !args.packed && !args.transposed) {  // each row of the weight from end to end
        for (int64_t c = 0; c < columns; c += kPanel) {
            const int64_t here = least(kPanel, columns - c);
            for (int64_t k0 = 0; k0 < args.inner; k0 += kBlock) {
                const int64_t k = least(kBlock, args.inner - k0);
                Column lines[kPanel];
                columns_of(args, k0, c0 + c, here, lines);
                add_lines(left(k0, k), rows, lines_of(lines, type, k, here, room.panel),
                          room.total + c / kPanel * apart);
            }
        }
        return;
    }
    const bool whole = args.packed && !args.transposed;
    for (int64_t k0 = 0; k0 < args.inner; k0 += kBlock) {
        const int64_t k = least(kBlock, args.inner - k0);
        const Left a = left(k0, k);
        for (int64_t c = 0, next; c < columns; c = next) {
            next = whole ? columns : least(c + kPanel, columns);
            const Block block{a, weight_panel(args, k0, k, c0 + c, next - c, rows, room.panel), k};
            add_blocks(&block, 1, rows, next - c, room.total + c / kPanel * apart, apart);
        }
    }
}

void linear_task(const void* data, int64_t index) {
    const auto& grid = *static_cast<const Grid<s3t_linear_args>*>(data);
    const auto& args = *grid.args;
    const int64_t strips = (panels_of(args.outer) + grid.strip - 1) / grid.strip;
    const int64_t t0 = index / strips * grid.chunk, t1 = least(args.rows, t0 + grid.chunk), chunk = (t1 - t0) * kPanel;
    const int64_t c0 = index % strips * grid.strip * kPanel, columns = least(grid.strip * kPanel, args.outer - c0);
    const s3t_type type = args.x.type;
    Room& room = own_room();
    std::memset(room.total, 0, panels_of(columns) * chunk * sizeof(float));

    add_base(args, t0, t1, c0, columns, room);
    add_slots(args.pools, args.table, args.dropout, args.s, type, args.rows, t0, t1, c0, columns, room);

    float bias[kPanel];
    for (int64_t c = 0; c < columns; c += kPanel) {
        const int64_t here = least(kPanel, columns - c);
        if (args.bias != nullptr) load_row(bias, at(args.bias, type, c0 + c), type, type, here);
        float* row = room.total + c / kPanel * chunk;
        for (int64_t t = t0; t < t1; ++t, row += kPanel) {
            for (int64_t i = 0; args.bias != nullptr && i < here; ++i) row[i] += bias[i];
            store_row(at(args.y.data, type, t * args.y.stride + c0 + c), type, row, here);
        }
    }
}

}  // namespace s3t::S3T_ISA
