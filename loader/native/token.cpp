// One token through a whole model, until it needs an expert that is not in memory.
#include <cstring>
#include <new>
#include <vector>

#include "layer.h"
#include "moe_kernels.h"
#include "rounding.h"

using namespace moe;

namespace {

// The logits of one token, summed in fp32 and rounded to T.
template <class T>
int32_t head(const moe_model& model, const T* x, T* logits) {
  const int64_t hidden = model.layers[0]->attention.hidden;
  std::vector<float> room(size_t(hidden + model.head.rows));
  float* const y = room.data() + hidden;
  for (int64_t i = 0; i < hidden; ++i) room[size_t(i)] = to_float(x[i]);
  const int32_t error =
      model.head.packing == MOE_HEAD_BF16
          ? moe_linear_bf16(reinterpret_cast<const uint16_t*>(model.head.tiles), model.head.rows, hidden, room.data(),
                            y, 1)
          : moe_linear(model.head.packing, model.head.tiles, model.head.rows, hidden, room.data(), y, 1);
  if (error == MOE_OK)
    for (int64_t i = 0; i < model.head.rows; ++i) round_to(y[i], logits + i);
  return error;
}

template <class T>
int32_t step(const moe_model& model, moe_token& token) {
  const int64_t hidden = model.layers[0]->attention.hidden;
  T* const x = static_cast<T*>(token.room);
  T* const residual = x + hidden;
  T* const normed = residual + hidden;
  if (token.halves_done == 0)
    std::memcpy(x, static_cast<const T*>(model.embedding) + token.id * hidden, size_t(hidden) * sizeof(T));
  for (; token.halves_done < 2 * model.count; ++token.halves_done) {
    const int32_t number = token.halves_done / 2;
    const moe_layer& layer = *model.layers[number];
    if (layer.top_k > model.top_k || layer.experts > model.experts) return MOE_E_SIZE;
    const moe_kv cache = {token.keys[number], token.values[number], token.capacity[number],
                          token.length,       token.kv_format,      0};
    const LayerToken at = {x,
                           token.cos,
                           token.sin,
                           cache,
                           residual,
                           normed,
                           token.index + number * model.top_k,
                           token.weights + number * model.top_k};
    int32_t error;
    if (token.halves_done % 2 == 0) {
      error = begin_layer(layer, at);
    } else {
      const uint8_t* const* blobs = token.blobs + number * model.experts;
      for (int k = 0; k < layer.top_k; ++k)
        if (!blobs[at.index[k]]) return MOE_MISSING;
      error = end_layer(layer, at, blobs, x);
    }
    if (error) return error;
  }
  rms_norm_row(x, static_cast<const T*>(model.norm), model.eps, hidden, normed);
  if (model.head.tiles) return head(model, normed, static_cast<T*>(token.out));
  std::memcpy(token.out, normed, size_t(hidden) * sizeof(T));
  return MOE_OK;
}

}  // namespace

extern "C" {

int32_t moe_token_step(const moe_model* model, moe_token* token) {
  if (model->count <= 0 || token->halves_done < 0) return MOE_E_SIZE;
  if (token->id < 0 || token->id >= model->vocabulary) return MOE_E_INDEX;
  try {
    if (model->layers[0]->attention.dtype == MOE_BF16) return step<uint16_t>(*model, *token);
    if (model->layers[0]->attention.dtype == MOE_F32) return step<float>(*model, *token);
  } catch (const std::bad_alloc&) {
    return MOE_E_MEMORY;
  }
  return MOE_E_SIZE;
}

}  // extern "C"
