// Kernels for AVX-512 F, BW, DQ, VL and VNNI.
#include <immintrin.h>

#include <algorithm>

#include "../../formats/native/half_float.h"
#include "isa.h"
#include "unrolled.h"

namespace moe {
namespace {

#include "elementwise.inc.h"
#include "lanes_avx512.inc.h"
#define MOE_PART_AVX512
#include "packings/all.inc.h"
#include "gemv_avx512.inc.h"
#include "gemm_avx512.inc.h"

template <Packing P>
void tile_any(const uint8_t* tile, int64_t blocks, Activations x, int tokens, float* y) {
  if constexpr (kGemvTokens<P> < kMaxTokens)
    if (tokens > kGemvTokens<P>) return tile_gemm<P>(tile, blocks, x, tokens, y);
  for (int n; tokens > 0; tokens -= n, x.at += n, y += n * kTileRows) {
    n = tokens <= 4 || tokens > 8 ? std::min(tokens, 4) : (tokens + 1) / 2;  // 5 tokens are 3 + 2
    if (n == 1) tile_gemv<P, 1>(tile, blocks, x, y);
    if (n == 2) tile_gemv<P, 2>(tile, blocks, x, y);
    if (n == 3) tile_gemv<P, 3>(tile, blocks, x, y);
    if (n == 4) tile_gemv<P, 4>(tile, blocks, x, y);
  }
}

}  // namespace

#define MOE_TILE(id, ...) tile_any<id>,

extern const IsaKernels kAvx512Kernels = {
    {MOE_PACKINGS(MOE_TILE)}, quantize_row, quantize64, swiglu_rows, dot_bf16_batch<4>, sum_words,
};

}  // namespace moe
