// Packed tiles as A fragments of the tensor cores (mma.cuh), straight from the bytes, without reordering columns.
#pragma once
#include "tiles.cuh"

namespace moe {

// The part of a tile's chunk in one lane (4 * group + member): four rows from 4 * group on. Their codes of columns
// 16 * q + 4 * member + 0..3 are words of A fragments. A tile is two matrices of 16 rows: rows 4 * group + 2 * p and
// 4 * group + 2 * p + 1 are rows group and group + 8 of matrix p.
template <int P>
struct ChunkPart {
  using L = Layout<P>;
  static constexpr int kVectors = L::kQuads;
  Words4 word[kVectors], high[L::kBits == 3 ? kVectors : 1];
  Words4 scale[L::kGroup == 64 ? 1 : L::kScaleBits / 4];  // a word for each row: S and M of all planes
  uint32_t s64[L::kPlanes], m64[L::kPlanes];              // g64, a word for each plane: S and M of the four rows
  int odd;                                                // q3: number of the vector in its pair

  MOE_DEVICE void load(const uint8_t* p, int lane) {
    const int group = lane / 4, member = lane % 4, half = group / 4, row16 = group % 4 * 16;
    odd = member % 2;
#pragma unroll
    for (int q = 0; q < kVectors; ++q) {
      if constexpr (L::kBits == 3) {
        const uint8_t* pair = p + 384 * (2 * q + member / 2) + 192 * half + row16;
        word[q] = stream_words(pair + 64 * odd);
        high[q] = stream_words(pair + 128);
      } else {
        word[q] = stream_words(p + 128 * (4 * q + member) + 16 * group);
      }
    }
    p += L::kCodeBytes;
    if constexpr (L::kGroup == 64) {
#pragma unroll
      for (int v = 0; v < L::kPlanes; ++v) {
        s64[v] = stream_word(p + 32 * L::kPlanes * half + 16 * v + row16 / 4);
        m64[v] = stream_word(p + 32 * L::kPlanes * half + 16 * (L::kPlanes + v) + row16 / 4);
      }
    } else if constexpr (L::kScaleBits == 8) {
      scale[0] = stream_words(p + 128 * half + row16);
      scale[1] = stream_words(p + 128 * half + row16 + 64);
    } else {
      scale[0] = stream_words(p + 16 * group);
    }
  }

  // Codes of row 4 * group + row, columns 64 * block + 16 * q + 4 * member + 0..3 of the chunk.
  MOE_DEVICE uint32_t codes(int block, int q, int row) const {
    const int v = L::kGroup == 16 ? q : L::kGroup == 32 ? 2 * block + q / 2 : block;
    const int vector = L::kGroup == 16 ? 0 : L::kGroup == 32 ? q % 2 : q;
    const uint32_t w = word[vector].w[row];
    if constexpr (L::kBits == 3) {
      const uint32_t top = high[vector].w[row] >> odd;
      return (w >> 2 * v & 0x03030303u) | ((v < 3 ? top >> 2 * v : top << 2) & 0x04040404u);
    }
    return L::kBits == 4 ? w >> 4 * v & 0x0f0f0f0fu : w >> 2 * v & 0x03030303u;
  }
  MOE_DEVICE GroupScales<L::kScaleBits> scales(int row) const {
    return GroupScales<L::kScaleBits>::of(scale[0].w[row], scale[L::kGroup == 64 ? 0 : L::kScaleBits / 8].w[row]);
  }
};

}  // namespace moe
