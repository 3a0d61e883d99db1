// The attention kernels of each instruction set.
#pragma once
#include <cstdint>

#include "moe_kernels.h"

namespace moe {

// Query heads over some positions of one KV head. dim is a multiple of 16.
struct AttendTask {
  const float* q;  // [heads][dim]
  const void* k;   // [length][dim], dense, or blocks of kv_blocks.h; v likewise
  const void* v;
  int64_t length;
  int64_t prefetchable;  // at least `length`: positions at k and v that this thread reads next
  int heads, dim;
  float scale;
  // For each head: running sums [heads][dim], the largest score, the sum of exp(score - largest).
  float *acc, *top, *total;
};
using AttendFn = void (*)(const AttendTask& task);

struct AttentionKernels {
  AttendFn attend_f32, attend_bf16, attend_8bit;
};

extern const AttentionKernels kPortableAttention;
#if defined(MOE_X86)
extern const AttentionKernels kAvx2Attention;
extern const AttentionKernels kAvx512Attention;
#endif

// Checks the arguments of moe_attention_step before it writes: MOE_OK, MOE_E_SIZE or MOE_E_PACKING.
int32_t check_attention(const moe_attention& layer, const moe_kv& cache);

}  // namespace moe
