// AVX-512 F, BW, DQ, VL and VNNI.
#include <immintrin.h>

#include <algorithm>

#include "isa.h"
#include "unrolled.h"

namespace moe {
namespace {

#include "elementwise.inc.h"
constexpr int kVector = 64;
#include "unpack.inc.h"
#include "gemv_avx512.inc.h"

// Up to this many tokens, taking the planes again for each four tokens costs no more than unpacking them once
// (measured at 4 to 48 tokens). For 4 bits and for 8-bit scales of 16 columns it never does.
template <Packing P>
constexpr int kGemvTokens = P == kQ4G64S8 || P == kQ2G16S8 ? kMaxTokens : P == kQ3G64S8 ? 16 : 32;

struct Avx512 {
  // 4-bit S times a code fits a byte: 64 columns are then one run of vpdpbusd.
  template <Packing P>
  static constexpr ScaleMode kMode = kPackingInfo[P].scale_bits == 4 ? ScaleMode::kFold : ScaleMode::kLow;
  // Accumulators of NT tokens x 2 halves, of 32 registers; q2-g16-s8 needs two sets.
  template <Packing P>
#if defined(MOE_SANITIZED)  // each size is one more instance to compile
  static constexpr int kGroup = 3;
#else
  static constexpr int kGroup = P == kQ2G16S8 ? 6 : 12;
#endif

  template <Packing P, int NT>
  [[gnu::noinline]] static void micro(const Unpacked& u, const ActBlock* x, float* s, float* m) {
    constexpr int kColumns = kPackingInfo[P].group_size;
    for (int b = 0; b < 4; ++b) {
      I sum[NT][2];
      unrolled<NT>([&](auto t) MOE_INLINE { sum[t][0] = sum[t][1] = none(); });
      if constexpr (P == kQ2G16S8) {
        for (int g = 0; g < 4; ++g) {
          I dot[NT][2];
          unrolled<NT>([&](auto t) MOE_INLINE { dot[t][0] = dot[t][1] = none(); });
          for (int k = 0; k < 4; ++k) step<NT>(u.codes[16 * b + 4 * g + k], x->x + 64 * b + 16 * g + 4 * k, dot);
          // The dot (<= 6096) is the low 16-bit half of its lane; S has a zero in the high half.
          unrolled<2>([&](auto r) MOE_INLINE {
            const I sv = _mm512_load_si512(u.s[b][r][g]);
            unrolled<NT>([&](auto t) MOE_INLINE { sum[t][r] = _mm512_dpwssd_epi32(sum[t][r], dot[t][r], sv); });
          });
        }
      } else {
        for (int k = 0; k < 16; ++k) step<NT>(u.codes[16 * b + k], x->x + 64 * b + 4 * k, sum);
      }
      unrolled<2>([&](auto r) MOE_INLINE {
        unrolled<NT>([&](auto t) MOE_INLINE {
          float* st = s + kTileRows * t + kHalfRows * r;
          float* mt = m + kTileRows * t + kHalfRows * r;
          Sums a = {_mm512_load_ps(st), _mm512_load_ps(mt)};
          if constexpr (kColumns == 64) {
            a.add64(sum[t][r], _mm512_load_ps(u.sf[b][r]), _mm512_load_ps(u.mf[b][r]), x[t].d[b], x[t].u[b]);
          } else if constexpr (kColumns == 32) {
            a.add(sum[t][r], _mm512_dpwssd_epi32(none(), _mm512_load_si512(u.m[b][r][0]), broadcast4(x[t].s32 + 2 * b)),
                  x[t].d[b]);
          } else {
            I zero = _mm512_dpwssd_epi32(none(), _mm512_load_si512(u.m[b][r][0]), broadcast4(x[t].s16 + 4 * b));
            zero = _mm512_dpwssd_epi32(zero, _mm512_load_si512(u.m[b][r][1]), broadcast4(x[t].s16 + 4 * b + 2));
            a.add(sum[t][r], zero, x[t].d[b]);
          }
          _mm512_store_ps(st, a.s);
          _mm512_store_ps(mt, a.m);
        });
      });
    }
  }

  // Four columns of NT tokens; the activations of token t stand sizeof(ActBlock) * t behind x.
  template <int NT>
  MOE_INLINE static inline void step(const uint8_t (*codes)[64], const int8_t* x, I (&sum)[NT][2]) {
    const I c0 = _mm512_load_si512(codes[0]), c1 = _mm512_load_si512(codes[1]);
    unrolled<NT>([&](auto t) MOE_INLINE {
      const I xb = broadcast4(x + int(sizeof(ActBlock)) * t);
      sum[t][0] = dot4(sum[t][0], c0, xb);
      sum[t][1] = dot4(sum[t][1], c1, xb);
    });
  }

  static void heads(const uint8_t* tile, float* ds, float* dm) {
    for (int r = 0; r < 2; ++r) {
      _mm512_store_ps(ds + 16 * r, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(tile + 64 * r))));
      _mm512_store_ps(dm + 16 * r, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(tile + 64 * r + 32))));
    }
  }
};

template <Packing P>
void tile_any(const uint8_t* tile, int64_t blocks, Activations x, int tokens, float* y) {
  if constexpr (kGemvTokens<P> < kMaxTokens)
    if (tokens > kGemvTokens<P>) return tile_gemm<Avx512, P>(tile, blocks, x, tokens, y);
  for (int n; tokens > 0; tokens -= n, x.at += n, y += n * kTileRows) {
    n = tokens <= 4 || tokens > 8 ? std::min(tokens, 4) : (tokens + 1) / 2;  // 5 tokens are 3 + 2
    if (n == 1) tile_gemv<P, 1>(tile, blocks, x, y);
    if (n == 2) tile_gemv<P, 2>(tile, blocks, x, y);
    if (n == 3) tile_gemv<P, 3>(tile, blocks, x, y);
    if (n == 4) tile_gemv<P, 4>(tile, blocks, x, y);
  }
}

}  // namespace

extern const IsaKernels kAvx512Kernels = {
    {tile_any<kQ2G16S4>, tile_any<kQ2G16S8>, tile_any<kQ3G32S4>, tile_any<kQ3G64S8>, tile_any<kQ4G64S8>},
    quantize_row,
    quantize64,
    swiglu_rows,
    dot_bf16_batch<4>,
    sum_words,
};

}  // namespace moe
