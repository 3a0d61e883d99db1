// Attention over a KV cache in 8 bits (kv_blocks.h). Query and weights are rounded to 16 bits, so that all products are
// sums of pairs of 16-bit integers, exact in 32 bits: 64 * 127 * 32767 < 2^31. Included after attention.inc.h; the
// including file defines wide_pairs(), which widens 2 * kLanes codes, and dot2(), which adds the products of pairs.

typedef int32_t I __attribute__((vector_size(4 * kLanes)));

constexpr int kPairs = kKvPositions / 2;  // pairs of positions in a block
constexpr int kStepPairs = 2;             // pairs of dimensions whose prefetch is one cache line

inline I all_pairs(const int16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return pair - I{};
}

// The larger of each lane, by the bits of positive floats: NaN is larger than infinity, and that than all others.
inline F larger_bits(F a, F b) { return F((I)a > (I)b ? (I)a : (I)b); }

template <int lanes = kLanes>
inline float largest_bits(F v) {
  if constexpr (lanes == 16) v = larger_bits(even<8>(v, v), odd<8>(v, v));
  if constexpr (lanes >= 8) v = larger_bits(even<4>(v, v), odd<4>(v, v));
  v = larger_bits(even<2>(v, v), odd<2>(v, v));
  return larger_bits(even<1>(v, v), odd<1>(v, v))[0];
}

// codes[i] = round(x[i] / step) with step = largest / 32767; n is a multiple of 16. Returns step: NaN if a value is not
// finite, 0 if all are below 1e-30 (then the codes are 0).
inline float to_16_bits(const float* x, int n, int16_t* codes) {
  typedef int16_t S __attribute__((vector_size(2 * kLanes)));
  F most = {};
  for (int i = 0; i < n; i += kLanes) most = larger_bits(F((I)load(x + i) & 0x7fffffff), most);
  const float largest = largest_bits(most);
  const bool is_zero = largest < 1e-30f;
  const F inverse = all_lanes(is_zero ? 0.0f : 32767.0f / largest);
  for (int i = 0; i < n; i += kLanes) {
    // Adding 1.5 * 2^23 rounds to nearest even, and leaves the integer in the low bits.
    const I wide = (I)(load(x + i) * inverse + 12582912.0f) - 0x4b400000;
    const S narrow = __builtin_convertvector(wide, S);
    __builtin_memcpy(codes + i, &narrow, sizeof narrow);
  }
  // 0 * largest is NaN for infinity too.
  return is_zero ? 0.0f : largest * (1.0f / 32767.0f) + 0.0f * largest;
}

// scores[g * kBlock + p] for the 16 * B positions of B blocks at k: group by group, sum of codes times the key's scale.
template <int G, int B>
MOE_INLINE inline void score8_tile(const int16_t* q, const uint8_t* k, int dim, bool more, float* scores) {
  constexpr int kSums = G * B * kParts;
  const int block_bytes = kv_block_bytes(dim), scale_bytes = kv_scale_bytes(dim);
  const int next = (kBlock / kKvPositions) * block_bytes;
  F score[kSums];
  unrolled<kSums>([&](auto i) MOE_INLINE { score[i] = F{}; });
  if (more) unrolled<B>([&](auto b) MOE_INLINE { prefetch(k + b * block_bytes + next, scale_bytes); });
  for (int begin = 0; begin < dim; begin += kKvGroup) {
    const int end = begin + kKvGroup < dim ? begin + kKvGroup : dim;
    I sum[kSums];
    unrolled<kSums>([&](auto i) MOE_INLINE { sum[i] = I{}; });
    for (int d = begin; d < end; d += 2 * kStepPairs) {
      const uint8_t* const codes = k + scale_bytes + d * kKvPositions;
      if (more) unrolled<B>([&](auto b) MOE_INLINE { __builtin_prefetch(codes + b * block_bytes + next); });
      unrolled<kStepPairs>([&](auto pair) MOE_INLINE {
        unrolled<B * kParts>([&](auto i) MOE_INLINE {
          const uint8_t* const at =
              codes + i / kParts * block_bytes + pair * 2 * kKvPositions + i % kParts * 2 * kLanes;
          const I key = I(wide_pairs(reinterpret_cast<const int8_t*>(at)));
          unrolled<G>([&](auto g) MOE_INLINE {
            using Raw = decltype(wide_pairs(nullptr));
            I& s = sum[g * B * kParts + i];
            s = I(dot2(Raw(s), Raw(key), Raw(all_pairs(q + g * dim + d + 2 * pair))));
          });
        });
      });
    }
    unrolled<B * kParts>([&](auto i) MOE_INLINE {
      const uint8_t* const scales =
          k + i / kParts * block_bytes + 2 * (begin / kKvGroup * kKvPositions + i % kParts * kLanes);
      const F scale = load(reinterpret_cast<const uint16_t*>(scales));
      unrolled<G>([&](auto g) MOE_INLINE {
        const int at = g * B * kParts + i;
        score[at] = score[at] + __builtin_convertvector(sum[at], F) * scale;
      });
    });
  }
  unrolled<G>([&](auto g) MOE_INLINE {
    unrolled<B * kParts>([&](auto i)
                             MOE_INLINE { store(scores + g * kBlock + i * kLanes, score[g * B * kParts + i]); });
  });
}

template <int G>
inline void score8_block(const int16_t* q, const uint8_t* k, int n, int dim, bool more, float* scores) {
  if constexpr (G > kHeads) {
    score8_block<kHeads>(q, k, n, dim, more, scores);
    score8_block<G - kHeads>(q + kHeads * dim, k, n, dim, false, scores + kHeads * kBlock);
  } else {
    int p = 0;
    for (; p + kScoreBlocks * kKvPositions <= n; p += kScoreBlocks * kKvPositions)
      score8_tile<G, kScoreBlocks>(q, k + p / kKvPositions * kv_block_bytes(dim), dim, more, scores + p);
    for (; p < n; p += kKvPositions)
      score8_tile<G, 1>(q, k + p / kKvPositions * kv_block_bytes(dim), dim, more, scores + p);
  }
}

// acc[g] = acc[g] * keep[g] + steps[g] * (sum over p of codes[g * kBlock + p] * v[p]), for C registers of each row.
template <int G, int C>
MOE_INLINE inline void weigh8_tile(const int16_t* codes, const float* steps, const uint8_t* v, int n, int dim,
                                   bool more, const float* keep, float* acc) {
  const int block_bytes = kv_block_bytes(dim);
  const int next = (kBlock / kKvPositions) * block_bytes;
  I sum[G * C];
  unrolled<G * C>([&](auto i) MOE_INLINE { sum[i] = I{}; });
  // Whole blocks: codes are 0 from n on. gcc spills sums if the inner loop has another exit.
  for (const int16_t* const end = codes + n; codes < end; codes += kKvPositions, v += block_bytes) {
    const uint8_t* row = v;
    for (int pair = 0; pair < kPairs; ++pair, row += 2 * dim) {
      if (more) prefetch(row + next, 2 * C * kLanes);
      I value[C];
      unrolled<C>([&](auto c)
                      MOE_INLINE { value[c] = I(wide_pairs(reinterpret_cast<const int8_t*>(row + c * 2 * kLanes))); });
      unrolled<G>([&](auto g) MOE_INLINE {
        const I weight = all_pairs(codes + g * kBlock + 2 * pair);
        unrolled<C>([&](auto c) MOE_INLINE {
          using Raw = decltype(wide_pairs(nullptr));
          I& s = sum[g * C + c];
          s = I(dot2(Raw(s), Raw(value[c]), Raw(weight)));
        });
      });
    }
  }
  unrolled<G>([&](auto g) MOE_INLINE {
    unrolled<C>([&](auto c) MOE_INLINE {
      float* const at = acc + g * dim + c * kLanes;
      store(at, load(at) * keep[g] + __builtin_convertvector(sum[g * C + c], F) * steps[g]);
    });
  });
}

template <int G>
inline void weigh8_columns(const int16_t* codes, const float* steps, const uint8_t* v, int n, int begin, int end,
                           int dim, bool more, const float* keep, float* acc) {
  if constexpr (G > kHeads) {
    weigh8_columns<kHeads>(codes, steps, v, n, begin, end, dim, more, keep, acc);
    weigh8_columns<G - kHeads>(codes + kHeads * kBlock, steps + kHeads, v, n, begin, end, dim, false, keep + kHeads,
                               acc + kHeads * dim);
  } else {
    int d = begin;
    for (; d + kWeighColumns * kLanes <= end; d += kWeighColumns * kLanes)
      weigh8_tile<G, kWeighColumns>(codes, steps, v + 2 * d, n, dim, more, keep, acc + d);
    if constexpr (kWeighColumns > kParts)
      for (; d < end; d += 16) weigh8_tile<G, kParts>(codes, steps, v + 2 * d, n, dim, more, keep, acc + d);
  }
}

struct Cache8 {
  const AttendTask& task;
  alignas(64) int16_t query[4 * kMaxKvDim];
  float scales[4];  // of the scores of each head

  Cache8(const AttendTask& t, int heads) : task(t) {
    for (int g = 0; g < heads; ++g) scales[g] = to_16_bits(t.q + g * t.dim, t.dim, query + g * t.dim) * t.scale;
  }

  const uint8_t* block(const void* part, int64_t begin) const {
    return static_cast<const uint8_t*>(part) + begin / kKvPositions * kv_block_bytes(task.dim);
  }

  float scale(int g) const { return scales[g]; }

  template <int G>
  void score(int64_t begin, int n, bool more, float* scores) const {
    score8_block<G>(query, block(task.k, begin), n, task.dim, more, scores);
  }

  template <int G>
  void weigh(const float* weights, int64_t begin, int n, bool more, const float* keep) const {
    const int dim = task.dim, block_bytes = kv_block_bytes(dim);
    const uint8_t* const v = block(task.v, begin);
    if (more)
      for (int p = 0; p < kBlock; p += kKvPositions)
        prefetch(v + (kBlock + p) / kKvPositions * block_bytes, kv_scale_bytes(dim));
    for (int first = 0; first < dim; first += kKvGroup) {
      // Weight times the value's scale, 0 beyond n: memory there may hold anything.
      alignas(64) float scale[kBlock];
      for (int p = 0; p < n; p += kLanes) {
        const uint8_t* const at =
            v + p / kKvPositions * block_bytes + 2 * (first / kKvGroup * kKvPositions + p % kKvPositions);
        store(scale + p, load(reinterpret_cast<const uint16_t*>(at)));
      }
      for (int p = n; p < kBlock; ++p) scale[p] = 0.0f;
      alignas(64) int16_t codes[G * kBlock];
      float steps[G];
      for (int g = 0; g < G; ++g) {
        alignas(64) float scaled[kBlock];
        for (int p = 0; p < kBlock; p += kLanes) store(scaled + p, load(weights + g * kBlock + p) * load(scale + p));
        steps[g] = to_16_bits(scaled, kBlock, codes + g * kBlock);
      }
      const int end = first + kKvGroup < dim ? first + kKvGroup : dim;
      weigh8_columns<G>(codes, steps, v + kv_scale_bytes(dim), n, first, end, dim, more, keep, task.acc);
    }
  }
};
