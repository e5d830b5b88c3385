// Philox 4x32 with 10 rounds (Salmon et al., SC 2011): the dropout mask as a function of (group seed, row key, column,
// slot) alone, the same words on every processor. One counter gives the words of four neighbouring columns.
#pragma once
#include <cstdint>

#include "s3t.h"

#if defined(__CUDACC__)
    #define S3T_ANYWHERE __host__ __device__
#else
    #define S3T_ANYWHERE
#endif

namespace s3t {

struct Words {
    uint32_t at[4];
};

// The words of columns 4 * quad .. 4 * quad + 3.
S3T_ANYWHERE static inline Words philox(uint64_t seed, uint64_t row, uint32_t quad, uint32_t slot) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    Words c{{quad, slot, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32)}};
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c.at[0];
        const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * c.at[2];
        c = {{static_cast<uint32_t>(b >> 32) ^ c.at[1] ^ key0, static_cast<uint32_t>(b),
              static_cast<uint32_t>(a >> 32) ^ c.at[3] ^ key1, static_cast<uint32_t>(a)}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

// Says whether the adapter `id` of a slot drops anything at all.
S3T_ANYWHERE static inline bool drops(const s3t_dropout& dropout, int64_t id) {
    return dropout.seeds != nullptr && id >= dropout.first;
}

}  // namespace s3t
