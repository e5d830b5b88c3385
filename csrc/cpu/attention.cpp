// y = softmax(scale q k^T + mask) v for each head of a record, and the gradients of q, k and v. A task owns one
// record's head of k and v and the heads of q that share it, kQueries rows of scores at a time; all it computes lies in
// fp32 in the caches. Order of sums: over d in blocks of 256; over keys in blocks of 32; over queries in blocks of
// kQueries; a block is one chain of fused multiply-adds, as in tile.h. A sum of a row of scores adds its panels of 32
// in order, then halves. Bound by the fused multiply-adds of the products: two forward, five backward.
#include <cstdlib>

#include "tile.h"

namespace s3t::S3T_ISA {
namespace {

constexpr int64_t kQueries = 64;
constexpr int kIn = kPanel / kLanes;  // vectors of a panel
constexpr float kLowest = -__builtin_inff();

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

// e^x for x <= 0, by 2^n e^r with |r| <= ln(2) / 2 and e^r by its series to r^7; 0 below the normal numbers.
inline Vec exp_of(Vec x) {
    const Vec magic = broadcast(0x1.8p23f);  // its sum with a small number has no fraction left
    const Vec shifted = fma(x, broadcast(0x1.715476p0f), magic), n = shifted - magic;
    Vec r = fma(n, broadcast(-0x1.62e4p-1f), x);  // ln(2), in a part of few digits and the rest
    r = fma(n, broadcast(-0x1.7f7d1cp-20f), r);
    Vec y = broadcast(1.0f / 5040);
    y = fma(y, r, broadcast(1.0f / 720));
    y = fma(y, r, broadcast(1.0f / 120));
    y = fma(y, r, broadcast(1.0f / 24));
    y = fma(y, r, broadcast(1.0f / 6));
    y = fma(y, r, broadcast(0.5f));
    y = fma(y, r, broadcast(1.0f));
    y = fma(y, r, broadcast(1.0f));
    const Bits power = ((Bits)shifted - (bits_of(0x1.8p23f) - 127)) << 23;
    const Bits tiny = (Bits)(x < broadcast(-87.0f));
    return (Vec)((Bits)(y * (Vec)power) & ~tiny);
}

inline float sum_of(const Vec* parts) {
    float lane[kPanel];
    std::memcpy(lane, parts, sizeof lane);
    for (int width = kPanel / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
    }
    return lane[0];
}

// Sizes of a task, and where its matrices lie. Rows are padded with zeros to whole panels; scores and results lie panel
// after panel of 32 columns.
struct Task {
    const s3t_attention_args& args;
    int64_t record, origin, rows, t, d, wide_t, wide_d;  // origin: row of its first query and key
    float *k, *v, *k_turned, *q, *scores, *result;

    int64_t apart() const { return kQueries * kPanel; }
    float* row_of(float* panels, int64_t row, int64_t panel) const { return panels + panel * apart() + row * kPanel; }
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

void read_rows(const Task& task, const s3t_heads& from, int64_t head, int64_t first, int64_t rows, float scale,
               float* to) {
    const s3t_type type = task.args.type;
    for (int64_t i = 0; i < rows; ++i, to += task.wide_d) {
        load_row(to, line_of(task, from, head, first + i), type, type, task.d);
        if (scale != 1) {
            for (int64_t c = 0; c < task.d; ++c) to[c] *= scale;
        }
        std::memset(to + task.d, 0, (task.wide_d - task.d) * 4);
    }
}

void clear(const Task& task, float* panels, int64_t rows, int64_t columns) {
    for (int64_t c = 0; c < columns; c += kPanel) std::memset(task.row_of(panels, 0, c / kPanel), 0, rows * kPanel * 4);
}

// Writes rows that lie panel after panel, times a number each (or all times one).
void write_rows(const Task& task, const s3t_heads& to, int64_t head, int64_t first, int64_t rows, float* from,
                int64_t apart, const float* each, float all) {
    const s3t_type type = task.args.type;
    for (int64_t i = 0; i < rows; ++i) {
        const float by = each == nullptr ? all : each[2 * i];
        auto* line = const_cast<void*>(line_of(task, to, head, first + i));
        for (int64_t c = 0; c < task.d; c += kPanel) {
            float* x = from + c / kPanel * apart + i * kPanel;
            for (int64_t j = 0; j < kPanel; ++j) x[j] *= by;
            store_row(at(line, type, c), type, x, least(kPanel, task.d - c));
        }
    }
}

// to (columns x rows) = from (rows x columns) turned; both sizes are whole panels.
void turn(const float* from, int64_t rows, int64_t columns, float* to) {
    for (int64_t i = 0; i < rows; i += kLanes) {
        for (int64_t c = 0; c < columns; c += kLanes) {
            Vec v[kLanes];
            for (int j = 0; j < kLanes; ++j) v[j] = load(from + (i + j) * columns + c);
            transpose(v, std::make_index_sequence<kLanes>{});
            for (int j = 0; j < kLanes; ++j) store(to + (c + j) * rows + i, v[j]);
        }
    }
}

// totals += A @ B, B (k x columns) with rows `b_row` floats apart. The sum goes in blocks of `block` terms, which lie
// `a_block` bytes from each other in A.
void multiply(const void* a, int64_t a_row, int64_t a_step, int64_t a_block, const float* b, int64_t b_row, int64_t k,
              int64_t block, int64_t rows, int64_t columns, float* total, int64_t apart) {
    constexpr int64_t kMost = 16;
    Block blocks[kMost];
    int64_t count = 0;
    for (int64_t i = 0; i < k; i += block) {
        const void* from = static_cast<const char*>(a) + i / block * a_block;
        blocks[count++] = {
            {from, a_row, a_step}, {b + i * b_row, Format::kFloat, b_row * 4, kPanel * 4}, least(block, k - i)};
        if (count < kMost && i + block < k) continue;
        add_blocks(blocks, count, rows, columns, total, apart);
        count = 0;
    }
}

// totals += x @ B for rows of x (q or a gradient) and B (d, t).
void multiply_rows(const Task& task, const float* x, const float* b, int64_t rows, float* total) {
    multiply(x, task.wide_d * 4, 4, kBlock * 4, b, task.wide_t, task.d, kBlock, rows, task.t, total, task.apart());
}

// totals += p @ B for panels of scores p and B (t, d).
void multiply_scores(const Task& task, const float* p, const float* b, int64_t rows, float* total) {
    multiply(p, kPanel * 4, 4, task.apart() * 4, b, task.wide_d, task.t, kPanel, rows, task.d, total, task.apart());
}

// totals (t x d) += p^T @ x: what a block of queries adds to the gradients of keys or values.
void add_turned_scores(const Task& task, const float* p, const float* x, int64_t rows, float* total) {
    for (int64_t c = 0; c < task.t; c += kPanel) {
        multiply(p + c / kPanel * task.apart(), 4, kPanel * 4, 0, x, task.wide_d, rows, kQueries,
                 least(kPanel, task.t - c), task.d, total + c * kPanel, task.wide_t * kPanel);
    }
}

// Scores of queries first.. of a head: scale q k^T + mask, minus infinity past the last key.
void fill_scores(const Task& task, int64_t first, int64_t rows) {
    const s3t_attention_args& args = task.args;
    for (int64_t i = 0; i < rows; ++i) {
        const float* mask =
            args.mask == nullptr ? nullptr : args.mask + task.record * args.mask_record + (first + i) * args.mask_row;
        for (int64_t c = 0; c < task.t; c += kPanel) {
            float* to = task.row_of(task.scores, i, c / kPanel);
            const int64_t here = least(kPanel, task.t - c);
            if (mask == nullptr) {
                std::memset(to, 0, here * 4);
            } else {
                std::memcpy(to, mask + c, here * 4);
            }
            const int64_t seen = args.causal ? least(here, first + i + 1 - c) : here;
            for (int64_t j = seen < 0 ? 0 : seen; j < kPanel; ++j) to[j] = kLowest;
        }
    }
    multiply_rows(task, task.q, task.k_turned, rows, task.scores);
}

float greatest(const Task& task, int64_t row) {
    Vec most = broadcast(kLowest);
    for (int64_t c = 0; c < task.wide_t; c += kLanes) {
        const Vec x = load(task.row_of(task.scores, row, c / kPanel) + c % kPanel);
        const Bits more = (Bits)(x > most);
        most = (Vec)(((Bits)x & more) | ((Bits)most & ~more));
    }
    float lane[kLanes], result = kLowest;
    std::memcpy(lane, &most, sizeof lane);
    for (float x : lane) result = x > result ? x : result;
    return result;
}

// Puts e^(score - most) times `by` in the place of a row of scores; gives the sum.
float raise_row(const Task& task, int64_t row, float most, float by) {
    Vec sums[kIn] = {};
    for (int64_t c = 0; c < task.wide_t; c += kPanel) {
        float* x = task.row_of(task.scores, row, c / kPanel);
        for (int j = 0; j < kIn; ++j) {
            const Vec e = exp_of(load(x + j * kLanes) - broadcast(most)) * broadcast(by);
            store(x + j * kLanes, e);
            sums[j] += e;
        }
    }
    return sum_of(sums);
}

Task begin(const s3t_attention_args& args, int64_t index, Pieces& pieces, bool backward) {
    const int64_t record = index / args.shared;
    const bool ragged = args.starts != nullptr;
    const int64_t origin = ragged ? args.starts[record] : 0, own = ragged ? args.starts[record + 1] - origin : 0;
    const int64_t keys = ragged ? own : args.keys;
    const int64_t wide_t = panels_of(keys) * kPanel, wide_d = panels_of(args.dim) * kPanel;
    const int64_t whole = wide_t * wide_d, rows = kQueries * wide_d, scores = kQueries * wide_t;
    pieces.begin((backward ? 6 : 3) * whole + (backward ? 3 : 2) * rows + (backward ? 2 : 1) * scores);
    Task task{args,
              record,
              origin,
              ragged ? own : args.rows,
              keys,
              args.dim,
              wide_t,
              wide_d,
              pieces.take(whole),
              pieces.take(whole),
              pieces.take(whole),
              pieces.take(rows),
              pieces.take(scores),
              pieces.take(rows)};
    const int64_t head = index % args.shared;
    for (float* to : {task.k, task.v}) {
        read_rows(task, to == task.k ? args.k : args.v, head, 0, task.t, 1, to);
        std::memset(to + task.t * wide_d, 0, (wide_t - task.t) * wide_d * 4);
    }
    turn(task.k, wide_t, wide_d, task.k_turned);
    return task;
}

Pieces& own_pieces() {
    static thread_local Pieces pieces;
    return pieces;
}

}  // namespace

void attention_task(const void* data, int64_t index) {
    const auto& args = *static_cast<const s3t_attention_args*>(data);
    const Task task = begin(args, index, own_pieces(), false);
    const int64_t each = args.heads / args.shared, start = index % args.shared * each;
    for (int64_t head = start; head < start + each; ++head) {
        for (int64_t first = 0; first < task.rows; first += kQueries) {
            const int64_t rows = least(kQueries, task.rows - first);
            float* stats = stats_of(task, head, first);
            read_rows(task, args.q, head, first, rows, args.scale, task.q);
            fill_scores(task, first, rows);
            for (int64_t i = 0; i < rows; ++i) {
                const float most = greatest(task, i);
                stats[2 * i] = 1 / raise_row(task, i, most, 1);
                stats[2 * i + 1] = most;
            }
            clear(task, task.result, rows, task.d);
            multiply_scores(task, task.scores, task.v, rows, task.result);
            write_rows(task, args.y, head, first, rows, task.result, task.apart(), stats, 1);
        }
    }
}

void attention_backward_task(const void* data, int64_t index) {
    const auto& args = *static_cast<const s3t_attention_args*>(data);
    Pieces& pieces = own_pieces();
    const Task task = begin(args, index, pieces, true);
    const int64_t whole = task.wide_t * task.wide_d, shared = index % args.shared;
    float *const v_turned = pieces.take(whole), *const dk = pieces.take(whole), *const dv = pieces.take(whole);
    float *const dy = pieces.take(kQueries * task.wide_d), *const dp = pieces.take(kQueries * task.wide_t);
    turn(task.v, task.wide_t, task.wide_d, v_turned);
    std::memset(dk, 0, whole * 4);
    std::memset(dv, 0, whole * 4);
    const int64_t each = args.heads / args.shared, start = shared * each;
    for (int64_t head = start; head < start + each; ++head) {
        for (int64_t first = 0; first < task.rows; first += kQueries) {
            const int64_t rows = least(kQueries, task.rows - first);
            const float* stats = stats_of(task, head, first);
            read_rows(task, args.q, head, first, rows, args.scale, task.q);
            read_rows(task, args.y, head, first, rows, 1, dy);
            fill_scores(task, first, rows);
            clear(task, dp, rows, task.t);
            multiply_rows(task, dy, v_turned, rows, dp);
            for (int64_t i = 0; i < rows; ++i) {
                raise_row(task, i, stats[2 * i + 1], stats[2 * i]);
                Vec sums[kIn] = {};
                for (int64_t c = 0; c < task.wide_t; c += kLanes) {
                    const int64_t panel = c / kPanel, lane = c % kPanel;
                    sums[lane / kLanes] = fma(load(task.row_of(task.scores, i, panel) + lane),
                                              load(task.row_of(dp, i, panel) + lane), sums[lane / kLanes]);
                }
                const Vec mean = broadcast(sum_of(sums));
                for (int64_t c = 0; c < task.wide_t; c += kLanes) {
                    const int64_t panel = c / kPanel, lane = c % kPanel;
                    float* x = task.row_of(dp, i, panel) + lane;
                    store(x, load(task.row_of(task.scores, i, panel) + lane) * (load(x) - mean));
                }
            }
            add_turned_scores(task, task.scores, dy, rows, dv);
            add_turned_scores(task, dp, task.q, rows, dk);  // q bears the scale
            clear(task, task.result, rows, task.d);
            multiply_scores(task, dp, task.k, rows, task.result);
            write_rows(task, args.dq, head, first, rows, task.result, task.apart(), nullptr, args.scale);
        }
    }
    write_rows(task, args.dk, shared, 0, task.t, dk, task.wide_t * kPanel, nullptr, 1);
    write_rows(task, args.dv, shared, 0, task.t, dv, task.wide_t * kPanel, nullptr, 1);
}

}  // namespace s3t::S3T_ISA
