// One superblock (32 rows x 256 columns) from its packed bytes to one byte a code, scales as lanes: the front half of
// AVX2's kernel for several tokens, and of the portable path. GCC vector extensions: the same source gives AVX2, SSE2
// and NEON; kVector is the native width (gcc splits a wider one badly: AVX2 took 1.7x the time at 2 tokens), and the 64
// bytes of a vector are done in pieces of it, `at` bytes in. Included inside an anonymous namespace (see
// elementwise.inc.h).

typedef uint16_t Halves __attribute__((vector_size(kVector)));
typedef uint32_t Words __attribute__((vector_size(kVector)));
typedef int32_t Ints __attribute__((vector_size(kVector)));

enum class ScaleMode {
  kLow,   // s lane = S
  kPair,  // s lane = S in both 16-bit halves, for a multiply of two 16-bit sums
};

struct alignas(64) Unpacked {
  uint8_t codes[64][2][64];   // [column / 4][half][4 * row + column % 4]
  int32_t s[4][2][4][16];     // [64 columns][half][group of 16 (g16) or 32 (g32)][row]; unused by g64
  int32_t m[4][2][2][16];     // pairs of 16-bit M: g16 (M0, M2) and (M1, M3), g32 (M0, M1); unused by g64
  float sf[4][2][16];         // g64 only
  float mf[4][2][16];         // g64 only
};

template <class V>
inline V load_as(const uint8_t* p) {
  V v;
  __builtin_memcpy(&v, p, kVector);
  return v;
}
template <class V>
inline void store_as(void* p, V v) {
  __builtin_memcpy(p, &v, kVector);
}

template <ScaleMode kMode>
inline void store_s(int32_t* p, Words s) {
  if constexpr (kMode == ScaleMode::kLow) store_as(p, s);
  if constexpr (kMode == ScaleMode::kPair) store_as(p, s | (s << 16));
}

// S and M of group v of four from 64 (s4) or 128 (s8) bytes; M sign-extended to 32 bits.
template <int kScaleBits>
inline void nibble_or_byte(const uint8_t* p, int v, Words& s, Words& m) {
  if constexpr (kScaleBits == 4) {
    const Words sm = load_as<Words>(p) >> (8 * v);
    s = sm & 15;
    m = (sm >> 4) & 15;
  } else {
    s = (load_as<Words>(p) >> (8 * v)) & 255;
    m = Words(Ints(load_as<Words>(p + 64) << (24 - 8 * v)) >> 24);
  }
}

template <int kScaleBits, ScaleMode kMode>
inline void unpack_q2_g16(const uint8_t* p, Unpacked& u) {
  constexpr int kScaleBytes = kScaleBits == 4 ? 64 : 128;
  for (int q = 0; q < 4; ++q, p += 512 + 2 * kScaleBytes) {
    for (int r = 0; r < 2; ++r) {
      for (int at = 0; at < 64; at += kVector) {
        Words s[4], m[4];
        unrolled<4>([&](auto v) MOE_INLINE {
          nibble_or_byte<kScaleBits>(p + 512 + kScaleBytes * r + at, v, s[v], m[v]);
          store_s<kMode>(u.s[q][r][v] + at / 4, s[v]);
        });
        store_as(u.m[q][r][0] + at / 4, (m[0] & 0xffff) | (m[2] << 16));
        store_as(u.m[q][r][1] + at / 4, (m[1] & 0xffff) | (m[3] << 16));
        unrolled<4>([&](auto j) MOE_INLINE {
          const Halves w = load_as<Halves>(p + 64 * (2 * j + r) + at);
          unrolled<4>([&](auto v) MOE_INLINE {
            store_as(u.codes[16 * q + 4 * v + j][r] + at, (w >> (2 * v)) & 0x0303);
          });
        });
      }
    }
  }
}

// Plane v of vector 2i+o: two low bits from w, the top bit from bit 2v+2+o (v < 3) or o (v = 3) of `high`.
inline Halves code3(Halves w, Halves high, int v, int o) {
  const Halves low = (w >> (2 * v)) & 0x0303;
  const Halves top = v < 3 ? (high >> (2 * v + o)) & 0x0404 : (o == 0 ? (high << 2) & 0x0404 : (high << 1) & 0x0404);
  return low | top;
}

template <ScaleMode kMode>
inline void unpack_q3_g32(const uint8_t* p, Unpacked& u) {
  for (int q = 0; q < 2; ++q, p += 1664) {
    for (int r = 0; r < 2; ++r) {
      for (int at = 0; at < 64; at += kVector) {
        Words s[4], m[4];
        unrolled<4>([&](auto v) MOE_INLINE {
          nibble_or_byte<4>(p + 1536 + 64 * r + at, v, s[v], m[v]);
          store_s<kMode>(u.s[2 * q + v / 2][r][v % 2] + at / 4, s[v]);
        });
        store_as(u.m[2 * q][r][0] + at / 4, m[0] | (m[1] << 16));
        store_as(u.m[2 * q + 1][r][0] + at / 4, m[2] | (m[3] << 16));
        unrolled<4>([&](auto i) MOE_INLINE {
          const uint8_t* c = p + 192 * (2 * i + r) + at;
          const Halves high = load_as<Halves>(c + 128);
          unrolled<2>([&](auto o) MOE_INLINE {
            const Halves w = load_as<Halves>(c + 64 * o);
            unrolled<4>([&](auto v) MOE_INLINE {
              store_as(u.codes[32 * q + 8 * v + 2 * i + o][r] + at, code3(w, high, v, o));
            });
          });
        });
      }
    }
  }
}

inline void scales_g64(Unpacked& u, int b, int r, const uint8_t* s, const uint8_t* m) {
  for (int row = 0; row < 16; ++row) {
    u.sf[b][r][row] = float(s[row]);
    u.mf[b][r][row] = float(int8_t(m[row]));
  }
}

inline void unpack_q3_g64(const uint8_t* p, Unpacked& u) {
  for (int i = 0; i < 8; ++i) {
    for (int r = 0; r < 2; ++r, p += 192) {
      for (int at = 0; at < 64; at += kVector) {
        const Halves high = load_as<Halves>(p + 128 + at);
        unrolled<2>([&](auto o) MOE_INLINE {
          const Halves w = load_as<Halves>(p + 64 * o + at);
          unrolled<4>([&](auto v) MOE_INLINE { store_as(u.codes[16 * v + 2 * i + o][r] + at, code3(w, high, v, o)); });
        });
      }
    }
  }
  for (int r = 0; r < 2; ++r, p += 128)
    for (int v = 0; v < 4; ++v) scales_g64(u, v, r, p + 16 * v, p + 64 + 16 * v);
}

inline void unpack_q4_g64(const uint8_t* p, Unpacked& u) {
  for (int h = 0; h < 2; ++h) {
    for (int j = 0; j < 16; ++j) {
      for (int r = 0; r < 2; ++r, p += 64) {
        for (int at = 0; at < 64; at += kVector) {
          const Halves w = load_as<Halves>(p + at);
          store_as(u.codes[32 * h + j][r] + at, w & 0x0f0f);
          store_as(u.codes[32 * h + 16 + j][r] + at, (w >> 4) & 0x0f0f);
        }
      }
    }
    for (int r = 0; r < 2; ++r, p += 64)
      for (int v = 0; v < 2; ++v) scales_g64(u, 2 * h + v, r, p + 16 * v, p + 32 + 16 * v);
  }
}

template <Packing P, ScaleMode kMode>
inline void unpack(const uint8_t* p, Unpacked& u) {
  if constexpr (P == kQ2G16S4) unpack_q2_g16<4, kMode>(p, u);
  if constexpr (P == kQ2G16S8) unpack_q2_g16<8, kMode>(p, u);
  if constexpr (P == kQ3G32S4) unpack_q3_g32<kMode>(p, u);
  if constexpr (P == kQ3G64S8) unpack_q3_g64(p, u);
  if constexpr (P == kQ4G64S8) unpack_q4_g64(p, u);
}

// A tile for many tokens. Isa gives kMode<P>, kGroup<P> (most tokens of one micro-kernel call), micro<P, NT> and heads.
template <class Isa, Packing P, int NT>
inline void run_micro(int tokens, const Unpacked& u, const ActBlock* x, float* s, float* m) {
  if constexpr (NT > 0) {
    if (tokens == NT) {
      Isa::template micro<P, NT>(u, x, s, m);
    } else {
      run_micro<Isa, P, NT - 1>(tokens, u, x, s, m);
    }
  }
}

// y = ds * sum(d * A) - dm * sum(d * B), each step rounded once: see docs/numerics.md.
inline void combine(const float* ds, const float* dm, const float* s, const float* m, float* y) {
  for (int i = 0; i < kTileRows; ++i) {
    const float zero = dm[i] * m[i];
    y[i] = __builtin_fmaf(ds[i], s[i], -zero);
  }
}

template <class Isa, Packing P>
void tile_gemm(const uint8_t* tile, int64_t blocks, Activations x, int tokens, float* y) {
  constexpr int kGroup = Isa::template kGroup<P>;
  alignas(64) float s[kMaxTokens * kTileRows];
  alignas(64) float m[kMaxTokens * kTileRows];
  __builtin_memset(s, 0, sizeof(float) * kTileRows * size_t(tokens));
  __builtin_memset(m, 0, sizeof(float) * kTileRows * size_t(tokens));
  Unpacked u;
  const uint8_t* p = tile + kHeadBytes;
  const int groups = (tokens + kGroup - 1) / kGroup;
  for (int64_t b = 0; b < blocks; ++b, p += kPackingInfo[P].block_bytes) {
    unpack<P, Isa::template kMode<P>>(p, u);
    for (int g = 0; g < groups; ++g) {  // even groups: 13 tokens are 7 + 6, not 12 + 1
      const int begin = tokens * g / groups, end = tokens * (g + 1) / groups;
      run_micro<Isa, P, kGroup>(end - begin, u, x.at + b * x.stride + begin, s + begin * kTileRows,
                                m + begin * kTileRows);
    }
  }
  alignas(64) float ds[kTileRows], dm[kTileRows];
  Isa::heads(tile, ds, dm);
  for (int t = 0; t < tokens; ++t) combine(ds, dm, s + t * kTileRows, m + t * kTileRows, y + t * kTileRows);
}
