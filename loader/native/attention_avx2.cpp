#include <immintrin.h>

#include "attention.h"
#include "unrolled.h"

namespace moe {
namespace {

// Tiles of 8 sums, half of the registers: 4 heads and 16 values of one position, or 4 heads and 16 columns of V.
constexpr int kLanes = 8, kHeads = 4, kScorePositions = 1, kWeighColumns = 2;

inline __m256 widened(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

#include "attention_vectors.inc.h"
#include "attention.inc.h"
}  // namespace

extern const AttentionKernels kAvx2Attention = {attend<float>, attend<uint16_t>};

}  // namespace moe
