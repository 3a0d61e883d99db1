// One tile times many tokens; each superblock is unpacked once (unpack.inc.h). Included inside an anonymous namespace.

// Isa provides kMode<P>, kGroup<P> (largest number of tokens of one micro-kernel call), micro<P, NT> and heads.
template <class Isa, Packing P, int NT>
inline void run_micro(int tokens, const Unpacked& u, const ActBlock* x, float* s, float* m) {
  if constexpr (NT > 0) {
    if (tokens == NT) {
      Isa::template micro<P, NT>(u, x, s, m);
    } else {
      run_micro<Isa, P, NT - 1>(tokens, u, x, s, m);
    }
  }
}

// y = ds * sum(d * A) - dm * sum(d * B), each step rounded once (docs/numerics.md).
inline void combine(const float* ds, const float* dm, const float* s, const float* m, float* y) {
  for (int i = 0; i < kTileRows; ++i) {
    const float zero = dm[i] * m[i];
    y[i] = __builtin_fmaf(ds[i], s[i], -zero);
  }
}

template <class Isa, Packing P>
void tile_gemm(const uint8_t* tile, int64_t blocks, Activations x, int tokens, float* y) {
  constexpr int kGroup = Isa::template kGroup<P>;
  alignas(64) float s[kMaxTokens * kTileRows];
  alignas(64) float m[kMaxTokens * kTileRows];
  __builtin_memset(s, 0, sizeof(float) * kTileRows * size_t(tokens));
  __builtin_memset(m, 0, sizeof(float) * kTileRows * size_t(tokens));
  Unpacked u;
  const uint8_t* p = tile + kHeadBytes;
  const int groups = (tokens + kGroup - 1) / kGroup;
  for (int64_t b = 0; b < blocks; ++b, p += kPackingInfo[P].block_bytes) {
    unpack<Isa::template kMode<P>>(Tag<P>{}, p, u);
    for (int g = 0; g < groups; ++g) {  // groups of equal size: 13 tokens are 7 + 6, not 12 + 1
      const int begin = tokens * g / groups, end = tokens * (g + 1) / groups;
      run_micro<Isa, P, kGroup>(end - begin, u, x.at + b * x.stride + begin, s + begin * kTileRows,
                                m + begin * kTileRows);
    }
  }
  alignas(64) float ds[kTileRows], dm[kTileRows];
  Isa::heads(tile, ds, dm);
  for (int t = 0; t < tokens; ++t) combine(ds, dm, s + t * kTileRows, m + t * kTileRows, y + t * kTileRows);
}
