// What the CUDA kernels share: the three types as fp32, the instructions of tensor cores, copies and clusters, and the
// launch. Under S3T_EMULATE the same sources are built for a CPU, whose instructions stand in for those of PTX.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <initializer_list>
#include <type_traits>

#include "routing.h"

namespace s3t::cuda {

constexpr int kBlock = 256;  // terms of one chain of the sum: part of the contract
constexpr int kWarp = 32;

template <typename X>
constexpr bool kIsFloat = std::is_same_v<X, float>;

__device__ inline float widen(float x) {
    return x;
}
__device__ inline float widen(__half x) {
    return __half2float(x);
}
__device__ inline float widen(__nv_bfloat16 x) {
    return __bfloat162float(x);
}

template <typename X>
__device__ X narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
    return x;
}
template <>
__device__ inline __half narrow<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// Reads element i of a pool as a value of X; an fp32 pool is rounded here.
template <typename X>
__device__ inline float read_pool(const void* data, bool is_float, int64_t i) {
    return is_float ? widen(narrow<X>(static_cast<const float*>(data)[i])) : widen(static_cast<const X*>(data)[i]);
}

__host__ __device__ inline bool aligned16(const void* address, int64_t row_bytes) {
    return (reinterpret_cast<uintptr_t>(address) | static_cast<uintptr_t>(row_bytes)) % 16 == 0;
}

// --- instructions ----------------------------------------------------------------------------------------------------

// c (16,8) += a (16,16) b (16,8), fp32 sums. Lane l holds, with i = l / 4 and k = l % 4 * 2:
// a: (i,k..k+1) (i+8,k..) (i,k+8..) (i+8,k+8..);  b: (k..k+1,i) (k+8..,i);  c: (i,k) (i,k+1) (i+8,k) (i+8,k+1).
template <typename X>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef S3T_EMULATE
    emulator::mma<X>(c, a, b, [](uint32_t bits) { return widen(reinterpret_cast<const X&>(bits)); });
#else
    if constexpr (std::is_same_v<X, __half>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#endif
}

// Four 8x8 matrices of 16-bit values from shared memory; lane l gives the address of row l % 8 of matrix l / 8 and gets
// elements (l / 4, l % 4 * 2 ..+1) of each, of their transposes if Transposed.
template <bool Transposed>
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
#ifdef S3T_EMULATE
    emulator::load_matrices(to, row, Transposed);
#else
    const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (Transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(from)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(from)
                     : "memory");
    }
#endif
}

// Copies 16 bytes to shared memory without a register between; bytes past `bytes` become zero and are not read.
__device__ inline void copy_async(void* to, const void* from, int bytes = 16) {
#ifdef S3T_EMULATE
    emulator::copy_async(to, from, bytes);
#else
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
        "l"(from), "r"(bytes)
        : "memory");
#endif
}

__device__ inline void commit_copies() {
#ifdef S3T_EMULATE
    emulator::commit_copies();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `Pending` of the committed groups of this thread are under way.
template <int Pending>
__device__ inline void wait_copies() {
#ifdef S3T_EMULATE
    emulator::wait_copies(Pending);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// Waits for the kernel before this one on its stream, where this one was launched to overlap with it.
__device__ inline void wait_for_kernel_before() {
#if !defined(S3T_EMULATE) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the kernel after this one begin as soon as multiprocessors have room; it waits before it reads our results.
__device__ inline void let_kernel_after_begin() {
#if !defined(S3T_EMULATE) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Blocks of a cluster (sm_90; elsewhere a cluster is one block) see each other's shared memory.
__device__ inline unsigned cluster_size() {
#if defined(S3T_EMULATE)
    return emulator::cluster_size();
#elif __CUDA_ARCH__ >= 900
    unsigned size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
#else
    return 1;
#endif
}

__device__ inline unsigned cluster_rank() {
#if defined(S3T_EMULATE)
    return emulator::cluster_rank();
#elif __CUDA_ARCH__ >= 900
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return 0;
#endif
}

__device__ inline void cluster_sync() {
#if defined(S3T_EMULATE)
    emulator::wait(emulator::Wait::cluster, 0);
#elif __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
#else
    __syncthreads();
#endif
}

// The same place of shared memory in block `rank` of the cluster.
template <typename T>
__device__ inline T* in_block(T* own, unsigned rank) {
#if defined(S3T_EMULATE)
    return static_cast<T*>(emulator::shared_of(own, rank));
#elif __CUDA_ARCH__ >= 900
    T* there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(own), "r"(rank));
    return there;
#else
    return own;
#endif
}

// All of a block's shared memory, as one struct; the launch asks for sizeof(T) bytes.
template <typename T>
__device__ inline T& shared() {
    static_assert(alignof(T) <= 16);
#ifdef S3T_EMULATE
    return *reinterpret_cast<T*>(emulator::shared_memory());
#else
    extern __shared__ uint4 shared_bytes[];
    return *reinterpret_cast<T*>(shared_bytes);
#endif
}

// --- work ------------------------------------------------------------------------------------------------------------

// Finds the (never empty) group of a row: the first one that ends after it.
__device__ inline int64_t group_of(const s3t_table& table, int64_t row) {
    int64_t low = 0, high = table.offsets == nullptr ? 0 : table.groups - 1;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (table.offsets[middle + 1] > row) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

// Finds the rows of a tile (see routing.h); a whole warp asks, and 32 groups are probed at a time.
__device__ inline Span find_span(const s3t_table& table, int64_t rows, int64_t tile, int64_t height) {
    int64_t low = 0, high = table.groups;  // the last group whose first tile is not past `tile` lies in low..high-1
    while (high - low > 1) {
        const int64_t step = (high - low + kWarp - 1) / kWarp, probe = low + threadIdx.x % kWarp * step;
        const bool begins = probe < high && first_tile(table, rows, probe, height) <= tile;
        low += (__popc(__ballot_sync(0xffffffff, begins)) - 1) * step;
        high = low + step < high ? low + step : high;
    }
    return span_of(table, rows, low, tile, height);
}

// --- launches --------------------------------------------------------------------------------------------------------

// The runtime linked here has a current device of its own; a launch must not leave it, or torch's, changed.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        status_ = cudaGetDevice(&before_);
        if (status_ == cudaSuccess && before_ != device) status_ = cudaSetDevice(device);
    }
    ~DeviceGuard() {
        if (status_ == cudaSuccess) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    cudaError_t status() const { return status_; }

  private:
    int before_ = 0;
    cudaError_t status_;
};

inline int32_t status_of(cudaError_t error) {
    return error == cudaSuccess ? S3T_OK : S3T_CUDA_ERROR + static_cast<int32_t>(error);
}

inline int attribute(int device, cudaDeviceAttr which) {
    int value = 0;
    cudaDeviceGetAttribute(&value, which, device);
    return value;
}

// The newest architecture (800, 900, ..) of a build that is not newer than a device.
constexpr int newest_for(int device, std::initializer_list<int> built) {
    int newest = 0;
    for (const int arch : built) newest = newest < arch && arch <= device ? arch : newest;
    return newest;
}

// The architecture of the code that a device runs. Clusters and overlap are there only where that code has them: a
// device of sm_90 with a build for sm_80 does not.
inline int architecture(int device) {
    const int major = attribute(device, cudaDevAttrComputeCapabilityMajor);
#ifdef S3T_EMULATE
    return major * 100;
#else
    const int minor = attribute(device, cudaDevAttrComputeCapabilityMinor);
    return newest_for(major * 100 + minor * 10, {__CUDA_ARCH_LIST__});
#endif
}

struct Launch {
    dim3 grid, block;
    size_t shared;  // bytes
    void* stream;
    unsigned cluster = 1;  // blocks along x that form a cluster; above 1 on sm_90 only
    bool overlap = false;  // may begin before the kernel before it ends, and calls wait_for_kernel_before()
};

template <typename... Parameters, typename... Args>
cudaError_t launch(const Launch& how, void (*kernel)(Parameters...), const Args&... args) {
#ifdef S3T_EMULATE
    return emulator::launch(how.grid, how.block, how.cluster, how.shared, [&] { kernel(args...); });
#else
    if (how.shared > 48 * 1024) {
        const int bytes = static_cast<int>(how.shared);
        const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (status != cudaSuccess) return status;
    }
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config{};
    config.gridDim = how.grid, config.blockDim = how.block;
    config.dynamicSmemBytes = how.shared, config.stream = static_cast<cudaStream_t>(how.stream);
    config.attrs = attributes;
    if (how.cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {how.cluster, 1, 1};
    }
    if (how.overlap) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    return cudaLaunchKernelEx(&config, kernel, args...);
#endif
}

// Calls f with a value of the type that a code names.
template <typename F>
int32_t with_type(s3t_type type, F&& f) {
    if (type == S3T_F32) return status_of(f(float{}));
    return type == S3T_F16 ? status_of(f(__half{})) : status_of(f(__nv_bfloat16{}));
}

}  // namespace s3t::cuda
