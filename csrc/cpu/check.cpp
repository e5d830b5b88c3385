// What only a look at a table's numbers shows, on the CPU, where it costs no synchronisation.
#include "../s3t.h"

bool s3t_check_values(const s3t_table* table, int64_t rows, int64_t adapters) {
    for (int64_t g = 0; g < table->groups; ++g) {
        const int32_t* ids = table->ids + g * table->group_stride;
        for (int64_t p = 0; p < table->slots; ++p) {
            const int64_t id = ids[p * table->slot_stride];
            if (id < -1 || id >= adapters) return false;
        }
    }
    const int32_t* offsets = table->offsets;
    if (offsets == nullptr) return true;
    for (int64_t g = 0; g < table->groups; ++g) {
        if (offsets[g] > offsets[g + 1]) return false;
    }
    return offsets[0] == 0 && offsets[table->groups] == rows;
}
