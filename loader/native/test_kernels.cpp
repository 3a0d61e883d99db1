// Tests for the sanitizers: every packing on every instruction set, over odd sizes down to one row, one column and one
// token, in heap buffers of exact size at odd addresses; also threads. All instruction sets must give the same bits.
// tests/loader/arithmetic/test_loader_kernels.py checks the values.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "../../formats/native/tile_layout.h"
#include "attention.h"
#include "kv_blocks.h"
#include "layer.h"
#include "moe_kernels.h"
#include "rounding.h"

namespace {

std::mt19937 rng(1);
int failures = 0;

void expect(bool ok, const char* what, int packing, int64_t a, int64_t b, int64_t c) {
  if (ok) return;
  ++failures;
  std::fprintf(stderr, "FAILED %s: packing %d, %lld %lld %lld\n", what, packing, (long long)a, (long long)b,
               (long long)c);
}

// A heap block whose data begins at `offset` and ends with the block, so that the sanitizer sees reads past the end.
struct Bytes {
  std::unique_ptr<uint8_t[]> block;
  uint8_t* data;
  Bytes(int64_t size, int offset) : block(new uint8_t[size_t(size) + size_t(offset)]), data(block.get() + offset) {
    for (int64_t i = 0; i < size; ++i) data[i] = uint8_t(rng());
  }
};

void set_heads(uint8_t* tiles, int32_t packing, int64_t rows, int64_t columns) {
  const int64_t bytes = moe::tile_bytes(moe::Packing(packing), columns);
  for (int64_t t = 0; t < moe::tiles_of(rows); ++t)
    for (int i = 0; i < 64; ++i) {
      const uint16_t half = 0x1400;  // 2^-10
      std::memcpy(tiles + t * bytes + 2 * i, &half, 2);
    }
}

std::vector<float> values(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> v(static_cast<size_t>(n));
  for (float& f : v) f = normal(rng);
  return v;
}

void linears(int32_t packing, int64_t rows, int64_t columns, int64_t tokens) {
  Bytes tiles(moe_packed_bytes(packing, rows, columns), int(rng() % 64));
  set_heads(tiles.data, packing, rows, columns);
  const auto x = values(tokens * columns);
  std::vector<float> first;
  for (int isa = MOE_ISA_AVX512; isa >= MOE_ISA_PORTABLE; --isa) {
    if (moe_set_isa(isa) != MOE_OK) continue;
    std::vector<float> y(static_cast<size_t>(tokens * rows), NAN);
    expect(moe_linear(packing, tiles.data, rows, columns, x.data(), y.data(), tokens) == MOE_OK, "linear", packing,
           rows, columns, tokens);
    if (first.empty()) first = y;
    expect(!std::memcmp(y.data(), first.data(), y.size() * sizeof(float)), "same bits", packing, rows, columns, tokens);
  }
}

void experts(int32_t gate_up, int32_t down, int64_t hidden, int64_t intermediate, int64_t tokens) {
  const int64_t size = moe_expert_bytes(gate_up, down, hidden, intermediate);
  const int64_t gate = moe_packed_bytes(gate_up, intermediate, hidden);
  Bytes one(size, 1), two(size, 0);
  for (uint8_t* blob : {one.data, two.data}) {
    set_heads(blob, gate_up, 2 * ((intermediate + 31) / 32 * 32), hidden);
    set_heads(blob + 2 * gate, down, hidden, intermediate);
  }
  const uint8_t* blobs[3] = {one.data, nullptr, two.data};
  const auto x = values(tokens * hidden), weights = values(tokens * 2);
  std::vector<int64_t> index(static_cast<size_t>(tokens * 2));
  for (int64_t t = 0; t < tokens; ++t) index[size_t(2 * t)] = t % 3 ? 0 : 2, index[size_t(2 * t + 1)] = t % 3 ? 2 : 0;
  const moe_layer_experts all = {blobs, hidden, intermediate, 3, gate_up, down, 0};
  const moe_routing routing = {index.data(), weights.data(), tokens, 2, 0};
  std::vector<float> first;
  for (int isa = MOE_ISA_AVX512; isa >= MOE_ISA_PORTABLE; --isa) {
    if (moe_set_isa(isa) != MOE_OK) continue;
    std::vector<float> out(static_cast<size_t>(tokens * hidden), NAN);
    expect(moe_experts_topk(&all, &routing, x.data(), out.data(), 0) == MOE_OK, "experts", gate_up, hidden,
           intermediate, tokens);
    if (first.empty()) first = out;
    expect(!std::memcmp(out.data(), first.data(), out.size() * sizeof(float)), "same bits of experts", gate_up, hidden,
           intermediate, tokens);
  }
  index[0] = 1;
  std::vector<float> out(static_cast<size_t>(tokens * hidden));
  expect(moe_experts_topk(&all, &routing, x.data(), out.data(), 0) == MOE_E_INDEX, "missing expert refused", gate_up,
         hidden, intermediate, tokens);
}

void bf16(int64_t rows, int64_t columns, int64_t tokens) {
  std::vector<uint16_t> w(static_cast<size_t>(rows * columns));
  for (uint16_t& v : w) v = uint16_t(0x3f00 + rng() % 256);
  const auto x = values(tokens * columns);
  std::vector<float> first;
  for (int isa = MOE_ISA_AVX512; isa >= MOE_ISA_PORTABLE; --isa) {
    if (moe_set_isa(isa) != MOE_OK) continue;
    std::vector<float> y(static_cast<size_t>(tokens * rows), NAN);
    expect(moe_linear_bf16(w.data(), rows, columns, x.data(), y.data(), tokens) == MOE_OK, "bf16", -1, rows, columns,
           tokens);
    if (first.empty()) first = y;
    expect(!std::memcmp(y.data(), first.data(), y.size() * sizeof(float)), "same bits of bf16", -1, rows, columns,
           tokens);
  }
}

// Random values of T in a heap block of exact size.
template <class T>
std::vector<T> narrow(int64_t n, float scale = 1.0f) {
  const auto wide = values(n);
  std::vector<T> v(static_cast<size_t>(n));
  for (size_t i = 0; i < v.size(); ++i) moe::round_to(wide[i] * scale, &v[i]);
  return v;
}

float sum16(std::vector<float> lanes) {
  for (size_t half = 8; half > 0; half /= 2)
    for (size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Attention over at most one span of positions, in the order of docs/numerics.md, "Attention", value by value.
template <class T>
void attend_in_order(const moe::AttendTask& task) {
  const T *keys = static_cast<const T*>(task.k), *vals = static_cast<const T*>(task.v);
  for (int g = 0; g < task.heads; ++g) {
    float top = -INFINITY, total = 0.0f;
    float* const acc = task.acc + g * task.dim;
    std::fill(acc, acc + task.dim, 0.0f);
    for (int64_t begin = 0; begin < task.length; begin += 64) {
      const int64_t n = std::min<int64_t>(task.length - begin, 64);
      const float before = top;
      std::vector<float> weight(static_cast<size_t>(n)), sums(16);
      for (int64_t p = 0; p < n; ++p) {
        std::vector<float> score(16);
        for (int d = 0; d < task.dim; ++d)
          score[size_t(d % 16)] += moe::to_float(keys[(begin + p) * task.dim + d]) * task.q[g * task.dim + d];
        weight[size_t(p)] = sum16(score) * task.scale;
        top = std::max(top, weight[size_t(p)]);
      }
      for (int64_t p = 0; p < n; ++p)
        sums[size_t(p % 16)] += weight[size_t(p)] = moe::exp_of_negative(weight[size_t(p)] - top);
      const float keep = begin == 0 ? 0.0f : moe::exp_of_negative(before - top);
      total = total * keep + sum16(sums);
      for (int d = 0; d < task.dim; ++d) {
        acc[d] *= keep;
        for (int64_t p = 0; p < n; ++p) acc[d] += moe::to_float(vals[(begin + p) * task.dim + d]) * weight[size_t(p)];
      }
    }
    task.top[g] = top;
    task.total[g] = total;
  }
}

template <class T>
void attends(int heads, int dim, int64_t length) {
  const auto q = values(heads * dim);
  const auto keys = narrow<T>(length * dim, 3.0f), vals = narrow<T>(length * dim);
  const auto run = [&](const auto& attend) {
    std::vector<float> out(static_cast<size_t>(heads * (dim + 2)), NAN);
    float* const acc = out.data();
    float* const top = acc + heads * dim;
    attend(moe::AttendTask{q.data(), keys.data(), vals.data(), length, length, heads, dim, 1.0f / std::sqrt(float(dim)),
                           acc, top, top + heads});
    return out;
  };
  const auto expected = run(attend_in_order<T>);
  const auto compare = [&](const moe::AttentionKernels& isa) {
    const auto out = run(sizeof(T) == 2 ? isa.attend_bf16 : isa.attend_f32);
    expect(!std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)), "attention in the written order",
           int(sizeof(T)), heads, dim, length);
  };
  compare(moe::kPortableAttention);
#if defined(MOE_X86)
  if (moe_set_isa(MOE_ISA_AVX2) == MOE_OK) compare(moe::kAvx2Attention);
  if (moe_set_isa(MOE_ISA_AVX512) == MOE_OK) compare(moe::kAvx512Attention);
#endif
}

// x as 16-bit integers and their step.
float in_16_bits(const std::vector<float>& x, std::vector<int>& codes) {
  float largest = 0.0f;
  for (float v : x) largest = std::max(largest, std::fabs(v));
  const float inverse = largest < 1e-30f ? 0.0f : 32767.0f / largest;
  codes.clear();
  for (float v : x) codes.push_back(int(std::nearbyint(v * inverse)));
  return largest < 1e-30f ? 0.0f : largest * (1.0f / 32767.0f);
}

// Codes of position p and dimension i, and scales of groups.
struct Codes8 {
  const uint8_t* blocks;
  int dim;
  moe::KvPart part;

  int code(int64_t p, int i) const {
    const uint8_t* const at = blocks + p / 16 * moe::kv_block_bytes(dim) + moe::kv_scale_bytes(dim);
    return int8_t(at[moe::kv_code_offset(part, dim, int(p % 16), i)]);
  }
  float scale(int64_t p, int group) const {
    uint16_t scale;
    std::memcpy(&scale, blocks + p / 16 * moe::kv_block_bytes(dim) + 2 * (16 * group + p % 16), 2);
    return moe::to_float(scale);
  }
};

// As attend_in_order, over a cache in 8 bits: docs/numerics.md, "A KV cache in 8 bits".
void attend8_in_order(const moe::AttendTask& task) {
  const int dim = task.dim;
  const Codes8 keys{static_cast<const uint8_t*>(task.k), dim, moe::KvPart::keys};
  const Codes8 vals{static_cast<const uint8_t*>(task.v), dim, moe::KvPart::values};
  for (int g = 0; g < task.heads; ++g) {
    std::vector<int> query;
    const float step = in_16_bits({task.q + g * dim, task.q + (g + 1) * dim}, query);
    float top = -INFINITY, total = 0.0f;
    float* const acc = task.acc + g * dim;
    std::fill(acc, acc + dim, 0.0f);
    for (int64_t begin = 0; begin < task.length; begin += 64) {
      const int64_t n = std::min<int64_t>(task.length - begin, 64);
      const float before = top;
      std::vector<float> weight(static_cast<size_t>(n)), sums(16);
      for (int64_t p = 0; p < n; ++p) {
        float score = 0.0f;
        for (int first = 0; first < dim; first += 64) {
          int sum = 0;
          for (int i = first; i < std::min(first + 64, dim); ++i) sum += keys.code(begin + p, i) * query[size_t(i)];
          score += float(sum) * keys.scale(begin + p, first / 64);
        }
        weight[size_t(p)] = score * (step * task.scale);
        top = std::max(top, weight[size_t(p)]);
      }
      for (int64_t p = 0; p < n; ++p)
        sums[size_t(p % 16)] += weight[size_t(p)] = moe::exp_of_negative(weight[size_t(p)] - top);
      const float keep = begin == 0 ? 0.0f : moe::exp_of_negative(before - top);
      total = total * keep + sum16(sums);
      for (int first = 0; first < dim; first += 64) {
        std::vector<float> scaled;
        for (int64_t p = 0; p < n; ++p) scaled.push_back(weight[size_t(p)] * vals.scale(begin + p, first / 64));
        std::vector<int> codes;
        const float value_step = in_16_bits(scaled, codes);
        for (int i = first; i < std::min(first + 64, dim); ++i) {
          int sum = 0;
          for (int64_t p = 0; p < n; ++p) sum += codes[size_t(p)] * vals.code(begin + p, i);
          acc[i] = acc[i] * keep + float(sum) * value_step;
        }
      }
    }
    task.top[g] = top;
    task.total[g] = total;
  }
}

// Blocks of random positions; scales and codes beyond them are NaN and -1.
std::unique_ptr<Bytes> blocks8(int dim, int64_t length, moe::KvPart part) {
  const int64_t size = (length + 15) / 16 * moe::kv_block_bytes(dim);
  auto blocks = std::make_unique<Bytes>(size, 0);
  std::fill(blocks->data, blocks->data + size, uint8_t(0xff));
  for (int64_t p = 0; p < length; ++p) {
    auto row = values(dim);
    for (float& v : row) v *= 3.0f * float(p % 5);  // each fifth position is zero
    moe::kv_store(row.data(), dim, part, blocks->data + p / 16 * moe::kv_block_bytes(dim), int(p % 16));
  }
  return blocks;
}

void attends8(int heads, int dim, int64_t length) {
  const auto q = values(heads * dim);
  const auto keys = blocks8(dim, length, moe::KvPart::keys), vals = blocks8(dim, length, moe::KvPart::values);
  const auto run = [&](moe::AttendFn attend) {
    std::vector<float> out(static_cast<size_t>(heads * (dim + 2)), NAN);
    float* const acc = out.data();
    float* const top = acc + heads * dim;
    attend(moe::AttendTask{q.data(), keys->data, vals->data, length, length, heads, dim, 1.0f / std::sqrt(float(dim)),
                           acc, top, top + heads});
    return out;
  };
  const auto expected = run(attend8_in_order);
  const auto compare = [&](const moe::AttentionKernels& isa) {
    const auto out = run(isa.attend_8bit);
    expect(!std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)), "8-bit attention in order", heads,
           dim, length, 0);
  };
  compare(moe::kPortableAttention);
#if defined(MOE_X86)
  if (moe_set_isa(MOE_ISA_AVX2) == MOE_OK) compare(moe::kAvx2Attention);
  if (moe_set_isa(MOE_ISA_AVX512) == MOE_OK) compare(moe::kAvx512Attention);
#endif
}

template <class T>
bool finite(const std::vector<T>& v) {
  for (T value : v)
    if (!std::isfinite(moe::to_float(value))) return false;
  return true;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(T));
}

template <class T>
T nan_of() {
  T v;
  moe::round_to(NAN, &v);
  return v;
}

struct Shape {
  int64_t hidden, heads, kv_heads, dim, intermediate;
  int32_t experts, top_k;
};

// Everything that one token in a layer writes.
template <class T>
struct Written {
  std::vector<T> keys, values, residual, normed, out;
  std::vector<int64_t> index;
  std::vector<float> weights;

  // Positions from `length` on are NaN: nothing may read them before the token is appended.
  Written(const Shape& s, int64_t capacity, int64_t length, const std::vector<T>& k, const std::vector<T>& v)
      : keys(k), values(v), residual(size_t(s.hidden), nan_of<T>()), normed(residual), out(residual),
        index(size_t(s.top_k), -1), weights(size_t(s.top_k), NAN) {
    for (int64_t at = 0; at < s.kv_heads * capacity; ++at)
      for (int64_t i = 0; i < s.dim && at % capacity >= length; ++i)
        keys[size_t(at * s.dim + i)] = values[size_t(at * s.dim + i)] = nan_of<T>();
  }

  // Returns a token that writes to these buffers.
  moe::LayerToken token(const std::vector<T>& x, const std::vector<T>& cos, const std::vector<T>& sin, int64_t capacity,
                        int64_t length) {
    return {
        x.data(),        cos.data(),    sin.data(),   {keys.data(), values.data(), capacity, length, MOE_KV_PLAIN, 0},
        residual.data(), normed.data(), index.data(), weights.data()};
  }

  bool operator==(const Written& o) const {
    return same(keys, o.keys) && same(values, o.values) && same(residual, o.residual) && same(normed, o.normed) &&
           same(out, o.out) && same(index, o.index) && same(weights, o.weights);
  }
};

// One token's input of a layer.
template <class T>
struct Input {
  const std::vector<T>&x, &cos, &sin;
  int64_t capacity, length;
};

template <class T>
void whole_token(const Shape& s, const moe_layer& layer, const uint8_t* const* blobs, const Input<T>& input,
                 Written<T> w, const Written<T>& first) {
  const auto& [x, cos, sin, capacity, length] = input;
  const auto check = [&](bool ok, const char* what) {
    expect(ok, what, -1, s.hidden, int64_t(sizeof(T)), input.length);
  };
  std::vector<T> embedding(3 * x.size()), room(3 * x.size()), normed(x.size()), out(x.size()), logits(5);
  std::copy(x.begin(), x.end(), embedding.begin() + 2 * int64_t(x.size()));
  const auto head = narrow<uint16_t>(5 * s.hidden);
  const uint8_t* missing[8] = {};
  const moe_layer* layers[] = {&layer};
  moe_model model = {layers, embedding.data(), layer.attention_norm, 3, {}, 1e-5f, 1, s.experts, s.top_k};
  void *keys[] = {w.keys.data()}, *values[] = {w.values.data()};
  moe_token token = {2,           cos.data(),     sin.data(),       keys,       values, &capacity, length, missing,
                     room.data(), w.index.data(), w.weights.data(), out.data(), 0,      0};
  check(moe_token_step(&model, &token) == MOE_MISSING && token.halves_done == 1, "experts are asked for");
  check(same(w.index, first.index) && same(w.keys, first.keys) && same(w.values, first.values), "up to the router");
  token.blobs = blobs;
  check(moe_token_step(&model, &token) == MOE_OK, "token goes on");
  moe::rms_norm_row(first.out.data(), static_cast<const T*>(layer.attention_norm), 1e-5f, s.hidden, normed.data());
  check(same(out, normed), "token without a head");
  model.head = {reinterpret_cast<const uint8_t*>(head.data()), 5, nullptr, MOE_HEAD_BF16, 0};
  token.out = logits.data();
  check(moe_token_step(&model, &token) == MOE_OK && finite(logits), "token with a head");
  token.id = 3, token.halves_done = 0;
  check(moe_token_step(&model, &token) == MOE_E_INDEX, "token outside of the vocabulary refused");
}

template <class T>
void layers(const Shape& s, int32_t gate_up, int32_t down, int64_t capacity, int64_t length) {
  constexpr int32_t kQ4 = moe::kQ4G64S8;
  const int64_t wide = s.heads * s.dim, kv = s.kv_heads * s.dim, cached = kv * capacity;
  const auto check = [&](bool ok, const char* what) {
    expect(ok, what, gate_up, s.hidden, int64_t(sizeof(T)), length);
  };
  Bytes q(moe_packed_bytes(kQ4, wide, s.hidden), 1), k(moe_packed_bytes(kQ4, kv, s.hidden), 0),
      v(moe_packed_bytes(kQ4, kv, s.hidden), 7), o(moe_packed_bytes(kQ4, s.hidden, wide), 33);
  set_heads(q.data, kQ4, wide, s.hidden);
  set_heads(k.data, kQ4, kv, s.hidden);
  set_heads(v.data, kQ4, kv, s.hidden);
  set_heads(o.data, kQ4, s.hidden, wide);
  const auto x = narrow<T>(s.hidden), cos = narrow<T>(s.dim, 0.5f), sin = narrow<T>(s.dim, 0.5f);
  const auto first_norm = narrow<T>(s.hidden), second_norm = narrow<T>(s.hidden);
  const auto router = narrow<T>(s.experts * s.hidden, 0.1f), keys = narrow<T>(cached), vals = narrow<T>(cached);
  const moe_layer layer = {{{q.data, wide, nullptr, kQ4, 0},
                            {k.data, kv, nullptr, kQ4, 0},
                            {v.data, kv, nullptr, kQ4, 0},
                            {o.data, s.hidden, nullptr, kQ4, 0},
                            s.hidden,
                            s.dim,
                            1.0f / std::sqrt(float(s.dim)),
                            sizeof(T) == 2 ? MOE_BF16 : MOE_F32},
                           first_norm.data(),
                           second_norm.data(),
                           router.data(),
                           s.intermediate,
                           1e-5f,
                           1e-6f,
                           s.experts,
                           s.top_k,
                           gate_up,
                           down};

  std::vector<T> attended;
  std::unique_ptr<Written<T>> first;
  const uint8_t* blobs[8] = {};
  std::vector<std::unique_ptr<Bytes>> experts;
  for (int isa = MOE_ISA_AVX512; isa >= MOE_ISA_PORTABLE; --isa) {
    if (moe_set_isa(isa) != MOE_OK) continue;
    Written<T> step(s, capacity, length, keys, vals);
    const moe_kv cache = {step.keys.data(), step.values.data(), capacity, length, MOE_KV_PLAIN, 0};
    check(moe_attention_step(&layer.attention, x.data(), cos.data(), sin.data(), &cache, step.out.data()) == MOE_OK,
          "attention");
    check(finite(step.out), "attention is finite");
    if (attended.empty()) attended = step.out;
    check(same(attended, step.out), "same bits of attention");

    Written<T> w(s, capacity, length, keys, vals);
    const moe::LayerToken token = w.token(x, cos, sin, capacity, length);
    check(moe::begin_layer(layer, token) == MOE_OK, "layer begin");
    float sum = 0.0f;
    for (size_t i = 0; i < w.index.size(); ++i) {
      sum += w.weights[i];
      check(w.index[i] >= 0 && w.index[i] < s.experts && (i == 0 || w.index[i] != w.index[i - 1]), "expert numbers");
      if (w.index[i] < 0 || w.index[i] >= s.experts) return;
      if (blobs[w.index[i]]) continue;  // experts that are not chosen stay null
      experts.push_back(std::make_unique<Bytes>(moe_expert_bytes(gate_up, down, s.hidden, s.intermediate), int(i)));
      uint8_t* blob = experts.back()->data;
      set_heads(blob, gate_up, 2 * ((s.intermediate + 31) / 32 * 32), s.hidden);
      set_heads(blob + 2 * moe_packed_bytes(gate_up, s.intermediate, s.hidden), down, s.hidden, s.intermediate);
      blobs[w.index[i]] = blob;
    }
    check(std::fabs(sum - 1.0f) < 1e-5f, "router weights sum to 1");
    check(moe::end_layer(layer, token, blobs, w.out.data()) == MOE_OK, "layer end");
    check(finite(w.residual) && finite(w.normed) && finite(w.weights) && finite(w.out), "layer is finite");
    for (int64_t at = 0; at < s.kv_heads * capacity; ++at)
      check(std::isfinite(moe::to_float(w.keys[size_t(at * s.dim)])) == (at % capacity <= length), "appended in place");
    if (!first) first = std::make_unique<Written<T>>(w);
    check(w == *first, "same bits of a layer");
  }

  const auto refused = [&](const moe_layer& bad, int64_t room, int32_t error, const char* what) {
    Written<T> w(s, capacity, length, keys, vals);
    const Written<T> before = w;
    const moe_kv cache = {w.keys.data(), w.values.data(), room, length, MOE_KV_PLAIN, 0};
    check(moe_attention_step(&bad.attention, x.data(), cos.data(), sin.data(), &cache, w.out.data()) == error ||
              bad.top_k > bad.experts,
          what);
    if (bad.top_k > bad.experts) w = before;
    check(moe::begin_layer(bad, w.token(x, cos, sin, room, length)) == error, what);
    check(w == before, "a refusal has written nothing");
  };
  refused(layer, length, MOE_E_SIZE, "full cache refused");
  moe_layer bad = layer;
  bad.attention.head_dim = 24;
  refused(bad, capacity, MOE_E_SIZE, "head width refused");
  bad = layer;
  bad.attention.dtype = 7;
  refused(bad, capacity, MOE_E_SIZE, "dtype refused");
  bad = layer;
  bad.attention.o.packing = 99;
  refused(bad, capacity, MOE_E_PACKING, "packing refused");
  bad = layer;
  bad.top_k = s.experts + 1;
  refused(bad, capacity, MOE_E_SIZE, "top_k refused");
  for (const int32_t format : {int32_t(MOE_KV_8BIT), 2}) {  // 8 bits: the capacity is no multiple of 16
    Written<T> w(s, capacity, length, keys, vals);
    const Written<T> before = w;
    const moe_kv cache = {w.keys.data(), w.values.data(), capacity, length, format, 0};
    check(moe_attention_step(&layer.attention, x.data(), cos.data(), sin.data(), &cache, w.out.data()) == MOE_E_SIZE &&
              w == before,
          "format of the cache refused");
  }
  if (!first) return;
  whole_token<T>(s, layer, blobs, {x, cos, sin, capacity, length}, {s, capacity, length, keys, vals}, *first);
  blobs[first->index[0]] = nullptr;
  const auto before = first->out;
  check(moe::end_layer(layer, first->token(x, cos, sin, capacity, length), blobs, first->out.data()) == MOE_E_INDEX &&
            same(before, first->out),
        "layer without its expert refused");
}

}  // namespace

int main() {
  const int64_t shapes[][2] = {{1, 1}, {31, 63}, {32, 64}, {33, 65}, {70, 192}, {96, 257}, {17, 700}};
  for (int threads : {1, 3}) {
    moe_set_threads(threads);
    for (int32_t packing = 0; packing < moe::kPackings; ++packing) {
      for (const auto& [rows, columns] : shapes)
        for (int64_t tokens : {1, 2, 3, 4, 5, 8, 9, 13, 49}) linears(packing, rows, columns, tokens);
      for (const auto& [hidden, intermediate] : shapes)
        for (int64_t tokens : {1, 2, 7, 50})
          experts(packing, (packing + 1) % moe::kPackings, hidden, intermediate, tokens);
    }
    for (const auto& [rows, columns] : shapes)
      for (int64_t tokens : {1, 3, 8, 9}) bf16(rows, columns, tokens);
    const int64_t capacity = 600;  // two spans of positions (attention.cpp)
    for (const Shape& shape : {Shape{192, 6, 2, 32, 65, 8, 2}, Shape{77, 10, 2, 48, 33, 3, 2}})
      for (const auto& [gate_up, down] : {std::pair{moe::kQ2G16S4, moe::kQ3G32S4}, {moe::kQ3G64S8, moe::kQ2G16S8}})
        for (int64_t length : {int64_t(0), int64_t(1), int64_t(511), capacity - 1}) {
          layers<float>(shape, gate_up, down, capacity, length);
          layers<uint16_t>(shape, gate_up, down, capacity, length);
        }
    layers<float>({192, 6, 2, 32, 65, 8, 2}, moe::kQ2G16S4, moe::kQ3G32S4, 1, 0);
  }
  for (int heads : {1, 2, 3, 4, 5, 9})
    for (int dim : {16, 80, 128})
      for (int64_t length : {1, 2, 3, 15, 16, 17, 63, 64, 65, 130, 512}) {
        attends<float>(heads, dim, length);
        attends<uint16_t>(heads, dim, length);
        attends8(heads, dim, length);
      }
  moe_set_isa(MOE_ISA_AUTO);
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) callers.emplace_back([] { moe_empty_region_us(2000); });
  for (auto& caller : callers) caller.join();
  Bytes words(1000, 3);
  const uint8_t* buffers[] = {words.data};
  moe_stream_sum(buffers, 1, 1000, 300);
  expect(moe_linear(99, nullptr, 1, 1, nullptr, nullptr, 1) == MOE_E_PACKING, "bad packing", 99, 0, 0, 0);
  expect(moe_linear(0, nullptr, -1, 1, nullptr, nullptr, 1) == MOE_E_SIZE, "bad size", 0, 0, 0, 0);
  expect(moe_packed_bytes(0, -1, 1) == -1 && moe_packing_id("tile32-q9") == -1, "bad arguments", 0, 0, 0, 0);
  std::printf("%s\n", failures ? "FAILED" : "all native kernel checks passed");
  return failures != 0;
}
