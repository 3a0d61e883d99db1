#include <immintrin.h>

#include "attention.h"
#include "unrolled.h"

namespace moe {
namespace {

// Tiles of 16 sums: 4 heads and 4 positions of scores, or 4 heads and 64 columns of V.
constexpr int kLanes = 16, kHeads = 4, kScorePositions = 4, kWeighColumns = 4;

// For plain vector code gcc 12 emits six instructions.
inline __m512 widened(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

#include "attention_vectors.inc.h"
#include "attention.inc.h"
}  // namespace

extern const AttentionKernels kAvx512Attention = {attend<float>, attend<uint16_t>};

}  // namespace moe
