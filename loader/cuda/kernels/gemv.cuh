// Products of packed tiles with 1 to 8 tokens. A lane is a row, so each load of a warp is one line of the tile. The
// warps of a block split the columns. A few of them then add the terms of each 64 columns in ascending order, so the
// result has the bits of a single chain (docs/numerics.md, "One product").
#pragma once
#include "tiles.cuh"

namespace moe {

// One row of one superblock in registers.
template <int P>
struct RowBlock {
  using L = Layout<P>;
  static constexpr int kWords = L::kBits * 8;  // 32-bit words of codes, including high bits
  static constexpr int kScales = L::kGroup == 64 ? 8 : L::kChunks * (L::kScaleBits / 4);
  uint32_t word[kWords], scale[kScales];

  MOE_DEVICE void load(const uint8_t* block, int row) {
#pragma unroll
    for (int chunk = 0; chunk < L::kChunks; ++chunk) {
      const uint8_t* p = block + chunk * L::kChunkBytes;
      constexpr int kEach = kWords / L::kChunks;
      if constexpr (L::kBits == 3) {
        const uint8_t* q = p + 192 * (row / 16) + 4 * (row % 16);
#pragma unroll
        for (int i = 0; i < kEach; ++i) word[chunk * kEach + i] = stream_word(q + 384 * (i / 3) + 64 * (i % 3));
      } else {
#pragma unroll
        for (int i = 0; i < kEach; ++i) word[chunk * kEach + i] = stream_word(p + 128 * i + 4 * row);
      }
      p += L::kCodeBytes;
      if constexpr (L::kGroup == 64) {
        const uint8_t* q = p + 32 * L::kPlanes * (row / 16) + row % 16;
#pragma unroll
        for (int i = 0; i < 2 * L::kPlanes; ++i) scale[chunk * 2 * L::kPlanes + i] = q[16 * i];  // S of planes, then M
      } else if constexpr (L::kScaleBits == 8) {
        scale[2 * chunk] = stream_word(p + 128 * (row / 16) + 4 * (row % 16));
        scale[2 * chunk + 1] = stream_word(p + 128 * (row / 16) + 4 * (row % 16) + 64);
      } else {
        scale[chunk] = stream_word(p + 4 * row);
      }
    }
  }

  // Codes of plane v, columns 16 * quad + 4 * i + 0..3, times 2^plane_shift(v).
  MOE_DEVICE uint32_t codes(int chunk, int v, int quad, int i) const {
    const int j = 4 * quad + i;
    const uint32_t* w = word + chunk * (kWords / L::kChunks);
    if constexpr (L::kBits == 3) return codes3(w[j / 2 * 3 + j % 2], w[j / 2 * 3 + 2] >> j % 2, v);
    return w[j] & (L::kBits == 4 ? 0x0f0f0f0fu << 4 * v : 0x03030303u << 2 * v);
  }

  // Calls put(b, t, a, z, d, u) for each 64 columns b = 0..3 and token t: a * d belongs to the sum of codes, z * u to
  // the zero term. x[t]: the token's four ActBlocks.
  template <int T, class Put>
  MOE_DEVICE void products(const ActBlock* const (&x)[T], const Put& put) const {
#pragma unroll
    for (int chunk = 0; chunk < L::kChunks; ++chunk) {
      int32_t dot[L::kPlanes][T];
#pragma unroll
      for (int v = 0; v < L::kPlanes; ++v) {
#pragma unroll
        for (int t = 0; t < T; ++t) dot[v][t] = 0;
#pragma unroll
        for (int quad = 0; quad < L::kQuads; ++quad) {
          const int column = chunk * (kBlockCols / L::kChunks) + v * L::kGroup + 16 * quad;
#pragma unroll
          for (int t = 0; t < T; ++t) {
            const Words4 xs = cached_words(x[t][column / 64].x + column % 64);
#pragma unroll
            for (int i = 0; i < 4; ++i) dot[v][t] = dot4(codes(chunk, v, quad, i), xs.w[i], dot[v][t]);
          }
        }
#pragma unroll
        for (int t = 0; t < T; ++t) dot[v][t] >>= plane_shift<L::kBits>(v);
      }
#pragma unroll
      for (int block = 0; block < L::kChunkBlocks; ++block) {
        const int b = chunk * L::kChunkBlocks + block;
        if constexpr (L::kGroup == 64) {
          const float s = float(scale[chunk * 2 * L::kPlanes + block]);
          const float m = float(int8_t(scale[chunk * 2 * L::kPlanes + L::kPlanes + block]));
#pragma unroll
          for (int t = 0; t < T; ++t) put(b, t, s * float(dot[block][t]), m, x[t][b].d, x[t][b].u);
        } else {
          const auto scales = GroupScales<L::kScaleBits>::of(scale[chunk * (L::kScaleBits / 4)],
                                                             scale[chunk * (L::kScaleBits / 4) + L::kScaleBits / 8]);
#pragma unroll
          for (int t = 0; t < T; ++t) {
            const Words4 rest = cached_words(x[t][b].sum);  // sums, d, u
            constexpr int32_t kFrom = L::kScaleBits == 4 ? kFloatBits : 0;
            int32_t a;
            if constexpr (L::kGroup == 16) {
              a = dot2<false, false>(pair16(dot[0][t], dot[1][t]), scales.s, kFrom);
              a = dot2<true, false>(pair16(dot[2][t], dot[3][t]), scales.s, a);
            } else {
              a = dot2<false, false>(pair16(dot[2 * block][t], dot[2 * block + 1][t]), scales.s >> 16 * block, kFrom);
            }
            const int32_t z = scales.template zero_term<L::kGroup>(rest.w[0], rest.w[1], block);
            const float d = float_of(rest.w[2]);
            put(b, t, L::kScaleBits == 4 ? summed(a) : float(a), summed(z), d, d);
          }
        }
      }
    }
  }
};

// Terms of the two sums of a row.
struct alignas(8) Pair {
  float codes, zero;
};

// Number of buffers for terms that are not yet added: two if they fit into 33 KB, so that a round needs one barrier.
template <int T, int kWarps>
constexpr int kRoundBuffers = T* kWarps <= 16 ? 2 : 1;

template <int T, int kWarps>
struct Round {
  Pair part[kWarps][4][T][kWarp];  // [superblock][block of 64][token][row]: a, z
  Pair scale[kWarps][4][T];        // their factors: d, u
};

// Computes kChains tiles at once, each with kWarps / kChains warps: products with T tokens over `segments` consecutive
// tiles of `blocks` superblocks each. Work has
//   const uint8_t* tile(int segment, int chain)
//   const ActBlock* x(int segment, int token)
//   void finish(int segment, int chain, int token, int row, float y): called by one thread each, segments ascending.
template <int P, int T, int kWarps, int kChains, class Work>
MOE_DEVICE void folded_products(Work& work, int blocks, int segments) {
  constexpr int kSplit = kWarps / kChains, kBuffers = kRoundBuffers<T, kWarps>, kMine = (T + kSplit - 1) / kSplit;
  MOE_SHARED Round<T, kWarps> rounds[kBuffers];
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int chain = warp / kSplit, split = warp % kSplit;

  int segment = 0, block = split;  // the superblock to load next
  RowBlock<P> next;
  const auto load = [&] {
    while (block >= blocks) {
      block -= blocks;
      ++segment;
    }
    if (segment < segments)
      next.load(work.tile(segment, chain) + kHeadBytes + int64_t(block) * Layout<P>::kBlockBytes, lane);
  };
  load();

  int fold_segment = 0, fold_block = 0;
  float s[kMine], m[kMine];  // sums of tokens split, split + kSplit, ... of this warp's chain
  Head head = {};
  for (int left = blocks * segments, number = 0; left > 0; left -= kSplit, ++number) {
    Round<T, kWarps>& round = rounds[number % kBuffers];
    if (segment < segments) {
      const RowBlock<P> row = next;
      constexpr int kStep = T == 8 ? 2 : T;  // eight tokens at once would spill registers
      const int here = segment, at = 4 * block;
      block += kSplit;
      load();
#pragma unroll 1
      for (int first = 0; first < T; first += kStep) {
        const ActBlock* x[kStep];
#pragma unroll
        for (int t = 0; t < kStep; ++t) x[t] = work.x(here, first + t) + at;
        row.template products<kStep>(x, [&](int b, int t, float a, float z, float d, float u) {
          round.part[warp][b][first + t][lane] = {a, z};
          if (lane == 0) round.scale[warp][b][first + t] = {d, u};
        });
      }
    }
    __syncthreads();
    const int count = left < kSplit ? left : kSplit;
    for (int i = 0; split < T && i < count;) {
      if (fold_block == 0) {
        head = head_of(work.tile(fold_segment, chain), lane);
#pragma unroll
        for (int k = 0; k < kMine; ++k) s[k] = m[k] = 0.0f;
      }
      const int rest = blocks - fold_block, run = rest < count - i ? rest : count - i;
#pragma unroll 2
      for (const int end = i + run; i < end; ++i) {
#pragma unroll
        for (int k = 0; k < kMine; ++k) {
          const int t = split + k * kSplit;
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            const Pair part = round.part[chain * kSplit + i][b][t][lane], scale = round.scale[chain * kSplit + i][b][t];
            s[k] = fmaf(part.codes, scale.codes, s[k]);
            m[k] = fmaf(part.zero, scale.zero, m[k]);
          }
        }
      }
      fold_block += run;
      if (fold_block == blocks) {
#pragma unroll
        for (int k = 0; k < kMine; ++k)
          work.finish(fold_segment, chain, split + k * kSplit, lane, combine(head, s[k], m[k]));
        fold_block = 0;
        ++fold_segment;
      }
    }
    if (kBuffers == 1) __syncthreads();
  }
}

// Up to four matrices over the same columns.
struct Matrices {
  const uint8_t* tiles[4];
  float* y[4];
  int64_t rows[4];
  int64_t count;
};

template <int T>
constexpr int kGemvWarps = T <= 4 ? 8 : 4;

// y [tokens, rows] of each matrix. Grid: the tiles of all matrices in order. 1 <= tokens <= T.
template <int P, int T>
MOE_DEVICE void gemv(const Matrices& matrices, int64_t columns, const ActBlock* acts, int64_t tokens) {
  int64_t tile = blockIdx.x;
  int i = 0;
  while (tile >= tiles_of(matrices.rows[i])) tile -= tiles_of(matrices.rows[i++]);
  struct Work {
    const uint8_t* tile_;
    const ActBlock* acts;
    float* y;
    int64_t rows, first, row_blocks;
    int tokens;
    MOE_DEVICE const uint8_t* tile(int, int) const { return tile_; }
    MOE_DEVICE const ActBlock* x(int, int t) const { return acts + (t < tokens ? t : tokens - 1) * row_blocks; }
    MOE_DEVICE void finish(int, int, int t, int row, float v) {
      if (t < tokens && first + row < rows) y[t * rows + first + row] = v;
    }
  } work = {matrices.tiles[i] + tile * tile_bytes<P>(columns),
            acts,
            matrices.y[i],
            matrices.rows[i],
            tile * kTileRows,
            blocks64(columns),
            int(tokens)};
  folded_products<P, T, kGemvWarps<T>, 1>(work, superblocks(columns), 1);
}

}  // namespace moe

#define MOE_GEMV(name, packing, T, ...)                                                                               \
  MOE_KERNEL(__VA_ARGS__)                                                                                             \
  gemv_##name##_t##T(MOE_STRUCT moe::Matrices matrices, int64_t columns, const moe::ActBlock* acts, int64_t tokens) { \
    moe::gemv<moe::packing, T>(matrices, columns, acts, tokens);                                                      \
  }
#define MOE_GEMVS(packing, name, ...) \
  MOE_GEMV(name, packing, 1, 256)     \
  MOE_GEMV(name, packing, 2, 256)     \
  MOE_GEMV(name, packing, 4, 256)     \
  MOE_GEMV(name, packing, 8, 128)
MOE_PACKINGS(MOE_GEMVS)
#undef MOE_GEMVS
#undef MOE_GEMV
