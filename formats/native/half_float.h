// Conversion of one number between fp16 and fp32: rounds to nearest even and keeps subnormals. In an unnamed namespace:
// see cpu_features.h.
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

// For value >= 0. Returns 0x7c00 (infinity) from 65520 on, and for NaN.
inline uint16_t float_to_half(float value) {
  if (!(value < 65520.0f)) return 0x7c00;
  if (value < 0x1p-14f) {
    // Adding 0.5 leaves the 24 bits above 2^-24, so the FPU rounds to a multiple of the smallest subnormal.
    return (uint16_t)(bits_of(value + 0.5f) - 0x3f000000u);
  }
  uint32_t bits = bits_of(value);
  bits += 0xfffu + (bits >> 13 & 1u);
  return (uint16_t)((bits - (112u << 23)) >> 13);
}

}  // namespace
}  // namespace moe
