#include "layer.h"

#include <cmath>
#include <new>
#include <vector>

#include "attention.h"
#include "dispatch.h"
#include "rounding.h"

using namespace moe;

namespace {

float dot(const uint16_t* w, const float* x, int64_t n) {
  float y;
  kernels().dot_bf16(w, x, n, 1, &y, 1);
  return y;
}

float dot(const float* w, const float* x, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += double(w[i]) * double(x[i]);
  return float(sum);
}

// MixtralTopKRouter: logits of T, softmax in fp32, the top_k largest (of equal ones the first), scaled to a sum of 1.
template <class T>
void route(const T* x, const T* router, int64_t hidden, int experts, int top_k, int64_t* index, float* weights) {
  std::vector<float> wide(static_cast<size_t>(hidden)), p(static_cast<size_t>(experts));
  for (int64_t i = 0; i < hidden; ++i) wide[size_t(i)] = to_float(x[i]);
  float largest = -INFINITY, sum = 0.0f, chosen = 0.0f;
  for (int e = 0; e < experts; ++e) {
    p[size_t(e)] = rounded<T>(dot(router + e * hidden, wide.data(), hidden));
    largest = p[size_t(e)] > largest ? p[size_t(e)] : largest;
  }
  for (float& v : p) sum += v = exp_of_negative(v - largest);
  for (int k = 0; k < top_k; ++k) {
    int best = -1;
    for (int e = 0; e < experts; ++e) {
      bool taken = false;
      for (int i = 0; i < k; ++i) taken = taken || index[i] == e;
      // !(<=) instead of >: a NaN logit makes all values NaN, and some expert must still be chosen.
      if (!taken && (best < 0 || !(p[size_t(e)] <= p[size_t(best)]))) best = e;
    }
    index[k] = best;
    weights[k] = p[size_t(best)] / sum;
    chosen += weights[k];
  }
  for (int k = 0; k < top_k; ++k) weights[k] /= chosen;
}

template <class T>
int32_t begin(const moe_layer& layer, const LayerToken& token) {
  const int64_t hidden = layer.attention.hidden;
  const T* const x = static_cast<const T*>(token.x);
  T* const residual = static_cast<T*>(token.residual);
  T* const normed = static_cast<T*>(token.normed);
  rms_norm_row(x, static_cast<const T*>(layer.attention_norm), layer.attention_eps, hidden, normed);
  if (const int32_t error = moe_attention_step(&layer.attention, normed, token.cos, token.sin, &token.cache, residual))
    return error;
  for (int64_t i = 0; i < hidden; ++i) round_to(to_float(x[i]) + to_float(residual[i]), residual + i);
  rms_norm_row<T>(residual, static_cast<const T*>(layer.experts_norm), layer.experts_eps, hidden, normed);
  route<T>(normed, static_cast<const T*>(layer.router), hidden, layer.experts, layer.top_k, token.index, token.weights);
  return MOE_OK;
}

template <class T>
int32_t end(const moe_layer& layer, const LayerToken& token, const uint8_t* const* blobs, T* out) {
  const int64_t hidden = layer.attention.hidden;
  const T* const residual = static_cast<const T*>(token.residual);
  const T* const normed = static_cast<const T*>(token.normed);
  std::vector<float> room(size_t(2 * hidden));
  float* const x = room.data();
  float* const sum = x + hidden;
  for (int64_t i = 0; i < hidden; ++i) x[i] = to_float(normed[i]);
  const moe_layer_experts experts = {
      blobs, hidden, layer.intermediate, layer.experts, layer.gate_up_packing, layer.down_packing, 0};
  const moe_routing routing = {token.index, token.weights, 1, layer.top_k, 0};
  if (const int32_t error = moe_experts_topk(&experts, &routing, x, sum, 0)) return error;
  for (int64_t i = 0; i < hidden; ++i) round_to(to_float(residual[i]) + rounded<T>(sum[i]), out + i);
  return MOE_OK;
}

}  // namespace

namespace moe {

int32_t begin_layer(const moe_layer& layer, const LayerToken& token) {
  if (layer.experts <= 0 || layer.top_k <= 0 || layer.top_k > layer.experts) return MOE_E_SIZE;
  if (const int32_t error = check_attention(layer.attention, token.cache)) return error;
  try {
    if (layer.attention.dtype == MOE_BF16) return begin<uint16_t>(layer, token);
    if (layer.attention.dtype == MOE_F32) return begin<float>(layer, token);
  } catch (const std::bad_alloc&) {
    return MOE_E_MEMORY;
  }
  return MOE_E_SIZE;
}

int32_t end_layer(const moe_layer& layer, const LayerToken& token, const uint8_t* const* blobs, void* out) {
  try {
    if (layer.attention.dtype == MOE_BF16) return end(layer, token, blobs, static_cast<uint16_t*>(out));
    if (layer.attention.dtype == MOE_F32) return end(layer, token, blobs, static_cast<float*>(out));
  } catch (const std::bad_alloc&) {
    return MOE_E_MEMORY;
  }
  return MOE_E_SIZE;
}

}  // namespace moe
