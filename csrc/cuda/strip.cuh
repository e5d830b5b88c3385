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
    int rows;    // that exist
    bool fours;  // step is 1, terms are a multiple of 4, and four elements from k = 4 i on may be read at once
};

// Lane's outputs: of[h][i] is row l / 4 + 8 h, column l % 4 * 16 + i.
struct Strip {
    float of[2][16];
};

// Adds a b to c, one chain of fmaf for each output, in order of k. Wide: a column that does not exist is the first one,
// and what comes of it is not written.
template <bool Drops, bool kWide, int Unroll>
__device__ inline void multiply_chain(Strip& c, const StripFactors<float>& a, const StripRows& b, int terms) {
    const int row = threadIdx.x % kWarp / 4, part = threadIdx.x % 4;
    const float* factors[2] = {a.data + min(row, a.rows - 1) * a.row, a.data + min(row + 8, a.rows - 1) * a.row};
#pragma unroll(Unroll)
    for (int k = 0; k < terms; ++k) {
        const float x[2] = {factors[0][k * a.step], factors[1][k * a.step]};
        float4 y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = part * 16 + i * 4;
            y[i] = load4<kWide>(b.at(k), kWide && column >= b.columns ? 0 : column, b.columns);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t kept = 0xf;
            if (Drops && b.dropout.seeds != nullptr) {
                kept = kept4(b.dropout, b.group, b.row + k, (b.column + part * 16) / 4 + i, b.slot);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float value = kept >> j & 1 ? (&y[i].x)[j] : 0.0f;
                c.of[0][i * 4 + j] = __fmaf_rn(x[0], value, c.of[0][i * 4 + j]);
                c.of[1][i * 4 + j] = __fmaf_rn(x[1], value, c.of[1][i * 4 + j]);
            }
        }
    }
}

// Terms k..k+3 of rows l / 4 and + 8, as a tensor core takes them.
template <typename X>
__device__ inline void load_factors(uint32_t (&x)[4], const StripFactors<X>& a, int k, int terms) {
    const int row = threadIdx.x % kWarp / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const X* from = a.data + min(row + 8 * h, a.rows - 1) * a.row;  // a row that is not there is not written
        if (a.fours) {
            const uint2 v = __ldg(reinterpret_cast<const uint2*>(from + min(k, terms - 4)));
            x[h] = k < terms ? v.x : 0;
            x[h + 2] = k < terms ? v.y : 0;
        } else {
            uint32_t v[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                v[i] = bits_of(from[min(k + i, terms - 1) * a.step]);
                v[i] = k + i < terms ? v[i] : 0;
            }
            x[h] = v[0] | v[1] << 16;
            x[h + 2] = v[2] | v[3] << 16;
        }
    }
}

// Adds a b to c on tensor cores, 16 terms at a time: lane l % 4 brings terms l % 4 * 4 .. + 3. Loads never branch: what
// does not exist is read from the last term or the first column, which are there and live, and selected away.
template <typename X, bool Drops, Rows What, int Unroll>
__device__ inline void multiply_steps(Strip& c, const StripFactors<X>& a, const StripRows& b, int terms) {
    const int part = threadIdx.x % 4, mine = threadIdx.x % kWarp / 4 * 8, column = mine < b.columns ? mine : 0;
    float sums[8][4];
#pragma unroll
    for (int i = 0; i < 32; ++i) sums[i % 8][i / 8] = c.of[i / 16][i % 16];
#pragma unroll(Unroll)
    for (int k0 = 0; k0 < terms; k0 += 16) {
        uint4 rows[4];
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            rows[i] = load8<X, What>(b.at(min(k0 + part * 4 + i, terms - 1)), column, b.columns, b.wide);
        }
        load_factors(x, a, k0 + part * 4, terms);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int k = k0 + part * 4 + i;
            if (k >= terms) rows[i] = make_uint4(0, 0, 0, 0);
            if (Drops && b.dropout.seeds != nullptr && k < terms) {
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
    for (int i = 0; i < 32; ++i) c.of[i / 16][i % 16] = sums[i % 8][i / 8];
}

template <typename X, bool Drops, int Unroll>
__device__ inline void multiply(Strip& c, const StripFactors<X>& a, const StripRows& b, int terms) {
    if constexpr (kIsFloat<X>) {
        b.wide ? multiply_chain<Drops, true, Drops ? 1 : 2 * Unroll>(c, a, b, terms)
               : multiply_chain<Drops, false, 1>(c, a, b, terms);
    } else if (!b.wide) {
        multiply_steps<X, Drops, Rows::kAny, 1>(c, a, b, terms);
    } else if (b.is_float) {
        multiply_steps<X, Drops, Rows::kSingle, 1>(c, a, b, terms);
    } else {
        multiply_steps<X, Drops, Rows::kSame, Unroll>(c, a, b, terms);
    }
}

// Eight neighbours of a row of X as words, as they lie in memory.
template <typename X>
struct Eight {
    uint32_t words[2 * sizeof(X)];

    __device__ float at(int i) const {
        if constexpr (kIsFloat<X>) {
            return __uint_as_float(words[i]);
        } else {
            const auto bits = static_cast<uint16_t>(words[i / 2] >> i % 2 * 16);
            return widen(*reinterpret_cast<const X*>(&bits));
        }
    }
};

// Reads columns from `column` on; those past the last are zero. Wide: 16 bytes at a time.
template <typename X>
__device__ inline Eight<X> read8(const X* from, int64_t column, int64_t columns, bool wide) {
    constexpr int kVector = 16 / sizeof(X);
    Eight<X> v{};
#pragma unroll
    for (int i = 0; i < 8; i += kVector) {
        if (wide && column + i < columns) {
            const uint4 x = *reinterpret_cast<const uint4*>(from + column + i);
            uint32_t* to = v.words + i / kVector * 4;
            to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (wide || column + i >= columns) continue;
        if constexpr (kIsFloat<X>) {
            v.words[i] = __float_as_uint(from[column + i]);
        } else {
            v.words[i / 2] |= bits_of(from[column + i]) << i % 2 * 16;
        }
    }
    return v;
}

template <typename X>
__device__ inline void write8(X* to, const float* from, int64_t column, int64_t columns, bool wide) {
    constexpr int kVector = 16 / sizeof(X);
#pragma unroll
    for (int i = 0; i < 8; i += kVector) {
        if (!wide || column + i >= columns) continue;
        if constexpr (kIsFloat<X>) {
            *reinterpret_cast<float4*>(to + column + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
        } else {
            *reinterpret_cast<uint4*>(to + column) = make_uint4(pack2<X>(from[0], from[1]), pack2<X>(from[2], from[3]),
                                                                pack2<X>(from[4], from[5]), pack2<X>(from[6], from[7]));
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (!wide && column + i < columns) to[column + i] = narrow<X>(from[i]);
    }
}

}  // namespace s3t::cuda
