// Not written yet.
#include "common.cuh"

int32_t s3t_expand_cuda(const s3t_expand_args*, int32_t, void*) {
    return S3T_NO_CUDA;
}
