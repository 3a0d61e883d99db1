// One token's attention in a layer. transformers takes about forty small operations for it.
#include "attention.h"

#include <cstring>
#include <new>
#include <vector>

#include "dispatch.h"
#include "kv_blocks.h"
#include "moe_kernels.h"
#include "pool.h"
#include "rounding.h"

using namespace moe;

namespace {

constexpr int64_t kSpan = 512;  // positions with their own sums; fixed, so that these do not depend on the threads
// Consecutive spans of a work item, at most: within an item each block is prefetched (20 % on one thread).
constexpr int64_t kItemSpans = 4;
constexpr int64_t kThreadItems = 4;  // items of each thread at least, so that threads end together
constexpr int64_t kFewSpans = 4;     // fewer are merged in less time than a parallel region takes

int64_t spans_of_item(int64_t spans, int threads) {
  const int64_t even = spans / (kThreadItems * threads);
  return even < 1 ? 1 : even < kItemSpans ? even : kItemSpans;
}

const AttentionKernels& attention_kernels() {
  switch (moe_isa()) {
#if defined(MOE_X86)
    case MOE_ISA_AVX512: return kAvx512Attention;
    case MOE_ISA_AVX2: return kAvx2Attention;
#endif
    default: return kPortableAttention;
  }
}

template <class T>
struct Step {
  const moe_attention& layer;
  int64_t heads, kv_heads, dim, group;

  explicit Step(const moe_attention& l)
      : layer(l), heads(l.q.rows / l.head_dim), kv_heads(l.k.rows / l.head_dim), dim(l.head_dim),
        group(heads / kv_heads) {}

  // Rotary embedding of each head: its halves (a, b) become (a cos - b sin, b cos + a sin).
  void rotate(float* x, int64_t count, const T* cos, const T* sin) const {
    const int64_t half = dim / 2;
    for (int64_t h = 0; h < count; ++h, x += dim) {
      for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        x[i] = a * to_float(cos[i]) - b * to_float(sin[i]);
        x[half + i] = b * to_float(cos[half + i]) + a * to_float(sin[half + i]);
      }
    }
  }

  // Appends the token's keys or values to the cache; `x` becomes what T holds of them.
  void append(float* x, KvPart part, const moe_kv& cache) const {
    void* const to = part == KvPart::keys ? cache.keys : cache.values;
    for (int64_t h = 0; h < kv_heads; ++h, x += dim) {
      if (cache.format == MOE_KV_8BIT) {
        for (int64_t i = 0; i < dim; ++i) x[i] = rounded<T>(x[i]);
        const int64_t block = (h * cache.capacity + cache.length) / kKvPositions;
        kv_store(x, int(dim), part, static_cast<uint8_t*>(to) + block * kv_block_bytes(int(dim)),
                 int(cache.length % kKvPositions));
      } else {
        T* const row = static_cast<T*>(to) + (h * cache.capacity + cache.length) * dim;
        for (int64_t i = 0; i < dim; ++i) round_to(x[i], row + i);
      }
    }
  }

  // Offset in bytes of a head's positions from `begin` on, a multiple of kSpan.
  int64_t offset(const moe_kv& cache, int64_t h, int64_t begin) const {
    const int64_t position = h * cache.capacity + begin;
    if (cache.format == MOE_KV_8BIT) return position / kKvPositions * kv_block_bytes(int(dim));
    return position * dim * int64_t(sizeof(T));
  }

  AttendFn attend_fn(const moe_kv& cache) const {
    const AttentionKernels& isa = attention_kernels();
    if (cache.format == MOE_KV_8BIT) return isa.attend_8bit;
    return sizeof(T) == 2 ? isa.attend_bf16 : isa.attend_f32;
  }

  // Attention of all heads over the cache and the token; out fp32 [heads * dim]. MOE_OK or MOE_E_MEMORY.
  int32_t attend(const float* q, const moe_kv& cache, float* out) const {
    const uint8_t *keys = static_cast<uint8_t*>(cache.keys), *values = static_cast<uint8_t*>(cache.values);
    const int64_t length = cache.length + 1;
    const int64_t spans = (length + kSpan - 1) / kSpan;
    Pool& pool = Pool::get();
    std::lock_guard<std::mutex> lock(pool.mutex());
    auto* const acc = static_cast<float*>(pool.scratch(0, size_t(spans * heads * (dim + 2)) * sizeof(float)));
    if (!acc) return MOE_E_MEMORY;
    float* const top = acc + spans * heads * dim;
    float* const total = top + spans * heads;
    const AttendFn attend_span = attend_fn(cache);
    const int64_t run = spans_of_item(spans * kv_heads, pool.threads()), runs = (spans + run - 1) / run;
    pool.run(runs * kv_heads, [&](int64_t item) {
      const int64_t h = item / runs, first = item % runs * run, last = first + run < spans ? first + run : spans;
      const int64_t end = last * kSpan < length ? last * kSpan : length;
      for (int64_t span = first; span < last; ++span) {
        const int64_t begin = span * kSpan, at = span * heads + h * group;
        const int64_t n = end - begin < kSpan ? end - begin : kSpan;
        const int64_t bytes = offset(cache, h, begin);
        attend_span({q + h * group * dim, keys + bytes, values + bytes, n, end - begin, int(group), int(dim),
                     layer.scale, acc + at * dim, top + at, total + at});
      }
    });
    const auto merge = [&](int64_t h) {
      float largest = top[h], sum = 0.0f;
      for (int64_t s = 1; s < spans; ++s) largest = top[s * heads + h] > largest ? top[s * heads + h] : largest;
      for (int64_t i = 0; i < dim; ++i) out[h * dim + i] = 0.0f;
      for (int64_t s = 0; s < spans; ++s) {
        const int64_t at = s * heads + h;
        const float share = spans == 1 ? 1.0f : exp_of_negative(top[at] - largest);
        sum += total[at] * share;
        for (int64_t i = 0; i < dim; ++i) out[h * dim + i] += acc[at * dim + i] * share;
      }
      for (int64_t i = 0; i < dim; ++i) out[h * dim + i] /= sum;
    };
    if (spans < kFewSpans) {
      for (int64_t h = 0; h < heads; ++h) merge(h);
    } else {
      pool.run(heads, merge);
    }
    pool.trim();
    return MOE_OK;
  }

  int32_t run(const T* x, const T* cos, const T* sin, const moe_kv& cache, T* out) {
    const int64_t hidden = layer.hidden, wide = heads * dim, narrow = kv_heads * dim;
    std::vector<float> room(size_t(2 * hidden + 2 * wide + 2 * narrow));
    float* const input = room.data();
    float* const q = input + hidden;
    float* const k = q + wide;
    float* const v = k + narrow;
    float* const mixed = v + narrow;
    float* const result = mixed + wide;
    for (int64_t i = 0; i < hidden; ++i) input[i] = to_float(x[i]);
    moe_matrix qkv[3] = {layer.q, layer.k, layer.v};
    qkv[0].y = q;
    qkv[1].y = k;
    qkv[2].y = v;
    if (const int32_t error = moe_linear_many(qkv, 3, hidden, input, 1)) return error;
    rotate(q, heads, cos, sin);
    rotate(k, kv_heads, cos, sin);
    append(k, KvPart::keys, cache);
    append(v, KvPart::values, cache);
    if (const int32_t error = attend(q, cache, mixed)) return error;
    moe_matrix o = layer.o;
    o.y = result;
    if (const int32_t error = moe_linear_many(&o, 1, wide, mixed, 1)) return error;
    for (int64_t i = 0; i < hidden; ++i) round_to(result[i], out + i);
    return MOE_OK;
  }
};

template <class T>
int32_t run_step(const moe_attention& layer, const void* x, const void* cos, const void* sin, const moe_kv& cache,
                 void* out) {
  return Step<T>(layer).run(static_cast<const T*>(x), static_cast<const T*>(cos), static_cast<const T*>(sin), cache,
                            static_cast<T*>(out));
}

}  // namespace

namespace moe {

int32_t check_attention(const moe_attention& l, const moe_kv& cache) {
  const int64_t dim = l.head_dim;
  if ((l.dtype != MOE_BF16 && l.dtype != MOE_F32) || dim <= 0 || dim % 16 || l.hidden <= 0 || l.k.rows <= 0 ||
      l.q.rows <= 0 || l.q.rows % dim || l.k.rows % dim || l.q.rows % l.k.rows || l.v.rows != l.k.rows ||
      l.o.rows != l.hidden || cache.length < 0 || cache.capacity <= cache.length)
    return MOE_E_SIZE;
  if (cache.format != MOE_KV_PLAIN && (cache.format != MOE_KV_8BIT || cache.capacity % kKvPositions || dim > kMaxKvDim))
    return MOE_E_SIZE;
  for (const moe_matrix* m : {&l.q, &l.k, &l.v, &l.o})
    if (!known_packing(m->packing)) return MOE_E_PACKING;
  return MOE_OK;
}

}  // namespace moe

extern "C" {

int32_t moe_attention_step(const moe_attention* layer, const void* x, const void* cos, const void* sin,
                           const moe_kv* cache, void* out) {
  if (const int32_t error = check_attention(*layer, *cache)) return error;
  try {
    if (layer->dtype == MOE_BF16) return run_step<uint16_t>(*layer, x, cos, sin, *cache, out);
    return run_step<float>(*layer, x, cos, sin, *cache, out);
  } catch (const std::bad_alloc&) {
    return MOE_E_MEMORY;
  }
}

}  // extern "C"
