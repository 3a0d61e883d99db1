// One token's experts in two launches: gate, up, SwiGLU and the quantization of h, then down.
#pragma once
#include "gemv.cuh"

namespace moe {

constexpr int kMaxExperts = 8;  // in one launch

struct Experts {
  const uint8_t* blob[kMaxExperts];
  int64_t rank[kMaxExperts];  // index of the expert's weight
};

struct DownShape {
  int64_t count;   // experts
  int64_t offset;  // of down in a blob, in bytes
  int64_t hidden, intermediate;
};

// h [expert][blocks64(intermediate)]. Grid (blocks64(intermediate), experts). A block computes 64 columns of h from two
// adjacent tile pairs (gate 0, up 0, gate 1, up 1).
template <int P>
MOE_DEVICE void gate_up_token(const Experts& experts, int64_t hidden, int64_t intermediate, const ActBlock* acts,
                              ActBlock* h) {
  MOE_SHARED float y[4][kTileRows];
  const int64_t first = 4 * int64_t(blockIdx.x), tiles = 2 * tiles_of(intermediate);
  struct Work {
    const uint8_t* first_tile;
    const ActBlock* acts;
    float (*y)[kTileRows];
    int64_t bytes;
    int last;  // last tile; chains past it repeat it, so that no thread reads outside
    MOE_DEVICE const uint8_t* tile(int, int chain) const { return first_tile + (chain < last ? chain : last) * bytes; }
    MOE_DEVICE const ActBlock* x(int, int) const { return acts; }
    MOE_DEVICE void finish(int, int chain, int, int row, float v) { y[chain][row] = v; }
  };
  const int64_t bytes = tile_bytes<P>(hidden);
  if (first < tiles) {
    Work work = {experts.blob[blockIdx.y] + first * bytes, acts, y, bytes, int(tiles - 1 - first)};
    folded_products<P, 1, 8, 4>(work, superblocks(hidden), 1);
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const int lane = int(threadIdx.x) % 16;
  float v[4];
  for (int i = 0; i < 4; ++i) {
    const int row = 4 * lane + i, pair = row / kTileRows * 2;
    const bool inside = kActCols * int64_t(blockIdx.x) + row < intermediate;
    v[i] = inside ? silu_mul(y[pair][row % kTileRows], y[pair + 1][row % kTileRows]) : 0.0f;
  }
  quantize_by_16(v, lane, threadIdx.x < 16 ? h + blockIdx.y * blocks64(intermediate) + blockIdx.x : nullptr);
}

constexpr int kDownWarps = 12;  // down has few tiles; 16 warps leave too few registers

// out [hidden] = (first ? 0 : out) + weights[rank] * down(h), experts in order. Grid: tiles of down.
template <int P>
MOE_DEVICE void down_token(const Experts& experts, const DownShape& shape, const ActBlock* h, const float* weights,
                           int64_t first, float* out) {
  struct Work {
    const Experts& experts;
    const ActBlock* h;
    const float* weights;
    float* out;
    int64_t offset, h_blocks, row0, hidden;
    bool overwrite;
    MOE_DEVICE const uint8_t* tile(int segment, int) const { return experts.blob[segment] + offset; }
    MOE_DEVICE const ActBlock* x(int segment, int) const { return h + segment * h_blocks; }
    MOE_DEVICE void finish(int segment, int, int, int row, float v) {
      if (row0 + row >= hidden) return;
      const float weighted = weights[experts.rank[segment]] * v;
      float* to = out + row0 + row;
      *to = (overwrite && segment == 0 ? 0.0f : *to) + weighted;
    }
  } work = {experts,
            h,
            weights,
            out,
            shape.offset + int64_t(blockIdx.x) * tile_bytes<P>(shape.intermediate),
            blocks64(shape.intermediate),
            int64_t(blockIdx.x) * kTileRows,
            shape.hidden,
            first != 0};
  folded_products<P, 1, kDownWarps, 1>(work, superblocks(shape.intermediate), int(shape.count));
}

}  // namespace moe

#define MOE_TOKEN_EXPERTS(packing, name, ...)                                                                 \
  MOE_KERNEL(256, 2)                                                                                          \
  gate_up_token_##name(MOE_STRUCT moe::Experts experts, int64_t hidden, int64_t intermediate,                 \
                       const moe::ActBlock* acts, moe::ActBlock* h) {                                         \
    moe::gate_up_token<moe::packing>(experts, hidden, intermediate, acts, h);                                 \
  }                                                                                                           \
  MOE_KERNEL(384)                                                                                             \
  down_token_##name(MOE_STRUCT moe::Experts experts, MOE_STRUCT moe::DownShape shape, const moe::ActBlock* h, \
                    const float* weights, int64_t first, float* out) {                                        \
    moe::down_token<moe::packing>(experts, shape, h, weights, first, out);                                    \
  }
MOE_PACKINGS(MOE_TOKEN_EXPERTS)
#undef MOE_TOKEN_EXPERTS
