// The KV cache in 8 bits: blocks of 16 positions of one KV head. A block holds bf16 scales [groups][16], then int8
// codes: of keys [dim / 2][16][2], of values [8][dim][2], so that a register of codes holds pairs of the dimensions or
// positions that a sum runs over. loader/decode/kv_blocks.py is the reference; docs/numerics.md has the arithmetic.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "rounding.h"

namespace moe {

inline constexpr int kKvPositions = 16;  // of a block
inline constexpr int kKvGroup = 64;      // values that share a scale; the last group of a head may be shorter
inline constexpr int kMaxKvDim = 1024;   // of a head

inline constexpr int kv_scale_bytes(int dim) { return (dim + kKvGroup - 1) / kKvGroup * kKvPositions * 2; }
inline constexpr int kv_block_bytes(int dim) { return kv_scale_bytes(dim) + kKvPositions * dim; }

enum class KvPart { keys, values };

// Offset of a code from the first code of its block.
inline int kv_code_offset(KvPart part, int dim, int slot, int i) {
  if (part == KvPart::keys) return i / 2 * (2 * kKvPositions) + 2 * slot + i % 2;
  return slot / 2 * (2 * dim) + 2 * i + slot % 2;
}

// Writes row x [dim] of T's values as position `slot` of a block: d = bf16(largest / 127), codes round(x / d).
inline void kv_store(const float* x, int dim, KvPart part, uint8_t* block, int slot) {
  int8_t* const codes = reinterpret_cast<int8_t*>(block + kv_scale_bytes(dim));
  for (int begin = 0; begin < dim; begin += kKvGroup) {
    const int end = begin + kKvGroup < dim ? begin + kKvGroup : dim;
    float largest = 0.0f, bad = 0.0f;
    for (int i = begin; i < end; ++i) {
      const float size = std::fabs(x[i]);
      largest = size > largest ? size : largest;
      bad += x[i] - x[i];  // NaN if a value is not finite
    }
    const bool is_zero = bad != bad || largest < 1e-30f;  // x / d must stay finite
    const float d = bad != bad ? bad : is_zero ? 0.0f : rounded<uint16_t>(largest / 127.0f);
    uint16_t scale;
    round_to(d, &scale);
    std::memcpy(block + 2 * (begin / kKvGroup * kKvPositions + slot), &scale, sizeof scale);
    for (int i = begin; i < end; ++i) {
      // The scale may have been rounded down: then the largest value exceeds 127.
      // Adding 1.5 * 2^23 rounds to nearest even; without SSE4.1 std::nearbyint is a call.
      const float code = is_zero ? 0.0f : (x[i] / d + 12582912.0f) - 12582912.0f;
      codes[kv_code_offset(part, dim, slot, i)] = int8_t(code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code);
    }
  }
}

}  // namespace moe
