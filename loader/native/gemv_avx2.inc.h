// AVX2, one token, straight from the packed bytes. vpmaddubsw adds two products into a saturating 16-bit lane. So codes
// are at most 3 (times 1) or 12 (times 4), 7 and 28 with three bits, and 16-bit sums are emptied before they overflow:
// after 4 vectors (28 * 127 * 2 = 7112 each, 28448 in all), or 8 of 4-bit codes (15 * 127 * 2 = 3810 each, 30480).

template <Packing P>
void tile_gemv(const uint8_t* tile, int64_t blocks, Activations x, float* y) {
  Sums sums[4];
  for (int i = 0; i < 4; ++i) sums[i].s = sums[i].m = _mm256_setzero_ps();
  const uint8_t* p = tile + kHeadBytes;
  for (int64_t b = 0; b < blocks; ++b, p += kPackingInfo[P].block_bytes)
    gemv_block(Tag<P>{}, p, x.at[b * x.stride], sums);
  for (int i = 0; i < 4; ++i) {
    const uint8_t* head = tile + 64 * (i / 2) + 16 * (i % 2);
    _mm256_storeu_ps(y + 8 * i,
                     _mm256_fmsub_ps(halves8(head), sums[i].s, _mm256_mul_ps(halves8(head + 32), sums[i].m)));
  }
}
