// The flat contract of the native module: raw pointers, sizes, strides, type codes, a stream; a status comes back.
// Nothing is checked here except ids: the public ops validate their arguments once, in Python.
//
// Sizes: T rows, K in, O out, r rank, N + M adapters, G groups, P slots. D is K or O. Strides count elements.
// Order of sums (the same bits on every instruction set and on CUDA cores): fp32; blocks of 256 in ascending order, one
// chain of fused multiply-adds from +0 inside a block, the blocks added in order to a total that starts from +0.
#pragma once
#include <cstdint>

extern "C" {

enum s3t_type : int32_t { S3T_F32 = 0, S3T_F16 = 1, S3T_BF16 = 2 };

// Zero is success; a CUDA error e comes back as S3T_CUDA_ERROR + e.
enum s3t_status : int32_t { S3T_OK = 0, S3T_BAD_CPU = 1, S3T_NO_CUDA = 2, S3T_CUDA_ERROR = 1000 };

struct s3t_matrix {
    void* data;
    int64_t stride;  // between rows; a row is contiguous
    s3t_type type;
};

struct s3t_pools {
    const void* w;   // (N, r, D), named by ids 0..N-1
    const void* w1;  // (M, r, D), named by ids N..N+M-1
    int64_t n, m, rank, dim;
    s3t_type w_type, w1_type;  // an fp32 pool is rounded on reading to the type of the rows
};

struct s3t_table {
    const int32_t* ids;  // (G, P); an id outside 0..N+M-1 is dead: nothing is read for it
    int64_t group_stride, slot_stride;
    const int32_t* offsets;  // (G+1,), or null: one group of all rows
    int64_t groups, slots;
};

// Dropout of the adapters first.. (frozen ones are below it): see philox.h for the word of an element.
struct s3t_dropout {
    const int64_t* seeds;  // (G,), or null: no dropout
    const int64_t* rows;   // (T,), a key of each row that travels with it
    uint32_t threshold;    // an element is kept where its word is not below it
    int64_t first;
};

struct s3t_shrink_args {
    int64_t rows;
    s3t_matrix u;  // (T, D)
    void* s;       // (T, P, r), type of u
    s3t_pools pools;
    s3t_table table;
    s3t_dropout dropout;  // of elements of u
    const float* scales;  // (N+M,), or null: `scale` for all
    float scale;
};

struct s3t_expand_args {
    int64_t rows;
    s3t_matrix y;   // (T, D), in place
    const void* s;  // (T, P, r), type of y
    s3t_pools pools;
    s3t_table table;
    s3t_dropout dropout;  // of each slot's addend to an element of y
};

struct s3t_linear_args {
    int64_t rows, inner, outer;  // lengths of the sum and of a row of y
    s3t_matrix x, y;             // (T, inner), (T, outer)
    const void* weight;          // (O, K) or panels (ceil(O/32), K, 32), type of x
    bool packed, transposed;     // transposed: inner = O, outer = K
    const void* bias;            // (outer,), type of x, or null
    const void* s;               // (T, P, r), type of x
    s3t_pools pools;
    s3t_table table;
    s3t_dropout dropout;  // of each slot's addend to an element of y
};

struct s3t_outer_args {
    int64_t rows, dim, rank, first, count;
    s3t_matrix u;   // (T, D)
    const void* s;  // (T, P, r), type of u
    s3t_table table;
    s3t_dropout dropout;  // of elements of u
    void* dw;             // (count, r, D)
    s3t_type dw_type;
};

struct s3t_pack_args {
    int64_t out, in;
    const void* weight;   // (O, K)
    int64_t row, column;  // its strides, in elements
    void* panels;         // (ceil(O/32), K, 32)
    s3t_type type;
};

// Heads of q, k, v or of a result: element (record, head, row, c) lies at data[record * .record + head * .head + row *
// .row + c].
struct s3t_heads {
    void* data;
    int64_t record, head, row;
};

struct s3t_attention_args {
    int64_t records, heads, shared, rows, keys, dim;  // heads of q; of k and v; queries; keys; width of a head
    s3t_type type;
    s3t_heads q, k, v, y;  // y: the result; backward, the gradient of it
    const float* mask;     // added to scores at [record * mask_record + row * mask_row + key], or null
    int64_t mask_record, mask_row;
    float* stats;  // (records, heads, rows, 2): 1 / sum and greatest score of each query
    float scale;
    s3t_heads dq, dk, dv;  // backward only
    // Records of different lengths, one after the other: record i owns rows starts[i] .. starts[i + 1] - 1 of q, k and
    // v alike, whose strides between records are not used; stats is (heads, starts[records], 2). Or null.
    const int64_t* starts;
    bool causal;  // a query sees no key past its own place
};

// Says whether all ids are -1 or name one of so many adapters, and the offsets ascend from 0 to the number of rows.
bool s3t_check_values(const s3t_table* table, int64_t rows, int64_t adapters);

int32_t s3t_shrink(const s3t_shrink_args* args, int32_t threads);
int32_t s3t_expand(const s3t_expand_args* args, int32_t threads);
int32_t s3t_linear(const s3t_linear_args* args, int32_t threads);
int32_t s3t_outer(const s3t_outer_args* args, int32_t threads);
int32_t s3t_pack(const s3t_pack_args* args, int32_t threads);
int32_t s3t_attention(const s3t_attention_args* args, bool backward, int32_t threads);

// Shrink, then linear, which reads what shrink wrote: the whole forward of a layer.
int32_t s3t_layer(const s3t_shrink_args* shrink, const s3t_linear_args* linear, int32_t threads);

// On a device: launched on the stream, nothing is allocated, nothing is waited for.
int32_t s3t_shrink_cuda(const s3t_shrink_args* args, int32_t device, void* stream);
int32_t s3t_expand_cuda(const s3t_expand_args* args, int32_t device, void* stream);
int32_t s3t_linear_cuda(const s3t_linear_args* args, int32_t device, void* stream);
int32_t s3t_layer_cuda(const s3t_shrink_args* shrink, const s3t_linear_args* linear, int32_t device, void* stream);
// workspace: s3t_outer_workspace(args) bytes on the device, or null where that is 0. The size follows from sizes alone.
int64_t s3t_outer_workspace(const s3t_outer_args* args);
int32_t s3t_outer_cuda(const s3t_outer_args* args, void* workspace, int32_t device, void* stream);
const char* s3t_cuda_error(int32_t status);

// What S3T_CPU or the processor selects; null where S3T_CPU names what cannot run here.
const char* s3t_cpu(void);
// Names of the instruction sets that can run here, best first, separated by spaces.
const char* s3t_cpus(void);
// Path of the library whose thread team is joined, or "".
const char* s3t_threads(void);
}
