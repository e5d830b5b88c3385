// What the CUDA kernels share: reading the three types as fp32, the routing table, the device of a launch.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../s3t.h"

namespace s3t::cuda {

constexpr int kBlock = 256;  // terms of one chain of the sum: part of the contract

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

}  // namespace s3t::cuda
