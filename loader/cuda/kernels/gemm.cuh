// Products of packed tiles with many tokens, on tensor cores (mma.cuh): one tile a warp, codes unpacked in registers.
// Integer sums are exact in any order. Sums over blocks of 64 columns run in ascending order, so results have the CPU's
// bits (docs/numerics.md).
#pragma once
#include "fragments.cuh"
#include "mma.cuh"

namespace moe {

constexpr int kTokenTile = 32;  // tokens of a block
constexpr int kGemmWarps = 4;   // tiles of a block

// Rows of activations in groups, one for each expert. A block computes up to kTokenTile rows of one group.
struct Groups {
  const uint8_t* blob[8];
  int64_t pair[9];        // first row of each group
  int64_t token_tile[9];  // first block (y) of each group
  int64_t count;
};
struct Place {
  int group;
  int64_t first;
  int tokens;
};
MOE_DEVICE Place place_in(const Groups& groups) {
  int i = 0;
  while (int64_t(blockIdx.y) >= groups.token_tile[i + 1]) ++i;
  const int64_t first = groups.pair[i] + (blockIdx.y - groups.token_tile[i]) * kTokenTile;
  const int64_t left = groups.pair[i + 1] - first;
  return {i, first, int(left < kTokenTile ? left : kTokenTile)};
}

struct alignas(16) TokenSums {
  uint32_t sum01, sum23;
  float d, u;
};  // the last 16 bytes of an ActBlock

// Activations of a block's tokens, one superblock: [block of 64][token]. Tokens are 80 bytes apart, so the words of a B
// fragment are in 32 different banks.
using Panel = ActBlock[4][kTokenTile];

// Sums of codes and of zero terms: [8 tokens][row of the lane's four][token % 2].
struct TileSums {
  float s[kTokenTile / 8][4][2], m[kTokenTile / 8][4][2];
};

// Adds one block of 64 columns of the lane's rows, times the tokens of the panel.
template <int P>
MOE_DEVICE void add_block(const ChunkPart<P>& part, int block, const ActBlock (&x)[kTokenTile], int tokens,
                          TileSums& sums) {
  using L = Layout<P>;
  const int lane = int(threadIdx.x) % kWarp, group = lane / 4, member = lane % 4;
  uint32_t a[4][4];  // [q][row]
#pragma unroll
  for (int row = 0; row < 4; ++row) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      a[q][row] = part.codes(block, q, row);
      // S * q is at most 105: it fits a signed byte.
      if constexpr (L::kScaleBits == 4)
        a[q][row] *= uint32_t(byte_of(part.scales(row).s, L::kGroup == 16 ? q : 2 * block + q / 2));
    }
  }
#pragma unroll
  for (int n = 0; n < kTokenTile / 8; ++n) {
    if (8 * n >= tokens) break;
    const uint32_t* xs = reinterpret_cast<const uint32_t*>(x[8 * n + group].x);
    uint32_t b[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) b[q] = xs[4 * q + member];
    TokenSums token[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) token[e] = *reinterpret_cast<const TokenSums*>(x[8 * n + 2 * member + e].sum);
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      constexpr bool kExact = L::kScaleBits == 4 || L::kGroup == 64;  // below 2^22
      int32_t c[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] = kExact ? kFloatBits : 0;
      if constexpr (kExact) {
        mma_k32(c, a[0][2 * p], a[0][2 * p + 1], a[1][2 * p], a[1][2 * p + 1], b[0], b[1]);
        mma_k32(c, a[2][2 * p], a[2][2 * p + 1], a[3][2 * p], a[3][2 * p + 1], b[2], b[3]);
      } else {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          int32_t dot[4] = {0, 0, 0, 0};
          mma_k16(dot, a[q][2 * p], a[q][2 * p + 1], b[q]);
#pragma unroll
          for (int i = 0; i < 4; ++i) c[i] += byte_of(part.scales(2 * p + i / 2).s, q) * dot[i];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 2 * p + i / 2, e = i % 2;
        float& s = sums.s[n][row][e];
        float& m = sums.m[n][row][e];
        float value = kExact ? summed(c[i]) : float(c[i]);
        if constexpr (L::kGroup == 64) {
          value = float(byte_of(part.s64[block], row)) * value;
          m = fmaf(float(signed_byte_of(part.m64[block], row)), token[e].u, m);
        } else {
          const int32_t zero = part.scales(row).template zero_term<L::kGroup>(token[e].sum01, token[e].sum23, block);
          m = fmaf(summed(zero), token[e].d, m);
        }
        s = fmaf(value, token[e].d, s);
      }
    }
  }
}

// Multiplies `tile` with `tokens` rows of activations (row i: x(i)) and calls put(token, row, y). All threads of the
// block call it, with the same rows; a warp without a tile has inside = false. `put` may overwrite the panels.
template <int P, class X, class Put>
MOE_DEVICE void tile_product(Panel* panels, const uint8_t* tile, bool inside, int blocks, int tokens, const X& x,
                             const Put& put) {
  using L = Layout<P>;
  const int lane = int(threadIdx.x) % kWarp;
  const auto stage = [&](int block, Panel& panel) {
    constexpr int kLines = sizeof(ActBlock) / 16;
    for (int i = int(threadIdx.x); i < 4 * kTokenTile * kLines; i += kGemmWarps * kWarp) {
      const int token = i / (4 * kLines), rest = i % (4 * kLines);
      if (token < (tokens + 7) / 8 * 8)
        copy16(reinterpret_cast<unsigned char*>(&panel[rest / kLines][token]) + 16 * (rest % kLines),
               reinterpret_cast<const unsigned char*>(x(token < tokens ? token : tokens - 1) + 4 * block) + 16 * rest);
    }
  };
  TileSums sums;
#pragma unroll
  for (int n = 0; n < kTokenTile / 8; ++n)
#pragma unroll
    for (int row = 0; row < 4; ++row)
#pragma unroll
      for (int e = 0; e < 2; ++e) sums.s[n][row][e] = sums.m[n][row][e] = 0.0f;

  constexpr bool kAhead = L::kBits == 2;  // other packings leave no registers for a second chunk
  const uint8_t* at = tile + kHeadBytes;
  ChunkPart<P> next;
  if (kAhead && inside) next.load(at, lane);
  stage(0, panels[0]);
  for (int block = 0; block < blocks; ++block) {
    copies_arrived();
    __syncthreads();
    if (block + 1 < blocks) stage(block + 1, panels[(block + 1) % 2]);
    if (!inside) continue;
#pragma unroll 1
    for (int chunk = 0; chunk < L::kChunks; ++chunk) {
      if (!kAhead) next.load(at, lane);
      const ChunkPart<P> part = next;
      at += L::kChunkBytes;
      if (kAhead && (chunk + 1 < L::kChunks || block + 1 < blocks)) next.load(at, lane);
#pragma unroll
      for (int b = 0; b < L::kChunkBlocks; ++b)
        add_block(part, b, panels[block % 2][chunk * L::kChunkBlocks + b], tokens, sums);
    }
  }
  __syncthreads();
  if (!inside) return;
#pragma unroll
  for (int row = 0; row < 4; ++row) {
    const Head head = head_of(tile, lane / 4 * 4 + row);
#pragma unroll
    for (int n = 0; n < kTokenTile / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = 8 * n + lane % 4 * 2 + e;
        if (token < tokens) put(token, lane / 4 * 4 + row, combine(head, sums.s[n][row][e], sums.m[n][row][e]));
      }
  }
}

// y [pairs, rows] = acts [pair] times the group's matrix, at byte `offset` of its blob. Grid (tiles / 4, token tiles).
template <int P>
MOE_DEVICE void gemm(const Groups& groups, int64_t offset, int64_t rows, int64_t columns, const ActBlock* acts,
                     float* y) {
  const Place at = place_in(groups);
  const int64_t tile = int64_t(blockIdx.x) * kGemmWarps + threadIdx.x / kWarp, row_blocks = blocks64(columns);
  const uint8_t* p = groups.blob[at.group] + offset + tile * tile_bytes<P>(columns);
  MOE_SHARED Panel panels[2];
  tile_product<P>(
      panels, p, tile < tiles_of(rows), superblocks(columns), at.tokens,
      [&](int t) { return acts + (at.first + t) * row_blocks; },
      [&](int t, int row, float v) {
        if (tile * kTileRows + row < rows) y[(at.first + t) * rows + tile * kTileRows + row] = v;
      });
}

// h [pair][blocks64(intermediate)] from acts [token[pair]], gate and up, which begin the group's blob. Grid
// (blocks64(intermediate), token tiles). A block computes 64 columns of h from two tile pairs (gate 0, up 0, gate 1,
// up 1).
template <int P>
MOE_DEVICE void gemm_gate_up(const Groups& groups, int64_t hidden, int64_t intermediate, const ActBlock* acts,
                             const int32_t* token, ActBlock* h) {
  using Products = float[kGemmWarps][kTokenTile][36];  // 36: fewer bank conflicts than 32
  static_assert(sizeof(Products) <= 2 * sizeof(Panel), "products reuse the memory of the panels");
  MOE_SHARED Panel panels[2];
  Products& products = *reinterpret_cast<Products*>(&panels);
  const Place at = place_in(groups);
  const int warp = int(threadIdx.x) / kWarp;
  const int64_t tile = int64_t(blockIdx.x) * kGemmWarps + warp, row_blocks = blocks64(hidden);
  tile_product<P>(
      panels, groups.blob[at.group] + tile * tile_bytes<P>(hidden), tile < 2 * tiles_of(intermediate),
      superblocks(hidden), at.tokens, [&](int t) { return acts + token[at.first + t] * row_blocks; },
      [&](int t, int row, float v) { products[warp][t][row] = v; });
  __syncthreads();
  const int lane = int(threadIdx.x) % 16, pair = lane / 8 * 2;
  const int64_t h_blocks = blocks64(intermediate);
  for (int first = 0; first < at.tokens; first += kGemmWarps * 2) {
    const int t = first + int(threadIdx.x) / 16;
    float v[4];
    for (int i = 0; i < 4; ++i) {
      const int row = 4 * (lane % 8) + i;
      const bool inside = t < at.tokens && kActCols * int64_t(blockIdx.x) + 4 * lane + i < intermediate;
      v[i] = inside ? silu_mul(products[pair][t][row], products[pair + 1][t][row]) : 0.0f;
    }
    quantize_by_16(v, lane, t < at.tokens ? h + (at.first + t) * h_blocks + blockIdx.x : nullptr);
  }
}

// Each token's pairs in ascending order of experts, [T, top_k], and the range of pairs in y.
struct PairLists {
  const int32_t* place;  // position among all pairs
  const int32_t* rank;   // index of the pair's weight
  int64_t begin, count;  // pairs begin .. begin + count - 1 are in y
  int64_t top_k;
};

// out [T, hidden] += weight * y of each token's pairs in the range, ascending by expert. Grid (T, hidden / 256).
MOE_DEVICE void add_pairs_of(const PairLists& pairs, const float* y, const float* weights, int64_t hidden, float* out) {
  const int64_t column = int64_t(blockIdx.y) * 256 + threadIdx.x, t = blockIdx.x;
  if (column >= hidden) return;
  float* to = out + t * hidden + column;
  for (int64_t i = t * pairs.top_k; i < (t + 1) * pairs.top_k; ++i) {
    const int64_t pair = pairs.place[i] - pairs.begin;
    if (pair < 0 || pair >= pairs.count) continue;
    const float weighted = weights[t * pairs.top_k + pairs.rank[i]] * y[pair * hidden + column];
    *to = *to + weighted;
  }
}

}  // namespace moe

#define MOE_GEMM(packing, name, ...)                                                                                   \
  MOE_KERNEL(128, 3)                                                                                                   \
  gemm_##name(MOE_STRUCT moe::Groups groups, int64_t offset, int64_t rows, int64_t columns, const moe::ActBlock* acts, \
              float* y) {                                                                                              \
    moe::gemm<moe::packing>(groups, offset, rows, columns, acts, y);                                                   \
  }                                                                                                                    \
  MOE_KERNEL(128, 3)                                                                                                   \
  gemm_gate_up_##name(MOE_STRUCT moe::Groups groups, int64_t hidden, int64_t intermediate, const moe::ActBlock* acts,  \
                      const int32_t* token, moe::ActBlock* h) {                                                        \
    moe::gemm_gate_up<moe::packing>(groups, hidden, intermediate, acts, token, h);                                     \
  }
MOE_PACKINGS(MOE_GEMM)
#undef MOE_GEMM
MOE_KERNEL(256)
add_pairs(MOE_STRUCT moe::PairLists pairs, const float* y, const float* weights, int64_t hidden, float* out) {
  moe::add_pairs_of(pairs, y, weights, hidden, out);
}
