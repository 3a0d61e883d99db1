// Kernels for AVX2, FMA and F16C.
#include <immintrin.h>

#include "../../formats/native/half_float.h"
#include "isa.h"
#include "unrolled.h"

namespace moe {
namespace {

#include "elementwise.inc.h"
#include "lanes_avx2.inc.h"
constexpr int kVector = 32;
#include "unpack.inc.h"
#define MOE_PART_UNPACK
#define MOE_PART_AVX2
#include "packings/all.inc.h"
#include "gemm_unpacked.inc.h"
#include "gemv_avx2.inc.h"

struct Avx2 {
  template <Packing P>
  static constexpr ScaleMode kMode = ScaleMode::kPair;
  template <Packing P>
#if defined(MOE_SANITIZED)
  static constexpr int kGroup = 3;
#else
  static constexpr int kGroup = 6;  // 16 registers: 6 sums of 16 bits, 6 of 32 bits, codes, activation, product
#endif

  template <Packing P, int NT>
  [[gnu::noinline]] static void micro(const Unpacked& u, const ActBlock* x, float* s, float* m) {
    constexpr int kColumns = kPackingInfo[P].group_size;
    // Vectors that one 16-bit sum can hold: a whole group, or 8 if codes reach 15.
    constexpr int kRun = kPackingInfo[P].nbits == 4 ? 8 : kColumns / 4;
    for (int b = 0; b < 4; ++b) {
      for (int part = 0; part < 4; ++part) {
        const int r = part / 2, y = part % 2;
        I sum[NT];
        unrolled<NT>([&](auto t) MOE_INLINE { sum[t] = zero(); });
        for (int k0 = 0; k0 < 16; k0 += kRun) {
          I a[NT];
          const uint8_t* codes = u.codes[16 * b + k0][r] + 32 * y;
          const int8_t* columns = x->x + 64 * b + 4 * k0;
          unrolled<kRun>([&](auto k) MOE_INLINE {
            const I c = load(codes + 128 * k);
            unrolled<NT>([&](auto t) MOE_INLINE {
              const I products = _mm256_maddubs_epi16(c, broadcast4(columns + int(sizeof(ActBlock)) * t + 4 * k));
              a[t] = k == 0 ? products : _mm256_add_epi16(a[t], products);
            });
          });
          const I sv = kColumns == 64 ? _mm256_set1_epi16(1) : load(u.s[b][r][k0 / kRun] + 8 * y);
          unrolled<NT>([&](auto t) MOE_INLINE { sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(a[t], sv)); });
        }
        unrolled<NT>([&](auto t) MOE_INLINE {
          float* st = s + kTileRows * t + 8 * part;
          float* mt = m + kTileRows * t + 8 * part;
          Sums total = {_mm256_load_ps(st), _mm256_load_ps(mt)};
          if constexpr (kColumns == 64) {
            total.add64(sum[t], _mm256_load_ps(u.sf[b][r] + 8 * y), _mm256_load_ps(u.mf[b][r] + 8 * y), x[t].d[b],
                        x[t].u[b]);
          } else if constexpr (kColumns == 16) {
            const I m02 = _mm256_madd_epi16(load(u.m[b][r][0] + 8 * y), broadcast4(x[t].s16 + 4 * b));
            const I m13 = _mm256_madd_epi16(load(u.m[b][r][1] + 8 * y), broadcast4(x[t].s16 + 4 * b + 2));
            total.add(sum[t], _mm256_add_epi32(m02, m13), x[t].d[b]);
          } else {
            total.add(sum[t], _mm256_madd_epi16(load(u.m[b][r][0] + 8 * y), broadcast4(x[t].s32 + 2 * b)), x[t].d[b]);
          }
          _mm256_store_ps(st, total.s);
          _mm256_store_ps(mt, total.m);
        });
      }
    }
  }

  static void heads(const uint8_t* tile, float* ds, float* dm) {
    for (int i = 0; i < 4; ++i) {
      _mm256_store_ps(ds + 8 * i, halves8(tile + 64 * (i / 2) + 16 * (i % 2)));
      _mm256_store_ps(dm + 8 * i, halves8(tile + 64 * (i / 2) + 32 + 16 * (i % 2)));
    }
  }
};

template <Packing P>
void tile_any(const uint8_t* tile, int64_t blocks, Activations x, int tokens, float* y) {
  if (tokens == 1) return tile_gemv<P>(tile, blocks, x, y);
  tile_gemm<Avx2, P>(tile, blocks, x, tokens, y);
}

}  // namespace

#define MOE_TILE(id, ...) tile_any<id>,

extern const IsaKernels kAvx2Kernels = {
    {MOE_PACKINGS(MOE_TILE)}, quantize_row, quantize64, swiglu_rows, dot_bf16_batch<2>, sum_words,
};

}  // namespace moe
