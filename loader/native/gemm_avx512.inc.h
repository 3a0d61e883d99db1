// AVX-512 VNNI, many tokens of 2- and 3-bit codes. The codes of 64 columns of one half stay in sixteen registers for
// all tokens, so nothing is unpacked to memory. Activations are broadcast from memory. One token and 64 columns take 16
// vpdpbusd and 3 to 6 more instructions of the same two pipes.

// s[t] += d * A over 64 columns (number b of the superblock at p) of one half, for n tokens.
template <Packing P, int b>
[[gnu::noinline]] void gemm_columns(const uint8_t* p, int r, const ActBlock* x, int n, F* s) {
  Columns64 c;
  columns64<b>(Tag<P>{}, p, r, c);
  for (int t = 0; t < n; ++t) {
    I dot[4];  // four chains hide vpdpbusd's latency
    unrolled<16>([&](auto k) MOE_INLINE {
      dot[k / 4] = dot4(k % 4 == 0 ? none() : dot[k / 4], c.code[k], x[t].x + 64 * b + 4 * k);
    });
    I sum;
    if constexpr (kHasWideScales<P>) {  // dots of 16 columns (<= 6096) as 16-bit pairs
      sum = _mm512_dpwssd_epi32(none(), low_or(dot[0], _mm512_slli_epi32(dot[1], 16)), c.s[0]);
      sum = _mm512_dpwssd_epi32(sum, low_or(dot[2], _mm512_slli_epi32(dot[3], 16)), c.s[1]);
    } else {
      sum = _mm512_add_epi32(_mm512_add_epi32(dot[0], dot[1]), _mm512_add_epi32(dot[2], dot[3]));
    }
    F a = _mm512_cvtepi32_ps(sum);
    if constexpr (kPackingInfo[P].group_size == 64) a = _mm512_mul_ps(a, c.sf);
    s[t] = _mm512_fmadd_ps(a, _mm512_set1_ps(x[t].d[b]), s[t]);
  }
}

// m[t] += the zero terms of a superblock of one half, for n tokens. Separate from the codes, so that a sum is loaded
// and stored once for 256 columns: on Zen 4 a store takes the time of two products.
template <Packing P>
[[gnu::noinline]] void gemm_zeros(const uint8_t* p, int r, const ActBlock* x, int n, F* m) {
  constexpr int kGroup = kPackingInfo[P].group_size;
  I pairs[4][2];
  F wide[4];
  unrolled<4>([&](auto b) MOE_INLINE {
    const uint8_t* ps = scales_at<P>(p, b, r);
    if constexpr (kGroup == 64) wide[b] = bytes_i8(ps + 64);
    if constexpr (kHasWideScales<P>) {
      const I sm = _mm512_loadu_si512(ps + 64);
      pairs[b][0] = _mm512_srai_epi16(_mm512_slli_epi16(sm, 8), 8);
      pairs[b][1] = _mm512_srai_epi16(sm, 8);
    }
    if constexpr (kPackingInfo[P].scale_bits == 4) {
      const I nibbles = _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(ps), 4), bytes(15));
      pairs[b][0] = kGroup == 16 ? two_bytes(nibbles, 0, 2) : two_bytes(nibbles, 2 * (b % 2), 2 * (b % 2) + 1);
      pairs[b][1] = two_bytes(nibbles, 1, 3);
    }
  });
  for (int t = 0; t < n; ++t) {
    F sum = m[t];
    unrolled<4>([&](auto b) MOE_INLINE {
      if constexpr (kGroup == 64) {
        sum = _mm512_fmadd_ps(wide[b], _mm512_set1_ps(x[t].u[b]), sum);
      } else {
        I zero = dot2(none(), pairs[b][0], kGroup == 16 ? x[t].s16 + 4 * b : x[t].s32 + 2 * b);
        if constexpr (kGroup == 16) zero = dot2(zero, pairs[b][1], x[t].s16 + 4 * b + 2);
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(zero), _mm512_set1_ps(x[t].d[b]), sum);
      }
    });
    m[t] = sum;
  }
}

// A chunk of 48 tokens keeps its activations of a superblock (18 KiB) and its sums (12 KiB) in L1.
template <Packing P>
void tile_gemm(const uint8_t* tile, int64_t blocks, Activations x, int tokens, float* y) {
  constexpr int kChunk = 48;
  F s[2][kChunk], m[2][kChunk];
  const int chunks = (tokens + kChunk - 1) / kChunk;
  for (int i = 0; i < chunks; ++i) {
    const int begin = tokens * i / chunks, n = tokens * (i + 1) / chunks - begin;
    for (int t = 0; t < n; ++t) s[0][t] = s[1][t] = m[0][t] = m[1][t] = _mm512_setzero_ps();
    const uint8_t* p = tile + kHeadBytes;
    for (int64_t block = 0; block < blocks; ++block, p += kPackingInfo[P].block_bytes) {
      const ActBlock* at = x.at + block * x.stride + begin;
      unrolled<4>([&](auto b) MOE_INLINE {
        for (int r = 0; r < 2; ++r) gemm_columns<P, b>(p, r, at, n, s[r]);
      });
      for (int r = 0; r < 2; ++r) gemm_zeros<P>(p, r, at, n, m[r]);
    }
    for (int r = 0; r < 2; ++r)
      for (int t = 0; t < n; ++t) finish(tile, r, {s[r][t], m[r][t]}, y + kTileRows * (begin + t) + kHalfRows * r);
  }
}
