// Writes the codes and scales of one superblock and one half r in tile order (docs/format.md, "Packings").
// A 32-bit lane is a row, so byte 4 * row + c of a code vector is byte c of lane `row`: packing needs only shifts and
// ORs.
#pragma once
#include <cstdint>

#include "../../formats/native/tile_layout.h"

namespace moe {
namespace {

// Codes of a superblock: [256 columns][16 rows]; S and M: [groups][16 rows], M in two's complement.
struct BlockCodes {
  const uint32_t* codes;
  const uint32_t* s;
  const uint32_t* m;
};

// OR of (codes[first + stride * v + c] & Mask) << (8 * c + Bit * v) over v < Planes and c < 4.
template <class S, int Planes, int Bit, int Mask>
typename S::U code_vector(const uint32_t* codes, int first, int stride) {
  typename S::U out = S::set_u(0);
  for (int c = 3; c >= 0; --c) {
    typename S::U byte = S::set_u(0);
    for (int v = Planes - 1; v >= 0; --v) {
      const typename S::U code = S::and_u(S::load_u(codes + 16 * (first + stride * v + c)), S::set_u(Mask));
      byte = S::or_u(S::template left<Bit>(byte), code);
    }
    out = S::or_u(S::template left<8>(out), byte);
  }
  return out;
}

// The top bits of the 3-bit codes of two code vectors: bit 2v + 2 + o of byte c for planes v < 3, bit o for plane 3.
template <class S>
typename S::U high_bits(const uint32_t* codes, int first, int stride) {
  typename S::U out = S::set_u(0);
  for (int c = 3; c >= 0; --c) {
    typename S::U byte = S::set_u(0);
    for (int place = 7; place >= 0; --place) {
      const int v = place < 2 ? 3 : place / 2 - 1, o = place & 1;
      const typename S::U code = S::load_u(codes + 16 * (first + 4 * o + stride * v + c));
      byte = S::or_u(S::template left<1>(byte), S::template right<2>(code));
    }
    out = S::or_u(S::template left<8>(out), byte);
  }
  return out;
}

// Numbers below 256 of four groups, group v in byte v of each lane.
template <class S>
typename S::U scale_bytes(const uint32_t* x, int first) {
  typename S::U out = S::set_u(0);
  for (int v = 3; v >= 0; --v) {
    out = S::or_u(S::template left<8>(out), S::and_u(S::load_u(x + 16 * (first + v)), S::set_u(0xff)));
  }
  return out;
}

template <class S>
typename S::U scale_nibbles(const BlockCodes& b, int first) {
  return S::or_u(scale_bytes<S>(b.s, first), S::template left<4>(scale_bytes<S>(b.m, first)));
}

// Code vectors 2i and 2i + 1 and their high bits: 192 bytes.
template <class S>
void pack_q3_pair(const uint32_t* codes, int first, int stride, uint8_t* to) {
  S::store_u(to, code_vector<S, 4, 2, 3>(codes, first, stride));
  S::store_u(to + 64, code_vector<S, 4, 2, 3>(codes, first + 4, stride));
  S::store_u(to + 128, high_bits<S>(codes, first, stride));
}

// One chunk of a superblock: its codes, then its S and M. first: its first column.
template <class S, Packing P>
void pack_chunk(const BlockCodes& b, int first, int r, uint8_t* chunk) {
  constexpr PackingInfo kInfo = kPackingInfo[P];
  constexpr int kGroup = kInfo.group_size, kPlanes = kInfo.planes(), kCodeBytes = kInfo.code_bytes();
  if constexpr (kInfo.nbits == 3) {
    for (int i = 0; i < kGroup / 8; ++i) pack_q3_pair<S>(b.codes, first + 8 * i, kGroup, chunk + 192 * (2 * i + r));
  } else {
    constexpr int kBits = kInfo.nbits;
    for (int j = 0; j < kGroup / 4; ++j) {
      S::store_u(chunk + 64 * (2 * j + r),
                 code_vector<S, kPlanes, kBits, (1 << kBits) - 1>(b.codes, first + 4 * j, kGroup));
    }
  }
  const int group = first / kGroup;
  uint8_t* const scales = chunk + kCodeBytes;
  if constexpr (kGroup == 64) {  // by group, a byte a row
    uint8_t* const s = scales + 32 * kPlanes * r;
    for (int v = 0; v < kPlanes; ++v) {
      S::store_bytes(s + 16 * v, S::load_u(b.s + 16 * (group + v)));
      S::store_bytes(s + 16 * (kPlanes + v), S::load_u(b.m + 16 * (group + v)));
    }
  } else if constexpr (kInfo.scale_bits == 8) {  // by row, a byte a group
    S::store_u(scales + 128 * r, scale_bytes<S>(b.s, group));
    S::store_u(scales + 128 * r + 64, scale_bytes<S>(b.m, group));
  } else {
    S::store_u(scales + 64 * r, scale_nibbles<S>(b, group));
  }
}

// block: the superblock's first byte in the tile.
template <class S, Packing P>
void pack_superblock(const BlockCodes& b, int r, uint8_t* block) {
  constexpr int kChunks = kPackingInfo[P].chunks, kColumns = kPackingInfo[P].chunk_columns();
  constexpr int kBytes = kPackingInfo[P].chunk_bytes();
  for (int chunk = 0; chunk < kChunks; ++chunk) pack_chunk<S, P>(b, kColumns * chunk, r, block + kBytes * chunk);
}

template <class S>
void pack_block(int packing, const BlockCodes& b, int r, uint8_t* block) {
  switch (packing) {
#define MOE_PACK(id, ...) \
  case id: return pack_superblock<S, id>(b, r, block);
    MOE_PACKINGS(MOE_PACK)
#undef MOE_PACK
  }
}

}  // namespace
}  // namespace moe
