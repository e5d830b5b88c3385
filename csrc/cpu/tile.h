// The one product under every op: totals (rows x 32) += A (rows x k) @ B (k x 32), k at most one block of the sum. An
// output is one lane of one accumulator, whatever shares its tile: no tiling can change its bits, no NaN leaves its row
// or column.
#pragma once
#include "isa.h"

namespace s3t::S3T_ISA {

struct Panel {
    const float* data;
    int64_t stride;  // between the rows k
};

struct Rows {
    const void* data;
    s3t_type type;
    int64_t row, step;  // strides of the row and of k; one of them is 1
};

static inline int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

template <int M, int V>
static inline void add_tile(const float* a, int64_t row, int64_t step, Panel b, int64_t k, float* total) {
    Vec acc[M][V] = {};
    const float* from = b.data;
    for (int64_t i = 0; i < k; ++i, a += step, from += b.stride) {
        Vec columns[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) columns[v] = load(from + v * kLanes);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const Vec x = broadcast(a[m * row]);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) acc[m][v] = fma(x, columns[v], acc[m][v]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            float* to = total + m * kPanel + v * kLanes;
            store(to, load(to) + acc[m][v]);
        }
    }
}

// Rows that do not fill a tile get a tile of their own size: a padded row would be read from nowhere.
template <int M, int V>
static inline void add_rows(int64_t m, const float* a, int64_t row, int64_t step, Panel b, int64_t k, float* total) {
    if (m == M) {
        add_tile<M, V>(a, row, step, b, k, total);
    } else if constexpr (M > 1) {
        add_rows<M - 1, V>(m, a, row, step, b, k, total);
    }
}

// Adds one block. Half types are converted a tile at a time, next to where they are used.
static inline void add_block(Rows a, int64_t rows, Panel b, int64_t k, int64_t columns, float* total) {
    alignas(64) float buffer[kRows * kBlock];
    for (int64_t i = 0; i < rows; i += kRows, total += kRows * kPanel) {
        const int64_t m = least(kRows, rows - i);
        const void* from = at(a.data, a.type, i * a.row);
        const float* tile = static_cast<const float*>(from);
        int64_t row = a.row, step = a.step;
        if (a.type != S3T_F32 && a.step == 1) {
            row = kBlock;
            for (int64_t j = 0; j < m; ++j)
                load_row(buffer + j * kBlock, at(from, a.type, j * a.row), a.type, a.type, k);
            tile = buffer;
        } else if (a.type != S3T_F32) {
            row = 1, step = kRows;
            for (int64_t j = 0; j < k; ++j)
                load_row(buffer + j * kRows, at(from, a.type, j * a.step), a.type, a.type, m);
            tile = buffer;
        }
        for (int64_t c = 0; c < columns; c += kVectors * kLanes) {
            const Panel part{b.data + c, b.stride};
            if (columns - c > kLanes) {
                add_rows<kRows, kVectors>(m, tile, row, step, part, k, total + c);
            } else {
                add_rows<kRows, 1>(m, tile, row, step, part, k, total + c);
            }
        }
    }
}

// B[i][c] = from[i * stride + c]: in place where it is fp32 already and 32 wide, else a copy padded with zeros.
static inline Panel panel_of_rows(const void* from, s3t_type type, s3t_type as, int64_t stride, int64_t k,
                                  int64_t columns, float* scratch) {
    if (type == S3T_F32 && as == S3T_F32 && columns == kPanel) return {static_cast<const float*>(from), stride};
    for (int64_t i = 0; i < k; ++i) {
        load_row(scratch + i * kPanel, at(from, type, i * stride), type, as, columns);
        std::memset(scratch + i * kPanel + columns, 0, (kPanel - columns) * 4);
    }
    return {scratch, kPanel};
}

static inline void transpose4(const float* const* rows, int64_t i, float* to) {
    const Vec4 a = load<Vec4>(rows[0] + i), b = load<Vec4>(rows[1] + i);
    const Vec4 c = load<Vec4>(rows[2] + i), d = load<Vec4>(rows[3] + i);
    const Vec4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Vec4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    store(to, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
    store(to + kPanel, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
    store(to + 2 * kPanel, __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5));
    store(to + 3 * kPanel, __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7));
}

// A column of B: k values that lie together, of a type of their own.
struct Column {
    const void* data;
    s3t_type type;
};

// B[i][c] = columns[c].data[i], padded with zero columns.
static inline Panel panel_of_columns(const Column* columns, s3t_type as, int64_t k, int64_t count, float* scratch) {
    static const float zeros[kBlock] = {};
    alignas(64) float buffer[4][kBlock];
    for (int64_t c = 0; c < kPanel; c += 4) {
        const float* rows[4];
        for (int64_t j = 0; j < 4; ++j) {
            rows[j] = zeros;
            if (c + j >= count) continue;
            const Column& column = columns[c + j];
            rows[j] = static_cast<const float*>(column.data);
            if (column.type == S3T_F32 && as == S3T_F32) continue;
            load_row(buffer[j], column.data, column.type, as, k);
            rows[j] = buffer[j];
        }
        int64_t i = 0;
        for (; i + 4 <= k; i += 4) transpose4(rows, i, scratch + i * kPanel + c);
        for (; i < k; ++i) {
            for (int64_t j = 0; j < 4; ++j) scratch[i * kPanel + c + j] = rows[j][i];
        }
    }
    return {scratch, kPanel};
}

}  // namespace s3t::S3T_ISA
