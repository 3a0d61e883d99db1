// Sizes of the tile packings for CPU code. loader/cuda/kernels/tiles.cuh has them for GPUs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "packings.h"

namespace moe {

inline constexpr int kTileRows = 32;    // rows of one tile
inline constexpr int kBlockCols = 256;  // input columns of one superblock
inline constexpr int kHeadBytes = 128;  // for r in 0, 1: 16 x fp16 ds, 16 x fp16 dm
inline constexpr int kHalfRows = 16;    // rows of one half r

enum Packing : int32_t {
#define MOE_ID(id, ...) id,
  MOE_PACKINGS(MOE_ID)
#undef MOE_ID
};

// A packing as a type: the functions of each packing are overloads over it.
template <Packing P>
struct Tag {};

struct PackingInfo {
  const char* name;
  int nbits;
  int group_size;   // input columns that share one S and one M
  int scale_bits;   // of S and of M
  int chunks;       // parts of a superblock, each with its codes, then its S and M
  int block_bytes;  // bytes of one superblock of 32 rows x 256 columns

  constexpr PackingInfo(const char* name, int nbits, int group_size, int scale_bits, int chunks)
      : name(name), nbits(nbits), group_size(group_size), scale_bits(scale_bits), chunks(chunks),
        block_bytes(kTileRows * (kBlockCols * nbits + kBlockCols / group_size * 2 * scale_bits) / 8) {}

  constexpr int chunk_columns() const { return kBlockCols / chunks; }
  constexpr int chunk_bytes() const { return block_bytes / chunks; }
  constexpr int code_bytes() const { return kTileRows * chunk_columns() * nbits / 8; }  // in one chunk
  constexpr int planes() const { return chunk_columns() / group_size; }  // groups of a chunk; each byte has all of them
};

inline constexpr PackingInfo kPackingInfo[] = {
#define MOE_INFO(id, suffix, name, nbits, group_size, scale_bits, chunks) {name, nbits, group_size, scale_bits, chunks},
    MOE_PACKINGS(MOE_INFO)
#undef MOE_INFO
};
inline constexpr int kPackings = int(sizeof(kPackingInfo) / sizeof(kPackingInfo[0]));

inline bool known_packing(int32_t packing) { return packing >= 0 && packing < kPackings; }

// Returns the id of a packing by its name, -1 if unknown.
inline int32_t packing_named(const char* name) {
  for (int32_t i = 0; i < kPackings; ++i)
    if (name && std::strcmp(name, kPackingInfo[i].name) == 0) return i;
  return -1;
}

constexpr int64_t blocks_of(int64_t columns) { return (columns + kBlockCols - 1) / kBlockCols; }
constexpr int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
constexpr int64_t tile_bytes(Packing p, int64_t columns) {
  return kHeadBytes + blocks_of(columns) * kPackingInfo[p].block_bytes;
}

}  // namespace moe
