// Layout of the tile packings (docs/format.md, "Packings"), which GPU threads read in place. formats/native/packings.h
// lists the packings. tests/loader/cuda/test_loader_cuda_products.py compares the constants with formats/packing.py.
#pragma once
#include "common.cuh"
#include "packings.h"

namespace moe {

constexpr int kTileRows = 32;
constexpr int kBlockCols = 256;
constexpr int kHeadBytes = 128;

enum Packing {
#define MOE_ID(id, ...) id,
  MOE_PACKINGS(MOE_ID)
#undef MOE_ID
};

// chunk: columns whose codes share bytes. plane: one group of a chunk; each code byte holds one code of every plane.
template <int kBits_, int kGroup_, int kScaleBits_, int kChunks_>
struct LayoutOf {
  static constexpr int kBits = kBits_, kGroup = kGroup_, kScaleBits = kScaleBits_;
  static constexpr int kBlockBytes = kTileRows * (kBlockCols * kBits + kBlockCols / kGroup * 2 * kScaleBits) / 8;
  static constexpr int kChunks = kChunks_, kPlanes = kBlockCols / kGroup / kChunks, kChunkBytes = kBlockBytes / kChunks;
  static constexpr int kQuads = kGroup / 16;        // 16 columns of one plane: four code vectors
  static constexpr int kChunkBlocks = 4 / kChunks;  // blocks of 64 columns
  static constexpr int kCodeBytes = kBlockCols * kTileRows * kBits / 8 / kChunks;  // then S and M
};
template <int P>
struct Layout;
#define MOE_LAYOUT(id, suffix, name, ...) \
  template <>                             \
  struct Layout<id> : LayoutOf<__VA_ARGS__> {};
MOE_PACKINGS(MOE_LAYOUT)
#undef MOE_LAYOUT

MOE_DEVICE int superblocks(int64_t columns) { return int((columns + kBlockCols - 1) / kBlockCols); }
MOE_DEVICE int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
template <int P>
MOE_DEVICE int64_t tile_bytes(int64_t columns) {
  return kHeadBytes + int64_t(superblocks(columns)) * Layout<P>::kBlockBytes;
}

struct alignas(16) Words4 {
  uint32_t w[4];
};

// Packed weights are read once, so they bypass L1 and leave it to the activations.
MOE_DEVICE uint32_t stream_word(const uint8_t* p) {
#if defined(MOE_ON_HOST)
  return *reinterpret_cast<const uint32_t*>(p);
#else
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
#endif
}
MOE_DEVICE Words4 stream_words(const uint8_t* p) {
#if defined(MOE_ON_HOST)
  return *reinterpret_cast<const Words4*>(p);
#else
  Words4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p));
  return v;
#endif
}
// Reads data that an earlier launch wrote, through L1.
MOE_DEVICE Words4 cached_words(const void* p) {
#if defined(MOE_ON_HOST)
  return *static_cast<const Words4*>(p);
#else
  Words4 v;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p));
  return v;
#endif
}

// c + four unsigned bytes times four signed ones.
MOE_DEVICE int32_t dot4(uint32_t codes, uint32_t x, int32_t c) {
#if defined(MOE_ON_HOST)
  for (int i = 0; i < 4; ++i) c += int32_t(codes >> (8 * i) & 255) * int8_t(x >> (8 * i));
  return c;
#else
  int32_t d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(codes), "r"(x), "r"(c));
  return d;
#endif
}
// c + two signed 16-bit halves times bytes 0, 1 (kHigh: 2, 3) of `bytes`.
template <bool kHigh, bool kSignedBytes>
MOE_DEVICE int32_t dot2(uint32_t halves, uint32_t bytes, int32_t c) {
#if defined(MOE_ON_HOST)
  for (int i = 0; i < 2; ++i) {
    const int byte = int(bytes >> (8 * (i + 2 * kHigh)) & 255);
    c += int16_t(halves >> (16 * i)) * (kSignedBytes ? int8_t(byte) : byte);
  }
  return c;
#else
  int32_t d;
  if (kHigh && kSignedBytes) asm("dp2a.hi.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(halves), "r"(bytes), "r"(c));
  if (kHigh && !kSignedBytes) asm("dp2a.hi.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(halves), "r"(bytes), "r"(c));
  if (!kHigh && kSignedBytes) asm("dp2a.lo.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(halves), "r"(bytes), "r"(c));
  if (!kHigh && !kSignedBytes) asm("dp2a.lo.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(halves), "r"(bytes), "r"(c));
  return d;
#endif
}
MOE_DEVICE uint32_t pair16(int32_t low, int32_t high) { return (uint32_t(low) & 0xffffu) | uint32_t(high) << 16; }

// Converts an integer below 2^22 to float, if its sum began with kFloatBits: one addition instead of a slow conversion.
constexpr int32_t kFloatBits = 0x4b400000;  // kRound's
MOE_DEVICE float summed(int32_t v) { return float_of(uint32_t(v)) - kRound; }

MOE_DEVICE int32_t byte_of(uint32_t word, int i) { return int32_t(word >> (8 * i) & 255); }
MOE_DEVICE int32_t signed_byte_of(uint32_t word, int i) { return int8_t(word >> (8 * i)); }

// 3-bit codes of plane v, times 2^plane_shift<3>(v): two low bits from w, the top bit from `high`, whose bits belong to
// vector 0; for vector 1 shift them right by one.
MOE_DEVICE uint32_t codes3(uint32_t w, uint32_t high, int v) {
  if (v == 3) return (w >> 6 & 0x03030303u) | (high << 2 & 0x04040404u);
  return (w & 0x03030303u << 2 * v) | (high & 0x04040404u << 2 * v);
}
// A plane is selected by AND without a shift where that is exact; the sum is divided by the factor.
template <int kBits>
MOE_DEVICE int plane_shift(int v) {
  if (kBits == 4) return 4 * v;
  return kBits == 3 && v == 3 ? 0 : 2 * v;
}

// S and M of four groups (bytes 0..3) of a row, for packings with several groups in 64 columns.
template <int kScaleBits>
struct GroupScales {
  uint32_t s, m;
  static constexpr bool kSigned = kScaleBits == 8;
  MOE_DEVICE static GroupScales of(uint32_t first, uint32_t second) {
    if (kScaleBits == 8) return {first, second};
    return {first & 0x0f0f0f0fu, first >> 4 & 0x0f0f0f0fu};
  }
  // kFloatBits plus the sum of M * (sum of x) over 64 columns. sum01, sum23: sums of x, two 16-bit halves each. With
  // kGroup 32 only bytes 2 * block and 2 * block + 1 of M count.
  template <int kGroup>
  MOE_DEVICE int32_t zero_term(uint32_t sum01, uint32_t sum23, int block) const {
    uint32_t each = m;
    if (kGroup == 32) {
      each = m >> 16 * block;
      each = (each & 0xffu) * 0x101u | (each >> 8 & 0xffu) * 0x1010000u;
    }
    return dot2<true, kSigned>(sum23, each, dot2<false, kSigned>(sum01, each, kFloatBits));
  }
};

// Super-scales ds and dm of one row.
struct Head {
  float ds, dm;
};
MOE_DEVICE Head head_of(const uint8_t* tile, int row) {
  const uint16_t* p = reinterpret_cast<const uint16_t*>(tile + 64 * (row / 16)) + row % 16;
  return {half_to_float(p[0]), half_to_float(p[16])};
}
MOE_DEVICE float combine(Head head, float s, float m) {
  const float zero = head.dm * m;
  return fmaf(head.ds, s, -zero);
}

}  // namespace moe
