// Attention of one token over a KV cache: plain vector code, compiled once for each instruction set. It uses correctly
// rounded operations in a fixed order (no contraction), so all instruction sets give the same bits. Included inside an
// anonymous namespace, after attention_vectors.inc.h and the sizes of tiles.
//
// Tiles keep their sums in registers, and each widened register of K or V serves all query heads. While a block is
// computed, the next one is prefetched: the loads of a block alone do not keep the memory busy.

constexpr int kBlock = 64;  // positions computed together: their 16 KiB of K and of V fit in L1
constexpr int kLineBytes = 64;

inline void prefetch(const void* begin, int bytes) {
  for (int i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(static_cast<const char*>(begin) + i);
}

// lanes[g * kLanes + p]: the products q[g] . k[p], value d in lane d mod kLanes, not yet added up over lanes.
template <int G, int P, class T>
MOE_INLINE inline void score_tile(const float* q, const T* k, int dim, F* lanes) {
  F sum[G * P * kParts] = {};
  for (int d = 0; d < dim; d += 16) {
    unrolled<kParts>([&](auto part) MOE_INLINE {
      const int at = d + part * kLanes;
      F key[P];
      unrolled<P>([&](auto p) MOE_INLINE { key[p] = load(k + int64_t(p) * dim + at); });
      unrolled<G>([&](auto g) MOE_INLINE {
        const F query = load(q + g * dim + at);
        unrolled<P>([&](auto p) MOE_INLINE {
          F& s = sum[(g * P + p) * kParts + part];
          s = s + key[p] * query;
        });
      });
    });
  }
  unrolled<G>([&](auto g) MOE_INLINE {
    unrolled<P>([&](auto p) MOE_INLINE { lanes[g * kLanes + p] = one_register(sum + (g * P + p) * kParts); });
  });
}

// scores[g * kBlock + p] = q[g] . k[p] for G query heads of one KV head; also written for p from n to the next
// multiple of kLanes.
template <int G, class T>
inline void score_heads(const float* q, const T* k, int n, int dim, bool more, float* scores) {
  F lanes[G * kLanes];
  unrolled<G * kLanes>([&](auto i) MOE_INLINE { lanes[i] = F{}; });
  for (int begin = 0; begin < n; begin += kLanes) {
    const int count = n - begin < kLanes ? n - begin : kLanes;
    int p = 0;
    for (; p + kScorePositions <= count; p += kScorePositions) {
      const T* rows = k + int64_t(begin + p) * dim;
      if (more) prefetch(rows + kBlock * dim, kScorePositions * dim * int(sizeof(T)));
      score_tile<G, kScorePositions>(q, rows, dim, lanes + p);
    }
    if constexpr (kScorePositions > 1)
      for (; p < count; ++p) score_tile<G, 1>(q, k + int64_t(begin + p) * dim, dim, lanes + p);
    unrolled<G>([&](auto g) MOE_INLINE { store(scores + g * kBlock + begin, sums_of_lanes(lanes + g * kLanes)); });
  }
}

template <int G, class T>
inline void score_block(const float* q, const T* k, int n, int dim, bool more, float* scores) {
  if constexpr (G > kHeads) {
    score_heads<kHeads>(q, k, n, dim, more, scores);
    score_block<G - kHeads>(q + kHeads * dim, k, n, dim, false, scores + kHeads * kBlock);
  } else {
    score_heads<G>(q, k, n, dim, more, scores);
  }
}

// Replaces the scores of n positions of one head by weights[p] = exp(score * scale - top); they are 0 from n to kBlock.
// Raises `top` to this block's largest score first. Returns the sum of the weights, not yet added up over lanes.
inline F weights_of(float* weights, int n, float scale, float& top) {
  for (int p = 0; p < n; p += kLanes) store(weights + p, load(weights + p) * scale);
  for (int p = n; p < kBlock; ++p) weights[p] = -__builtin_inff();
  F most = all_lanes(top);
  for (int p = 0; p < kBlock; p += kLanes) most = larger(load(weights + p), most);
  top = largest_lane(most);
  F sum[kParts] = {};
  for (int p = 0; p < kBlock; p += 16) {
    unrolled<kParts>([&](auto part) MOE_INLINE {
      float* at = weights + p + part * kLanes;
      const F e = exp_lanes(load(at) - top);
      store(at, e);
      sum[part] = sum[part] + e;
    });
  }
  // exp_lanes is never below exp(-87), so positions beyond n need an explicit zero.
  for (int p = n; p < kBlock; ++p) weights[p] = 0.0f;
  return one_register(sum);
}

// acc[g] = acc[g] * keep[g] + sum over p of weights[g * kBlock + p] * v[p], for C registers of each row.
template <int G, int C, class T>
MOE_INLINE inline void weigh_tile(const float* weights, const T* v, int n, int dim, bool more, const float* keep,
                                  float* acc) {
  F sum[G * C];
  unrolled<G>([&](auto g) MOE_INLINE {
    unrolled<C>([&](auto c) MOE_INLINE { sum[g * C + c] = load(acc + g * dim + c * kLanes) * keep[g]; });
  });
  for (int p = 0; p < n; ++p) {
    const T* row = v + int64_t(p) * dim;
    if (more) prefetch(row + kBlock * dim, C * kLanes * int(sizeof(T)));
    F value[C];
    unrolled<C>([&](auto c) MOE_INLINE { value[c] = load(row + c * kLanes); });
    unrolled<G>([&](auto g) MOE_INLINE {
      const F weight = all_lanes(weights[g * kBlock + p]);
      unrolled<C>([&](auto c) MOE_INLINE { sum[g * C + c] = sum[g * C + c] + value[c] * weight; });
    });
  }
  unrolled<G>([&](auto g) MOE_INLINE {
    unrolled<C>([&](auto c) MOE_INLINE { store(acc + g * dim + c * kLanes, sum[g * C + c]); });
  });
}

template <int G, class T>
inline void weigh_block(const float* weights, const T* v, int n, int dim, bool more, const float* keep, float* acc) {
  if constexpr (G > kHeads) {
    weigh_block<kHeads>(weights, v, n, dim, more, keep, acc);
    weigh_block<G - kHeads>(weights + kHeads * kBlock, v, n, dim, false, keep + kHeads, acc + kHeads * dim);
  } else {
    int d = 0;
    for (; d + kWeighColumns * kLanes <= dim; d += kWeighColumns * kLanes)
      weigh_tile<G, kWeighColumns>(weights, v + d, n, dim, more, keep, acc + d);
    if constexpr (kWeighColumns > kParts)
      for (; d < dim; d += 16) weigh_tile<G, kParts>(weights, v + d, n, dim, more, keep, acc + d);
  }
}

// The KV cache in T; attention_8bit.inc.h has the same functions for 8 bits.
template <class T>
struct PlainCache {
  const AttendTask& task;

  PlainCache(const AttendTask& t, int) : task(t) {}

  float scale(int) const { return task.scale; }
  template <int G>
  void score(int64_t begin, int n, bool more, float* scores) const {
    score_block<G>(task.q, static_cast<const T*>(task.k) + begin * task.dim, n, task.dim, more, scores);
  }
  template <int G>
  void weigh(const float* weights, int64_t begin, int n, bool more, const float* keep) const {
    weigh_block<G>(weights, static_cast<const T*>(task.v) + begin * task.dim, n, task.dim, more, keep, task.acc);
  }
};

template <int G, class Cache>
void attend_group(const AttendTask& task) {
  const Cache cache(task, G);
  const int dim = task.dim;
  float *const top = task.top, *const total = task.total, *const acc = task.acc;
  alignas(64) float weights[G * kBlock];
  for (int g = 0; g < G; ++g) {
    top[g] = -__builtin_inff();
    total[g] = 0.0f;
    for (int d = 0; d < dim; ++d) acc[g * dim + d] = 0.0f;
  }
  for (int64_t begin = 0; begin < task.length; begin += kBlock) {
    const int n = int(task.length - begin < kBlock ? task.length - begin : kBlock);
    const bool more = begin + kBlock < task.prefetchable;
    cache.template score<G>(begin, n, more, weights);
    alignas(64) float keep[kLanes] = {}, sum[kLanes];
    F sums[kLanes];
    unrolled<kLanes>([&](auto i) MOE_INLINE { sums[i] = F{}; });
    for (int g = 0; g < G; ++g) {
      const float before = top[g];
      sums[g] = weights_of(weights + g * kBlock, n, cache.scale(g), top[g]);
      keep[g] = before - top[g];
    }
    // The first block keeps nothing; its -inf - -inf must not reach exp.
    store(keep, begin == 0 ? F{} : exp_lanes(load(keep)));
    store(sum, sums_of_lanes(sums));
    for (int g = 0; g < G; ++g) total[g] = total[g] * keep[g] + sum[g];
    cache.template weigh<G>(weights, begin, n, more, keep);
  }
}

template <int G, class Cache>
void attend_heads(AttendTask task) {
  for (; task.heads >= G; task.heads -= G) {
    attend_group<G, Cache>(task);
    task.q += G * task.dim;
    task.acc += G * task.dim;
    task.top += G;
    task.total += G;
  }
  if constexpr (G > 1) attend_heads<G - 1, Cache>(task);
}

template <class Cache>
void attend(const AttendTask& task) {
  attend_heads<4, Cache>(task);
}
