// A decoder layer for one token in two calls. The caller fetches the experts' bytes in between.
#pragma once
#include <cstdint>

#include "moe_kernels.h"

namespace moe {

// x, residual, normed [hidden], cos, sin [head_dim] have the attention's dtype.
struct LayerToken {
  const void *x, *cos, *sin;
  moe_kv cache;
  void *residual, *normed;  // first residual sum; input of router and experts
  int64_t* index;           // [top_k]
  float* weights;           // [top_k]
};

// Norm, attention, residual sum, norm and router: writes the cache, residual, normed, index and weights. Returns a
// status.
int32_t begin_layer(const moe_layer& layer, const LayerToken& token);

// out [hidden] = residual + chosen experts. blobs: [experts]. Returns a status.
int32_t end_layer(const moe_layer& layer, const LayerToken& token, const uint8_t* const* blobs, void* out);

}  // namespace moe
