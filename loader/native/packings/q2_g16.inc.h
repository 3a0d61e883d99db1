// tile32-q2-g16-s4 and -s8.

#if defined(MOE_PART_UNPACK)
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
          unrolled<4>([&](auto v)
                          MOE_INLINE { store_as(u.codes[16 * q + 4 * v + j][r] + at, (w >> (2 * v)) & 0x0303); });
        });
      }
    }
  }
}

template <ScaleMode kMode>
inline void unpack(Tag<kQ2G16S4>, const uint8_t* p, Unpacked& u) {
  unpack_q2_g16<4, kMode>(p, u);
}
template <ScaleMode kMode>
inline void unpack(Tag<kQ2G16S8>, const uint8_t* p, Unpacked& u) {
  unpack_q2_g16<8, kMode>(p, u);
}
#endif

#if defined(MOE_PART_AVX2)
// One half (16 rows, 8 for each y) of 64 columns.
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
    I dot = _mm256_add_epi32(_mm256_madd_epi16(a[y][1], pair_of_byte(s, 1)),
                             _mm256_madd_epi16(a[y][3], pair_of_byte(s, 3)));
    dot = _mm256_srai_epi32(dot, 2);
    dot = _mm256_add_epi32(dot, _mm256_madd_epi16(a[y][0], pair_of_byte(s, 0)));
    dot = _mm256_add_epi32(dot, _mm256_madd_epi16(a[y][2], pair_of_byte(s, 2)));
    const I b = _mm256_add_epi32(_mm256_madd_epi16(m02, broadcast4(x.s16 + 4 * q)),
                                 _mm256_madd_epi16(m13, broadcast4(x.s16 + 4 * q + 2)));
    sums[2 * r + y].add(dot, b, x.d[q]);
  });
}

inline void gemv_block(Tag<kQ2G16S4>, const uint8_t* p, const ActBlock& x, Sums* sums) {
  for (int q = 0; q < 4; ++q)
    for (int r = 0; r < 2; ++r) gemv_q2<4>(p + 640 * q, q, r, x, sums);
}
inline void gemv_block(Tag<kQ2G16S8>, const uint8_t* p, const ActBlock& x, Sums* sums) {
  for (int q = 0; q < 4; ++q)
    for (int r = 0; r < 2; ++r) gemv_q2<8>(p + 768 * q, q, r, x, sums);
}
#endif

#if defined(MOE_PART_AVX512)
// 64 columns of q2-g16. p: their first byte; q: their number; r0: the first half.
template <int kScaleBits, int T, int R>
MOE_INLINE inline void gemv_q2_quad(const uint8_t* p, int q, int r0, const ActBlock* x, Sums (&sums)[T][R]) {
  constexpr int kScaleBytes = kScaleBits == 4 ? 64 : 128;
  I a[T][R][4];
  unrolled<4>([&](auto j) MOE_INLINE {
    I w[R];
    unrolled<R>([&](auto r) MOE_INLINE { w[r] = load_codes(p + 64 * (2 * j + r0 + r)); });
    if (R == 1 && r0 == 0) touch(p + 64 * (2 * j + 1));
    unrolled<4>([&](auto v) MOE_INLINE {
      I code[R];
      unrolled<R>([&](auto r) MOE_INLINE { code[r] = _mm512_and_si512(w[r], bytes(3 << (2 * v))); });
      unrolled<T>([&](auto t) MOE_INLINE {
        const I xb = broadcast4(x[t].x + 64 * q + 16 * v + 4 * j);
        unrolled<R>([&](auto r) MOE_INLINE { a[t][r][v] = dot4(j == 0 ? none() : a[t][r][v], code[r], xb); });
      });
    });
  });
  unrolled<R>([&](auto r) MOE_INLINE {
    const uint8_t* ps = p + 512 + kScaleBytes * (r0 + r);
    I s02, s13, m02, m13;
    const I sv = load_codes(ps);
    if constexpr (kScaleBits == 4) {
      const I nibble = _mm512_set1_epi32(0x000f000f);
      s02 = _mm512_and_si512(sv, nibble);
      m02 = _mm512_and_si512(_mm512_srli_epi16(sv, 4), nibble);
      s13 = _mm512_and_si512(_mm512_srli_epi16(sv, 8), nibble);
      m13 = _mm512_srli_epi16(sv, 12);
    } else {
      const I mv = load_codes(ps + 64);
      s02 = _mm512_and_si512(sv, _mm512_set1_epi32(0x00ff00ff));
      s13 = _mm512_srli_epi16(sv, 8);
      m02 = _mm512_srai_epi16(_mm512_slli_epi16(mv, 8), 8);
      m13 = _mm512_srai_epi16(mv, 8);
    }
    unrolled<T>([&](auto t) MOE_INLINE {
      // Dots of 16 columns (<= 6096) as 16-bit pairs: planes 0, 2 times 1, planes 1, 3 times 4.
      const I p02 = low_or(a[t][r][0], _mm512_slli_epi32(a[t][r][2], 12));
      const I p13 = low_or(a[t][r][1], _mm512_slli_epi32(a[t][r][3], 12));
      I dot = _mm512_srai_epi32(_mm512_dpwssd_epi32(none(), p13, s13), 2);
      dot = _mm512_dpwssd_epi32(dot, p02, s02);
      I zero = _mm512_dpwssd_epi32(none(), m02, broadcast4(x[t].s16 + 4 * q));
      zero = _mm512_dpwssd_epi32(zero, m13, broadcast4(x[t].s16 + 4 * q + 2));
      sums[t][r].add(dot, zero, x[t].d[q]);
    });
  });
}

template <int T, int R>
MOE_INLINE inline void gemv_block(Tag<kQ2G16S4>, const uint8_t* p, int r0, const ActBlock* x, Sums (&sums)[T][R]) {
  for (int q = 0; q < 4; ++q) gemv_q2_quad<4, T, R>(p + 640 * q, q, r0, x, sums);
}
template <int T, int R>
MOE_INLINE inline void gemv_block(Tag<kQ2G16S8>, const uint8_t* p, int r0, const ActBlock* x, Sums (&sums)[T][R]) {
  for (int q = 0; q < 4; ++q) gemv_q2_quad<8, T, R>(p + 768 * q, q, r0, x, sums);
}

template <>
constexpr int kGemvTokens<kQ2G16S8> = 28;

template <Packing P>
MOE_INLINE inline void columns_q2(const uint8_t* p, int b, int r, Columns64& c) {
  const I s = _mm512_loadu_si512(scales_at<P>(p, b, r));
  if constexpr (kHasWideScales<P>) {
    c.s[0] = two_bytes(s, 0, 1);
    c.s[1] = two_bytes(s, 2, 3);
  }
  p += kPackingInfo[P].block_bytes / 4 * b + 64 * r;
  unrolled<4>([&](auto j) MOE_INLINE {
    const I w = load_codes(p + 128 * j);
    unrolled<4>([&](auto v) MOE_INLINE {
      I& code = c.code[4 * v + j];
      code = _mm512_and_si512(v == 0 ? w : _mm512_srli_epi16(w, 2 * v), bytes(3));
      if constexpr (!kHasWideScales<P>)
        code = _mm512_mullo_epi16(code, two_bytes(_mm512_and_si512(s, bytes(15)), v, v));
    });
  });
}

template <int b>
MOE_INLINE inline void columns64(Tag<kQ2G16S4>, const uint8_t* p, int r, Columns64& c) {
  columns_q2<kQ2G16S4>(p, b, r, c);
}
template <int b>
MOE_INLINE inline void columns64(Tag<kQ2G16S8>, const uint8_t* p, int r, Columns64& c) {
  columns_q2<kQ2G16S8>(p, b, r, c);
}
#endif
