/* C ABI of libmoe_kernels: packed linears, fused Mixtral experts and bf16 linears on the CPU.
 *
 * Arithmetic: docs/numerics.md. Bytes: docs/format.md; packings: formats/native/packings.h.
 * All functions are thread safe: calls from several threads run one after the other, each on the whole pool.
 * A call returns a status of formats/native/abi.h; after an error it has written nothing.
 * Pointers to tiles and activations need only the alignment of their type. All tensors are dense and row major.
 */
#ifndef MOE_KERNELS_H
#define MOE_KERNELS_H

#include <stdint.h>

#include "../../formats/native/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MOE_ABI_VERSION 6

/* One packed matrix: y[tokens, rows] = x[tokens, columns] * W^T. */
typedef struct {
  const uint8_t* tiles; /* moe_packed_bytes(packing, rows, columns) bytes */
  int64_t rows;
  float* y; /* fp32 [tokens, rows], overwritten */
  int32_t packing;
  int32_t reserved;
} moe_matrix;

/* One expert and the tokens that the router gave it. */
typedef struct {
  const uint8_t* blob;   /* gate/up section (tiles interleaved), then down section: moe_expert_bytes() bytes */
  const int32_t* tokens; /* [token_count] row numbers in x and out */
  const float* weights;  /* [token_count] router weights */
  int64_t token_count;
  int32_t gate_up_packing;
  int32_t down_packing;
} moe_expert;

MOE_API int32_t moe_abi_version(void);

/* Sets the threads of a call, the calling one included; 0: one for each core that this process may use. Returns the
 * number in force. */
MOE_API int32_t moe_set_threads(int32_t threads);
MOE_API int32_t moe_threads(void);

/* The instruction set in use (MOE_ISA_*), and the reason in one sentence (static storage). */
MOE_API int32_t moe_isa(void);
MOE_API const char* moe_isa_reason(void);
/* Forces an instruction set, for tests and benchmarks. MOE_E_ISA if this processor or this build lacks it. */
MOE_API int32_t moe_set_isa(int32_t isa);

/* Sizes in bytes; -1 for an unknown packing or a negative size. */
MOE_API int64_t moe_packed_bytes(int32_t packing, int64_t rows, int64_t columns);
MOE_API int64_t moe_expert_bytes(int32_t gate_up_packing, int32_t down_packing, int64_t hidden, int64_t intermediate);
/* Id of a named packing, -1 if unknown. */
MOE_API int32_t moe_packing_id(const char* name);

/* y = x * W^T for any number of tokens; x fp32 [tokens, columns], y fp32 [tokens, rows]. */
MOE_API int32_t moe_linear(int32_t packing, const uint8_t* tiles, int64_t rows, int64_t columns, const float* x,
                           float* y, int64_t tokens);
/* Several matrices (q, k, v) over one quantized x, in one parallel region. */
MOE_API int32_t moe_linear_many(const moe_matrix* matrices, int32_t count, int64_t columns, const float* x,
                                int64_t tokens);

/* out[t] (+)= sum over experts, in the order given, of weight * down(silu(gate(x[t])) * up(x[t])).
 * x, out: fp32 [tokens, hidden]. accumulate 0: out is overwritten (zero where no expert serves a token).
 * One call over a list equals consecutive accumulating calls over its parts, bit for bit. */
MOE_API int32_t moe_experts(const moe_expert* experts, int32_t count, int64_t hidden, int64_t intermediate,
                            const float* x, float* out, int64_t tokens, int32_t accumulate);
/* All experts of a layer by number, with one pair of packings. A blob may be null if no token uses its expert. */
typedef struct {
  const uint8_t* const* blobs; /* [count] */
  int64_t hidden, intermediate;
  int32_t count, gate_up_packing, down_packing, reserved;
} moe_layer_experts;
/* The experts that a router chose, and their weights. */
typedef struct {
  const int64_t* index; /* [tokens, top_k] */
  const float* weights; /* [tokens, top_k] */
  int64_t tokens;
  int32_t top_k, reserved;
} moe_routing;
/* moe_experts over a router's choice, experts in ascending order.
 * flags: MOE_ACCUMULATE adds to out; MOE_PARTIAL skips pairs whose blob is null instead of returning an error. */
enum { MOE_ACCUMULATE = 1, MOE_PARTIAL = 2 };
MOE_API int32_t moe_experts_topk(const moe_layer_experts* experts, const moe_routing* routing, const float* x,
                                 float* out, int32_t flags);

/* y = x * W^T, w bf16 [rows, columns] as uint16, fp32 accumulation (lm_head). */
MOE_API int32_t moe_linear_bf16(const uint16_t* w, int64_t rows, int64_t columns, const float* x, float* y,
                                int64_t tokens);

/* One token's attention in a layer: q, k, v over one quantized x, rotary embedding, append to the cache, attention over
 * it, o. x, out [hidden] and cos, sin [head_dim] have `dtype` (MOE_F32, MOE_BF16); all arithmetic is fp32.
 * head_dim is a multiple of 16. The y of the four matrices is not used. */
typedef struct {
  moe_matrix q, k, v, o;
  int64_t hidden, head_dim;
  float scale;
  int32_t dtype;
} moe_attention;
/* A layer's KV cache with `length` positions; the token becomes position `length` < capacity.
 * MOE_KV_PLAIN: the attention's dtype, [kv heads][capacity][head_dim].
 * MOE_KV_8BIT: blocks of 16 positions (kv_blocks.h), [kv heads][capacity / 16][bytes of a block]; capacity is a
 * multiple of 16, head_dim is at most 1024. */
enum { MOE_KV_PLAIN = 0, MOE_KV_8BIT = 1 };
typedef struct {
  void *keys, *values;
  int64_t capacity, length;
  int32_t format, reserved;
} moe_kv;
MOE_API int32_t moe_attention_step(const moe_attention* layer, const void* x, const void* cos, const void* sin,
                                   const moe_kv* cache, void* out);

/* A decoder layer. The weights of norms [hidden] and router [experts, hidden] have the attention's dtype. */
typedef struct {
  moe_attention attention;
  const void *attention_norm, *experts_norm, *router;
  int64_t intermediate;
  float attention_eps, experts_eps; /* epsilons of the two norms */
  int32_t experts, top_k, gate_up_packing, down_packing;
} moe_layer;

/* A whole model: embedding, layers, final norm, head. All layers have one hidden size and one dtype, which embedding
 * [vocabulary, hidden] and norm [hidden] share. */
enum { MOE_HEAD_BF16 = -1 };
typedef struct {
  const moe_layer* const* layers; /* [count] */
  const void *embedding, *norm;
  int64_t vocabulary;
  moe_matrix head; /* y is not used; packing MOE_HEAD_BF16: tiles are bf16 [rows, hidden]; tiles null: no head */
  float eps;
  int32_t count;
  int32_t experts, top_k; /* the largest of any layer */
} moe_model;
typedef struct {
  int64_t id;                        /* the token, a row of the embedding */
  const void *cos, *sin;             /* [head_dim] */
  void *const *keys, *const *values; /* as in moe_kv, by layer [count] */
  const int64_t* capacity;
  int64_t length;
  const uint8_t* const* blobs; /* [count, experts]; null: not in memory */
  void* room;                  /* [3, hidden]: input, first residual sum and experts' input of the present layer */
  int64_t* index;              /* [count, top_k] */
  float* weights;              /* [count, top_k] */
  void* out;                   /* logits [head.rows], or without a head the normed state [hidden]; of the dtype */
  int32_t halves_done;         /* 0 at first; a layer has two: up to its router, its experts */
  int32_t kv_format;           /* of all layers */
} moe_token;
/* MOE_MISSING: layer halves_done / 2 chose experts without a blob. The caller either sets them in `blobs`, or writes
 * the layer's output to room[0] and adds one to halves_done; then the same call continues. A layer's blobs are read
 * until the next layer begins. After an error the caches' positions from `length` on are undefined. */
MOE_API int32_t moe_token_step(const moe_model* model, moe_token* token);

/* Sum of the 64-bit words of `count` buffers of `bytes` bytes, which the pool reads once: the memory bound that
 * bench/decode.py compares with. */
MOE_API uint64_t moe_stream_sum(const uint8_t* const* buffers, int32_t count, int64_t bytes, int64_t chunk_bytes);

/* Microseconds of one empty parallel region, the mean of `repeats`. */
MOE_API double moe_empty_region_us(int32_t repeats);

#ifdef __cplusplus
}
#endif
#endif
