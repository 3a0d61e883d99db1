// tile32-q4-g64-s8.

#if defined(MOE_PART_UNPACK)
template <ScaleMode>
inline void unpack(Tag<kQ4G64S8>, const uint8_t* p, Unpacked& u) {
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
#endif

#if defined(MOE_PART_AVX2)
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
    unrolled<2>([&](auto y) MOE_INLINE {
      unrolled<2>([&](auto v)
                      MOE_INLINE { dot[y][v] = _mm256_add_epi32(dot[y][v], _mm256_madd_epi16(a[y][v], ones)); });
    });
  }
  unrolled<2>([&](auto y) MOE_INLINE {
    const uint8_t* ps = p + 2048 + 64 * r + 8 * y;
    unrolled<2>([&](auto v) MOE_INLINE {
      sums[2 * r + y].add64(dot[y][v], _mm256_cvtepi32_ps(bytes8_u(ps + 16 * v)),
                            _mm256_cvtepi32_ps(bytes8_i(ps + 32 + 16 * v)), x.d[2 * h + v], x.u[2 * h + v]);
    });
  });
}

inline void gemv_block(Tag<kQ4G64S8>, const uint8_t* p, const ActBlock& x, Sums* sums) {
  for (int h = 0; h < 2; ++h)
    for (int r = 0; r < 2; ++r) gemv_q4(p + 2176 * h, h, r, x, sums);
}
#endif

#if defined(MOE_PART_AVX512)
// 128 columns of q4-g64. With one token, even and odd vectors have separate sums, to hide vpdpbusd's latency.
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

template <int T, int R>
MOE_INLINE inline void gemv_block(Tag<kQ4G64S8>, const uint8_t* p, int r0, const ActBlock* x, Sums (&sums)[T][R]) {
  for (int h = 0; h < 2; ++h) gemv_q4<T, R>(p + 2176 * h, h, r0, x, sums);
}

template <>
constexpr int kGemvTokens<kQ4G64S8> = kMaxTokens;
#endif
