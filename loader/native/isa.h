// The kernels of one instruction set, and the quantized activations that all of them read.
#pragma once
#include <cstdint>

#include "../../formats/native/tile_layout.h"

namespace moe {

inline constexpr int kActCols = 64;    // input columns that share one activation scale
inline constexpr int kMaxTokens = 96;  // tokens of one tile call; their sums take 96 x 32 x 2 floats = 24 KiB

// 256 quantized columns of one token. Zero where the row is padded.
struct alignas(64) ActBlock {
  int8_t x[256];    // round(x * 127 / amax) of each 64 columns, in column order
  int16_t s16[16];  // sums of x over 16 columns; each four sums g0..g3 stand as g0, g2, g1, g3
  int16_t s32[8];   // sums over 32 columns, in order
  float d[4];       // amax / 127 of each 64 columns; NaN if one of them is not finite
  float u[4];       // d * (sum over 64 columns)
};
static_assert(sizeof(ActBlock) == 384);

// Activations of n tokens, [superblock][token]. Tokens are a constant distance apart, so a kernel addresses twelve of
// them from one register.
struct Activations {
  const ActBlock* at;  // first token, first superblock
  int64_t stride;      // ActBlocks between superblocks: the number of tokens of the whole panel
};

// y[t][row] for the 32 rows of one tile; 0 < tokens <= kMaxTokens.
using TileFn = void (*)(const uint8_t* tile, int64_t blocks, Activations x, int tokens, float* y);

// Reads a cache line early. The kernel computes one half of the rows after the other, but the hardware prefetcher only
// follows lines that are first read in memory order (AVX2: 1.4 to 2x faster, measured).
inline __attribute__((always_inline)) void touch(const uint8_t* p) { asm volatile("" : : "r"(*p)); }

struct IsaKernels {
  TileFn tile[kPackings];
  // Quantizes one row of n columns into blocks_of(n) ActBlocks, `stride` apart.
  void (*quantize)(const float* x, int64_t n, ActBlock* out, int64_t stride);
  // Quantizes 64 columns into quarter b (0..3) of one ActBlock.
  void (*quantize_block)(const float* x, ActBlock* out, int b);
  // h[i] = silu(gate[i]) * up[i], n a multiple of 32.
  void (*swiglu)(const float* gate, const float* up, float* h, int n);
  // y[t * stride] = dot(w, x[t]) for one bf16 row.
  void (*dot_bf16)(const uint16_t* w, const float* x, int64_t n, int tokens, float* y, int64_t stride);
  uint64_t (*sum)(const uint8_t* p, int64_t bytes);
};

extern const IsaKernels kPortableKernels;
#if defined(MOE_X86)
extern const IsaKernels kAvx2Kernels;
extern const IsaKernels kAvx512Kernels;
#endif

}  // namespace moe
