// panels[i][k][c] = weight[32 i + c][k], padded with zeros; of bf16, in which terms are multiplied in pairs, two k lie
// side by side: panels[i][k / 2][c][k % 2]. A task owns one panel. Bound by memory.
#include <cstring>

#include "threads.h"

namespace s3t {
namespace {

template <typename Element>
void pack_panel(const s3t_pack_args& args, int64_t panel, int64_t pair) {
    const int64_t in = (args.in + pair - 1) / pair * pair;
    const auto* weight = static_cast<const Element*>(args.weight) + panel * kPanel * args.in;
    auto* to = static_cast<Element*>(args.panels) + panel * in * kPanel;
    const int64_t columns = args.out - panel * kPanel < kPanel ? args.out - panel * kPanel : kPanel;
    if (columns < kPanel || in > args.in) std::memset(to, 0, in * kPanel * sizeof(Element));
    for (int64_t k = 0; k < args.in; ++k) {
        Element* line = to + k / pair * pair * kPanel + k % pair;
        for (int64_t c = 0; c < columns; ++c) line[c * pair] = weight[c * args.in + k];
    }
}

void pack_task(const void* data, int64_t panel) {
    const auto& args = *static_cast<const s3t_pack_args*>(data);
    if (args.type == S3T_F32) {
        pack_panel<uint32_t>(args, panel, 1);
    } else {
        pack_panel<uint16_t>(args, panel, args.type == S3T_BF16 ? 2 : 1);
    }
}

}  // namespace
}  // namespace s3t

int32_t s3t_pack(const s3t_pack_args* args, int32_t threads) {
    s3t::parallel(s3t::pack_task, args, (args->out + s3t::kPanel - 1) / s3t::kPanel, args->out * args->in * 16,
                  threads);
    return S3T_OK;
}
