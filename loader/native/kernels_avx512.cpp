// AVX-512 F, BW, DQ, VL and VNNI.
#include <immintrin.h>

#include <algorithm>

#include "isa.h"
#include "unrolled.h"

namespace moe {
namespace {

#include "elementwise.inc.h"
#include "gemv_avx512.inc.h"
#include "gemm_avx512.inc.h"

// Up to this many tokens, taking the planes again for each four tokens costs no more than the GEMM, which does not read
// cold weights in their order (measured at 5 to 128 tokens). For 4 bits it never does.
template <Packing P>
constexpr int kGemvTokens = P == kQ4G64S8 ? kMaxTokens : P == kQ2G16S8 ? 28 : 12;

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

extern const IsaKernels kAvx512Kernels = {
    {tile_any<kQ2G16S4>, tile_any<kQ2G16S8>, tile_any<kQ3G32S4>, tile_any<kQ3G64S8>, tile_any<kQ4G64S8>},
    quantize_row,
    quantize64,
    swiglu_rows,
    dot_bf16_batch<4>,
    sum_words,
};

}  // namespace moe
