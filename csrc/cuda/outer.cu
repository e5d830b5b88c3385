// Not written yet.
#include "common.cuh"

int64_t s3t_outer_workspace(const s3t_outer_args*) {
    return 0;
}

int32_t s3t_outer_cuda(const s3t_outer_args*, void*, int32_t, void*) {
    return S3T_NO_CUDA;
}
