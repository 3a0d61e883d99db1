// Sixteen lanes in two AVX2 registers. Same operations as simd_portable.h.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "solver_api.h"

namespace moe {
namespace {

struct SimdAvx2 {
  struct F {
    __m256 a, b;
  };
  struct U {
    __m256i a, b;
  };
  using M = F;
  struct D {
    __m256d d[4];
  };
  static constexpr int kBatchesAtOnce = 1;

  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  static U load_u(const uint32_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
  }
  static void store_u(void* p, U x) {
    _mm256_storeu_si256((__m256i*)p, x.a);
    _mm256_storeu_si256((__m256i*)p + 1, x.b);
  }
  static F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static U set_u(uint32_t x) { return {_mm256_set1_epi32((int)x), _mm256_set1_epi32((int)x)}; }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static F fnma(F x, F y, F z) { return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }
  static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static F rint(F x) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, kNearest), _mm256_round_ps(x.b, kNearest)};
  }
  static U bits(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
  static F from_bits(U x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
  static F to_float(U x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
  static U add_u(U x, U y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static U sub_u(U x, U y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
  static U and_u(U x, U y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
  static U or_u(U x, U y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  template <int N>
  static U left(U x) {
    return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
  }
  template <int N>
  static U right(U x) {
    return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)};
  }
  template <int N>
  static U right_signed(U x) {
    return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)};
  }
  static M greater(F x, F y) { return {_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)}; }
  static M differ(F x, F y) { return {_mm256_cmp_ps(x.a, y.a, _CMP_NEQ_UQ), _mm256_cmp_ps(x.b, y.b, _CMP_NEQ_UQ)}; }
  static M both(M x, M y) { return {_mm256_and_ps(x.a, y.a), _mm256_and_ps(x.b, y.b)}; }
  static bool any(M x) { return _mm256_movemask_ps(_mm256_or_ps(x.a, x.b)) != 0; }
  static F select(M m, F yes, F no) { return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)}; }

  static D zero_d() {
    const __m256d z = _mm256_setzero_pd();
    return {{z, z, z, z}};
  }
  // A float's square is exact in a double: multiply-then-add and FMA give the same bits.
  static D add_square(D d, F x) {
    const __m128 part[4] = {_mm256_castps256_ps128(x.a), _mm256_extractf128_ps(x.a, 1), _mm256_castps256_ps128(x.b),
                            _mm256_extractf128_ps(x.b, 1)};
    for (int i = 0; i < 4; ++i) {
      const __m256d wide = _mm256_cvtps_pd(part[i]);
      d.d[i] = _mm256_add_pd(d.d[i], _mm256_mul_pd(wide, wide));
    }
    return d;
  }
  // So is a product of two floats.
  static D add_product(D d, F x, F y) {
    float p[16], q[16];
    store(p, x);
    store(q, y);
    for (int i = 0; i < 4; ++i) {
      const __m256d wide =
          _mm256_mul_pd(_mm256_cvtps_pd(_mm_loadu_ps(p + 4 * i)), _mm256_cvtps_pd(_mm_loadu_ps(q + 4 * i)));
      d.d[i] = _mm256_add_pd(d.d[i], wide);
    }
    return d;
  }
  static void store_d(double* p, D d) {
    for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, d.d[i]);
  }
  static void store_bytes(uint8_t* p, U x) {
    alignas(32) uint32_t lanes[16];
    store_u(lanes, x);
    for (int i = 0; i < 16; ++i) p[i] = (uint8_t)lanes[i];
  }

  static U load_bytes(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
  }

  // 8 x 8 words of 32 bits: rows[r] + offset -> v[word], lane = row.
  static void transpose8(const uint8_t* const* rows, int64_t offset, __m256i v[8]) {
    __m256i r[8], a[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_si256((const __m256i*)(rows[i] + offset));
    for (int i = 0; i < 4; ++i) {
      a[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      a[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      r[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
      r[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
      r[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
      r[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    for (int k = 0; k < 4; ++k) {
      v[k] = _mm256_permute2x128_si256(r[k], r[4 + k], 0x20);
      v[4 + k] = _mm256_permute2x128_si256(r[k], r[4 + k], 0x31);
    }
  }

  // The low halves of eight 32-bit lanes as eight 16-bit numbers.
  static __m128i narrow(__m256i x) {
    const __m256i low = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
    return _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  }

  // 32 columns of 16 rows -> out[column][row].
  static void load_columns(const uint8_t* const rows[16], int32_t dtype, float* out) {
    const int words = dtype == MOE_F32 ? 32 : 16;
    for (int half = 0; half < 2; ++half) {
      for (int first = 0; first < words; first += 8) {
        __m256i v[8];
        transpose8(rows + 8 * half, 4 * first, v);
        for (int i = 0; i < 8; ++i) {
          if (dtype == MOE_F32) {
            _mm256_storeu_si256((__m256i*)(out + 16 * (first + i) + 8 * half), v[i]);
            continue;
          }
          float* even = out + 32 * (first + i) + 8 * half;
          if (dtype == MOE_BF16) {
            _mm256_storeu_si256((__m256i*)even, _mm256_slli_epi32(v[i], 16));
            _mm256_storeu_si256((__m256i*)(even + 16), _mm256_and_si256(v[i], _mm256_set1_epi32((int)0xffff0000u)));
          } else {
            _mm256_storeu_ps(even, _mm256_cvtph_ps(narrow(v[i])));
            _mm256_storeu_ps(even + 16, _mm256_cvtph_ps(narrow(_mm256_srli_epi32(v[i], 16))));
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace moe
