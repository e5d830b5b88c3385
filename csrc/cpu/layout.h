// Lays A and B out as the product reads them, where they do not lie so already: halves widened or put in pairs, columns
// turned, ends padded with zeros.
#pragma once
#include "tile.h"

namespace s3t::S3T_ISA {

// A as it is handed in: type and strides (in elements) of the rows and of k, one of which is 1.
struct Rows {
    const void* data;
    s3t_type type;
    int64_t row, step;
};

// Room for A where it must be converted: kChunk rows of a block as floats.
constexpr int64_t kRoom = kChunk * kBlock;

// Gives A as add_block reads it: in place where it can be, else converted into `room`. An odd k gets a zero to its
// pair.
static inline Left left_of(Rows a, int64_t rows, int64_t k, float* room) {
    if (a.type == S3T_F32) return {a.data, a.row * 4, a.step * 4};
    const bool pairs = a.type == S3T_BF16, odd = pairs && k % 2 != 0;
    if (pairs && kMultipliesPairs) {
        if (a.step == 1 && !odd) return {a.data, a.row * 2, 4};
        auto* to = reinterpret_cast<uint16_t*>(room);
        const auto* from = static_cast<const uint16_t*>(a.data);
        if (a.step == 1) {
            for (int64_t i = 0; i < rows; ++i) {
                std::memcpy(to + i * 2 * kBlock, from + i * a.row, k * 2);
                to[i * 2 * kBlock + k] = 0;
            }
            return {room, kBlock * 4, 4};
        }
        auto* word = reinterpret_cast<uint32_t*>(room);
        for (int64_t j = 0; j < k; j += 2, word += rows) {
            const uint16_t *first = from + j * a.step, *second = first + (j + 1 < k ? a.step : 0);
            const uint32_t keep = j + 1 < k ? 0xffff0000 : 0;
            for (int64_t i = 0; i < rows; ++i) word[i] = first[i] | (uint32_t{second[i]} << 16 & keep);
        }
        return {room, 4, rows * 4};
    }
    if (a.step == 1) {
        for (int64_t i = 0; i < rows; ++i) {
            load_row(room + i * kBlock, at(a.data, a.type, i * a.row), a.type, a.type, k);
            if (odd) room[i * kBlock + k] = 0;
        }
        return {room, kBlock * 4, pairs ? 8 : 4};
    }
    for (int64_t j = 0; j < k; ++j) load_row(room + j * rows, at(a.data, a.type, j * a.step), a.type, a.type, rows);
    if (odd) std::memset(room + k * rows, 0, rows * 4);
    return {room, 4, rows * (pairs ? 8 : 4)};
}

// Lays two rows of 32 halves out in pairs.
static inline void pair_up(const uint16_t* first, const uint16_t* second, float* to) {
    typedef uint16_t Line __attribute__((vector_size(kPanel * 2)));
    Line a, b;
    std::memcpy(&a, first, sizeof a);
    std::memcpy(&b, second, sizeof b);
    const Line low = __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41,
                                             10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
    const Line high = __builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24,
                                              56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
    std::memcpy(to, &low, sizeof low);
    std::memcpy(to + kPanel / 2, &high, sizeof high);
}

// B[i][c] = from[i * stride + c]: in place where the tiles can read it so and few will, else a copy padded with zeros.
// One panel where it is copied, as many as `columns` has where it is not.
static inline Panel panel_of_rows(const void* from, s3t_type type, s3t_type as, int64_t stride, int64_t k,
                                  int64_t columns, int64_t rows, float* scratch) {
    const bool plain = type == as && columns % kPanel == 0 && rows <= 2 * kRows;
    if (plain && type == S3T_F32) return {from, Format::kFloat, stride * 4, kPanel * 4};
    if (plain && type == S3T_F16) return {from, Format::kHalf, stride * 2, kPanel * 2};
    const int64_t here = least(columns, kPanel);
    const auto ask_early = [&](const void* row) {  // the panel after this one
        if (columns > kPanel) __builtin_prefetch(at(row, type, kPanel));
        if (columns > kPanel && type == S3T_F32) __builtin_prefetch(at(row, type, kPanel + kPanel / 2));
    };
    if (as != S3T_BF16) {
        for (int64_t i = 0; i < k; ++i) {
            ask_early(at(from, type, i * stride));
            load_row(scratch + i * kPanel, at(from, type, i * stride), type, as, here);
            std::memset(scratch + i * kPanel + here, 0, (kPanel - here) * 4);
        }
        return {scratch, Format::kFloat, kPanel * 4, 0};
    }
    int64_t i = 0;
    if (type == S3T_BF16 && here == kPanel) {
        const auto* row = static_cast<const uint16_t*>(from);
        for (; i + 1 < k; i += 2, row += 2 * stride) {
            ask_early(row);
            ask_early(row + stride);
            pair_up(row, row + stride, scratch + i / 2 * kPanel);
        }
    }
    for (; i < k; i += 2) {
        uint16_t rounded[2][kPanel] = {};
        for (int64_t j = 0; j < least(2, k - i); ++j) {
            const void* row = at(from, type, (i + j) * stride);
            if (type == S3T_BF16) {
                std::memcpy(rounded[j], row, here * 2);
            } else {
                store_row(rounded[j], S3T_BF16, static_cast<const float*>(row), here);
            }
        }
        pair_up(rounded[0], rounded[1], scratch + i / 2 * kPanel);
    }
    return {scratch, Format::kPairs, kPanel * 4, 0};
}

// A column of B: k values that lie together, of a type of their own.
struct Column {
    const void* data;
    s3t_type type;
};

// Gives the words of a column: in place where they are of the type of the rows, floats or whole pairs, else made in
// `room`, a block of floats.
static inline const void* words_of(const Column& column, s3t_type as, int64_t k, float* room) {
    const bool pairs = as == S3T_BF16;
    if (column.type == as && (as == S3T_F32 || (pairs && k % 2 == 0))) return column.data;
    if (!pairs) {
        load_row(room, column.data, column.type, as, k);
        return room;
    }
    auto* half = reinterpret_cast<uint16_t*>(room);
    if (column.type == S3T_BF16) {
        std::memcpy(half, column.data, k * 2);
    } else {
        store_row(half, S3T_BF16, static_cast<const float*>(column.data), k);
    }
    if (k % 2 != 0) half[k] = 0;
    return room;
}

// For add_lines. What cannot stay in place goes to `room`, a block of floats for each column.
static inline Lines lines_of(const Column* columns, s3t_type as, int64_t k, int64_t count, float* room) {
    Lines lines;
    lines.count = count;
    lines.words = as == S3T_BF16 ? (k + 1) / 2 : k;
    lines.format = as == S3T_BF16 ? Format::kPairs : Format::kFloat;
    for (int64_t c = 0; c < count; ++c) lines.at[c] = words_of(columns[c], as, k, room + c * kBlock);
    return lines;
}

// B[i][c] = columns[c].data[i], padded with zero columns to a whole vector.
static inline Panel panel_of_columns(const Column* columns, s3t_type as, int64_t k, int64_t count, float* scratch) {
    static const float zeros[kBlock] = {};
    alignas(64) float room[kLanes * kBlock];
    for (int64_t c = 0; c < count; c += kLanes) {
        const Lines lines = lines_of(columns + c, as, k, least(kLanes, count - c), room);
        const void* from[kLanes];
        for (int64_t j = 0; j < kLanes; ++j) from[j] = j < lines.count ? lines.at[j] : zeros;
        for (int64_t i = 0; i < lines.words; i += kLanes) {
            const int64_t words = least(kLanes, lines.words - i);
            Vec v[kLanes];
            load_turned(v, from, i, words);
#pragma GCC unroll 16
            for (int j = 0; j < kLanes; ++j) {
                if (j < words) store(scratch + (i + j) * kPanel + c, v[j]);
            }
        }
    }
    return {scratch, as == S3T_BF16 ? Format::kPairs : Format::kFloat, kPanel * 4, 0};
}

}  // namespace s3t::S3T_ISA
