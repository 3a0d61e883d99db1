// AVX-512 VNNI, 1 to 4 tokens: straight from the packed bytes, in the order in which they lie.
// No shifts of codes: plane v is taken by AND and comes out times 4^v; the factor leaves with the integer sums.
// T tokens and R halves (1 or 2) at a time: two halves share each broadcast, one half keeps T = 3, 4 in registers.

typedef __m512i I;
typedef __m512 F;

// The empty asm keeps gcc from folding one load into four memory operands, and loads from changing places.
inline I load_codes(const uint8_t* p) {
  I v = _mm512_loadu_si512(p);
  asm volatile("" : "+v"(v));
  return v;
}
inline I broadcast4(const void* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}
inline I none() { return _mm512_setzero_si512(); }
inline I bytes(int v) { return _mm512_set1_epi8(char(v)); }
// vpdpbusd in place: around the builtin gcc copies the accumulator.
inline I dot4(I sum, I codes, I x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
  return sum;
}
inline I select(I low, I high, I mask) { return _mm512_ternarylogic_epi32(low, high, mask, 0xd8); }  // mask ? high : low
inline I low_or(I low, I high) {  // (low & 0xffff) | high
  return _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi32(0xffff), 0xec);
}
inline F bytes_u8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline F bytes_i8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }

struct Sums {  // one half of one token
  F s, m;
  inline void add(I a, I b, float d) {
    const F dv = _mm512_set1_ps(d);
    s = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), dv, s);
    m = _mm512_fmadd_ps(_mm512_cvtepi32_ps(b), dv, m);
  }
  inline void add64(I dot, F sf, F mf, float d, float u) {
    s = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dot), sf), _mm512_set1_ps(d), s);
    m = _mm512_fmadd_ps(mf, _mm512_set1_ps(u), m);
  }
};

// The 16 outputs of one half.
inline void finish(const uint8_t* tile, int r, const Sums& a, float* y) {
  const F ds = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(tile + 64 * r)));
  const F dm = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(tile + 64 * r + 32)));
  _mm512_storeu_ps(y, _mm512_fmsub_ps(ds, a.s, _mm512_mul_ps(dm, a.m)));
}

// 64 columns of q2-g16: p at the quad, q its number, r0 the first half.
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

// Two vectors of 3-bit codes: planes 0..2 as 7 << 2v by one select and one AND; plane 3 would need a ninth bit, so its
// low bits (times 64) go to a[3] and its top bit to a[4].
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

// 128 columns of q3-g32.
template <int T, int R>
MOE_INLINE inline void gemv_q3_g32(const uint8_t* p, int q, int r0, const ActBlock* x, Sums (&sums)[T][R]) {
  I a[T][R][5];
  unrolled<4>([&](auto i) MOE_INLINE { gemv_q3_pair<i == 0, T, R>(p + 384 * i, r0, x, 128 * q + 8 * i, 32, a); });
  // Bytes 0, 1 (or 2, 3) of each lane to its two 16-bit halves; -128 writes a zero.
  const I index01 = _mm512_broadcast_i32x4(
    _mm_setr_epi8(0, -128, 1, -128, 4, -128, 5, -128, 8, -128, 9, -128, 12, -128, 13, -128));
  const I index23 = _mm512_broadcast_i32x4(
    _mm_setr_epi8(2, -128, 3, -128, 6, -128, 7, -128, 10, -128, 11, -128, 14, -128, 15, -128));
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
MOE_INLINE inline void gemv_q3_g64(const uint8_t* p, int r0, const ActBlock* x, Sums (&sums)[T][R]) {
  I a[T][R][5];
  unrolled<T>([&](auto t) MOE_INLINE {
    unrolled<R>([&](auto r) MOE_INLINE { unrolled<5>([&](auto v) MOE_INLINE { a[t][r][v] = none(); }); });
  });
  for (int i = 0; i < 8; ++i) gemv_q3_pair<false, T, R>(p + 384 * i, r0, x, 8 * i, 64, a);
  unrolled<R>([&](auto r) MOE_INLINE {
    const uint8_t* ps = p + 3072 + 128 * (r0 + r);
    unrolled<4>([&](auto v) MOE_INLINE {
      const F sf = bytes_u8(ps + 16 * v), mf = bytes_i8(ps + 64 + 16 * v);
      unrolled<T>([&](auto t) MOE_INLINE {
        I dot = a[t][r][v];
        if constexpr (v == 3) dot = _mm512_add_epi32(dot, _mm512_slli_epi32(a[t][r][4], 8));
        if constexpr (v > 0) dot = _mm512_srai_epi32(dot, 2 * v);
        sums[t][r].add64(dot, sf, mf, x[t].d[v], x[t].u[v]);
      });
    });
  });
}

// 128 columns of q4-g64; even and odd vectors have their own sums where registers allow, to hide vpdpbusd's latency.
template <int T, int R>
MOE_INLINE inline void gemv_q4(const uint8_t* p, int h, int r0, const ActBlock* x, Sums (&sums)[T][R]) {
  constexpr int kChains = T == 1 ? 2 : 1;
  I a[T][R][2][kChains];
  unrolled<T>([&](auto t) MOE_INLINE {
    unrolled<R>([&](auto r) MOE_INLINE {
      unrolled<kChains>([&](auto c) MOE_INLINE { a[t][r][0][c] = a[t][r][1][c] = none(); });
    });
  });
  for (int j0 = 0; j0 < 16; j0 += 2) {
    unrolled<2>([&](auto odd) MOE_INLINE {
      const int j = j0 + odd;
      I w[R];
      unrolled<R>([&](auto r) MOE_INLINE { w[r] = load_codes(p + 64 * (2 * j + r0 + r)); });
      if (R == 1 && r0 == 0) touch(p + 64 * (2 * j + 1));
      unrolled<2>([&](auto v) MOE_INLINE {
        I code[R];
        unrolled<R>([&](auto r) MOE_INLINE { code[r] = _mm512_and_si512(w[r], bytes(v ? 0xf0 : 15)); });
        unrolled<T>([&](auto t) MOE_INLINE {
          const I xb = broadcast4(x[t].x + 128 * h + 64 * v + 4 * j);
          unrolled<R>([&](auto r) MOE_INLINE {
            I& sum = a[t][r][v][odd % kChains];
            sum = dot4(sum, code[r], xb);
          });
        });
      });
    });
  }
  unrolled<R>([&](auto r) MOE_INLINE {
    const uint8_t* ps = p + 2048 + 64 * (r0 + r);
    unrolled<2>([&](auto v) MOE_INLINE {
      const F sf = bytes_u8(ps + 16 * v), mf = bytes_i8(ps + 32 + 16 * v);
      unrolled<T>([&](auto t) MOE_INLINE {
        I dot = a[t][r][v][0];
        if constexpr (kChains == 2) dot = _mm512_add_epi32(dot, a[t][r][v][1]);
        if constexpr (v == 1) dot = _mm512_srai_epi32(dot, 4);
        sums[t][r].add64(dot, sf, mf, x[t].d[2 * h + v], x[t].u[2 * h + v]);
      });
    });
  });
}

// R halves of one superblock.
template <Packing P, int T, int R>
MOE_INLINE inline void gemv_block(const uint8_t* p, int r0, const ActBlock* x, Sums (&sums)[T][R]) {
  if constexpr (P == kQ2G16S4)
    for (int q = 0; q < 4; ++q) gemv_q2_quad<4, T, R>(p + 640 * q, q, r0, x, sums);
  if constexpr (P == kQ2G16S8)
    for (int q = 0; q < 4; ++q) gemv_q2_quad<8, T, R>(p + 768 * q, q, r0, x, sums);
  if constexpr (P == kQ3G32S4)
    for (int q = 0; q < 2; ++q) gemv_q3_g32<T, R>(p + 1664 * q, q, r0, x, sums);
  if constexpr (P == kQ3G64S8) gemv_q3_g64<T, R>(p, r0, x, sums);
  if constexpr (P == kQ4G64S8)
    for (int h = 0; h < 2; ++h) gemv_q4<T, R>(p + 2176 * h, h, r0, x, sums);
}

template <Packing P, int T>
void tile_gemv(const uint8_t* tile, int64_t blocks, Activations x, float* y) {
  constexpr int R = T <= 2 ? 2 : 1;
  Sums sums[2 / R][T][R];
  unrolled<2 / R>([&](auto part) MOE_INLINE {
    unrolled<T>([&](auto t) MOE_INLINE {
      unrolled<R>([&](auto r) MOE_INLINE { sums[part][t][r].s = sums[part][t][r].m = _mm512_setzero_ps(); });
    });
  });
  const uint8_t* p = tile + kHeadBytes;
  for (int64_t b = 0; b < blocks; ++b, p += kPackingInfo[P].block_bytes)
    unrolled<2 / R>([&](auto part) MOE_INLINE { gemv_block<P, T, R>(p, part, x.at + b * x.stride, sums[part]); });
  for (int r = 0; r < 2; ++r)
    for (int t = 0; t < T; ++t)
      finish(tile, r, sums[R == 2 ? 0 : r][t][R == 2 ? r : 0], y + kTileRows * t + kHalfRows * r);
}
