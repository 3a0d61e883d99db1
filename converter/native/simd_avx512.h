// Sixteen lanes in one AVX-512 register. The lanes are the rows of half a tile. Same operations as simd_portable.h.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "solver_api.h"

namespace moe {
namespace {

struct SimdAvx512 {
  using F = __m512;
  using U = __m512i;
  using M = __mmask16;
  struct D {
    __m512d low, high;
  };
  static constexpr int kBatchesAtOnce = 4;  // 4 columns of 4 batches take 16 of 32 registers

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static U load_u(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store_u(void* p, U a) { _mm512_storeu_si512(p, a); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static U set_u(uint32_t x) { return _mm512_set1_epi32((int)x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F rint(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static U bits(F a) { return _mm512_castps_si512(a); }
  static F from_bits(U a) { return _mm512_castsi512_ps(a); }
  static F to_float(U a) { return _mm512_cvtepi32_ps(a); }
  static U add_u(U a, U b) { return _mm512_add_epi32(a, b); }
  static U sub_u(U a, U b) { return _mm512_sub_epi32(a, b); }
  static U and_u(U a, U b) { return _mm512_and_si512(a, b); }
  static U or_u(U a, U b) { return _mm512_or_si512(a, b); }
  template <int N>
  static U left(U a) {
    return _mm512_slli_epi32(a, N);
  }
  template <int N>
  static U right(U a) {
    return _mm512_srli_epi32(a, N);
  }
  template <int N>
  static U right_signed(U a) {
    return _mm512_srai_epi32(a, N);
  }
  static M greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static M differ(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
  static M both(M a, M b) { return a & b; }
  static bool any(M a) { return a != 0; }
  static F select(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }

  static D zero_d() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  // A float's square is exact in a double, so an FMA gives the same bits as a multiplication and an addition.
  static D add_square(D d, F a) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1));
    return {_mm512_fmadd_pd(low, low, d.low), _mm512_fmadd_pd(high, high, d.high)};
  }
  // So is a product of two floats.
  static D add_product(D d, F a, F b) {
    const __m512d a0 = _mm512_cvtps_pd(_mm512_castps512_ps256(a)), a1 = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1));
    const __m512d b0 = _mm512_cvtps_pd(_mm512_castps512_ps256(b)), b1 = _mm512_cvtps_pd(_mm512_extractf32x8_ps(b, 1));
    return {_mm512_fmadd_pd(a0, b0, d.low), _mm512_fmadd_pd(a1, b1, d.high)};
  }
  static void store_d(double* p, D d) {
    _mm512_storeu_pd(p, d.low);
    _mm512_storeu_pd(p + 8, d.high);
  }
  static void store_bytes(uint8_t* p, U a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }

  static U load_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }

  static void transpose(U v[16]) {
    U a[16];
    for (int i = 0; i < 8; ++i) {
      a[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
      a[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
      v[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
      v[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
      v[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
      v[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    for (int k = 0; k < 4; ++k) {
      const U x0 = _mm512_shuffle_i32x4(v[k], v[4 + k], 0x88), x1 = _mm512_shuffle_i32x4(v[k], v[4 + k], 0xdd);
      const U y0 = _mm512_shuffle_i32x4(v[8 + k], v[12 + k], 0x88),
              y1 = _mm512_shuffle_i32x4(v[8 + k], v[12 + k], 0xdd);
      a[k] = _mm512_shuffle_i32x4(x0, y0, 0x88);
      a[8 + k] = _mm512_shuffle_i32x4(x0, y0, 0xdd);
      a[4 + k] = _mm512_shuffle_i32x4(x1, y1, 0x88);
      a[12 + k] = _mm512_shuffle_i32x4(x1, y1, 0xdd);
    }
    for (int i = 0; i < 16; ++i) v[i] = a[i];
  }

  // 32 columns of 16 rows -> out[column][row].
  static void load_columns(const uint8_t* const rows[16], int32_t dtype, float* out) {
    U v[16];
    if (dtype == MOE_F32) {
      for (int part = 0; part < 2; ++part) {
        for (int r = 0; r < 16; ++r) v[r] = _mm512_loadu_si512(rows[r] + 64 * part);
        transpose(v);
        for (int c = 0; c < 16; ++c) store_u(out + 16 * (16 * part + c), v[c]);
      }
      return;
    }
    for (int r = 0; r < 16; ++r) v[r] = _mm512_loadu_si512(rows[r]);
    transpose(v);  // lane = row, 32 bits = columns 2c and 2c + 1
    if (dtype == MOE_BF16) {
      const U high = set_u(0xffff0000u);
      for (int c = 0; c < 16; ++c) {
        store_u(out + 32 * c, left<16>(v[c]));
        store_u(out + 32 * c + 16, and_u(v[c], high));
      }
    } else {
      for (int c = 0; c < 16; ++c) {
        store(out + 32 * c, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v[c])));
        store(out + 32 * c + 16, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(right<16>(v[c]))));
      }
    }
  }
};

}  // namespace
}  // namespace moe
