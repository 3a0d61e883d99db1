// A decoder layer for one token in two calls, between which the experts' bytes are fetched.
#include <cmath>
#include <new>
#include <vector>

#include "attention.h"
#include "dispatch.h"
#include "moe_kernels.h"
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

// MixtralTopKRouter: logits of T, softmax in fp32, the top_k largest (of equal ones the first), scaled to sum 1.
template <class T>
void route(const T* x, const T* router, int64_t hidden, int experts, int top_k, int64_t* index, float* weights) {
  std::vector<float> wide(static_cast<size_t>(hidden)), p(static_cast<size_t>(experts));
  for (int64_t i = 0; i < hidden; ++i) wide[size_t(i)] = to_float(x[i]);
  float most = -INFINITY, sum = 0.0f, chosen = 0.0f;
  for (int e = 0; e < experts; ++e) {
    p[size_t(e)] = rounded<T>(dot(router + e * hidden, wide.data(), hidden));
    most = p[size_t(e)] > most ? p[size_t(e)] : most;
  }
  for (float& v : p) sum += v = exp_of_negative(v - most);
  for (int k = 0; k < top_k; ++k) {
    int best = -1;
    for (int e = 0; e < experts; ++e) {
      bool taken = false;
      for (int i = 0; i < k; ++i) taken = taken || index[i] == e;
      // !(<=) instead of >: with a NaN among the logits everything is NaN, and some expert must be named.
      if (!taken && (best < 0 || !(p[size_t(e)] <= p[size_t(best)]))) best = e;
    }
    index[k] = best;
    weights[k] = p[size_t(best)] / sum;
    chosen += weights[k];
  }
  for (int k = 0; k < top_k; ++k) weights[k] /= chosen;
}

template <class T>
int32_t begin_layer(const moe_layer& layer, const T* x, const void* cos, const void* sin, void* keys, void* values,
                    int64_t capacity, int64_t length, T* residual, T* normed, int64_t* index, float* weights) {
  const int64_t hidden = layer.attention.hidden;
  rms_norm_row(x, static_cast<const T*>(layer.attention_norm), layer.attention_eps, hidden, normed);
  if (const int32_t error =
          moe_attention_step(&layer.attention, normed, cos, sin, keys, values, capacity, length, residual))
    return error;
  for (int64_t i = 0; i < hidden; ++i) round_to(to_float(x[i]) + to_float(residual[i]), residual + i);
  rms_norm_row<T>(residual, static_cast<const T*>(layer.experts_norm), layer.experts_eps, hidden, normed);
  route<T>(normed, static_cast<const T*>(layer.router), hidden, layer.experts, layer.top_k, index, weights);
  return MOE_OK;
}

template <class T>
int32_t end_layer(const uint8_t* const* blobs, const moe_layer& layer, const int64_t* index, const float* weights,
                  const T* residual, const T* normed, T* out) {
  const int64_t hidden = layer.attention.hidden;
  std::vector<float> room(size_t(2 * hidden));
  float* const x = room.data();
  float* const sum = x + hidden;
  for (int64_t i = 0; i < hidden; ++i) x[i] = to_float(normed[i]);
  if (const int32_t error =
          moe_experts_topk(blobs, layer.experts, layer.gate_up_packing, layer.down_packing, hidden, layer.intermediate,
                           index, weights, layer.top_k, x, sum, 1, 0))
    return error;
  for (int64_t i = 0; i < hidden; ++i) round_to(to_float(residual[i]) + rounded<T>(sum[i]), out + i);
  return MOE_OK;
}

}  // namespace

extern "C" {

int32_t moe_layer_begin(const moe_layer* layer, const void* x, const void* cos, const void* sin, void* keys,
                        void* values, int64_t capacity, int64_t length, void* residual, void* normed, int64_t* index,
                        float* weights) {
  if (layer->experts <= 0 || layer->top_k <= 0 || layer->top_k > layer->experts) return MOE_E_SIZE;
  if (const int32_t error = check_attention(layer->attention, capacity, length)) return error;
  try {
    if (layer->attention.dtype == MOE_BF16)
      return begin_layer(*layer, static_cast<const uint16_t*>(x), cos, sin, keys, values, capacity, length,
                         static_cast<uint16_t*>(residual), static_cast<uint16_t*>(normed), index, weights);
    if (layer->attention.dtype == MOE_F32)
      return begin_layer(*layer, static_cast<const float*>(x), cos, sin, keys, values, capacity, length,
                         static_cast<float*>(residual), static_cast<float*>(normed), index, weights);
  } catch (const std::bad_alloc&) {
    return MOE_E_MEMORY;
  }
  return MOE_E_SIZE;
}

int32_t moe_layer_end(const uint8_t* const* blobs, const moe_layer* layer, const int64_t* index, const float* weights,
                      const void* residual, const void* normed, void* out) {
  try {
    if (layer->attention.dtype == MOE_BF16)
      return end_layer(blobs, *layer, index, weights, static_cast<const uint16_t*>(residual),
                       static_cast<const uint16_t*>(normed), static_cast<uint16_t*>(out));
    if (layer->attention.dtype == MOE_F32)
      return end_layer(blobs, *layer, index, weights, static_cast<const float*>(residual),
                       static_cast<const float*>(normed), static_cast<float*>(out));
  } catch (const std::bad_alloc&) {
    return MOE_E_MEMORY;
  }
  return MOE_E_SIZE;
}

}  // extern "C"
