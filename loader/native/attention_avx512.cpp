#include <immintrin.h>

#include "attention.h"
#include "kv_blocks.h"
#include "unrolled.h"

namespace moe {
namespace {

// Tiles of 16 sums: 4 heads and 4 positions of scores, or 4 heads and 64 columns of V.
constexpr int kLanes = 16, kHeads = 4, kScorePositions = 4, kWeighColumns = 4, kScoreBlocks = 2;

// For plain vector code gcc 12 emits six instructions.
inline __m512 widened(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline __m512i wide_pairs(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// In place: with the builtin, gcc copies the accumulator.
inline __m512i dot2(__m512i sum, __m512i a, __m512i b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

#include "attention_vectors.inc.h"
#include "attention.inc.h"
#include "attention_8bit.inc.h"
}  // namespace

extern const AttentionKernels kAvx512Attention = {attend<PlainCache<float>>, attend<PlainCache<uint16_t>>,
                                                  attend<Cache8>};

}  // namespace moe
