// Code that all kernels share: quantized activations, conversions, and the arithmetic of docs/numerics.md.
// NVRTC compiles it for the user's GPU (--fmad=false, so that only fmaf contracts), a C++ compiler for the tests
// (tests/support/gpu/cuda_host/host.h replaces the GPU). No CUDA headers: NVRTC comes without them.
#pragma once

// MOE_STRUCT: a structure passed by value. Without __grid_constant__ an index computed at run time copies it to local
// memory.
#if defined(MOE_ON_HOST)
#include "host.h"
#define MOE_STRUCT const
#else
#if defined(__CUDACC_RTC__)
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif
#define MOE_DEVICE __device__ __forceinline__
#define MOE_KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)
#define MOE_STRUCT const __grid_constant__
#define MOE_SHARED __shared__
#define MOE_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace moe {

constexpr int kWarp = 32;
constexpr int kActCols = 64;
constexpr uint32_t kAllLanes = 0xffffffffu;

// 64 quantized columns of one token. A token has blocks64(columns) of them: whole superblocks of 256 columns.
struct alignas(16) ActBlock {
  int8_t x[64];    // round(x * 127 / amax), in column order
  int16_t sum[4];  // sums of 16 columns each, in order
  float d;         // amax / 127; NaN if a value is not finite
  float u;         // d * (sum over the 64 columns)
};
static_assert(sizeof(ActBlock) == 80, "ActBlock");

MOE_DEVICE int64_t blocks64(int64_t columns) { return (columns + 255) / 256 * 4; }

MOE_DEVICE uint32_t bits_of(float v) { return __float_as_uint(v); }
MOE_DEVICE float float_of(uint32_t v) { return __uint_as_float(v); }

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

MOE_DEVICE float to_float(float v) { return v; }
MOE_DEVICE float to_float(Bf16 v) { return float_of(uint32_t(v.bits) << 16); }
MOE_DEVICE float half_to_float(uint16_t bits) {
#if defined(MOE_ON_HOST)
  return host_half_to_float(bits);
#else
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
#endif
}
MOE_DEVICE float to_float(F16 v) { return half_to_float(v.bits); }

// Rounds to nearest, ties to even; NaN stays NaN.
MOE_DEVICE void round_to(float v, float* to) { *to = v; }
MOE_DEVICE void round_to(float v, Bf16* to) {
  const uint32_t u = bits_of(v);
  to->bits = v != v ? uint16_t(0x7fc0) : uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
MOE_DEVICE void round_to(float v, F16* to) {
#if defined(MOE_ON_HOST)
  to->bits = host_float_to_half(v);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(v));
#endif
}

template <class T>
MOE_DEVICE float rounded(float v) {
  T narrow;
  round_to(v, &narrow);
  return to_float(narrow);
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest even integer
constexpr float kTiny = 1e-30f;        // a block with a smaller amax counts as zero: 127 / amax must stay finite

// exp(x) within 3 ulp, clamped to exp(-87) and exp(88); NaN stays NaN (docs/numerics.md, "Experts").
MOE_DEVICE float exp_poly(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = fmaf(x, 1.44269504f, kRound);
  const float n = shifted - kRound;
  float r = fmaf(n, -0.693145752f, x);
  r = fmaf(n, -1.42860677e-6f, r);
  float p = 1.0f / 720.0f;
  p = fmaf(p, r, 1.0f / 120.0f);
  p = fmaf(p, r, 1.0f / 24.0f);
  p = fmaf(p, r, 1.0f / 6.0f);
  p = fmaf(p, r, 0.5f);
  p = fmaf(p, r, 1.0f);
  p = fmaf(p, r, 1.0f);
  return p * float_of((bits_of(shifted) << 23) + 0x3f800000u);
}

MOE_DEVICE float silu_mul(float gate, float up) { return gate / (1.0f + exp_poly(-gate)) * up; }

// Quantizes 64 columns with 16 lanes: lane i (0..15) of an aligned group of 16 holds columns 4i..4i+3 in v. All 32
// lanes of a warp (two groups) must call it. A group with `to` = null writes nothing.
MOE_DEVICE void quantize_by_16(const float (&v)[4], int lane16, ActBlock* to) {
  uint32_t top = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t a = bits_of(v[i]) & 0x7fffffffu;  // an integer comparison, because fmax would drop a NaN
    top = a > top ? a : top;
  }
  for (int step = 8; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, top, step);
    top = other > top ? other : top;
  }
  const float amax = float_of(top);
  const bool zero = top >= 0x7f800000u || amax < kTiny;
  const float inverse = zero ? 0.0f : 127.0f / amax;
  int32_t q[4], sum = 0;
  for (int i = 0; i < 4; ++i) {
    q[i] = zero ? 0 : int32_t(bits_of(v[i] * inverse + kRound)) - 0x4b400000;
    sum += q[i];
  }
  // Four lanes hold 16 columns.
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  int32_t all = sum + __shfl_xor_sync(kAllLanes, sum, 4);
  all += __shfl_xor_sync(kAllLanes, all, 8);
  if (!to) return;
  const uint32_t word =
      (uint32_t(q[0]) & 255) | (uint32_t(q[1]) & 255) << 8 | (uint32_t(q[2]) & 255) << 16 | uint32_t(q[3]) << 24;
  reinterpret_cast<uint32_t*>(to->x)[lane16] = word;
  if (lane16 % 4 == 0) to->sum[lane16 / 4] = int16_t(sum);
  if (lane16 == 0) {
    to->d = top >= 0x7f800000u ? float_of(0x7fc00000u) : zero ? 0.0f : amax / 127.0f;
    to->u = top >= 0x7f800000u ? float_of(0x7fc00000u) : to->d * float(all);
  }
}

}  // namespace moe
