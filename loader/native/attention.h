// What attention.cpp needs of each instruction set.
#pragma once
#include <cstdint>

#include "moe_kernels.h"

namespace moe {

// `heads` query heads [heads][dim] over `length` positions of one head of K and V ([length][dim], dense): running sums
// acc [heads][dim], the largest score and the sum of exp(score - largest) of each head. dim is a multiple of 16.
using AttendFn = void (*)(const float* q, const void* k, const void* v, int64_t length, int heads, int dim, float scale,
                          float* acc, float* top, float* total);

struct AttentionKernels {
  AttendFn attend_f32, attend_bf16;
};

extern const AttentionKernels kPortableAttention;
#if defined(MOE_X86)
extern const AttentionKernels kAvx2Attention;
extern const AttentionKernels kAvx512Attention;
#endif

// What moe_attention_step refuses before it writes anything: MOE_OK, MOE_E_SIZE or MOE_E_PACKING.
int32_t check_attention(const moe_attention& layer, int64_t capacity, int64_t length);

}  // namespace moe
