// AVX2, one token: straight from the packed bytes. vpmaddubsw adds two products into a saturating 16-bit lane, so codes
// are brought to 3 (times 1) or 12 (times 4) at most, 7 and 28 with three bits, and 16-bit sums are emptied in time:
// 4 vectors of 28 * 127 * 2 = 28448, 8 of 15 * 127 * 2 = 30480.

typedef __m256i I;
typedef __m256 F;

inline I load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline I load_codes(const uint8_t* p) {
  I v = load(p);
  asm("" : "+x"(v));
  return v;
}
inline I broadcast4(const void* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}
inline I zero() { return _mm256_setzero_si256(); }
inline I bytes8_u(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline I bytes8_i(const uint8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline I select4(I low, I l, I high, I h) { return _mm256_or_si256(_mm256_and_si256(low, l), _mm256_and_si256(high, h)); }

// Byte v of each 32-bit lane, zero-extended, in both 16-bit halves.
inline I pair_of_byte(I lanes, int v) {
  const char b = char(v);
  return _mm256_shuffle_epi8(lanes, _mm256_broadcastsi128_si256(_mm_setr_epi8(
    b, -128, b, -128, char(b + 4), -128, char(b + 4), -128, char(b + 8), -128, char(b + 8), -128, char(b + 12), -128,
    char(b + 12), -128)));
}
// Bytes a and b of each lane as two 16-bit halves.
inline I two_bytes(I lanes, int a, int b) {
  const char c = char(a), d = char(b);
  return _mm256_shuffle_epi8(lanes, _mm256_broadcastsi128_si256(_mm_setr_epi8(
    c, -128, d, -128, char(c + 4), -128, char(d + 4), -128, char(c + 8), -128, char(d + 8), -128, char(c + 12), -128,
    char(d + 12), -128)));
}

struct Sums {  // 8 rows
  F s, m;
  inline void add(I a, I b, float d) {
    const F dv = _mm256_set1_ps(d);
    s = _mm256_fmadd_ps(_mm256_cvtepi32_ps(a), dv, s);
    m = _mm256_fmadd_ps(_mm256_cvtepi32_ps(b), dv, m);
  }
  inline void add64(I dot, F sf, F mf, float d, float u) {
    s = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(dot), sf), _mm256_set1_ps(d), s);
    m = _mm256_fmadd_ps(mf, _mm256_set1_ps(u), m);
  }
};

// One half (16 rows: y = 0, 1) of 64 columns.
template <int kScaleBits>
inline void gemv_q2(const uint8_t* p, int q, int r, const ActBlock& x, Sums* sums) {
  I a[2][4];
  const I m3 = _mm256_set1_epi8(3), m12 = _mm256_set1_epi8(12);
  unrolled<4>([&](auto j) MOE_INLINE {
    I w[2], high[2];
    unrolled<2>([&](auto y) MOE_INLINE {
      w[y] = load_codes(p + 64 * (2 * j + r) + 32 * y);
      if (y == 1 && r == 0) touch(p + 64 * (2 * j + 1));
      high[y] = _mm256_srli_epi16(w[y], 4);
    });
    unrolled<4>([&](auto v) MOE_INLINE {
      const I xb = broadcast4(x.x + 64 * q + 16 * v + 4 * j);
      unrolled<2>([&](auto y) MOE_INLINE {
        const I products = _mm256_maddubs_epi16(_mm256_and_si256(v < 2 ? w[y] : high[y], v % 2 ? m12 : m3), xb);
        a[y][v] = j == 0 ? products : _mm256_add_epi16(a[y][v], products);
      });
    });
  });
  constexpr int kScaleBytes = kScaleBits == 4 ? 64 : 128;
  unrolled<2>([&](auto y) MOE_INLINE {
    const uint8_t* ps = p + 512 + kScaleBytes * r + 32 * y;
    I s = load(ps), m02, m13;
    if constexpr (kScaleBits == 4) {
      const I nibble = _mm256_set1_epi8(15);
      const I m = _mm256_and_si256(_mm256_srli_epi16(s, 4), nibble);
      s = _mm256_and_si256(s, nibble);
      m02 = _mm256_and_si256(m, _mm256_set1_epi16(255));
      m13 = _mm256_srli_epi16(m, 8);
    } else {
      const I m = load(ps + 64);
      m02 = _mm256_srai_epi16(_mm256_slli_epi16(m, 8), 8);
      m13 = _mm256_srai_epi16(m, 8);
    }
    I dot = _mm256_add_epi32(_mm256_madd_epi16(a[y][1], pair_of_byte(s, 1)), _mm256_madd_epi16(a[y][3], pair_of_byte(s, 3)));
    dot = _mm256_srai_epi32(dot, 2);
    dot = _mm256_add_epi32(dot, _mm256_madd_epi16(a[y][0], pair_of_byte(s, 0)));
    dot = _mm256_add_epi32(dot, _mm256_madd_epi16(a[y][2], pair_of_byte(s, 2)));
    const I b = _mm256_add_epi32(_mm256_madd_epi16(m02, broadcast4(x.s16 + 4 * q)),
                                 _mm256_madd_epi16(m13, broadcast4(x.s16 + 4 * q + 2)));
    sums[2 * r + y].add(dot, b, x.d[q]);
  });
}

// Two i (four vectors) of 3-bit codes, 8 rows: 16-bit sums a[v]. p at the first i. Planes 1 and 3 are summed times 4;
// without the factor a sum has room for sixteen vectors (7 * 127 * 2 * 16 = 28448).
inline void gemv_q3_four(const uint8_t* p, const int8_t* x, int plane, bool first, I* a) {
  const I m3 = _mm256_set1_epi8(3), m4 = _mm256_set1_epi8(4), m12 = _mm256_set1_epi8(12), m16 = _mm256_set1_epi8(16);
  unrolled<2>([&](auto i) MOE_INLINE {
    if (first) unrolled<6>([&](auto line) MOE_INLINE { touch(p + 384 * i + 64 * line); });
    I top = load_codes(p + 384 * i + 128);
    unrolled<2>([&](auto o) MOE_INLINE {
      const I w = load_codes(p + 384 * i + 64 * o);
      const I high = _mm256_srli_epi16(w, 4);
      if (o == 1) top = _mm256_srli_epi16(top, 1);
      const I code[4] = {select4(w, m3, top, m4), select4(w, m12, top, m16),
                         select4(high, m3, _mm256_srli_epi16(top, 4), m4),
                         select4(high, m12, _mm256_slli_epi16(top, 4), m16)};
      unrolled<4>([&](auto v) MOE_INLINE {
        const I products = _mm256_maddubs_epi16(code[v], broadcast4(x + plane * v + 8 * i + 4 * o));
        a[v] = i + o == 0 ? products : _mm256_add_epi16(a[v], products);
      });
    });
  });
  a[1] = _mm256_srai_epi16(a[1], 2);
  a[3] = _mm256_srai_epi16(a[3], 2);
}

// 128 columns of q3-g32, rows 8 * part .. of the tile.
inline void gemv_q3_g32(const uint8_t* p, int q, int part, const ActBlock& x, Sums* sums) {
  const uint8_t* rows = p + 192 * (part / 2) + 32 * (part % 2);
  I a[4], b[4];
  gemv_q3_four(rows, x.x + 128 * q, 32, part == 0, a);
  gemv_q3_four(rows + 768, x.x + 128 * q + 16, 32, part == 0, b);
  const uint8_t* ps = p + 1536 + 32 * part;
  asm volatile("" : "+r"(ps));  // not before the codes: see touch
  const I sm = load(ps), nibble = _mm256_set1_epi8(15);
  const I s = _mm256_and_si256(sm, nibble), m = _mm256_and_si256(_mm256_srli_epi16(sm, 4), nibble);
  unrolled<4>([&](auto v) MOE_INLINE { a[v] = _mm256_madd_epi16(_mm256_add_epi16(a[v], b[v]), pair_of_byte(s, v)); });
  unrolled<2>([&](auto h) MOE_INLINE {
    sums[part].add(_mm256_add_epi32(a[2 * h], a[2 * h + 1]),
                   _mm256_madd_epi16(two_bytes(m, 2 * h, 2 * h + 1), broadcast4(x.s32 + 4 * q + 2 * h)), x.d[2 * q + h]); });
}

inline void gemv_q3_g64(const uint8_t* p, int part, const ActBlock& x, Sums* sums) {
  const uint8_t* rows = p + 192 * (part / 2) + 32 * (part % 2);
  I dot[4] = {zero(), zero(), zero(), zero()};
#pragma GCC unroll 1
  for (int i = 0; i < 8; i += 2) {
    I a[4];
    gemv_q3_four(rows + 384 * i, x.x + 8 * i, 64, part == 0, a);
    unrolled<4>([&](auto v) MOE_INLINE { dot[v] = _mm256_add_epi16(dot[v], a[v]); });
  }
  const uint8_t* ps = p + 3072 + 128 * (part / 2) + 8 * (part % 2);
  unrolled<4>([&](auto v) MOE_INLINE {
    sums[part].add64(_mm256_madd_epi16(dot[v], _mm256_set1_epi16(1)), _mm256_cvtepi32_ps(bytes8_u(ps + 16 * v)),
                     _mm256_cvtepi32_ps(bytes8_i(ps + 64 + 16 * v)), x.d[v], x.u[v]); });
}

// One half (16 rows) of 128 columns of q4-g64.
inline void gemv_q4(const uint8_t* p, int h, int r, const ActBlock& x, Sums* sums) {
  const I m15 = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  I dot[2][2] = {{zero(), zero()}, {zero(), zero()}};
#pragma GCC unroll 2
  for (int j0 = 0; j0 < 16; j0 += 8) {
    I a[2][2];
    unrolled<8>([&](auto j) MOE_INLINE {
      const I x0 = broadcast4(x.x + 128 * h + 4 * (j0 + j)), x1 = broadcast4(x.x + 128 * h + 64 + 4 * (j0 + j));
      unrolled<2>([&](auto y) MOE_INLINE {
        const I w = load_codes(p + 64 * (2 * (j0 + j) + r) + 32 * y);
        if (y == 1 && r == 0) touch(p + 64 * (2 * (j0 + j) + 1));
        const I p0 = _mm256_maddubs_epi16(_mm256_and_si256(w, m15), x0);
        const I p1 = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(w, 4), m15), x1);
        a[y][0] = j == 0 ? p0 : _mm256_add_epi16(a[y][0], p0);
        a[y][1] = j == 0 ? p1 : _mm256_add_epi16(a[y][1], p1);
      });
    });
    unrolled<2>([&](auto y) MOE_INLINE { unrolled<2>([&](auto v) MOE_INLINE { dot[y][v] = _mm256_add_epi32(dot[y][v], _mm256_madd_epi16(a[y][v], ones)); }); });
  }
  unrolled<2>([&](auto y) MOE_INLINE {
    const uint8_t* ps = p + 2048 + 64 * r + 8 * y;
    unrolled<2>([&](auto v) MOE_INLINE {
      sums[2 * r + y].add64(dot[y][v], _mm256_cvtepi32_ps(bytes8_u(ps + 16 * v)),
                            _mm256_cvtepi32_ps(bytes8_i(ps + 32 + 16 * v)), x.d[2 * h + v], x.u[2 * h + v]); });
  });
}

template <Packing P>
inline void gemv_block(const uint8_t* p, const ActBlock& x, Sums* sums) {
  if constexpr (P == kQ2G16S4)
    for (int q = 0; q < 4; ++q)
      for (int r = 0; r < 2; ++r) gemv_q2<4>(p + 640 * q, q, r, x, sums);
  if constexpr (P == kQ2G16S8)
    for (int q = 0; q < 4; ++q)
      for (int r = 0; r < 2; ++r) gemv_q2<8>(p + 768 * q, q, r, x, sums);
  if constexpr (P == kQ3G32S4)
    for (int q = 0; q < 2; ++q)
      for (int part = 0; part < 4; ++part) gemv_q3_g32(p + 1664 * q, q, part, x, sums);
  if constexpr (P == kQ3G64S8)
    for (int part = 0; part < 4; ++part) gemv_q3_g64(p, part, x, sums);
  if constexpr (P == kQ4G64S8)
    for (int h = 0; h < 2; ++h)
      for (int r = 0; r < 2; ++r) gemv_q4(p + 2176 * h, h, r, x, sums);
}

inline F halves8(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }

template <Packing P>
void tile_gemv(const uint8_t* tile, int64_t blocks, Activations x, float* y) {
  Sums sums[4];
  for (int i = 0; i < 4; ++i) sums[i].s = sums[i].m = _mm256_setzero_ps();
  const uint8_t* p = tile + kHeadBytes;
  for (int64_t b = 0; b < blocks; ++b, p += kPackingInfo[P].block_bytes) gemv_block<P>(p, x.at[b * x.stride], sums);
  for (int i = 0; i < 4; ++i) {
    const uint8_t* head = tile + 64 * (i / 2) + 16 * (i % 2);
    _mm256_storeu_ps(y + 8 * i, _mm256_fmsub_ps(halves8(head), sums[i].s, _mm256_mul_ps(halves8(head + 32), sums[i].m)));
  }
}
