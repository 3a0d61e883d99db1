// Unpacks one superblock (32 rows x 256 columns) to one byte a code and scales as lanes, for AVX2's kernel for several
// tokens and for the portable path. GCC vector extensions give AVX2, SSE2 and NEON from one source. kVector is the
// native width: gcc splits wider vectors badly (AVX2 took 1.7x the time at 2 tokens). So 64 bytes are unpacked in
// pieces of kVector bytes, each at offset `at`. Included inside an anonymous namespace (see elementwise.inc.h).

typedef uint16_t Halves __attribute__((vector_size(kVector)));
typedef uint32_t Words __attribute__((vector_size(kVector)));
typedef int32_t Ints __attribute__((vector_size(kVector)));

enum class ScaleMode {
  kLow,   // s lane = S
  kPair,  // s lane = S in both 16-bit halves, to multiply two 16-bit sums at once
};

struct alignas(64) Unpacked {
  uint8_t codes[64][2][64];  // [column / 4][half][4 * row + column % 4]
  int32_t s[4][2][4][16];    // [64 columns][half][group of 16 (g16) or 32 (g32)][row]; unused by g64
  int32_t m[4][2][2][16];    // pairs of 16-bit M: g16 (M0, M2) and (M1, M3), g32 (M0, M1); unused by g64
  float sf[4][2][16];        // g64 only
  float mf[4][2][16];        // g64 only
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

// S and M of group v (of four) from 64 (s4) or 128 (s8) bytes; an 8-bit M is sign-extended to 32 bits.
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

inline void scales_g64(Unpacked& u, int b, int r, const uint8_t* s, const uint8_t* m) {
  for (int row = 0; row < 16; ++row) {
    u.sf[b][r][row] = float(s[row]);
    u.mf[b][r][row] = float(int8_t(m[row]));
  }
}
