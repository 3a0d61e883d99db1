#include "attention.h"
#include "kv_blocks.h"
#include "unrolled.h"

namespace moe {
namespace {

// Tiles of 8 sums, half of the registers: 2 heads and 16 values of one position, or 2 heads and 16 columns of V.
constexpr int kLanes = 4, kHeads = 2, kScorePositions = 1, kWeighColumns = 4, kScoreBlocks = 1;

// Each value is the upper half of a float: little-endian zeros go between. gcc 12 needs one instruction for this, and
// four to convert and shift.
inline auto widened(const uint16_t* p) {
  typedef uint64_t Pair __attribute__((vector_size(16)));
  typedef uint16_t Eight __attribute__((vector_size(16)));
  typedef float Four __attribute__((vector_size(16)));
  uint64_t four;
  __builtin_memcpy(&four, p, 8);  // not to the vector: half of one would pass through the stack
  return Four(__builtin_shufflevector(Eight{}, Eight(Pair{four, 0}), 0, 8, 1, 9, 2, 10, 3, 11));
}

typedef int32_t Ints __attribute__((vector_size(16)));
typedef int16_t Pairs __attribute__((vector_size(16)));

inline Ints wide_pairs(const int8_t* p) {
  typedef int8_t Codes __attribute__((vector_size(8)));
  Codes codes;
  __builtin_memcpy(&codes, p, sizeof codes);
  return Ints(__builtin_convertvector(codes, Pairs));
}
inline Ints dot2(Ints sum, Ints a, Ints b) {
#if defined(__SSE2__)
  return sum + Ints(__builtin_ia32_pmaddwd128(Pairs(a), Pairs(b)));
#else
  return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

#include "attention_vectors.inc.h"
#include "attention.inc.h"
#include "attention_8bit.inc.h"
}  // namespace

extern const AttentionKernels kPortableAttention = {attend<PlainCache<float>>, attend<PlainCache<uint16_t>>,
                                                    attend<Cache8>};

}  // namespace moe
