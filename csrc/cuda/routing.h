// The routing table on a device: which rows, groups and adapters a block works on. Plain C++, so that a host can test
// it.
#pragma once
#include "../philox.h"

namespace s3t::cuda {

struct Span {
    int64_t group, first, last;  // rows first..last-1 of one group
};

S3T_ANYWHERE inline int64_t row_of(const s3t_table& table, int64_t rows, int64_t group) {
    return table.offsets == nullptr ? (group == 0 ? 0 : rows) : table.offsets[group];
}

S3T_ANYWHERE inline int64_t id_of(const s3t_table& table, int64_t group, int64_t slot) {
    return table.ids[group * table.group_stride + slot * table.slot_stride];
}

// Tiles of `height` rows never mix groups, and are numbered without a sum over groups: those of group g begin at
// offsets[g] / height + g, which leaves room for all of them. A number without rows is an empty tile.
S3T_ANYWHERE inline int64_t tile_numbers(int64_t rows, int64_t groups, int64_t height) {
    return rows / height + groups;
}

S3T_ANYWHERE inline int64_t first_tile(const s3t_table& table, int64_t rows, int64_t group, int64_t height) {
    return row_of(table, rows, group) / height + group;
}

S3T_ANYWHERE inline Span span_of(const s3t_table& table, int64_t rows, int64_t group, int64_t tile, int64_t height) {
    const int64_t end = row_of(table, rows, group + 1);
    const int64_t first = row_of(table, rows, group) + (tile - first_tile(table, rows, group, height)) * height;
    return {group, first, first + height < end ? first + height : end};  // empty: last <= first
}

// One adapter's matrix (r, D); no data where the id is dead.
struct Adapter {
    const char* data;
    bool is_float;  // fp32, to be rounded on reading
};

S3T_ANYWHERE inline Adapter adapter_of(const s3t_pools& pools, int64_t id) {
    const int64_t size = pools.rank * pools.dim;
    if (id >= 0 && id < pools.n) {
        const bool is_float = pools.w_type == S3T_F32;
        return {static_cast<const char*>(pools.w) + id * size * (is_float ? 4 : 2), is_float};
    }
    if (id >= pools.n && id < pools.n + pools.m) {
        const bool is_float = pools.w1_type == S3T_F32;
        return {static_cast<const char*>(pools.w1) + (id - pools.n) * size * (is_float ? 4 : 2), is_float};
    }
    return {nullptr, false};
}

}  // namespace s3t::cuda
