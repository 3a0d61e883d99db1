// Attention of one token over a KV cache: plain vector code, compiled once for each instruction set. It uses correctly
// rounded operations in a fixed order (no contraction), so all instruction sets give the same bits. Included inside an
// anonymous namespace (see elementwise.inc.h).

typedef float F16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint16_t H16 __attribute__((vector_size(32)));

constexpr int kBlock = 64;  // positions computed together: their 16 KiB of K and of V fit in L1

inline F16 load16(const float* p) {
  F16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline F16 load16(const uint16_t* p) {
  H16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return (F16)(__builtin_convertvector(v, U16) << 16);
}

inline void store16(float* p, F16 v) { __builtin_memcpy(p, &v, sizeof v); }

// exp(x) within a few ulp for x <= 0, at least exp(-87); NaN stays NaN. The polynomial of elementwise.inc.h.
inline F16 exp16(F16 x) {
  const F16 low = F16{} - 87.0f;
  x = x < low ? low : x;
  const F16 shifted = x * 1.44269504f + 12582912.0f;
  const F16 n = shifted - 12582912.0f;
  const F16 r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  F16 p = r * (1.0f / 720.0f) + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (F16)(((U16)shifted << 23) + 0x3f800000u);
}

inline float sum16(F16 v) {
  float a[16];
  store16(a, v);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a[i] += a[i + half];
  return a[0];
}

// scores[g * kBlock + p] = q[g] . k[p] for G query heads of one KV head.
template <int G, class T>
inline void score_block(const float* q, const T* k, int n, int dim, float* scores) {
  for (int p = 0; p < n; ++p) {
    F16 sum[G] = {};
    for (int d = 0; d < dim; d += 16) {
      const F16 key = load16(k + int64_t(p) * dim + d);
      unrolled<G>([&](auto g) MOE_INLINE { sum[g] = sum[g] + key * load16(q + g * dim + d); });
    }
    unrolled<G>([&](auto g) MOE_INLINE { scores[g * kBlock + p] = sum16(sum[g]); });
  }
}

// acc[g] = acc[g] * keep[g] + sum over p of weights[g * kBlock + p] * v[p].
template <int G, class T>
inline void weigh_block(const float* weights, const T* v, int n, int dim, const float* keep, float* acc) {
  for (int d = 0; d < dim; d += 16) {
    F16 sum[G];
    unrolled<G>([&](auto g) MOE_INLINE { sum[g] = load16(acc + g * dim + d) * keep[g]; });
    for (int p = 0; p < n; ++p) {
      const F16 value = load16(v + int64_t(p) * dim + d);
      unrolled<G>([&](auto g) MOE_INLINE { sum[g] = sum[g] + value * weights[g * kBlock + p]; });
    }
    unrolled<G>([&](auto g) MOE_INLINE { store16(acc + g * dim + d, sum[g]); });
  }
}

template <int G, class T>
void attend_group(const AttendTask& task) {
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
    score_block<G>(task.q, static_cast<const T*>(task.k) + begin * dim, n, dim, weights);
    float keep[G];
    for (int g = 0; g < G; ++g) {
      float* w = weights + g * kBlock;
      float largest = top[g];
      for (int p = 0; p < n; ++p) {
        w[p] *= task.scale;
        largest = w[p] > largest ? w[p] : largest;
      }
      for (int p = n; p < kBlock; ++p) w[p] = -__builtin_inff();
      alignas(64) float difference[16] = {top[g] - largest};
      // The first block keeps nothing; its -inf - -inf must not reach exp.
      keep[g] = begin == 0 ? 0.0f : exp16(load16(difference))[0];
      F16 sum = {};
      for (int p = 0; p < kBlock; p += 16) {
        const F16 e = exp16(load16(w + p) - largest);
        store16(w + p, e);
        sum = sum + e;
      }
      // exp16 is never below exp(-87), so positions beyond n need an explicit zero.
      for (int p = n; p < kBlock; ++p) w[p] = 0.0f;
      total[g] = total[g] * keep[g] + sum16(sum);
      top[g] = largest;
    }
    weigh_block<G>(weights, static_cast<const T*>(task.v) + begin * dim, n, dim, keep, acc);
  }
}

template <int G, class T>
void attend_heads(AttendTask task) {
  for (; task.heads >= G; task.heads -= G) {
    attend_group<G, T>(task);
    task.q += G * task.dim;
    task.acc += G * task.dim;
    task.top += G;
    task.total += G;
  }
  if constexpr (G > 1) attend_heads<G - 1, T>(task);
}

template <class T>
void attend(const AttendTask& task) {
  attend_heads<4, T>(task);
}
