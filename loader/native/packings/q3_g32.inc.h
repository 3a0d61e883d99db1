// tile32-q3-g32-s4.

#if defined(MOE_PART_UNPACK)
template <ScaleMode kMode>
inline void unpack(Tag<kQ3G32S4>, const uint8_t* p, Unpacked& u) {
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
#endif

#if defined(MOE_PART_AVX2)
// 128 columns of q3-g32, rows 8 * part to 8 * part + 7 of the tile.
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
                   _mm256_madd_epi16(two_bytes(m, 2 * h, 2 * h + 1), broadcast4(x.s32 + 4 * q + 2 * h)),
                   x.d[2 * q + h]);
  });
}

inline void gemv_block(Tag<kQ3G32S4>, const uint8_t* p, const ActBlock& x, Sums* sums) {
  for (int q = 0; q < 2; ++q)
    for (int part = 0; part < 4; ++part) gemv_q3_g32(p + 1664 * q, q, part, x, sums);
}
#endif

#if defined(MOE_PART_AVX512)
// 128 columns of q3-g32.
template <int T, int R>
MOE_INLINE inline void gemv_q3_g32(const uint8_t* p, int q, int r0, const ActBlock* x, Sums (&sums)[T][R]) {
  I a[T][R][5];
  unrolled<4>([&](auto i) MOE_INLINE { gemv_q3_pair<i == 0, T, R>(p + 384 * i, r0, x, 128 * q + 8 * i, 32, a); });
  // Bytes 0, 1 (or 2, 3) of each lane to its two 16-bit halves; -128 writes a zero.
  const I index01 =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, -128, 1, -128, 4, -128, 5, -128, 8, -128, 9, -128, 12, -128, 13, -128));
  const I index23 =
      _mm512_broadcast_i32x4(_mm_setr_epi8(2, -128, 3, -128, 6, -128, 7, -128, 10, -128, 11, -128, 14, -128, 15, -128));
  unrolled<R>([&](auto r) MOE_INLINE {
    const I sm = load_codes(p + 1536 + 64 * (r0 + r));
    const I s = _mm512_and_si512(sm, bytes(15)), m = _mm512_and_si512(_mm512_srli_epi16(sm, 4), bytes(15));
    const I s01 = _mm512_shuffle_epi8(s, index01), s23 = _mm512_shuffle_epi8(s, index23);
    const I m01 = _mm512_shuffle_epi8(m, index01), m23 = _mm512_shuffle_epi8(m, index23);
    unrolled<T>([&](auto t) MOE_INLINE {
      const I(&d)[5] = a[t][r];  // dots of 32 columns (<= 28448), planes times 4^v
      const I p01 = low_or(d[0], _mm512_slli_epi32(d[1], 14));
      const I top = _mm512_add_epi32(_mm512_slli_epi32(d[3], 10), _mm512_slli_epi32(d[4], 18));
      const I p23 = low_or(_mm512_srli_epi32(d[2], 4), top);
      sums[t][r].add(_mm512_dpwssd_epi32(none(), p01, s01),
                     _mm512_dpwssd_epi32(none(), m01, broadcast4(x[t].s32 + 4 * q)), x[t].d[2 * q]);
      sums[t][r].add(_mm512_dpwssd_epi32(none(), p23, s23),
                     _mm512_dpwssd_epi32(none(), m23, broadcast4(x[t].s32 + 4 * q + 2)), x[t].d[2 * q + 1]);
    });
  });
}

template <int T, int R>
MOE_INLINE inline void gemv_block(Tag<kQ3G32S4>, const uint8_t* p, int r0, const ActBlock* x, Sums (&sums)[T][R]) {
  for (int q = 0; q < 2; ++q) gemv_q3_g32<T, R>(p + 1664 * q, q, r0, x, sums);
}

template <int b>
MOE_INLINE inline void columns64(Tag<kQ3G32S4>, const uint8_t* p, int r, Columns64& c) {
  constexpr int kFirst = 2 * (b % 2);  // 64 columns are two of the four planes
  const I s = _mm512_and_si512(_mm512_loadu_si512(scales_at<kQ3G32S4>(p, b, r)), bytes(15));
  p += 1664 * (b / 2) + 192 * r;
  unrolled<4>([&](auto i) MOE_INLINE {
    const I high = load_codes(p + 384 * i + 128);
    unrolled<2>([&](auto o) MOE_INLINE {
      const I w = load_codes(p + 384 * i + 64 * o);
      unrolled<2>([&](auto v) MOE_INLINE {
        c.code[8 * v + 2 * i + o] =
            _mm512_mullo_epi16(code3(w, high, kFirst + v, o), two_bytes(s, kFirst + v, kFirst + v));
      });
    });
  });
}
#endif
