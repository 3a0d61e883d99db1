// fp32 and bf16 activations, exp, and RMSNorm with transformers' rounding. All operations are correctly rounded, and
// the GPU kernels give the same bits.
#pragma once
#include <cmath>
#include <cstdint>

namespace moe {

inline float to_float(float v) { return v; }
inline float to_float(uint16_t v) { return __builtin_bit_cast(float, uint32_t(v) << 16); }

inline void round_to(float v, float* to) { *to = v; }
inline void round_to(float v, uint16_t* to) {  // to nearest, ties to even; NaN stays NaN
  const uint32_t u = __builtin_bit_cast(uint32_t, v);
  const uint16_t rounded = uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
  *to = v != v ? uint16_t(0x7fc0) : rounded;
}

template <class T>
float rounded(float v) {
  T narrow;
  round_to(v, &narrow);
  return to_float(narrow);
}

// exp(x) within a few ulp for x <= 0, at least exp(-87); NaN stays NaN. Equals one lane of exp_lanes
// (attention_vectors.inc.h).
inline float exp_of_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = r * (1.0f / 720.0f) + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * __builtin_bit_cast(float, (__builtin_bit_cast(uint32_t, shifted) << 23) + 0x3f800000u);
}

template <class T>
void rms_norm_row(const T* x, const T* weight, float eps, int64_t columns, T* y) {
  double lanes[16] = {};
  int64_t begin = 0;
  for (; begin + 16 <= columns; begin += 16)
    for (int i = 0; i < 16; ++i) lanes[i] += double(to_float(x[begin + i])) * double(to_float(x[begin + i]));
  for (int64_t i = begin; i < columns; ++i) lanes[i - begin] += double(to_float(x[i])) * double(to_float(x[i]));
  double sum = 0.0;
  for (double lane : lanes) sum += lane;
  const float factor = float(1.0 / std::sqrt(sum / double(columns) + double(eps)));
  // transformers rounds before it multiplies by the weight.
  for (int64_t i = 0; i < columns; ++i) round_to(to_float(weight[i]) * rounded<T>(to_float(x[i]) * factor), y + i);
}

}  // namespace moe
