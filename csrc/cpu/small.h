// The product of two small matrices of floats that lie in the nearest caches: nothing is packed, nothing is asked for
// early. An output is one lane of one accumulator and one chain of fused multiply-adds, in any tile.
#pragma once
#include "tile.h"

namespace s3t::S3T_ISA {

constexpr int64_t kWide = 16;  // columns of a small matrix are padded to whole groups of so many, in every set

static inline int64_t wide_of(int64_t columns) {
    return (columns + kWide - 1) / kWide * kWide;
}

// How the matrices of a product lie, in floats: A steps by a_row from a row to the next and by a_step from a term to
// the next, B by b_row from a term to the next, C by c_row from a row to the next. Chains start from zero, or where
// there is such a matrix, of rows from_row apart, from its numbers. C is overwritten, or added to.
struct Product {
    int64_t a_row, a_step, b_row, c_row, from_row = 0;
    bool add = false;
};

// A tile has up to kSmallVectors vectors and small_rows(vectors) rows: what the registers hold beside a step of B.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSmallVectors = 5;
constexpr int small_rows(int vectors) {
    return vectors == 1 ? 12 : vectors <= 3 ? 8 : vectors == 4 ? 6 : 4;
}
#elif defined(__AVX2__)
constexpr int kSmallVectors = 2;
constexpr int small_rows(int vectors) {
    return vectors == 1 ? 8 : 6;
}
#else
constexpr int kSmallVectors = 1;
constexpr int small_rows(int) {
    return 2;
}
#endif

template <int M, int V>
void small_tile(const Product& p, const float* a, const float* b, int64_t k, float* c, const float* from) {
    const int64_t a_row = p.a_row, a_step = p.a_step, b_row = p.b_row;
    Vec acc[M][V] = {};
    if (from != nullptr) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) acc[m][v] = load(from + m * p.from_row + v * kLanes);
        }
    }
#pragma GCC unroll 2
    for (; k > 0; --k, a += a_step, b += b_row) {
        Vec columns[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) columns[v] = load(b + v * kLanes);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const Vec x = broadcast(a[m * a_row]);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) acc[m][v] = fma(x, columns[v], acc[m][v]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            float* to = c + m * p.c_row + v * kLanes;
            store(to, p.add ? load(to) + acc[m][v] : acc[m][v]);
        }
    }
}

template <int M, int V>
void small_rows_of(int64_t m, const Product& p, const float* a, const float* b, int64_t k, float* c,
                   const float* from) {
    if constexpr (M > 1) {
        if (m < M) return small_rows_of<M - 1, V>(m, p, a, b, k, c, from);
    }
    small_tile<M, V>(p, a, b, k, c, from);
}

// V vectors of columns, at most: rows in tiles of nearly equal size.
template <int V>
void small_strip(int64_t v, const Product& p, const float* a, const float* b, int64_t k, int64_t rows, float* c,
                 const float* from) {
    if constexpr (V > 1) {
        if (v < V) return small_strip<V - 1>(v, p, a, b, k, rows, c, from);
    }
    const int64_t tiles = (rows + small_rows(V) - 1) / small_rows(V), each = rows / tiles, more = rows % tiles;
    for (int64_t i = 0; i < tiles; ++i) {
        const int64_t m = each + (i < more);
        small_rows_of<small_rows(V), V>(m, p, a, b, k, c, from);
        a += m * p.a_row, c += m * p.c_row, from += m * p.from_row;
    }
}

// C = A @ B, or C += A @ B, for B (k x columns); columns in whole groups. The sum goes in blocks of kBlock terms.
static inline void multiply(Product p, const float* a, const float* b, int64_t k, int64_t rows, int64_t columns,
                            float* c, const float* from = nullptr) {
    if (rows == 0) return;
    for (; k > 0; k -= kBlock, a += kBlock * p.a_step, b += kBlock * p.b_row) {
        for (int64_t i = 0; i < columns; i += kSmallVectors * kLanes) {
            const int64_t v = least(kSmallVectors, (columns - i) / kLanes);
            small_strip<kSmallVectors>(v, p, a, b + i, least(kBlock, k), rows, c + i,
                                       from == nullptr ? nullptr : from + i);
        }
        from = nullptr, p.from_row = 0, p.add = true;
    }
}

}  // namespace s3t::S3T_ISA
