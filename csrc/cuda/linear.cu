// Not written yet.
#include "common.cuh"

int32_t s3t_linear_cuda(const s3t_linear_args*, int32_t, void*) {
    return S3T_NO_CUDA;
}

int32_t s3t_layer_cuda(const s3t_shrink_args*, const s3t_linear_args*, int32_t, void*) {
    return S3T_NO_CUDA;
}
