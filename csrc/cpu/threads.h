#pragma once
#include "kernels.h"

namespace s3t {

// Runs task(args, 0) .. task(args, count - 1), on torch's own OpenMP team of `threads` where there is one and the work
// (fused multiply-adds) pays for a fork. The tasks share nothing, so neither order nor team changes a bit.
void parallel(Task task, const void* args, int64_t count, int64_t work, int32_t threads);

}  // namespace s3t
