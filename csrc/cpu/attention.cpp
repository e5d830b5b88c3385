// y = softmax(scale q k^T + mask) v for each head of a record, and the gradients of q, k and v. A task owns one
// record's head of k and v and the heads of q that share it, up to kQueries rows of scores at a time; all it computes
// lies in fp32 in the caches. Order of sums: over d and over keys in blocks of 256; over queries in blocks of kQueries
// or a little less, of nearly equal size; a block is one chain of fused multiply-adds, as in small.h; of a row of
// scores as in softmax.h. Bound by the fused multiply-adds of the products, two forward, five backward; heads of 16 as
// much by the exponentials; where records are short and many, by reading them.
#include <cstdlib>

#include "softmax.h"

namespace s3t::S3T_ISA {
namespace {

constexpr int64_t kQueries = 96;  // of a text or a small image all, which asks for the fewest tiles and passes

// What a thread keeps: one allocation, handed out in pieces.
class Pieces {
  public:
    ~Pieces() { std::free(data_); }

    void begin(int64_t floats) {
        used_ = 0;
        if (floats <= size_) return;
        std::free(data_);
        data_ = static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float)));
        size_ = floats;
        if (data_ == nullptr) std::abort();
    }
    float* take(int64_t floats) { return data_ + (used_ += floats) - floats; }

  private:
    float* data_ = nullptr;
    int64_t size_ = 0, used_ = 0;
};

// Sizes of a task, and where its matrices lie: row after row, padded with zeros to whole groups. Rows of scores and of
// k_turned lie `apart`, an odd number of groups: of lines 4096 bytes from each other the nearest cache holds a few
// only.
struct Task {
    const s3t_attention_args& args;
    int64_t record, origin, rows, t, d, wide_t, wide_d, apart;  // origin: row of its first query and key
    float *k, *v, *k_turned, *q, *scores, *result, *seen;       // seen: t zeros, then minus infinity
};

const void* line_of(const Task& task, const s3t_heads& x, int64_t head, int64_t row) {
    const int64_t record = task.args.starts == nullptr ? task.record * x.record : 0;
    return at(static_cast<const void*>(x.data), task.args.type, record + head * x.head + (task.origin + row) * x.row);
}

float* stats_of(const Task& task, int64_t head, int64_t row) {
    const s3t_attention_args& args = task.args;
    const int64_t before = args.starts == nullptr ? (task.record * args.heads + head) * args.rows
                                                  : head * args.starts[args.records] + task.origin;
    return args.stats + (before + row) * 2;
}

// Reads rows of a head and asks early for those of the next: of `heads`, or of the next record.
void read_rows(const Task& task, const s3t_heads& from, int64_t head, int64_t heads, int64_t first, int64_t rows,
               float scale, float* to) {
    const s3t_type type = task.args.type;
    const int64_t d = task.d, whole = d / kLanes * kLanes, wide = task.wide_d, size = size_of(type);
    const int64_t record = task.args.starts == nullptr ? from.record : task.rows * from.row, row = from.row * size;
    const int64_t next = (head + 1 < heads ? from.head : record - head * from.head) * size;
    const auto* line = static_cast<const char*>(line_of(task, from, head, first));
    const Vec by = broadcast(scale);
    for (int64_t i = 0; i < rows; ++i, line += row, to += wide) {
        for (int64_t c = 0; c < whole; c += kLanes) {
            store(to + c, load_as(line + c * size, type) * by);
            __builtin_prefetch(line + c * size + next, 0, 2);
        }
        if (whole == wide) continue;
        float end[kWide] = {};
        load_row(end, line + whole * size, type, type, d - whole);
        for (int64_t c = whole; c < wide; c += kLanes) store(to + c, load(end + c - whole) * by);
    }
}

// Writes rows, each times a number of its own (or all times one).
void write_rows(const Task& task, const s3t_heads& to, int64_t head, int64_t first, int64_t rows, const float* from,
                const float* each, float all) {
    const s3t_type type = task.args.type;
    const int64_t d = task.d, whole = d / kLanes * kLanes, wide = task.wide_d, size = size_of(type);
    const int64_t row = to.row * size;
    auto* line = static_cast<char*>(const_cast<void*>(line_of(task, to, head, first)));
    for (int64_t i = 0; i < rows; ++i, line += row, from += wide) {
        const Vec by = broadcast(each == nullptr ? all : each[2 * i]);
        for (int64_t c = 0; c < whole; c += kLanes) store_as(line + c * size, type, load(from + c) * by);
        if (whole == d) continue;
        float end[kLanes];
        store(end, load(from + whole) * by);
        store_row(line + whole * size, type, end, d - whole);
    }
}

void clear(float* x, int64_t floats) {
    for (int64_t i = 0; i < floats; i += kLanes) store(x + i, Vec{});
}

// to (d x keys) = rows of keys or values turned, zero past the last.
void turn(const Task& task, float* from, float* to) {
    const int64_t wide = task.wide_d, apart = task.apart;
    clear(from + task.t * wide, (task.wide_t - task.t) * wide);
    for (int64_t i = 0; i < task.wide_t; i += kLanes) {
        for (int64_t c = 0; c < wide; c += kLanes) {
            Vec v[kLanes];
#pragma GCC unroll 16
            for (int j = 0; j < kLanes; ++j) v[j] = load(from + (i + j) * wide + c);
            transpose(v, std::make_index_sequence<kLanes>{});
#pragma GCC unroll 16
            for (int j = 0; j < kLanes; ++j) store(to + (c + j) * apart + i, v[j]);
        }
    }
}

// The rows of scores that are made together, and how many keys any of them sees.
struct Rows {
    int64_t first, count, keys, wide;
};

Rows rows_of(const Task& task, int64_t block, int64_t blocks) {
    const int64_t first = task.rows * block / blocks, end = task.rows * (block + 1) / blocks;
    const int64_t keys = task.args.causal ? least(task.t, end) : task.t;
    return {first, end - first, keys, wide_of(keys)};
}

int64_t blocks_of(int64_t rows) {
    return (rows + kQueries - 1) / kQueries;
}

// Scores of rows of a head: scale q k^T + mask. A chain starts from 0, but past the last key that its query sees from
// minus infinity: where that is one key more from row to row, each row reads one place earlier in `seen`.
void fill_scores(const Task& task, const Rows& rows) {
    const s3t_attention_args& args = task.args;
    const int64_t growing = args.causal && rows.first < task.t ? least(rows.count, task.t - rows.first) : 0;
    const auto fill = [&](int64_t i, int64_t count, const float* seen, int64_t step) {
        multiply({task.wide_d, 1, task.apart, task.apart, step}, task.q + i * task.wide_d, task.k_turned, task.d, count,
                 rows.wide, task.scores + i * task.apart, seen);
    };
    fill(0, growing, task.seen + task.t - rows.first - 1, -1);
    fill(growing, rows.count - growing, task.t == task.wide_t ? nullptr : task.seen, 0);
    if (args.mask == nullptr) return;
    for (int64_t i = 0; i < rows.count; ++i) {
        const float* mask = args.mask + task.record * args.mask_record + (rows.first + i) * args.mask_row;
        float* x = task.scores + i * task.apart;
        int64_t c = 0;
        for (; c + kLanes <= rows.keys; c += kLanes) store(x + c, load(x + c) + load(mask + c));
        for (; c < rows.keys; ++c) x[c] += mask[c];
    }
}

Task begin(const s3t_attention_args& args, int64_t index, Pieces& pieces, bool backward) {
    const int64_t record = index / args.shared;
    const bool ragged = args.starts != nullptr;
    const int64_t origin = ragged ? args.starts[record] : 0, own = ragged ? args.starts[record + 1] - origin : 0;
    const int64_t keys = ragged ? own : args.keys, queries = ragged ? own : args.rows;
    const int64_t wide_t = wide_of(keys), wide_d = wide_of(args.dim), apart = wide_t | kWide;
    const int64_t whole = wide_t * wide_d, turned = apart * wide_d, most = least(queries, kQueries);
    const int64_t rows = most * wide_d, scores = most * apart;
    pieces.begin((backward ? 4 : 2) * whole + (backward ? 2 : 1) * turned + (backward ? 3 : 2) * rows +
                 (backward ? 2 : 1) * scores + wide_t + apart);
    Task task{args,
              record,
              origin,
              queries,
              keys,
              args.dim,
              wide_t,
              wide_d,
              apart,
              pieces.take(whole),
              pieces.take(whole),
              pieces.take(turned),
              pieces.take(rows),
              pieces.take(scores),
              pieces.take(rows),
              pieces.take(wide_t + apart)};
    for (int64_t c = 0; c < wide_t + (args.causal ? keys : 0); ++c) task.seen[c] = c < keys ? 0 : kLowest;
    const int64_t head = index % args.shared;
    read_rows(task, args.k, head, args.shared, 0, task.t, 1, task.k);
    read_rows(task, args.v, head, args.shared, 0, task.t, 1, task.v);
    turn(task, task.k, task.k_turned);
    return task;
}

Pieces& own_pieces() {
    static thread_local Pieces pieces;
    return pieces;
}

void attend(const s3t_attention_args& args, int64_t index) {
    const Task task = begin(args, index, own_pieces(), false);
    const int64_t each = args.heads / args.shared, start = index % args.shared * each, blocks = blocks_of(task.rows);
    for (int64_t head = start; head < start + each; ++head) {
        for (int64_t block = 0; block < blocks; ++block) {
            const Rows rows = rows_of(task, block, blocks);
            float* stats = stats_of(task, head, rows.first);
            read_rows(task, args.q, head, args.heads, rows.first, rows.count, args.scale, task.q);
            fill_scores(task, rows);
            for (int64_t i = 0; i < rows.count; ++i) {
                stats[2 * i + 1] = greatest(task.scores + i * task.apart, rows.wide)[0];
            }
            for (int64_t i = 0; i < rows.count; ++i) {
                stats[2 * i] = raise(task.scores + i * task.apart, nullptr, rows.wide, stats[2 * i + 1], 1)[0];
            }
            for (int64_t i = 0; i < rows.count; ++i) stats[2 * i] = 1 / stats[2 * i];
            multiply({task.apart, 1, task.wide_d, task.wide_d}, task.scores, task.v, rows.keys, rows.count, task.wide_d,
                     task.result);
            write_rows(task, args.y, head, rows.first, rows.count, task.result, stats, 1);
        }
    }
}

void attend_backward(const s3t_attention_args& args, int64_t index) {
    Pieces& pieces = own_pieces();
    const Task task = begin(args, index, pieces, true);
    const int64_t wide_d = task.wide_d, apart = task.apart, whole = task.wide_t * wide_d, shared = index % args.shared;
    const int64_t most = least(task.rows, kQueries);
    float *const v_turned = pieces.take(apart * wide_d), *const dk = pieces.take(whole), *const dv = pieces.take(whole);
    float *const dy = pieces.take(most * wide_d), *const dp = pieces.take(most * apart), mean[kQueries];
    turn(task, task.v, v_turned);
    clear(dk, whole);
    clear(dv, whole);
    const int64_t each = args.heads / args.shared, start = shared * each, blocks = blocks_of(task.rows);
    for (int64_t head = start; head < start + each; ++head) {
        for (int64_t block = 0; block < blocks; ++block) {
            const Rows rows = rows_of(task, block, blocks);
            const float* stats = stats_of(task, head, rows.first);
            read_rows(task, args.q, head, args.heads, rows.first, rows.count, args.scale, task.q);
            read_rows(task, args.y, head, args.heads, rows.first, rows.count, 1, dy);
            fill_scores(task, rows);
            multiply({wide_d, 1, apart, apart}, dy, v_turned, task.d, rows.count, rows.wide, dp);
            for (int64_t i = 0; i < rows.count; ++i) {
                mean[i] = raise(task.scores + i * apart, dp + i * apart, rows.wide, stats[2 * i + 1], stats[2 * i])[0];
            }
            for (int64_t i = 0; i < rows.count; ++i) {
                const float* p = task.scores + i * apart;
                const Vec m = broadcast(mean[i]);
                for (int64_t c = 0; c < rows.wide; c += kLanes) {
                    store(dp + i * apart + c, load(p + c) * (load(dp + i * apart + c) - m));
                }
            }
            multiply({1, apart, wide_d, wide_d, 0, true}, task.scores, dy, rows.count, rows.keys, wide_d, dv);
            multiply({1, apart, wide_d, wide_d, 0, true}, dp, task.q, rows.count, rows.keys, wide_d,
                     dk);  // q is scaled
            multiply({apart, 1, wide_d, wide_d}, dp, task.k, rows.keys, rows.count, wide_d, task.result);
            write_rows(task, args.dq, head, rows.first, rows.count, task.result, nullptr, args.scale);
        }
    }
    write_rows(task, args.dk, shared, 0, task.t, dk, nullptr, 1);
    write_rows(task, args.dv, shared, 0, task.t, dv, nullptr, 1);
}

}  // namespace

void attention_task(const void* data, int64_t index) {
    const auto& tasks = *static_cast<const AttentionTasks*>(data);
    const int64_t end = least((index + 1) * tasks.chunk, tasks.args->records * tasks.args->shared);
    for (int64_t i = index * tasks.chunk; i < end; ++i) attend(*tasks.args, i);
}

void attention_backward_task(const void* data, int64_t index) {
    const auto& tasks = *static_cast<const AttentionTasks*>(data);
    const int64_t end = least((index + 1) * tasks.chunk, tasks.args->records * tasks.args->shared);
    for (int64_t i = index * tasks.chunk; i < end; ++i) attend_backward(*tasks.args, i);
}

}  // namespace s3t::S3T_ISA
