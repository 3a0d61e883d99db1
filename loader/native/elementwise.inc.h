// Quantization of activations, SwiGLU and bf16 dots: plain loops, compiled once for each instruction set. They use
// correctly rounded operations in a fixed order (-ffp-contract=off), so all instruction sets give the same bits.
// Included inside an anonymous namespace: the linker would keep only one copy of an inline function, perhaps one that
// this processor cannot run.

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest even integer
constexpr float kTiny = 1e-30f;        // a block with a smaller amax counts as zero: 127 / amax must stay finite

void quantize64(const float* x, ActBlock* out, int b) {
  uint32_t top = 0;
  for (int i = 0; i < 64; ++i) {
    const uint32_t a = bits_of(x[i]) & 0x7fffffffu;
    top = a > top ? a : top;
  }
  int8_t* q = out->x + 64 * b;
  const float amax = float_of(top);
  if (top >= 0x7f800000u || amax < kTiny) {  // an integer comparison, because fmax would drop a NaN
    __builtin_memset(q, 0, 64);
    for (int i = 0; i < 4; ++i) out->s16[4 * b + i] = 0;
    out->s32[2 * b] = out->s32[2 * b + 1] = 0;
    out->d[b] = out->u[b] = top >= 0x7f800000u ? __builtin_nanf("") : 0.0f;
    return;
  }
  const float inverse = 127.0f / amax;
  int32_t v[64];
  for (int i = 0; i < 64; ++i) v[i] = int32_t(bits_of(x[i] * inverse + kRound)) - 0x4b400000;
  int32_t sum[4];
  for (int g = 0; g < 4; ++g) {
    int32_t s = 0;
    for (int i = 0; i < 16; ++i) s += v[16 * g + i];
    sum[g] = s;
  }
  for (int i = 0; i < 64; ++i) q[i] = int8_t(v[i]);
  out->s16[4 * b + 0] = int16_t(sum[0]);
  out->s16[4 * b + 1] = int16_t(sum[2]);
  out->s16[4 * b + 2] = int16_t(sum[1]);
  out->s16[4 * b + 3] = int16_t(sum[3]);
  out->s32[2 * b] = int16_t(sum[0] + sum[1]);
  out->s32[2 * b + 1] = int16_t(sum[2] + sum[3]);
  out->d[b] = amax / 127.0f;
  out->u[b] = out->d[b] * float(sum[0] + sum[1] + sum[2] + sum[3]);
}

void quantize_row(const float* x, int64_t n, ActBlock* out, int64_t stride) {
  const int64_t padded = (n + 255) / 256 * 256;
  for (int64_t k = 0; k < padded; k += 64) {
    const int b = int(k / 64 % 4);
    if (k + 64 <= n) {
      quantize64(x + k, out + k / 256 * stride, b);
    } else {
      float tail[64] = {};
      for (int64_t i = k; i < n; ++i) tail[i - k] = x[i];
      quantize64(tail, out + k / 256 * stride, b);
    }
  }
}

// exp(x) within 3 ulp, clamped to exp(-87) and exp(88); NaN stays NaN.
inline float exp_poly(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = __builtin_fmaf(x, 1.44269504f, kRound);
  const float n = shifted - kRound;
  float r = __builtin_fmaf(n, -0.693145752f, x);
  r = __builtin_fmaf(n, -1.42860677e-6f, r);
  float p = 1.0f / 720.0f;
  p = __builtin_fmaf(p, r, 1.0f / 120.0f);
  p = __builtin_fmaf(p, r, 1.0f / 24.0f);
  p = __builtin_fmaf(p, r, 1.0f / 6.0f);
  p = __builtin_fmaf(p, r, 0.5f);
  p = __builtin_fmaf(p, r, 1.0f);
  p = __builtin_fmaf(p, r, 1.0f);
  return p * float_of((bits_of(shifted) << 23) + 0x3f800000u);
}

void swiglu_rows(const float* gate, const float* up, float* h, int n) {
  for (int i = 0; i < n; ++i) h[i] = gate[i] / (1.0f + exp_poly(-gate[i])) * up[i];
}

// 64 partial sums (column k is added to sum k mod 64, ascending), then halves are added: 32, 16, ... 1.
template <int T>
inline void dot_bf16_tokens(const uint16_t* w, const float* x, int64_t n, float* y, int64_t stride) {
  float acc[T][64] = {};
  int64_t k = 0;
  for (; k + 64 <= n; k += 64) {
    for (int i = 0; i < 64; ++i) {
      const float wf = float_of(uint32_t(w[k + i]) << 16);
      for (int t = 0; t < T; ++t) acc[t][i] = __builtin_fmaf(wf, x[t * n + k + i], acc[t][i]);
    }
  }
  for (int i = 0; k + i < n; ++i) {
    const float wf = float_of(uint32_t(w[k + i]) << 16);
    for (int t = 0; t < T; ++t) acc[t][i] = __builtin_fmaf(wf, x[t * n + k + i], acc[t][i]);
  }
  for (int t = 0; t < T; ++t) {
    for (int half = 32; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) acc[t][i] += acc[t][i + half];
    y[t * stride] = acc[t][0];
  }
}

template <int T>
inline void dot_bf16_batch(const uint16_t* w, const float* x, int64_t n, int tokens, float* y, int64_t stride) {
  for (; tokens >= T; tokens -= T, x += T * n, y += T * stride) dot_bf16_tokens<T>(w, x, n, y, stride);
  if constexpr (T > 1) dot_bf16_batch<T - 1>(w, x, n, tokens, y, stride);
}

uint64_t sum_words(const uint8_t* p, int64_t bytes) {
  uint64_t acc[32] = {};
  int64_t i = 0;
  for (; i + 256 <= bytes; i += 256) {
    uint64_t v[32];
    __builtin_memcpy(v, p + i, 256);
    for (int l = 0; l < 32; ++l) acc[l] += v[l];
  }
  for (; i + 8 <= bytes; i += 8) {
    uint64_t v;
    __builtin_memcpy(&v, p + i, 8);
    acc[0] += v;
  }
  uint64_t total = 0;
  for (int l = 0; l < 32; ++l) total += acc[l];
  return total;
}
