// Reading rows of u, of s and of pools: 16 bytes at once where alignment allows, else element by element; zeros past
// the end and where there is no row. Half types stay packed, two to a register, as the tensor cores take them.
#pragma once
#include "common.cuh"

namespace s3t::cuda {

template <typename X>
__device__ inline uint32_t bits_of(X x) {
    return *reinterpret_cast<const uint16_t*>(&x);
}

template <typename X>
__device__ inline uint32_t pack2(float low, float high) {
    return bits_of(narrow<X>(low)) | bits_of(narrow<X>(high)) << 16;
}

// A row of a matrix; of type X, or fp32 to be rounded to X.
struct Row {
    const char* data;  // null: no row
    bool is_float;
};

// A call, so that the rare way does not cost the common one its registers.
template <typename X>
__device__ __noinline__ uint4 load8_singly(const char* data, bool is_float, int64_t k, int64_t end) {
    uint4 v = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (k + i < end) (&v.x)[i / 2] |= bits_of(narrow<X>(read_pool<X>(data, is_float, k + i))) << i % 2 * 16;
    }
    return v;
}

// What is known of rows. Same, Single: they are all there, begin at and have lengths of multiples of 16 bytes, and are
// of type X or fp32, all of them: loads do not branch then, and many are under way at once. Any: none of this.
enum class Rows { kSame, kSingle, kAny };

// Eight values k..k+7 of a half type. Wide, of any rows: 16 bytes may be read at once.
template <typename X, Rows What>
__device__ inline uint4 load8(Row row, int64_t k, int64_t end, bool wide) {
    if constexpr (What == Rows::kAny) {
        if (row.data == nullptr || k >= end) return make_uint4(0, 0, 0, 0);
        if (!wide) return load8_singly<X>(row.data, row.is_float, k, end);
        return row.is_float ? load8<X, Rows::kSingle>(row, k, end, true) : load8<X, Rows::kSame>(row, k, end, true);
    } else if constexpr (What == Rows::kSingle) {
        const float4* from = reinterpret_cast<const float4*>(row.data + 4 * k);
        const float4 a = __ldg(from), b = __ldg(from + 1);
        return make_uint4(pack2<X>(a.x, a.y), pack2<X>(a.z, a.w), pack2<X>(b.x, b.y), pack2<X>(b.z, b.w));
    } else {
        return __ldg(reinterpret_cast<const uint4*>(row.data + 2 * k));
    }
}

// What is known of all rows of the pools.
inline __host__ __device__ Rows rows_of(const s3t_pools& pools, bool wide) {
    const bool first = pools.w_type == S3T_F32, second = pools.w1_type == S3T_F32;
    if (!wide || (pools.n > 0 && pools.m > 0 && first != second)) return Rows::kAny;
    return (pools.n > 0 ? first : second) ? Rows::kSingle : Rows::kSame;
}

// Four values k..k+3 of an fp32 row. Wide: the row is there and aligned, with all four of them; loads do not branch.
template <bool kWide>
__device__ inline float4 load4(Row row, int64_t k, int64_t end) {
    const float* from = reinterpret_cast<const float*>(row.data) + k;
    if constexpr (kWide) return __ldg(reinterpret_cast<const float4*>(from));
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (row.data == nullptr || k >= end) return v;
    v.x = from[0];
    if (k + 1 < end) v.y = from[1];
    if (k + 2 < end) v.z = from[2];
    if (k + 3 < end) v.w = from[3];
    return v;
}

// The words of dropout for columns 4 * quad .. + 3 of a row, as a mask: bit i is set where column 4 * quad + i is kept.
__device__ inline uint32_t kept4(const s3t_dropout& dropout, int64_t group, int64_t row, int64_t quad, int64_t slot) {
    const Words words = philox(static_cast<uint64_t>(dropout.seeds[group]), static_cast<uint64_t>(dropout.rows[row]),
                               static_cast<uint32_t>(quad), static_cast<uint32_t>(slot));
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) kept |= (words.at[i] >= dropout.threshold ? 1u : 0u) << i;
    return kept;
}

// Selects the kept ones of eight packed values.
__device__ inline uint4 select8(uint4 v, uint32_t kept) {
    uint32_t* words = &v.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        words[i] &= (kept >> 2 * i & 1 ? 0xffffu : 0u) | (kept >> (2 * i + 1) & 1 ? 0xffff0000u : 0u);
    }
    return v;
}

}  // namespace s3t::cuda
