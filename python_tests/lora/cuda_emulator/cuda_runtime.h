// Stands in for CUDA's headers, so that a compiler of C++17 can build the .cu sources and a test can run them on a CPU.
// Threads are fibers that run until they wait; whoever is ready runs next, in a shuffled order. See emulator.cpp.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __shared__ static_assert(false, "shared memory comes from shared<Type>(), which the emulator can poison");

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}

// --- the runtime -----------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
const char* cudaGetErrorString(cudaError_t error);

namespace emulator {

// Runs a kernel: every thread of every block once, `cluster` blocks along x at the same time.
cudaError_t launch(dim3 grid, dim3 block, unsigned cluster, size_t shared, const std::function<void()>& kernel);

enum class Wait { none, warp, block, cluster };
void wait(Wait what, int line);
char* shared_memory();                      // of this block
void* shared_of(void* own, unsigned rank);  // the same place in another block of the cluster
unsigned cluster_rank();
unsigned cluster_size();
// Shows every lane of the warp what all lanes brought: 32 records of kRecord bytes.
constexpr int kLanes = 32, kRecord = 64;
const char* exchange(const void* mine, size_t bytes, int line);
int lane();
void copy_async(void* to, const void* from, int bytes);  // 16 bytes, of which those past `bytes` become 0
void commit_copies();
void wait_copies(int pending);
[[noreturn]] void fail(const char* format, ...);

template <typename T>
T brought(const char* records, int lane) {
    T value;
    std::memcpy(&value, records + lane * kRecord, sizeof value);
    return value;
}

}  // namespace emulator

// --- what kernels call -----------------------------------------------------------------------------------------------

inline void __syncthreads(int line = __builtin_LINE()) {
    emulator::wait(emulator::Wait::block, line);
}
inline void __syncwarp(unsigned mask = 0xffffffff, int line = __builtin_LINE()) {
    if (mask != 0xffffffff) emulator::fail("line %d: only whole warps are emulated", line);
    emulator::wait(emulator::Wait::warp, line);
}
template <typename T>
T __shfl_sync(unsigned, T value, int from, int = 32, int line = __builtin_LINE()) {
    return emulator::brought<T>(emulator::exchange(&value, sizeof value, line), from & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int by, int = 32, int line = __builtin_LINE()) {
    return emulator::brought<T>(emulator::exchange(&value, sizeof value, line), emulator::lane() ^ by);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned by, int = 32, int line = __builtin_LINE()) {
    const int lane = emulator::lane(), from = lane + static_cast<int>(by);
    return emulator::brought<T>(emulator::exchange(&value, sizeof value, line), from < 32 ? from : lane);
}
inline unsigned __ballot_sync(unsigned, int yes, int line = __builtin_LINE()) {
    const char* all = emulator::exchange(&yes, sizeof yes, line);
    unsigned mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= unsigned{emulator::brought<int>(all, lane) != 0} << lane;
    return mask;
}
inline int __any_sync(unsigned mask, int yes, int line = __builtin_LINE()) {
    return __ballot_sync(mask, yes, line) != 0;
}
inline int __all_sync(unsigned mask, int yes, int line = __builtin_LINE()) {
    return __ballot_sync(mask, yes, line) == 0xffffffff;
}
inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline int __ffs(unsigned x) {
    return __builtin_ffs(static_cast<int>(x));
}
template <typename T>
T __ldg(const T* from) {
    return *from;
}
inline float __fmaf_rn(float a, float b, float c) {
    return std::fmaf(a, b, c);
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
// Picks four of the eight bytes of (high, low), as PRMT does without its sign mode.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned pick) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (pick >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}
using std::max, std::min;

// --- instructions of PTX, see csrc/cuda/common.cuh
// --------------------------------------------------------------------

namespace emulator {

// The sum over 16 products is rounded once: hardware's own order inside is not documented, so tests allow for it.
template <typename X, typename Widen>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Widen widen, int line = __builtin_LINE()) {
    struct Fragment {
        float a[8], b[4];
    } mine;
    for (int i = 0; i < 8; ++i) mine.a[i] = widen(a[i / 2] >> i % 2 * 16 & 0xffff);
    for (int i = 0; i < 4; ++i) mine.b[i] = widen(b[i / 2] >> i % 2 * 16 & 0xffff);
    const char* all = exchange(&mine, sizeof mine, line);
    for (int i = 0; i < 4; ++i) {
        const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
        double sum = c[i];
        for (int k = 0; k < 16; ++k) {  // lane 4 i + k % 8 / 2 holds row (of a) or column (of b) i
            const auto& x = *reinterpret_cast<const Fragment*>(all + (row % 8 * 4 + k % 8 / 2) * kRecord);
            const auto& y = *reinterpret_cast<const Fragment*>(all + (column * 4 + k % 8 / 2) * kRecord);
            sum += static_cast<double>(x.a[row / 8 * 2 + k / 8 * 4 + k % 2]) * y.b[k / 8 * 2 + k % 2];
        }
        c[i] = static_cast<float>(sum);
    }
}

inline void load_matrices(uint32_t (&to)[4], const void* row, bool transposed, int line = __builtin_LINE()) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("line %d: a row of a matrix is not aligned to 16 bytes", line);
    const char* all = exchange(&row, sizeof row, line);
    for (int i = 0; i < 4; ++i) {
        uint16_t pair[2];
        for (int j = 0; j < 2; ++j) {
            const int a = lane() / 4, b = lane() % 4 * 2 + j, from = transposed ? b : a, at = transposed ? a : b;
            std::memcpy(pair + j, brought<const char*>(all, i * 8 + from) + at * 2, 2);
        }
        std::memcpy(&to[i], pair, 4);
    }
}

}  // namespace emulator

// --- the two half types, converted exactly ---------------------------------------------------------------------------

struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __half2float(__half x) {
    _Float16 value;
    std::memcpy(&value, &x, 2);
    return static_cast<float>(value);
}
inline __half __float2half_rn(float x) {
    const auto value = static_cast<_Float16>(x);
    __half half;
    std::memcpy(&half, &value, 2);
    return half;
}
inline float __bfloat162float(__nv_bfloat16 x) {
    return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const unsigned bits = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __half __ushort_as_half(uint16_t bits) {
    return {bits};
}
inline uint16_t __half_as_ushort(__half x) {
    return x.bits;
}
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) {
    return {bits};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) {
    return x.bits;
}
