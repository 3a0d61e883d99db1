// The fused expert call: quantizes once, computes gate, up and SwiGLU for 64 rows at a time, then down with the
// router's weights.
#include <cstring>
#include <new>
#include <vector>

#include "dispatch.h"
#include "moe_kernels.h"
#include "pool.h"

using namespace moe;

namespace {

constexpr int64_t kMaxPairs = 1024;  // (token, expert) pairs of one pass: their h takes 22 MB with 14336 columns

struct Call {
  const IsaKernels* isa;
  int64_t hidden, intermediate;
  int64_t hidden_blocks, intermediate_blocks;
  const ActBlock* x;  // of each expert [hidden_blocks][token_count]; with one token all experts share it
  ActBlock* h;        // of each expert [intermediate_blocks][token_count]
  int64_t x_tokens;   // ActBlocks of x to skip for each pair and superblock: 1, or 0 if all experts share x
  float* out;
};

int64_t gate_up_bytes(const Call& c, const moe_expert& e) {
  return 2 * tiles_of(c.intermediate) * tile_bytes(Packing(e.gate_up_packing), c.hidden);
}

// Computes columns [64 * block, 64 * block + 64) of one expert's h (two tile pairs) for all its tokens, quantized.
void gate_up_block(const Call& c, const moe_expert& e, int64_t first_pair, int64_t block) {
  const auto packing = Packing(e.gate_up_packing);
  const int64_t bytes = tile_bytes(packing, c.hidden), tiles = tiles_of(c.intermediate);
  const ActBlock* x = c.x + first_pair * c.x_tokens * c.hidden_blocks;
  alignas(64) float gate[kMaxTokens * kTileRows], up[kMaxTokens * kTileRows], h[kMaxTokens * 64];
  for (int64_t begin = 0; begin < e.token_count; begin += kMaxTokens) {
    const int n = int(e.token_count - begin < kMaxTokens ? e.token_count - begin : kMaxTokens);
    const Activations panel = {x + begin, e.token_count};
    for (int half = 0; half < 2; ++half) {
      const int64_t tile = 2 * block + half;
      const int64_t row = tile * kTileRows;
      const int64_t rows = tile >= tiles ? 0 : c.intermediate - row < kTileRows ? c.intermediate - row : kTileRows;
      if (rows > 0) {
        const uint8_t* p = e.blob + 2 * tile * bytes;
        c.isa->tile[packing](p, c.hidden_blocks, panel, n, gate);
        c.isa->tile[packing](p + bytes, c.hidden_blocks, panel, n, up);
        for (int t = 0; t < n; ++t)
          c.isa->swiglu(gate + t * kTileRows, up + t * kTileRows, h + t * 64 + half * kTileRows, kTileRows);
      }
      for (int t = 0; t < n; ++t)
        for (int64_t i = rows; i < kTileRows; ++i) h[t * 64 + half * kTileRows + i] = 0.0f;
    }
    ActBlock* to = c.h + first_pair * c.intermediate_blocks + block / 4 * e.token_count + begin;
    for (int t = 0; t < n; ++t) c.isa->quantize_block(h + t * 64, to + t, int(block % 4));
  }
}

// Computes one tile of output rows for all experts in order. This fixes the order of the sum.
void down_tile(const Call& c, const moe_expert* experts, int count, int64_t tile) {
  const int64_t row = tile * kTileRows;
  const int64_t rows = c.hidden - row < kTileRows ? c.hidden - row : kTileRows;
  alignas(64) float y[kMaxTokens * kTileRows];
  const ActBlock* h = c.h;
  for (int i = 0; i < count; ++i) {
    const moe_expert& e = experts[i];
    const auto packing = Packing(e.down_packing);
    const uint8_t* p = e.blob + gate_up_bytes(c, e) + tile * tile_bytes(packing, c.intermediate);
    for (int64_t begin = 0; begin < e.token_count; begin += kMaxTokens) {
      const int n = int(e.token_count - begin < kMaxTokens ? e.token_count - begin : kMaxTokens);
      c.isa->tile[packing](p, c.intermediate_blocks, {h + begin, e.token_count}, n, y);
      for (int t = 0; t < n; ++t) {
        float* out = c.out + e.tokens[begin + t] * c.hidden + row;
        const float weight = e.weights[begin + t];
        for (int64_t r = 0; r < rows; ++r) out[r] += weight * y[t * kTileRows + r];
      }
    }
    h += e.token_count * c.intermediate_blocks;
  }
}

// Copies each expert's tokens side by side.
void gather(Pool& pool, const Call& c, const moe_expert* experts, int count, const ActBlock* act, int64_t tokens,
            ActBlock* to) {
  for (int i = 0; i < count; ++i) {
    const moe_expert& e = experts[i];
    pool.run(c.hidden_blocks, [&](int64_t b) {
      for (int64_t t = 0; t < e.token_count; ++t) to[b * e.token_count + t] = act[b * tokens + e.tokens[t]];
    });
    to += e.token_count * c.hidden_blocks;
  }
}

void run_pass(Pool& pool, const Call& c, const moe_expert* experts, int count, int64_t pairs) {
  const int64_t blocks = (c.intermediate + 63) / 64;
  ActBlock* last = c.h;  // clears columns of the last superblock that no block of rows writes
  for (int i = 0; i < count && blocks % 4; ++i) {
    const int64_t n = experts[i].token_count;
    last += n * c.intermediate_blocks;
    std::memset(last - n, 0, size_t(n) * sizeof(ActBlock));
  }
  // With few tokens a chunk of 128 rows reads about 300 KiB; with many tokens 64 rows are enough work.
  const int64_t step = pairs <= 8 * count ? 2 : 1;
  const int64_t chunks = (blocks + step - 1) / step;
  pool.run(chunks * count, [&](int64_t item) {
    const int64_t e = item / chunks;
    int64_t first_pair = 0;
    for (int64_t i = 0; i < e; ++i) first_pair += experts[i].token_count;
    for (int64_t b = item % chunks * step; b < (item % chunks + 1) * step && b < blocks; ++b)
      gate_up_block(c, experts[e], first_pair, b);
  });
  pool.run(tiles_of(c.hidden), [&](int64_t tile) { down_tile(c, experts, count, tile); });
}

int32_t check(const moe_expert* experts, int32_t count, int64_t tokens) {
  for (int32_t i = 0; i < count; ++i) {
    const moe_expert& e = experts[i];
    if (!known_packing(e.gate_up_packing) || !known_packing(e.down_packing)) return MOE_E_PACKING;
    if (e.token_count < 0) return MOE_E_SIZE;
    if (e.token_count > 0 && !e.blob) return MOE_E_INDEX;
    for (int64_t t = 0; t < e.token_count; ++t)
      if (e.tokens[t] < 0 || e.tokens[t] >= tokens) return MOE_E_INDEX;
  }
  return MOE_OK;
}

}  // namespace

extern "C" {

int32_t moe_experts(const moe_expert* experts, int32_t count, int64_t hidden, int64_t intermediate, const float* x,
                    float* out, int64_t tokens, int32_t accumulate) {
  if (count < 0 || hidden < 0 || intermediate < 0 || tokens < 0 || tokens > INT32_MAX) return MOE_E_SIZE;
  if (const int32_t error = check(experts, count, tokens)) return error;
  if (tokens == 0) return MOE_OK;
  Pool& pool = Pool::get();
  std::lock_guard<std::mutex> lock(pool.mutex());
  pool.prepare();
  // Pairs of the largest pass: whole experts up to kMaxPairs, or one expert alone.
  int64_t max_pairs = 0, all = 0;
  for (int32_t i = 0; i < count; ++i) {
    max_pairs = experts[i].token_count > max_pairs ? experts[i].token_count : max_pairs;
    all += experts[i].token_count;
  }
  max_pairs = max_pairs > kMaxPairs ? max_pairs : kMaxPairs;
  max_pairs = all < max_pairs ? all : max_pairs;
  const int64_t blocks = blocks_of(hidden), h_blocks = blocks_of(intermediate);
  const auto room = [&](int slot, int64_t n) {
    return static_cast<ActBlock*>(pool.scratch(slot, size_t(n + 1) * sizeof(ActBlock)));
  };
  ActBlock* act = room(0, tokens * blocks);
  ActBlock* h = room(1, max_pairs * h_blocks);
  ActBlock* panels = tokens > 1 ? room(2, max_pairs * blocks) : act;
  if (!act || !h || !panels) return MOE_E_MEMORY;
  const Call c{&kernels(), hidden, intermediate, blocks, h_blocks, panels, h, tokens > 1 ? 1 : 0, out};
  const auto quantize = [&](int64_t t) { c.isa->quantize(x + t * hidden, hidden, act + t, tokens); };
  if (tokens < 4) {
    for (int64_t t = 0; t < tokens; ++t) quantize(t);
  } else {
    pool.run(tokens, quantize);
  }
  if (!accumulate) std::memset(out, 0, size_t(tokens * hidden) * sizeof(float));
  for (int32_t begin = 0; begin < count;) {
    int32_t end = begin;
    int64_t pairs = 0;
    while (end < count && (end == begin || pairs + experts[end].token_count <= kMaxPairs))
      pairs += experts[end++].token_count;
    if (tokens > 1) gather(pool, c, experts + begin, end - begin, act, tokens, panels);
    if (pairs > 0) run_pass(pool, c, experts + begin, end - begin, pairs);
    begin = end;
  }
  pool.trim();
  return MOE_OK;
}

int32_t moe_experts_topk(const moe_layer_experts* experts, const moe_routing* routing, const float* x, float* out,
                         int32_t flags) {
  const int64_t tokens = routing->tokens;
  const int32_t top_k = routing->top_k;
  if (experts->count < 0 || top_k < 0 || tokens < 0 || tokens > INT32_MAX) return MOE_E_SIZE;
  const int64_t pairs = tokens * top_k;
  for (int64_t p = 0; p < pairs; ++p) {
    const int64_t e = routing->index[p];
    if (e < 0 || e >= experts->count || (!experts->blobs[e] && !(flags & MOE_PARTIAL))) return MOE_E_INDEX;
  }
  try {
    std::vector<moe_expert> used;
    std::vector<int32_t> rows(static_cast<size_t>(pairs));
    std::vector<float> scaled(static_cast<size_t>(pairs));
    size_t n = 0;
    for (int32_t e = 0; e < experts->count; ++e) {
      if (!experts->blobs[e]) continue;
      const size_t begin = n;
      for (int64_t p = 0; p < pairs; ++p) {
        if (routing->index[p] != e) continue;
        rows[n] = int32_t(p / top_k);
        scaled[n++] = routing->weights[p];
      }
      if (n > begin)
        used.push_back({experts->blobs[e], rows.data() + begin, scaled.data() + begin, int64_t(n - begin),
                        experts->gate_up_packing, experts->down_packing});
    }
    return moe_experts(used.data(), int32_t(used.size()), experts->hidden, experts->intermediate, x, out, tokens,
                       flags & MOE_ACCUMULATE);
  } catch (const std::bad_alloc&) {
    return MOE_E_MEMORY;
  }
}

}  // extern "C"
