// Sixteen lanes as four vectors of four (GCC and clang vector extensions give SSE2, NEON or plain code).
// This file defines the operations; simd_avx2.h and simd_avx512.h give the same bits.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../formats/native/half_float.h"
#include "solver_api.h"

namespace moe {
namespace {

struct SimdPortable {
  typedef float F4 __attribute__((vector_size(16)));
  typedef uint32_t U4 __attribute__((vector_size(16)));
  typedef int32_t I4 __attribute__((vector_size(16)));
  typedef double D2 __attribute__((vector_size(16)));
  struct F {
    F4 v[4];
  };
  struct U {
    U4 v[4];
  };
  struct M {
    I4 v[4];
  };
  struct D {
    D2 v[8];
  };
  static constexpr int kBatchesAtOnce = 1;  // batches of 16 rows that feedback.h updates together

#define MOE_EACH(R, expression)                    \
  R r;                                             \
  for (int i = 0; i < 4; ++i) r.v[i] = expression; \
  return r

  static F load(const float* p) {
    F r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  static void store(float* p, F a) { std::memcpy(p, &a, sizeof a); }
  static U load_u(const uint32_t* p) {
    U r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  static void store_u(void* p, U a) { std::memcpy(p, &a, sizeof a); }
  static F set(float x) { MOE_EACH(F, (F4{x, x, x, x})); }
  static U set_u(uint32_t x) { MOE_EACH(U, (U4{x, x, x, x})); }
  static F add(F a, F b) { MOE_EACH(F, a.v[i] + b.v[i]); }
  static F sub(F a, F b) { MOE_EACH(F, a.v[i] - b.v[i]); }
  static F mul(F a, F b) { MOE_EACH(F, a.v[i] * b.v[i]); }
  // a * b + c, rounded once, in hardware or in the C library; fnma: c - a * b.
  static F fma(F a, F b, F c) {
    float x[16], y[16], z[16];
    store(x, a);
    store(y, b);
    store(z, c);
    for (int i = 0; i < 16; ++i) z[i] = __builtin_fmaf(x[i], y[i], z[i]);
    return load(z);
  }
  static F fnma(F a, F b, F c) { return fma(from_bits(xor_sign(bits(a))), b, c); }
  static F div(F a, F b) { MOE_EACH(F, a.v[i] / b.v[i]); }
  // Return the second operand if both are equal or one is NaN, as x86 does.
  static F min(F a, F b) { MOE_EACH(F, pick(a.v[i] < b.v[i], a.v[i], b.v[i])); }
  static F max(F a, F b) { MOE_EACH(F, pick(a.v[i] > b.v[i], a.v[i], b.v[i])); }
  static F rint(F a) {
    float x[16];
    store(x, a);
    for (int i = 0; i < 16; ++i) x[i] = std::nearbyint(x[i]);
    return load(x);
  }
  static U bits(F a) { MOE_EACH(U, (U4)a.v[i]); }
  static F from_bits(U a) { MOE_EACH(F, (F4)a.v[i]); }
  static F to_float(U a) { MOE_EACH(F, __builtin_convertvector((I4)a.v[i], F4)); }
  static U add_u(U a, U b) { MOE_EACH(U, a.v[i] + b.v[i]); }
  static U sub_u(U a, U b) { MOE_EACH(U, a.v[i] - b.v[i]); }
  static U and_u(U a, U b) { MOE_EACH(U, a.v[i] & b.v[i]); }
  static U or_u(U a, U b) { MOE_EACH(U, a.v[i] | b.v[i]); }
  template <int N>
  static U left(U a) {
    MOE_EACH(U, a.v[i] << N);
  }
  template <int N>
  static U right(U a) {
    MOE_EACH(U, a.v[i] >> N);
  }
  template <int N>
  static U right_signed(U a) {
    MOE_EACH(U, (U4)((I4)a.v[i] >> N));
  }
  static M greater(F a, F b) { MOE_EACH(M, (I4)(a.v[i] > b.v[i])); }
  static M differ(F a, F b) { MOE_EACH(M, (I4)(a.v[i] != b.v[i])); }
  static M both(M a, M b) { MOE_EACH(M, a.v[i] & b.v[i]); }
  static bool any(M a) {
    uint64_t w[8];
    std::memcpy(w, &a, sizeof w);
    return (w[0] | w[1] | w[2] | w[3] | w[4] | w[5] | w[6] | w[7]) != 0;
  }
  static F select(M m, F yes, F no) { MOE_EACH(F, pick(m.v[i], yes.v[i], no.v[i])); }

  static D zero_d() {
    D d;
    for (int i = 0; i < 8; ++i) d.v[i] = D2{0.0, 0.0};
    return d;
  }
  // A float's square is exact in a double: multiply-then-add and FMA give the same bits.
  static D add_square(D d, F a) {
    for (int i = 0; i < 4; ++i) {
      const D2 low = {(double)a.v[i][0], (double)a.v[i][1]}, high = {(double)a.v[i][2], (double)a.v[i][3]};
      d.v[2 * i] += low * low;
      d.v[2 * i + 1] += high * high;
    }
    return d;
  }
  static D add_product(D d, F a, F b) {
    for (int i = 0; i < 4; ++i) {
      const D2 a0 = {(double)a.v[i][0], (double)a.v[i][1]}, a1 = {(double)a.v[i][2], (double)a.v[i][3]};
      const D2 b0 = {(double)b.v[i][0], (double)b.v[i][1]}, b1 = {(double)b.v[i][2], (double)b.v[i][3]};
      d.v[2 * i] += a0 * b0;
      d.v[2 * i + 1] += a1 * b1;
    }
    return d;
  }
  static void store_d(double* p, D d) { std::memcpy(p, &d, sizeof d); }
  static void store_bytes(uint8_t* p, U a) {
    uint32_t lanes[16];
    store_u(lanes, a);
    for (int i = 0; i < 16; ++i) p[i] = (uint8_t)lanes[i];
  }

  static U load_bytes(const uint8_t* p) {
    uint32_t lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = p[i];
    return load_u(lanes);
  }

  // 32 columns of 16 rows -> out[column][row].
  static void load_columns(const uint8_t* const rows[16], int32_t dtype, float* out) {
    for (int r = 0; r < 16; ++r) {
      float* to = out + r;
      if (dtype == MOE_F32) {
        for (int c = 0; c < 32; ++c) std::memcpy(to + 16 * c, rows[r] + 4 * c, 4);
        continue;
      }
      uint16_t row[32];
      std::memcpy(row, rows[r], sizeof row);
      if (dtype == MOE_BF16) {
        for (int c = 0; c < 32; ++c) to[16 * c] = float_of((uint32_t)row[c] << 16);
      } else {
        for (int c = 0; c < 32; ++c) to[16 * c] = half_to_float(row[c]);
      }
    }
  }

 private:
  static U xor_sign(U a) { MOE_EACH(U, a.v[i] ^ 0x80000000u); }
  static F4 pick(I4 m, F4 yes, F4 no) { return (F4)(((I4)yes & m) | ((I4)no & ~m)); }
#undef MOE_EACH
};

}  // namespace
}  // namespace moe
