// Constants of the tile packings (docs/format.md, "Packings"). The only place where native code states them;
// tests/test_formats_native_header.py compares them with formats/packing.py.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moe {

inline constexpr int kTileRows = 32;     // rows of one tile
inline constexpr int kBlockCols = 256;   // input columns of one superblock
inline constexpr int kHeadBytes = 128;   // for r in 0, 1: 16 x fp16 ds, 16 x fp16 dm
inline constexpr int kHalfRows = 16;     // rows of one half r

// The ids are part of the C ABI, not of the file format: files name packings by their names.
enum Packing : int32_t {
  kQ2G16S4 = 0,  // tile32-q2-g16-s4
  kQ2G16S8 = 1,  // tile32-q2-g16-s8
  kQ3G32S4 = 2,  // tile32-q3-g32-s4
  kQ3G64S8 = 3,  // tile32-q3-g64-s8
  kQ4G64S8 = 4,  // tile32-q4-g64-s8
};
inline constexpr int kPackings = 5;

struct PackingInfo {
  const char* name;
  int nbits;
  int group_size;    // input columns that share one S and one M
  int scale_bits;    // 4: S and M unsigned nibbles; 8: S unsigned, M signed
  int block_bytes;   // bytes of one superblock of 32 rows x 256 columns
};

inline constexpr PackingInfo kPackingInfo[kPackings] = {
    {"tile32-q2-g16-s4", 2, 16, 4, 2560},
    {"tile32-q2-g16-s8", 2, 16, 8, 3072},
    {"tile32-q3-g32-s4", 3, 32, 4, 3328},
    {"tile32-q3-g64-s8", 3, 64, 8, 3328},
    {"tile32-q4-g64-s8", 4, 64, 8, 4352},
};

constexpr int64_t blocks_of(int64_t columns) { return (columns + kBlockCols - 1) / kBlockCols; }
constexpr int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
constexpr int64_t tile_bytes(Packing p, int64_t columns) {
  return kHeadBytes + blocks_of(columns) * kPackingInfo[p].block_bytes;
}

}  // namespace moe
