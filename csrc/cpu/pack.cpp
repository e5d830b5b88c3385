// panels[i][k][c] = weight[32 i + c][k], padded with zeros; of bf16, in which terms are multiplied in pairs, two k lie
// side by side: panels[i][k / 2][c][k % 2]. A task owns one panel, and lays it out in squares that stay in the first
// cache, along the weight's contiguous dimension: rows a power of two apart drive each other out. Bound by memory.
#include <cstring>

#include "threads.h"

namespace s3t {
namespace {

template <typename Element, int64_t pair>
void pack_panel(const s3t_pack_args& args, int64_t panel) {
    const int64_t in = (args.in + pair - 1) / pair * pair;
    const auto* weight = static_cast<const Element*>(args.weight) + panel * kPanel * args.row;
    auto* to = static_cast<Element*>(args.panels) + panel * in * kPanel;
    const int64_t columns = args.out - panel * kPanel < kPanel ? args.out - panel * kPanel : kPanel;
    if (in > 0 && (columns < kPanel || in > args.in)) std::memset(to, 0, in * kPanel * sizeof(Element));
    const auto put = [&](int64_t k, int64_t c) {
        to[(k / pair * kPanel + c) * pair + k % pair] = weight[c * args.row + k * args.column];
    };
    for (int64_t first = 0; first < args.in; first += kPanel) {
        const int64_t end = first + kPanel < args.in ? first + kPanel : args.in;
        if (args.row == 1) {
            for (int64_t k = first; k < end; ++k) {
                for (int64_t c = 0; c < columns; ++c) put(k, c);
            }
        } else {
            for (int64_t c = 0; c < columns; ++c) {
                for (int64_t k = first; k < end; ++k) put(k, c);
            }
        }
    }
}

void pack_task(const void* data, int64_t panel) {
    const auto& args = *static_cast<const s3t_pack_args*>(data);
    switch (args.type) {
        case S3T_F32:
            return pack_panel<uint32_t, 1>(args, panel);
        case S3T_F16:
            return pack_panel<uint16_t, 1>(args, panel);
        case S3T_BF16:
            return pack_panel<uint16_t, 2>(args, panel);
    }
}

}  // namespace
}  // namespace s3t

int32_t s3t_pack(const s3t_pack_args* args, int32_t threads) {
    s3t::parallel(s3t::pack_task, args, (args->out + s3t::kPanel - 1) / s3t::kPanel, args->out * args->in * 16,
                  threads);
    return S3T_OK;
}
