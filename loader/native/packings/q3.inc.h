// Code that the 3-bit packings share.

#if defined(MOE_PART_UNPACK)
// Plane v of vector 2i+o: two low bits from w, the top bit from bit 2v+2+o (v < 3) or o (v = 3) of `high`.
inline Halves code3(Halves w, Halves high, int v, int o) {
  const Halves low = (w >> (2 * v)) & 0x0303;
  const Halves top = v < 3 ? (high >> (2 * v + o)) & 0x0404 : (o == 0 ? (high << 2) & 0x0404 : (high << 1) & 0x0404);
  return low | top;
}
#endif

#if defined(MOE_PART_AVX2)
// 16-bit sums a[v] of two i (four vectors) of 3-bit codes, 8 rows; p points to the first i. Planes 1 and 3 are summed
// times 4. Without the factor a sum can hold sixteen vectors (7 * 127 * 2 * 16 = 28448).
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
#endif

#if defined(MOE_PART_AVX512)
// Two vectors of 3-bit codes. One select and one AND give planes 0..2 as 7 << 2v. Plane 3 would need a ninth bit, so
// its low bits (times 64) go to a[3] and its top bit to a[4].
template <bool kFirst, int T, int R>
MOE_INLINE inline void gemv_q3_pair(const uint8_t* p, int r0, const ActBlock* x, int base, int plane, I (&a)[T][R][5]) {
  I w[2][R], high[R];
  unrolled<R>([&](auto r) MOE_INLINE {
    w[0][r] = load_codes(p + 192 * (r0 + r));
    w[1][r] = load_codes(p + 192 * (r0 + r) + 64);
    high[r] = load_codes(p + 192 * (r0 + r) + 128);
  });
  if (R == 1 && r0 == 0) unrolled<3>([&](auto line) MOE_INLINE { touch(p + 192 + 64 * line); });
  unrolled<2>([&](auto o) MOE_INLINE {
    if (o == 1) unrolled<R>([&](auto r) MOE_INLINE { high[r] = _mm512_srli_epi32(high[r], 1); });
    unrolled<4>([&](auto v) MOE_INLINE {
      I code[R], top[R];
      unrolled<R>([&](auto r) MOE_INLINE {
        if constexpr (v < 3) {
          code[r] = _mm512_and_si512(select(w[o][r], high[r], bytes(4 << (2 * v))), bytes(7 << (2 * v)));
        } else {
          code[r] = _mm512_and_si512(w[o][r], bytes(0xc0));
          top[r] = _mm512_and_si512(high[r], bytes(1));
        }
      });
      unrolled<T>([&](auto t) MOE_INLINE {
        const I xb = broadcast4(x[t].x + base + plane * v + 4 * o);
        constexpr bool kZero = kFirst && o == 0;
        unrolled<R>([&](auto r) MOE_INLINE {
          a[t][r][v] = dot4(kZero ? none() : a[t][r][v], code[r], xb);
          if constexpr (v == 3) a[t][r][4] = dot4(kZero ? none() : a[t][r][4], top[r], xb);
        });
      });
    });
  });
}

// Plane v of vector o (0 or 1) of the two vectors that share `high`.
MOE_INLINE inline I code3(I w, I high, int v, int o) {
  const I low = v == 0 ? w : _mm512_srli_epi16(w, 2 * v);
  const int from = v < 3 ? 2 * v + 2 + o : o;  // the bit of `high` that is bit 2 of the code
  const I top = from >= 2 ? _mm512_srli_epi16(high, from - 2) : _mm512_slli_epi16(high, 2 - from);
  return _mm512_and_si512(select(low, top, bytes(4)), bytes(7));
}
#endif
