// Activations to int8, 64 columns at a time.
#pragma once
#include "common.cuh"

namespace moe {

// x [tokens, columns] of T -> out [tokens][blocks64(columns)]. Grid (ceil(blocks64 / 8), tokens), 128 threads, 16 for
// each block of 64 columns.
template <class T>
MOE_DEVICE void quantize_rows(const T* x, int64_t columns, ActBlock* out) {
  const int64_t block = int64_t(blockIdx.x) * 8 + threadIdx.x / 16, blocks = blocks64(columns);
  const T* row = x + blockIdx.y * columns;
  const int lane = threadIdx.x % 16;
  float v[4];
  for (int i = 0; i < 4; ++i) {
    const int64_t column = block * kActCols + lane * 4 + i;
    v[i] = column < columns ? to_float(row[column]) : 0.0f;
  }
  quantize_by_16(v, lane, block < blocks ? out + blockIdx.y * blocks + block : nullptr);
}

}  // namespace moe

MOE_KERNEL(128) quantize_f32(const float* x, int64_t columns, moe::ActBlock* out) {
  moe::quantize_rows(x, columns, out);
}
MOE_KERNEL(128) quantize_bf16(const moe::Bf16* x, int64_t columns, moe::ActBlock* out) {
  moe::quantize_rows(x, columns, out);
}
MOE_KERNEL(128) quantize_f16(const moe::F16* x, int64_t columns, moe::ActBlock* out) {
  moe::quantize_rows(x, columns, out);
}
