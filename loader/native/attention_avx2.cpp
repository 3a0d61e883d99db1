#include <immintrin.h>

#include "attention.h"
#include "kv_blocks.h"
#include "unrolled.h"

namespace moe {
namespace {

// Tiles of 8 sums, half of the registers: 4 heads and 16 values of one position, or 4 heads and 16 columns of V.
constexpr int kLanes = 8, kHeads = 4, kScorePositions = 1, kWeighColumns = 2, kScoreBlocks = 1;

inline __m256 widened(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

inline __m256i wide_pairs(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256i dot2(__m256i sum, __m256i a, __m256i b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

#include "attention_vectors.inc.h"
#include "attention.inc.h"
#include "attention_8bit.inc.h"
}  // namespace

extern const AttentionKernels kAvx2Attention = {attend<PlainCache<float>>, attend<PlainCache<uint16_t>>,
                                                attend<Cache8>};

}  // namespace moe
