// AVX-512 VNNI, 1 to 4 tokens, straight from the packed bytes in memory order.
// Codes are not shifted: an AND gives plane v times 4^v, and the integer sums are divided by that factor.
// T tokens and R halves (1 or 2) at a time: two halves share each broadcast; one half keeps T = 3, 4 in registers.

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
    unrolled<2 / R>([&](auto part)
                        MOE_INLINE { gemv_block<T, R>(Tag<P>{}, p, part, x.at + b * x.stride, sums[part]); });
  for (int r = 0; r < 2; ++r)
    for (int t = 0; t < T; ++t)
      finish(tile, r, sums[R == 2 ? 0 : r][t][R == 2 ? r : 0], y + kTileRows * t + kHalfRows * r);
}
