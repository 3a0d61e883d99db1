// One token's attention over a KV cache, in the order of docs/numerics.md, "One token through the decoder".
#pragma once
#include "common.cuh"
#include "norm.cuh"

namespace moe {

constexpr int kAttendThreads = 256;
constexpr int kSpan = 512;   // positions of one block, which has its own running sums
constexpr int kScores = 64;  // positions that share one largest score
constexpr int kParts = kSpan / kScores;
constexpr int kHeads = 2;  // query heads of one block
constexpr int kMaxDim = 256;
static_assert(kParts == kAttendThreads / kWarp, "a warp for each part");
static_assert(kScores * 4 == kAttendThreads, "four lanes for each position");

// exp(x) within a few ulp for x <= 0, at least exp(-87), without fma; NaN stays NaN. Equals the CPU's exp_lanes.
MOE_DEVICE float exp_of_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = r * (1.0f / 720.0f) + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * float_of((bits_of(shifted) << 23) + 0x3f800000u);
}

// Value i of a head after the rotary embedding: its halves (a, b) become (a cos - b sin, b cos + a sin).
template <class T>
MOE_DEVICE float rotated(const float* head, int64_t i, int64_t dim, const T* cos, const T* sin) {
  const int64_t half = dim / 2;
  const float c = to_float(cos[i]), s = to_float(sin[i]);
  return i < half ? head[i] * c - head[half + i] * s : head[i] * c + head[i - half] * s;
}

// The sum of 16 partial sums, in all four lanes; lane j of four holds partial sums 4j .. 4j + 3.
MOE_DEVICE float sum16_by_4(const float (&part)[4]) {
  float a[4];
  for (int i = 0; i < 4; ++i) a[i] = part[i] + __shfl_xor_sync(kAllLanes, part[i], 2);
  for (int i = 0; i < 4; ++i) a[i] = a[i] + __shfl_xor_sync(kAllLanes, a[i], 1);
  return (a[0] + a[2]) + (a[1] + a[3]);
}

// One token's values before the rotary embedding. All layers share the structure.
template <class T>
struct TokenHeads {
  const float* q;  // [heads * dim]
  const float* k;  // [kv heads * dim]
  const float* v;  // [kv heads * dim]
  const T* cos;    // [dim], of this token
  const T* sin;    // [dim]
  int64_t position;
};

// A layer's KV cache: [kv heads][capacity][dim].
template <class T>
struct KvPlace {
  T* keys;
  T* values;
  int64_t capacity;
};

struct HeadShape {
  int64_t group;  // heads / kv heads
  int64_t dim;    // a multiple of 16 up to kMaxDim
  float scale;
};

// Results by span: sums of v by exp(score - largest score), the largest score, the sum of the exps.
struct SpanSums {
  float* acc;    // [spans][heads][dim]
  float* top;    // [spans][heads]
  float* total;  // [spans][heads]
};

// Appends k and v to the cache at `position`, and attends to one span of positions. Grid (spans of kSpan positions, kv
// heads, ceil(group / kHeads)).
template <class T>
MOE_DEVICE void attend_span(const TokenHeads<T>& token, const KvPlace<T>& cache, const HeadShape& shape,
                            const SpanSums& spans) {
  const int64_t group = shape.group, dim = shape.dim;
  MOE_SHARED Four<float> query[kHeads][kMaxDim / 4];
  MOE_SHARED float weight[kHeads][kSpan];  // scores, then exp(score - largest)
  MOE_SHARED float part_max[kHeads][kParts], keep[kHeads][kParts], sum[kHeads][kParts];
  const int thread = int(threadIdx.x), lane = thread % kWarp;
  const int64_t begin = int64_t(blockIdx.x) * kSpan;
  const int64_t left = token.position + 1 - begin;
  const int length = int(left < kSpan ? left : kSpan), parts = (length + kScores - 1) / kScores;
  const int64_t first = int64_t(blockIdx.y) * group + int64_t(blockIdx.z) * kHeads;
  const int64_t heads_left = int64_t(blockIdx.y + 1) * group - first;
  const int heads = int(heads_left < kHeads ? heads_left : kHeads);
  T* const key = cache.keys + (blockIdx.y * cache.capacity + begin) * dim;
  T* const value = cache.values + (blockIdx.y * cache.capacity + begin) * dim;

  for (int64_t i = thread; i < heads * dim; i += kAttendThreads)
    query[i / dim][i % dim / 4].v[i % 4] =
        rotated(token.q + (first + i / dim) * dim, i % dim, dim, token.cos, token.sin);
  if (blockIdx.x == gridDim.x - 1) {
    // All blocks of one kv head write the same values, each before it reads.
    for (int64_t i = thread; i < dim; i += kAttendThreads) {
      round_to(rotated(token.k + blockIdx.y * dim, i, dim, token.cos, token.sin), key + (length - 1) * dim + i);
      round_to(token.v[blockIdx.y * dim + i], value + (length - 1) * dim + i);
    }
  }
  __syncthreads();

  for (int part = 0; part < parts; ++part) {
    const int p = part * kScores + thread / 4, j = thread % 4;
    float sums[kHeads][4] = {};
    if (p < length) {
      const Four<T>* row = reinterpret_cast<const Four<T>*>(key + p * dim) + j;
#pragma unroll 4
      for (int64_t d = 0; d < dim / 4; d += 4) {
        const Four<T> four = row[d];
        for (int h = 0; h < kHeads; ++h) {
          if (h >= heads) break;
          const Four<float> other = query[h][d + j];
          for (int i = 0; i < 4; ++i) sums[h][i] = sums[h][i] + to_float(four.v[i]) * other.v[i];
        }
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      const float score = sum16_by_4(sums[h]) * shape.scale;
      if (j == 0) weight[h][p] = p < length ? score : float_of(0xff800000u);
    }
  }
  __syncthreads();

  const int part = thread / kWarp;
  if (part < parts) {
    for (int h = 0; h < heads; ++h) {
      float largest = float_of(0xff800000u);
      for (int i = lane; i < kScores; i += kWarp) {
        const float score = weight[h][part * kScores + i];
        largest = score > largest ? score : largest;
      }
      for (int step = kWarp / 2; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(kAllLanes, largest, step);
        largest = other > largest ? other : largest;
      }
      if (lane == 0) part_max[h][part] = largest;
    }
  }
  __syncthreads();
  if (part < parts) {
    for (int h = 0; h < heads; ++h) {
      float before = float_of(0xff800000u);
      for (int i = 0; i < part; ++i) before = part_max[h][i] > before ? part_max[h][i] : before;
      const float largest = part_max[h][part] > before ? part_max[h][part] : before;
      const int p = part * kScores + lane;
      const float e = exp_of_negative(weight[h][p] - largest), later = exp_of_negative(weight[h][p + kWarp] - largest);
      // Lanes below 16 get partial sum `lane` of 16, positions ascending.
      const float e16 = __shfl_xor_sync(kAllLanes, e, 16), later16 = __shfl_xor_sync(kAllLanes, later, 16);
      float partial = ((e + e16) + later) + later16;
      for (int step = 8; step > 0; step /= 2) partial = partial + __shfl_xor_sync(kAllLanes, partial, step);
      weight[h][p] = e;
      weight[h][p + kWarp] = later;
      if (lane == 0) {
        sum[h][part] = partial;
        // The first part keeps nothing; its -inf - -inf must not reach exp.
        keep[h][part] = part == 0 ? 0.0f : exp_of_negative(before - largest);
      }
    }
  }
  __syncthreads();

  const int64_t at = int64_t(blockIdx.x) * gridDim.y * group + first;
  for (int64_t chain = thread; chain < heads * (dim / 2); chain += kAttendThreads) {
    const int h = int(chain / (dim / 2));
    const int64_t d = chain % (dim / 2) * 2;
    float a = 0.0f, b = 0.0f;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t end = length - i * kScores < kScores ? length - i * kScores : kScores;
      const T* row = value + i * kScores * dim + d;
      a = a * keep[h][i];
      b = b * keep[h][i];
#pragma unroll 8
      for (int64_t p = 0; p < end; ++p) {
        const Two<T> two = *reinterpret_cast<const Two<T>*>(row + p * dim);
        const float w = weight[h][i * kScores + p];
        a = a + to_float(two.v[0]) * w;
        b = b + to_float(two.v[1]) * w;
      }
    }
    spans.acc[(at + h) * dim + d] = a;
    spans.acc[(at + h) * dim + d + 1] = b;
  }
  if (thread < heads) {
    float all = 0.0f, largest = float_of(0xff800000u);
    for (int i = 0; i < parts; ++i) {
      all = all * keep[thread][i] + sum[thread][i];
      largest = part_max[thread][i] > largest ? part_max[thread][i] : largest;
    }
    spans.top[at + thread] = largest;
    spans.total[at + thread] = all;
  }
}

// Adds each head's spans in order, and quantizes the result, the input of o. Grid ceil(blocks64(heads * dim) / 8), 128
// threads.
MOE_DEVICE void combine(const SpanSums& sums, int64_t spans, int64_t heads, int64_t dim, ActBlock* out) {
  const int64_t block = int64_t(blockIdx.x) * 8 + threadIdx.x / 16, blocks = blocks64(heads * dim);
  const int lane = threadIdx.x % 16;
  const int64_t column = block * kActCols + lane * 4, head = column / dim;
  float v[4] = {};
  if (head < heads) {
    const float* const top = sums.top;
    float max = top[head], sum = 0.0f;
    for (int64_t s = 1; s < spans; ++s) max = top[s * heads + head] > max ? top[s * heads + head] : max;
    for (int64_t s = 0; s < spans; ++s) {
      const float share = spans == 1 ? 1.0f : exp_of_negative(top[s * heads + head] - max);
      const Four<float> part = *reinterpret_cast<const Four<float>*>(sums.acc + s * heads * dim + column);
      sum += sums.total[s * heads + head] * share;
      for (int i = 0; i < 4; ++i) v[i] += part.v[i] * share;
    }
    for (int i = 0; i < 4; ++i) v[i] /= sum;
  }
  quantize_by_16(v, lane, block < blocks ? out + block : nullptr);
}

}  // namespace moe

#define MOE_ATTEND(name, T)                                                   \
  MOE_KERNEL(moe::kAttendThreads)                                             \
  name(MOE_STRUCT moe::TokenHeads<T> token, MOE_STRUCT moe::KvPlace<T> cache, \
       MOE_STRUCT moe::HeadShape shape, MOE_STRUCT moe::SpanSums spans) {     \
    moe::attend_span(token, cache, shape, spans);                             \
  }
MOE_ATTEND(attend_f32, float)
MOE_ATTEND(attend_bf16, moe::Bf16)
MOE_ATTEND(attend_f16, moe::F16)
#undef MOE_ATTEND

MOE_KERNEL(128)
attend_combine(MOE_STRUCT moe::SpanSums sums, int64_t spans, int64_t heads, int64_t dim, moe::ActBlock* out) {
  moe::combine(sums, spans, heads, dim, out);
}
