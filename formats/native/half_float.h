// Converts one number between fp16 and fp32. Rounds to nearest even and keeps subnormals. The namespace is unnamed for
// the reason given in cpu_features.h.
#pragma once
#include <cstdint>
#include <cstring>

namespace moe {
namespace {

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x0400) return float_of(sign | ((rest << 13) + (112u << 23)));
  const float magnitude = (float)rest * 0x1p-24f;
  return float_of(sign | bits_of(magnitude));
}

// Requires value >= 0. Returns 0x7c00 (infinity) from 65520 on, and for NaN.
inline uint16_t float_to_half(float value) {
  if (!(value < 65520.0f)) return 0x7c00;
  if (value < 0x1p-14f) {
    // From 0.5 to 1, fp32 has steps of 2^-24, the smallest fp16 subnormal: the addition rounds to a multiple of it.
    return (uint16_t)(bits_of(value + 0.5f) - 0x3f000000u);
  }
  uint32_t bits = bits_of(value);
  bits += 0xfffu + (bits >> 13 & 1u);
  return (uint16_t)((bits - (112u << 23)) >> 13);
}

}  // namespace
}  // namespace moe
