// The product under expand and outer: c (16,64) = a (16,k) b (k,64) for one warp, the rows of b contiguous.
// Lane l owns rows l / 4 and l / 4 + 8 and the 16 columns from l % 4 * 16 on, so that it moves them 16 bytes at a time.
// It loads columns l / 4 * 8 .. + 7 of four rows of b and transposes pairs of them in registers: column l / 4 * 8 + i
// is column l / 4 of the i-th matrix that a tensor core takes. fp32 is one chain of fmaf for each output.
#pragma once
#include "rows.cuh"

namespace s3t::cuda {

constexpr int kStrip = 64, kHeight = 16;

// Rows k of b, columns from its first one on; a row is `stride` bytes after the one before.
struct StripRows {
    const char* data;
    int64_t stride, columns;  // columns that exist
    bool is_float, wide;
    // Dropout of elements: row k has the key rows[row + k]; column 0 is `column` of its matrix. No seeds: none.
    s3t_dropout dropout;
    int64_t group, slot, row, column;

    __device__ Row at(int64_t k) const { return {data + k * stride, is_float}; }
};

// Elements (i,k) of a: data[i * row + k * step].
template <typename X>
struct StripFactors {
    const X* data;
    int64_t row, step;
    int rows;  // that exist
};

// Lane's outputs: of[h][i] is row l / 4 + 8 h, column l % 4 * 16 + i.
struct Strip {
    float of[2][16];
};

template <typename X, bool Drops>
__device__ inline void multiply(Strip& c, const StripFactors<X>& a, const StripRows& b, int64_t terms) {
    const int lane = threadIdx.x % kWarp, row = lane / 4, part = lane % 4;
    const bool exists[2] = {row < a.rows, row + 8 < a.rows};
    const X* factors = a.data + row * a.row;
    if constexpr (kIsFloat<X>) {
        for (int64_t k = 0; k < terms; ++k) {
            float x[2];
            for (int h = 0; h < 2; ++h) x[h] = exists[h] ? factors[8 * h * a.row + k * a.step] : 0.0f;
#pragma unroll
            for (int i = 0; i < 16; i += 4) {
                const int column = part * 16 + i;
                float4 y = load4(b.at(k), column, b.columns, b.wide);
                uint32_t kept = 0xf;
                if (Drops && b.dropout.seeds != nullptr) {
                    kept = kept4(b.dropout, b.group, b.row + k, (b.column + column) / 4, b.slot);
                }
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float value = kept >> j & 1 ? (&y.x)[j] : 0.0f;
                    c.of[0][i + j] = __fmaf_rn(x[0], value, c.of[0][i + j]);
                    c.of[1][i + j] = __fmaf_rn(x[1], value, c.of[1][i + j]);
                }
            }
        }
    } else {
        float sums[8][4] = {};
        const int column = row * 8;
        for (int64_t k0 = 0; k0 < terms; k0 += 16) {
            uint4 rows[4];
            uint32_t x[4] = {};  // rows l / 4 and + 8 of terms 0 and 1 of this lane, then of terms 2 and 3
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int64_t k = k0 + part * 4 + i;
                rows[i] = make_uint4(0, 0, 0, 0);
                if (k >= terms) continue;
                rows[i] = load8<X>(b.at(k), column, b.columns, b.wide);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    if (exists[h]) x[i / 2 * 2 + h] |= bits_of(factors[8 * h * a.row + k * a.step]) << i % 2 * 16;
                }
                if (Drops && b.dropout.seeds != nullptr) {
                    const int64_t quad = (b.column + column) / 4;
                    const uint32_t low = kept4(b.dropout, b.group, b.row + k, quad, b.slot);
                    rows[i] = select8(rows[i], low | kept4(b.dropout, b.group, b.row + k, quad + 1, b.slot) << 4);
                }
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const uint32_t pick = i % 2 == 0 ? 0x5410 : 0x7632;
                const uint32_t y[2] = {__byte_perm((&rows[0].x)[i / 2], (&rows[1].x)[i / 2], pick),
                                       __byte_perm((&rows[2].x)[i / 2], (&rows[3].x)[i / 2], pick)};
                mma<X>(sums[i], x, y);
            }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) c.of[e / 2][e % 2 * 8 + i] = sums[i][e];
        }
    }
}

// Reads eight neighbours from `column` on as fp32; those past the last are zero.
template <typename X>
__device__ inline void load8_widened(float* to, const X* from, int64_t column, int64_t columns, bool wide) {
    constexpr int kVector = 16 / sizeof(X);
#pragma unroll
    for (int i = 0; i < 8; i += kVector) {
        alignas(16) X values[kVector] = {};
        if (wide && column + i < columns) {
            *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(from + column + i);
        } else if (!wide) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                if (column + i + j < columns) values[j] = from[column + i + j];
            }
        }
#pragma unroll
        for (int j = 0; j < kVector; ++j) to[i + j] = widen(values[j]);
    }
}

// Writes eight neighbours from `column` on, 16 bytes at a time where rows allow it.
template <typename X>
__device__ inline void store8(X* to, const float* from, int64_t column, int64_t columns, bool wide) {
    if (column >= columns) return;
    if (!wide) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (column + i < columns) to[column + i] = narrow<X>(from[i]);
        }
    } else if constexpr (kIsFloat<X>) {
        *reinterpret_cast<float4*>(to + column) = make_float4(from[0], from[1], from[2], from[3]);
        // Rows are multiples of 16 bytes, four of these values: the second half may be past the end.
        if (column + 4 < columns) {
            *reinterpret_cast<float4*>(to + column + 4) = make_float4(from[4], from[5], from[6], from[7]);
        }
    } else {
        *reinterpret_cast<uint4*>(to + column) = make_uint4(pack2<X>(from[0], from[1]), pack2<X>(from[2], from[3]),
                                                            pack2<X>(from[4], from[5]), pack2<X>(from[6], from[7]));
    }
}

}  // namespace s3t::cuda
