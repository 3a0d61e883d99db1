// tile32-q3-g64-s8.

#if defined(MOE_PART_UNPACK)
template <ScaleMode>
inline void unpack(Tag<kQ3G64S8>, const uint8_t* p, Unpacked& u) {
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
#endif

#if defined(MOE_PART_AVX2)
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
                     _mm256_cvtepi32_ps(bytes8_i(ps + 64 + 16 * v)), x.d[v], x.u[v]);
  });
}

inline void gemv_block(Tag<kQ3G64S8>, const uint8_t* p, const ActBlock& x, Sums* sums) {
  for (int part = 0; part < 4; ++part) gemv_q3_g64(p, part, x, sums);
}
#endif

#if defined(MOE_PART_AVX512)
template <int T, int R>
MOE_INLINE inline void gemv_block(Tag<kQ3G64S8>, const uint8_t* p, int r0, const ActBlock* x, Sums (&sums)[T][R]) {
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

template <int b>
MOE_INLINE inline void columns64(Tag<kQ3G64S8>, const uint8_t* p, int r, Columns64& c) {
  c.sf = bytes_u8(scales_at<kQ3G64S8>(p, b, r));
  p += 192 * r;
  unrolled<8>([&](auto i) MOE_INLINE {
    const I high = load_codes(p + 384 * i + 128);
    unrolled<2>([&](auto o) MOE_INLINE { c.code[2 * i + o] = code3(load_codes(p + 384 * i + 64 * o), high, b, o); });
  });
}
#endif
