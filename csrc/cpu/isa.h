// One instruction set: a vector of floats, the fused multiply-add, and the conversions between fp32, fp16 and bf16.
// The flags of the compiler choose the set; S3T_ISA names the namespace. All sets give the same bits, but that the bf16
// dot product of AVX512_BF16 takes subnormal numbers for zero, in its sums too.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
    #include <immintrin.h>
#elif defined(__aarch64__)
    #include <arm_neon.h>
#endif

#include "kernels.h"

namespace s3t::S3T_ISA {

// A tile has up to kRows rows of vectors(rows) vectors: as many accumulators as the registers hold beside a step of B,
// and enough of them, few rows as there may be, to hide the latency of a fused multiply-add.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8;
constexpr int vectors(int rows) {
    return rows <= 2 ? 8 : rows <= 4 ? 4 : 2;
}
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6;
constexpr int vectors(int rows) {
    return rows == 1 ? 8 : rows == 2 ? 4 : 2;
}
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 6;
constexpr int vectors(int rows) {
    return rows <= 2 ? 8 : 4;
}
#else
constexpr int kLanes = 4, kRows = 2;
constexpr int vectors(int) {
    return 1;
}
#endif
typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));

template <typename V = Vec>
static inline V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <typename V>
static inline void store(void* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

#if defined(__AVX512F__)
static inline Vec broadcast(float x) {
    return _mm512_set1_ps(x);
}
static inline Vec fma(Vec a, Vec b, Vec c) {
    return _mm512_fmadd_ps(a, b, c);
}
#elif defined(__AVX2__)
static inline Vec broadcast(float x) {
    return _mm256_set1_ps(x);
}
static inline Vec fma(Vec a, Vec b, Vec c) {
    return _mm256_fmadd_ps(a, b, c);
}
#elif defined(__aarch64__)
static inline Vec broadcast(float x) {
    return (Vec)vdupq_n_f32(x);
}
static inline Vec fma(Vec a, Vec b, Vec c) {
    return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
static inline Vec broadcast(float x) {
    return Vec{x, x, x, x};
}

// The product of two floats is exact in double. Its sum with c is rounded there to odd (the last bit set where anything
// was lost), which makes the second rounding, to float, the only one (Boldo and Melquiond, 2008).
static inline Vec fma(Vec a, Vec b, Vec c) {
    typedef double Wide __attribute__((vector_size(32)));
    typedef int64_t Word __attribute__((vector_size(32)));
    const Wide product = __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide);
    const Wide addend = __builtin_convertvector(c, Wide), sum = product + addend, back = sum - product;
    const Wide lost = (product - (sum - back)) + (addend - back);
    const Word bits = (Word)sum;
    const Word inexact = (Word)(lost > 0) | (Word)(lost < 0);  // neither, for the NaN beside an infinite sum
    const Word even = (bits & 1) - 1;
    const Word step = ((Word)(lost < 0) ^ (Word)(sum < 0)) | 1;  // one unit towards what was lost
    return __builtin_convertvector((Wide)(bits + (inexact & even & step)), Vec);
}
#endif

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

static inline float from_bf16(uint16_t h) {
    return float_of(uint32_t{h} << 16);
}

static inline uint16_t to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40;  // a payload in the low half only must not turn into infinity
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

#if defined(__F16C__)
static inline float from_f16(uint16_t h) {
    return _cvtsh_ss(h);
}
static inline uint16_t to_f16(float x) {
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
}
#else
static inline float from_f16(uint16_t h) {
    const uint32_t sign = uint32_t{h} << 16 & 0x80000000, rest = h & 0x7fff;
    const uint32_t normal = (rest << 13) + 0x38000000;                                // exponent bias 15 to 127
    const uint32_t special = rest << 13 | (rest > 0x7c00 ? 0x7fc00000 : 0x7f800000);  // a NaN is made quiet
    const uint32_t tiny = bits_of(static_cast<float>(rest) * 0x1p-24f);
    return float_of(sign | (rest >= 0x7c00 ? special : rest >= 0x400 ? normal : tiny));
}

static inline uint16_t to_f16(float x) {
    const uint32_t sign = bits_of(x) >> 16 & 0x8000, rest = bits_of(x) & 0x7fffffff;
    const uint32_t normal = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;  // carries into infinity by itself
    const uint32_t tiny = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);          // 0.5 has the step of the subnormals
    const uint32_t special = rest > 0x7f800000 ? 0x7e00 | (rest >> 13 & 0x1ff) : 0x7c00;
    return static_cast<uint16_t>(sign | (rest >= 0x47800000 ? special : rest >= 0x38800000 ? normal : tiny));
}
#endif

// kLanes values of fp16 as floats.
static inline Vec load_f16(const void* from) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(0xffff, load<__m256i>(from));  // GCC warns of what the unmasked one leaves undefined
#elif defined(__F16C__)
    return _mm256_cvtph_ps(load<__m128i>(from));
#else
    uint16_t half[kLanes];
    std::memcpy(half, from, sizeof half);
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = from_f16(half[i]);
    return v;
#endif
}

// kLanes values of a type, as floats.
static inline Vec load_as(const void* from, s3t_type type) {
    typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
    if (type == S3T_F32) return load(from);
    if (type == S3T_F16) return load_f16(from);
    return (Vec)(__builtin_convertvector(load<Halves>(from), Bits) << 16);
}

// Writes kLanes floats as a type, to nearest even.
static inline void store_as(void* to, s3t_type type, Vec x) {
    typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
    if (type == S3T_F32) return store(to, x);
    if (type == S3T_BF16) {
        const Bits bits = (Bits)x, nan = (Bits)((bits & 0x7fffffff) > 0x7f800000);
        const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        return store(to, __builtin_convertvector((nan & (bits >> 16 | 0x40)) | (rounded & ~nan), Halves));
    }
#if defined(__AVX512F__)
    store(to, _mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    store(to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
    Halves half;
    for (int i = 0; i < kLanes; ++i) half[i] = to_f16(x[i]);
    store(to, half);
#endif
}

static inline int64_t size_of(s3t_type type) {
    return type == S3T_F32 ? 4 : 2;
}

static inline const void* at(const void* data, s3t_type type, int64_t index) {
    return static_cast<const char*>(data) + index * size_of(type);
}

static inline void* at(void* data, s3t_type type, int64_t index) {
    return static_cast<char*>(data) + index * size_of(type);
}

// Writes n floats as `type`, to nearest even.
static inline void store_row(void* to, s3t_type type, const float* from, int64_t n) {
    auto* half = static_cast<uint16_t*>(to);
    if (type == S3T_F32) {
        std::memcpy(to, from, n * 4);
    } else if (type == S3T_BF16) {
        for (int64_t i = 0; i < n; ++i) half[i] = to_bf16(from[i]);
    } else {
        int64_t i = 0;
#if defined(__F16C__)
        for (; i + 8 <= n; i += 8) {
            const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i), h);
        }
#endif
        for (; i < n; ++i) half[i] = to_f16(from[i]);
    }
}

// Reads n values of `type` as floats; `as` is the type of the rows, to which an fp32 pool is rounded on the way.
static inline void load_row(float* to, const void* from, s3t_type type, s3t_type as, int64_t n) {
    const auto* half = static_cast<const uint16_t*>(from);
    const auto* full = static_cast<const float*>(from);
    if (type == S3T_F32 && as == S3T_F32) {
        std::memcpy(to, from, n * 4);
    } else if (type == S3T_F32 && as == S3T_BF16) {
        for (int64_t i = 0; i < n; ++i) to[i] = from_bf16(to_bf16(full[i]));
    } else if (type == S3T_F32) {
        for (int64_t i = 0; i < n; ++i) to[i] = from_f16(to_f16(full[i]));
    } else if (type == S3T_BF16) {
        for (int64_t i = 0; i < n; ++i) to[i] = from_bf16(half[i]);
    } else {
        int64_t i = 0;
#if defined(__F16C__)
        for (; i + 8 <= n; i += 8) {
            const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i));
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(h));
        }
#endif
        for (; i < n; ++i) to[i] = from_f16(half[i]);
    }
}

}  // namespace s3t::S3T_ISA
