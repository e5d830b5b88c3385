// The one product under every op but attention, which multiplies small matrices (small.h): totals (rows x columns) += A
// (rows x k) @ B (k x columns), k at most one block of the sum. An output is one lane of one accumulator, whatever
// shares its tile: no tiling can change its bits, no NaN leaves its row or column.
#pragma once
#include "isa.h"

namespace s3t::S3T_ISA {

// How B lies in memory; the type of the rows says how A does. A step is one k, or two where bf16 lies in pairs: those
// of a pair are added second first, which is the order of the instruction VDPBF16PS.
enum class Format { kFloat, kHalf, kPairs };

struct Panel {
    const void* data;
    Format format;
    int64_t step, panel;         // bytes from a step to the next, and from 32 columns to the next 32
    const void* next = nullptr;  // what is read after this
};

struct Left {
    const void* data;
    int64_t row, step;  // bytes
};

// One block of a sum: k terms of the rows of A and the columns of B.
struct Block {
    Left a;
    Panel b;
    int64_t k;
};

// Columns of B that were not laid out: words of 32 bits, floats or pairs, of up to 32 columns.
struct Lines {
    const void* at[kPanel];
    int64_t count, words;
    Format format;
};

constexpr int64_t kFew = 2;  // rows for which columns are turned in registers

// Adds one block to the totals of up to kFew rows (tile.cpp).
void add_lines(const Left& a, int64_t rows, const Lines& b, float* total);

// Adds blocks, one after the other, to totals of 32 columns a row, the panels `apart` floats from each other
// (tile.cpp). The blocks have their strides in common.
void add_blocks(const Block* blocks, int64_t count, int64_t rows, int64_t columns, float* total, int64_t apart);

static inline int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static inline int64_t panels_of(int64_t columns) {
    return (columns + kPanel - 1) / kPanel;
}

#if defined(__AVX512BF16__)
constexpr bool kMultipliesPairs = true;
#else
constexpr bool kMultipliesPairs = false;
#endif

// Exchanges, for every pair of vectors D apart, the elements D apart: done for D = 1, 2, 4, ... it transposes.
template <int D = 1, std::size_t... E>
static inline void transpose(Vec* v, std::index_sequence<E...> elements) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
        if (i & D) continue;
        const Vec a = v[i], b = v[i + D];
        v[i] = __builtin_shufflevector(a, b, (E & D ? static_cast<int>(E) - D + kLanes : static_cast<int>(E))...);
        v[i + D] = __builtin_shufflevector(a, b, (E & D ? static_cast<int>(E) + kLanes : static_cast<int>(E) + D)...);
    }
    if constexpr (2 * D < kLanes) transpose<2 * D>(v, elements);
}

// Words i.. of kLanes columns, turned: v[w] has word i + w of each. Where fewer than kLanes are left the rest is zero.
static inline void load_turned(Vec* v, const void* const* columns, int64_t i, int64_t words) {
    const auto at = [=](int64_t j) { return static_cast<const char*>(columns[j]) + i * 4; };
    if (words >= kLanes) {
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) v[j] = load(at(j));
    } else {
        for (int j = 0; j < kLanes; ++j) {
            float part[kLanes] = {};
            std::memcpy(part, at(j), words * 4);
            v[j] = load(part);
        }
    }
    transpose(v, std::make_index_sequence<kLanes>{});
}

}  // namespace s3t::S3T_ISA
