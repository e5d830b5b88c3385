// Kernels that the emulator's own tests run: wrong ones, each of which must be found, and the tensor cores' layouts;
// and the arithmetic of routing.h, called as a host does.
#include "common.cuh"

namespace s3t::cuda {

struct Shared {
    uint16_t a[16][24], b[16][24];  // 8 more columns: rows stay aligned to 16 bytes
    float words[64];
};

// c (16,8) = a (16,16) b (16,8): `a` through ldmatrix, `b` through its transposed form.
__global__ void multiply(float* c, const uint16_t* a, const uint16_t* b) {
    auto& in = shared<Shared>();
    const int lane = threadIdx.x;
    copy_async(&in.a[lane / 2][lane % 2 * 8], a + lane * 8);
    if (lane < 16) copy_async(&in.b[lane][0], b + lane * 8);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    uint32_t x[4], y[4];
    load_matrices<false>(x, &in.a[lane % 16][lane / 16 * 8]);
    load_matrices<true>(y, &in.b[lane % 16][0]);
    float sum[4] = {};
    mma<__half>(sum, x, {y[0], y[1]});
    for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

// Sums over a cluster through the shared memory of its blocks.
__global__ void sum_cluster(float* to) {
    float* mine = shared<Shared>().words + threadIdx.x;
    *mine = static_cast<float>(blockIdx.x * 100 + threadIdx.x);
    cluster_sync();
    float sum = 0;
    for (unsigned rank = 0; rank < cluster_size(); ++rank) sum += *in_block(mine, rank);
    cluster_sync();
    to[blockIdx.x * 64 + threadIdx.x] = sum;
}

enum Fault {
    kNone,
    kNoBarrier,
    kOneBranch,
    kTwoPlaces,
    kPastShared,
    kPastGlobal,
    kNoWait,
    kOverwritten,
    kAcrossBlocks
};

__global__ void wrong(float* data, int fault) {
    auto& in = shared<Shared>();
    const int thread = threadIdx.x;
    if (fault == kOneBranch && thread >= 48) __syncwarp();
    if (fault == kTwoPlaces && thread < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    in.words[thread] = 1;
    if (fault != kNoBarrier) __syncthreads();
    float sum = in.words[63 - thread];
    if (fault == kPastShared) in.words[64 + thread] = 1;
    if (fault == kPastGlobal) sum += data[128 + thread];
    if (fault == kNoWait || fault == kOverwritten) {
        const int other = (thread + 1) % 16;
        if (thread < 16) copy_async(&in.words[4 * thread], data + 4 * thread);
        commit_copies();
        if (fault == kOverwritten) sum = in.words[4 * other];  // another thread's copy may land at any time
        if (fault == kNoWait) sum = in.words[thread];
        wait_copies<0>();
    }
    if (fault == kAcrossBlocks) sum = data[(blockIdx.x + 1) % 2 * 64 + thread] == 0 ? 1 : 2;  // has the other begun?
    data[blockIdx.x * 64 + thread] = sum;
}

}  // namespace s3t::cuda

#define S3T_EXPORT extern "C" __attribute__((visibility("default")))

S3T_EXPORT int probe_multiply(float* c, const uint16_t* a, const uint16_t* b) {
    using namespace s3t::cuda;
    return launch({1, 32, sizeof(Shared), nullptr}, multiply, c, a, b);
}
S3T_EXPORT int probe_cluster(float* to, unsigned size) {
    using namespace s3t::cuda;
    return launch({8, 64, sizeof(Shared), nullptr, size}, sum_cluster, to);
}
S3T_EXPORT int probe_fault(float* data, int fault) {
    using namespace s3t::cuda;
    return launch({2, 64, sizeof(Shared), nullptr}, wrong, data, fault);
}
S3T_EXPORT const char* probe_message() {
    return cudaGetErrorString(cudaErrorLaunchFailure);
}

// Gives (group, first, last) of every tile number.
S3T_EXPORT int64_t probe_spans(const int32_t* offsets, int64_t groups, int64_t rows, int64_t height, int64_t* to) {
    using namespace s3t::cuda;
    const s3t_table table{nullptr, 0, 0, offsets, groups, 0};
    const int64_t tiles = tile_numbers(rows, groups, height);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        int64_t group = 0;
        while (group + 1 < groups && first_tile(table, rows, group + 1, height) <= tile) ++group;
        const Span span = span_of(table, rows, group, tile, height);
        to[3 * tile] = span.group, to[3 * tile + 1] = span.first, to[3 * tile + 2] = span.last;
    }
    return tiles;
}

namespace s3t::cuda {
__global__ void find_all(s3t_table table, int64_t rows, int64_t height, int64_t* to) {
    const Span span = find_span(table, rows, blockIdx.x, height);
    if (threadIdx.x == 0) to[3 * blockIdx.x] = span.group, to[3 * blockIdx.x + 1] = span.first;
    if (threadIdx.x == 0) to[3 * blockIdx.x + 2] = span.last;
}
}  // namespace s3t::cuda

// The same, by the search of a warp.
S3T_EXPORT int probe_find(const int32_t* offsets, int64_t groups, int64_t rows, int64_t height, int64_t* to) {
    using namespace s3t::cuda;
    const s3t_table table{nullptr, 0, 0, offsets, groups, 0};
    const auto tiles = static_cast<unsigned>(tile_numbers(rows, groups, height));
    return tiles == 0 ? 0 : launch({tiles, 32, 0, nullptr}, find_all, table, rows, height, to);
}
