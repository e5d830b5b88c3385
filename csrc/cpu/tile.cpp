// totals += A @ B for one block of the sum: a tile of rows and vectors at a time, its accumulators in registers. Runs
// at the peak of the fused multiply-adds from about 8 rows on; below that it is bound by reading B, which it asks for
// kAhead steps early.
#include "tile.h"

namespace s3t::S3T_ISA {
namespace {

constexpr int kIn = kPanel / kLanes;  // vectors of a panel
constexpr int64_t kAhead = 32, kLine = 64;

template <Format F>
constexpr int64_t kBytes = F == Format::kHalf ? 2 * kLanes : 4 * kLanes;  // of a vector of B in memory

template <Format F>
constexpr int64_t steps_of(int64_t k) {
    return F == Format::kPairs ? (k + 1) / 2 : k;
}

// Terms of a step: one, but two where a pair is multiplied as floats.
template <Format F>
constexpr int kTerms = F == Format::kPairs && !kMultipliesPairs ? 2 : 1;

template <Format F>
inline Vec term_of(Vec words, int term) {
    if constexpr (kTerms<F> == 1) return words;
    return (Vec)(term == 0 ? (Bits)words & 0xffff0000 : (Bits)words << 16);
}

template <Format F>
inline Vec columns_at(const char* from, int term) {
    if constexpr (F == Format::kHalf) return load_f16(from);
    return term_of<F>(load(from), term);
}

template <Format F>
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512BF16__)
    if constexpr (F == Format::kPairs) return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#endif
    return fma(a, b, c);
}

// M rows from `left` bytes on, V vectors, of one panel or of several whole ones, from `right` bytes on. A step asks
// early for a line of cache at `ahead`, or where that is null for its own columns kAhead steps on.
template <Format F, int M, int V>
void add_tile(const Block* blocks, int64_t count, int64_t left, int64_t right, const char* ahead, float* total,
              int64_t apart) {
    const int64_t row = blocks->a.row, a_step = blocks->a.step, b_step = blocks->b.step, panel = blocks->b.panel;
    for (const Block* block = blocks; block < blocks + count; ++block) {
        const char* x = static_cast<const char*>(block->a.data) + left;
        const char* from = static_cast<const char*>(block->b.data) + right;
        const char* early = ahead == nullptr ? from + kAhead * b_step : ahead;
        const int64_t early_step = ahead == nullptr ? b_step : kLine;
        Vec acc[M][V] = {};
#pragma GCC unroll 2
        for (int64_t i = steps_of<F>(block->k); i > 0; --i) {
#pragma GCC unroll 2
            for (int term = 0; term < kTerms<F>; ++term) {
                Vec columns[V];
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) {
                    const int64_t at = v / kIn * panel + v % kIn * kBytes<F>;
                    columns[v] = columns_at<F>(from + at, term);
                    if (term == 0) __builtin_prefetch(early + at);
                }
                const char* at = x + (kTerms<F> == 2 && term == 0 ? a_step / 2 : 0);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    const Vec a = broadcast(load<float>(at + m * row));
#pragma GCC unroll 8
                    for (int v = 0; v < V; ++v) acc[m][v] = multiply_add<F>(a, columns[v], acc[m][v]);
                }
            }
            x += a_step, from += b_step, early += early_step;
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                float* to = total + v / kIn * apart + m * kPanel + v % kIn * kLanes;
                store(to, load(to) + acc[m][v]);
            }
        }
    }
}

// Vectors [v, end) by tiles of V, and what is left over by smaller ones.
template <Format F, int M, int V>
void add_columns(const Block* blocks, int64_t count, int64_t left, int64_t v, int64_t end, const char* ahead,
                 float* total, int64_t apart) {
    for (; v + V <= end; v += V) {
        const int64_t right = v / kIn * blocks->b.panel + v % kIn * kBytes<F>;
        add_tile<F, M, V>(blocks, count, left, right, ahead, total + v / kIn * apart + v % kIn * kLanes, apart);
    }
    if constexpr (V > 1) {
        if (v < end) add_columns<F, M, V / 2>(blocks, count, left, v, end, ahead, total, apart);
    }
}

// Rows that do not fill a tile get a tile of their own size: a padded row would be read from nowhere.
template <Format F, int M>
void add_rows(const Block* blocks, int64_t count, int64_t m, int64_t left, int64_t v, int64_t end, const char* ahead,
              float* total, int64_t apart) {
    if (m == M) {
        add_columns<F, M, vectors(M)>(blocks, count, left, v, end, ahead, total, apart);
    } else if constexpr (M > 1) {
        add_rows<F, M - 1>(blocks, count, m, left, v, end, ahead, total, apart);
    }
}

template <Format F>
void add_tiles(const Block* blocks, int64_t count, int64_t rows, int64_t columns, float* total, int64_t apart) {
    const int64_t tiles = (rows + kRows - 1) / kRows, all = (columns + kLanes - 1) / kLanes;
    // With many rows a panel stays in the nearest cache while all of them pass, and the first two tiles ask for the
    // panel after it, a line a step: about as fast as memory gives. Few rows take all panels at once.
    const int64_t width = tiles > 1 ? kIn : all, part = steps_of<F>(blocks->k) * kLine;
    for (int64_t v = 0; v < all; v += width) {
        const auto* b = static_cast<const char*>(blocks->b.data) + (v + width) / kIn * blocks->b.panel;
        const auto* next = v + width < all ? b : static_cast<const char*>(blocks->b.next);
        for (int64_t i = 0; i < tiles; ++i) {  // of nearly equal size
            const int64_t from = rows * i / tiles, m = rows * (i + 1) / tiles - from;
            const char* ahead = next == nullptr || blocks->b.panel == 0 || i > 1 ? nullptr : next + i * part;
            add_rows<F, kRows>(blocks, count, m, from * blocks->a.row, v, least(v + width, all), ahead,
                               total + from * kPanel, apart);
        }
    }
}

// V vectors of columns, kLanes steps at a time: turned in registers, then multiplied.
template <Format F, int M, int V>
void add_turned(const Left& a, const Lines& b, int64_t column, float* total) {
    static const float zeros[kBlock] = {};
    const void* from[V * kLanes];
    for (int64_t j = 0; j < V * kLanes; ++j) {
        from[j] = column + j < b.count ? b.at[column + j] : zeros;
    }
    const char* x = static_cast<const char*>(a.data);
    Vec acc[M][V] = {};
    for (int64_t i = 0; i < b.words; i += kLanes, x += kLanes * a.step) {
        const int64_t words = least(kLanes, b.words - i);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            Vec lines[kLanes];
            load_turned(lines, from + v * kLanes, i, words);
#pragma GCC unroll 16
            for (int w = 0; w < kLanes; ++w) {
                if (w == words) break;
#pragma GCC unroll 2
                for (int term = 0; term < kTerms<F>; ++term) {
                    const char* at = x + w * a.step + (kTerms<F> == 2 && term == 0 ? a.step / 2 : 0);
                    const Vec columns = term_of<F>(lines[w], term);
#pragma GCC unroll 4
                    for (int m = 0; m < M; ++m) {
                        acc[m][v] = multiply_add<F>(broadcast(load<float>(at + m * a.row)), columns, acc[m][v]);
                    }
                }
            }
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int v = 0; v < V; ++v) {
            float* to = total + m * kPanel + column + v * kLanes;
            store(to, load(to) + acc[m][v]);
        }
    }
}

template <Format F, int M>
void add_lines_of(const Left& a, int64_t rows, const Lines& b, float* total) {
    if constexpr (M > 1) {
        if (rows < M) return add_lines_of<F, M - 1>(a, rows, b, total);
    }
    int64_t c = 0;
    for (; c + kLanes < b.count; c += 2 * kLanes) add_turned<F, M, 2>(a, b, c, total);
    if (c < b.count) add_turned<F, M, 1>(a, b, c, total);
}

}  // namespace

void add_lines(const Left& a, int64_t rows, const Lines& b, float* total) {
    if (b.format == Format::kPairs) {
        add_lines_of<Format::kPairs, kFew>(a, rows, b, total);
    } else {
        add_lines_of<Format::kFloat, kFew>(a, rows, b, total);
    }
}

void add_blocks(const Block* blocks, int64_t count, int64_t rows, int64_t columns, float* total, int64_t apart) {
    switch (blocks->b.format) {
        case Format::kFloat:
            return add_tiles<Format::kFloat>(blocks, count, rows, columns, total, apart);
        case Format::kHalf:
            return add_tiles<Format::kHalf>(blocks, count, rows, columns, total, apart);
        case Format::kPairs:
            return add_tiles<Format::kPairs>(blocks, count, rows, columns, total, apart);
    }
}

}  // namespace s3t::S3T_ISA
