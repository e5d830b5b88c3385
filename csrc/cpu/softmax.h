// Rows of scores, padded to whole groups of kWide: their greatest, their exponentials, their sums. A sum adds the
// groups in order, then halves of a group.
#pragma once
#include "small.h"

namespace s3t::S3T_ISA {

constexpr int kIn = kWide / kLanes;  // vectors of a group
constexpr float kLowest = -__builtin_inff();

// e^x for x <= 0, by 2^n e^r with |r| <= ln(2) / 2; e^r is 1 + r and the polynomial of r^2 .. r^6 whose greatest
// relative error is least, 3e-9. 0 below the normal numbers.
static inline Vec exp_of(Vec x) {
    const Vec magic = broadcast(0x1.8p23f);  // its sum with a small number has no fraction left
    const Vec shifted = fma(x, broadcast(0x1.715476p0f), magic), n = shifted - magic;
    Vec r = fma(n, broadcast(-0x1.62e4p-1f), x);  // ln(2), in a part of few digits and the rest
    r = fma(n, broadcast(-0x1.7f7d1cp-20f), r);
    Vec y = broadcast(0x1.6a2434p-10f);
    y = fma(y, r, broadcast(0x1.1239e2p-7f));
    y = fma(y, r, broadcast(0x1.5558f2p-5f));
    y = fma(y, r, broadcast(0x1.555492p-3f));
    y = fma(y, r, broadcast(0x1.fffffcp-2f));
    y = fma(y, r, broadcast(1.0f));
    y = fma(y, r, broadcast(1.0f));
#if defined(__AVX512F__)
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, broadcast(-87.0f), _CMP_NLT_UQ), y, n);
#else
    const Bits tiny = (Bits)(x < broadcast(-87.0f));
    return (Vec)((Bits)(y * (Vec)(((Bits)shifted - (bits_of(0x1.8p23f) - 127)) << 23)) & ~tiny);
#endif
}

struct Add {
    static Vec of(Vec a, Vec b) { return a + b; }
};

struct Greater {  // b where a is NaN
    static Vec of(Vec a, Vec b) {
#if defined(__AVX512F__)
        return _mm512_maskz_max_ps(0xffff, a, b);
#else
        const Bits more = (Bits)(a > b);
        return (Vec)(((Bits)a & more) | ((Bits)b & ~more));
#endif
    }
};

template <typename Fold, int D = kLanes / 2, std::size_t... E>
static inline Vec folded(Vec v, std::index_sequence<E...> elements) {
    v = Fold::of(v, __builtin_shufflevector(v, v, (E ^ D)...));
    if constexpr (D > 1) return folded<Fold, D / 2>(v, elements);
    return v;
}

// A group folded onto itself, half onto half: the result in every lane.
template <typename Fold>
static inline Vec folded(Vec* group) {
    for (int width = kIn / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) group[i] = Fold::of(group[i], group[i + width]);
    }
    return folded<Fold>(group[0], std::make_index_sequence<kLanes>{});
}

// NaN is passed over here; the sum will be NaN.
static inline Vec greatest(const float* x, int64_t wide) {
    Vec most[kIn];
    for (Vec& part : most) part = broadcast(kLowest);
    for (int64_t c = 0; c < wide; c += kWide) {
        for (int j = 0; j < kIn; ++j) most[j] = Greater::of(load(x + c + j * kLanes), most[j]);
    }
    return folded<Greater>(most);
}

// Puts p = e^(x - most) by in the place of a row of scores; gives the sum of p, or where dp is given of p dp.
static inline Vec raise(float* x, const float* dp, int64_t wide, float most, float by) {
    Vec sums[kIn] = {};
    for (int64_t c = 0; c < wide; c += kWide) {
        for (int j = 0; j < kIn; ++j) {
            const Vec p = exp_of(load(x + c + j * kLanes) - broadcast(most)) * broadcast(by);
            store(x + c + j * kLanes, p);
            sums[j] = dp == nullptr ? sums[j] + p : fma(p, load(dp + c + j * kLanes), sums[j]);
        }
    }
    return folded<Add>(sums);
}

}  // namespace s3t::S3T_ISA
