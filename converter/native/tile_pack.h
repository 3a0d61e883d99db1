// Writes the codes and scales of one superblock and one half r in tile order (docs/format.md, "Packings").
// One int32 lane = one row, so byte 4 * row + c of a code vector is byte c of lane `row`: packing is shifts and ORs.
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

// OR of `field` bits of codes[first + stride * v + c] << (8 * c + bit * v) over v < planes and c < 4.
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

// Four groups' numbers below 256, group v in byte v of each lane.
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

// `block`: where the superblock begins in the tile.
template <class S>
void pack_q2_g16(const BlockCodes& b, int r, bool wide_scales, uint8_t* block) {
  const int quad_bytes = wide_scales ? 768 : 640;
  for (int q = 0; q < 4; ++q) {
    uint8_t* quad = block + q * quad_bytes;
    for (int j = 0; j < 4; ++j) {
      S::store_u(quad + 64 * (2 * j + r), code_vector<S, 4, 2, 3>(b.codes, 64 * q + 4 * j, 16));
    }
    if (wide_scales) {
      S::store_u(quad + 512 + 128 * r, scale_bytes<S>(b.s, 4 * q));
      S::store_u(quad + 576 + 128 * r, scale_bytes<S>(b.m, 4 * q));
    } else {
      S::store_u(quad + 512 + 64 * r, scale_nibbles<S>(b, 4 * q));
    }
  }
}

// Code vectors 2i and 2i + 1 and their high bits: 192 bytes.
template <class S>
void pack_q3_pair(const uint32_t* codes, int first, int stride, uint8_t* to) {
  S::store_u(to, code_vector<S, 4, 2, 3>(codes, first, stride));
  S::store_u(to + 64, code_vector<S, 4, 2, 3>(codes, first + 4, stride));
  S::store_u(to + 128, high_bits<S>(codes, first, stride));
}

template <class S>
void pack_q3_g32(const BlockCodes& b, int r, uint8_t* block) {
  for (int q = 0; q < 2; ++q) {
    uint8_t* half = block + q * 1664;
    for (int i = 0; i < 4; ++i) pack_q3_pair<S>(b.codes, 128 * q + 8 * i, 32, half + 192 * (2 * i + r));
    S::store_u(half + 1536 + 64 * r, scale_nibbles<S>(b, 4 * q));
  }
}

template <class S>
void pack_q3_g64(const BlockCodes& b, int r, uint8_t* block) {
  for (int i = 0; i < 8; ++i) pack_q3_pair<S>(b.codes, 8 * i, 64, block + 192 * (2 * i + r));
  uint8_t* scales = block + 3072 + 128 * r;
  for (int v = 0; v < 4; ++v) {
    S::store_bytes(scales + 16 * v, S::load_u(b.s + 16 * v));
    S::store_bytes(scales + 64 + 16 * v, S::load_u(b.m + 16 * v));
  }
}

template <class S>
void pack_q4_g64(const BlockCodes& b, int r, uint8_t* block) {
  for (int h = 0; h < 2; ++h) {
    uint8_t* half = block + h * 2176;
    for (int j = 0; j < 16; ++j) {
      S::store_u(half + 64 * (2 * j + r), code_vector<S, 2, 4, 15>(b.codes, 128 * h + 4 * j, 64));
    }
    uint8_t* scales = half + 2048 + 64 * r;
    for (int v = 0; v < 2; ++v) {
      S::store_bytes(scales + 16 * v, S::load_u(b.s + 16 * (2 * h + v)));
      S::store_bytes(scales + 32 + 16 * v, S::load_u(b.m + 16 * (2 * h + v)));
    }
  }
}

template <class S>
void pack_block(int packing, const BlockCodes& b, int r, uint8_t* block) {
  switch (packing) {
    case kQ2G16S4: pack_q2_g16<S>(b, r, false, block); break;
    case kQ2G16S8: pack_q2_g16<S>(b, r, true, block); break;
    case kQ3G32S4: pack_q3_g32<S>(b, r, block); break;
    case kQ3G64S8: pack_q3_g64<S>(b, r, block); break;
    case kQ4G64S8: pack_q4_g64<S>(b, r, block); break;
  }
}

}  // namespace
}  // namespace moe
