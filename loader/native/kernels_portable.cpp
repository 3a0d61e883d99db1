// Kernels for any processor: plain C++ that the compiler may vectorise.
#include "../../formats/native/half_float.h"
#include "isa.h"
#include "unrolled.h"

namespace moe {
namespace {

#include "elementwise.inc.h"
constexpr int kVector = 16;
#include "unpack.inc.h"
#define MOE_PART_UNPACK
#include "packings/all.inc.h"
#include "gemm_unpacked.inc.h"

struct Portable {
  template <Packing P>
  static constexpr ScaleMode kMode = ScaleMode::kLow;
  template <Packing P>
  static constexpr int kGroup = 4;

  // Exact integer sums over 4 * steps columns of one half and one token.
  static void dots(const uint8_t (*codes)[2][64], int r, const int8_t* x, int steps, int32_t* out) {
    int32_t lanes[64] = {};
    for (int k = 0; k < steps; ++k) {
      int16_t x64[64];
      for (int i = 0; i < 64; ++i) x64[i] = x[4 * k + i % 4];
      const uint8_t* c = codes[k][r];
      for (int i = 0; i < 64; ++i) lanes[i] += int16_t(int16_t(c[i]) * x64[i]);
    }
    for (int i = 0; i < 16; ++i) out[i] = lanes[4 * i] + lanes[4 * i + 1] + lanes[4 * i + 2] + lanes[4 * i + 3];
  }

  template <Packing P, int NT>
  static void micro(const Unpacked& u, const ActBlock* x, float* s, float* m) {
    constexpr int kColumns = kPackingInfo[P].group_size;
    for (int t = 0; t < NT; ++t) {
      const ActBlock& a = x[t];
      for (int b = 0; b < 4; ++b) {
        for (int r = 0; r < 2; ++r) {
          float* st = s + kTileRows * t + kHalfRows * r;
          float* mt = m + kTileRows * t + kHalfRows * r;
          int32_t dot[16], sum[16] = {}, zero[16] = {};
          if constexpr (kColumns == 64) {
            dots(u.codes + 16 * b, r, a.x + 64 * b, 16, dot);
            for (int i = 0; i < 16; ++i) {
              st[i] = __builtin_fmaf(u.sf[b][r][i] * float(dot[i]), a.d[b], st[i]);
              mt[i] = __builtin_fmaf(u.mf[b][r][i], a.u[b], mt[i]);
            }
          } else {
            constexpr int kGroups = 64 / kColumns;
            for (int g = 0; g < kGroups; ++g) {
              dots(u.codes + 16 * b + kColumns / 4 * g, r, a.x + 64 * b + kColumns * g, kColumns / 4, dot);
              for (int i = 0; i < 16; ++i) sum[i] += dot[i] * u.s[b][r][g][i];
            }
            const int16_t* sums = kColumns == 16 ? a.s16 + 4 * b : a.s32 + 2 * b;
            for (int pair = 0; pair < kGroups / 2; ++pair)
              for (int i = 0; i < 16; ++i) {
                const int32_t mm = u.m[b][r][pair][i];
                zero[i] += int16_t(mm & 0xffff) * sums[2 * pair] + (mm >> 16) * sums[2 * pair + 1];
              }
            for (int i = 0; i < 16; ++i) {
              st[i] = __builtin_fmaf(float(sum[i]), a.d[b], st[i]);
              mt[i] = __builtin_fmaf(float(zero[i]), a.d[b], mt[i]);
            }
          }
        }
      }
    }
  }

  static void heads(const uint8_t* tile, float* ds, float* dm) {
    for (int i = 0; i < 32; ++i) {
      uint16_t h[2];
      __builtin_memcpy(&h[0], tile + 64 * (i / 16) + 2 * (i % 16), 2);
      __builtin_memcpy(&h[1], tile + 64 * (i / 16) + 32 + 2 * (i % 16), 2);
      ds[i] = half_to_float(h[0]);
      dm[i] = half_to_float(h[1]);
    }
  }
};

}  // namespace

#define MOE_TILE(id, ...) tile_gemm<Portable, id>,

extern const IsaKernels kPortableKernels = {
    {MOE_PACKINGS(MOE_TILE)}, quantize_row, quantize64, swiglu_rows, dot_bf16_batch<4>, sum_words,
};

}  // namespace moe
