// Products with bf16 weights (docs/numerics.md, "bf16 linear"), one row a warp. Memory bandwidth limits them.
#pragma once
#include "common.cuh"
#include "norm.cuh"

namespace moe {

constexpr int kHeadThreads = 256;

// Dot product of n 16-bit weights (n even) with x, by a warp. Lane l keeps partial sums 2l and 2l + 1 of 64. All lanes
// return the result.
template <class T>
MOE_DEVICE float dot_row(const T* w, const T* x, int64_t n) {
  const int lane = threadIdx.x % kWarp;
  float a = 0.0f, b = 0.0f;
#pragma unroll 8
  for (int64_t k = 2 * lane; k < n; k += 2 * kWarp) {
    const Two<T> weight = *reinterpret_cast<const Two<T>*>(w + k);
    const Two<T> input = *reinterpret_cast<const Two<T>*>(x + k);
    a = fmaf(to_float(weight.v[0]), to_float(input.v[0]), a);
    b = fmaf(to_float(weight.v[1]), to_float(input.v[1]), b);
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    a = a + __shfl_xor_sync(kAllLanes, a, step);
    b = b + __shfl_xor_sync(kAllLanes, b, step);
  }
  return a + b;
}

}  // namespace moe

// y = x W^T, rounded to bf16; w [rows, columns], columns even. Grid ceil(rows / 8).
MOE_KERNEL(moe::kHeadThreads)
linear_bf16(const moe::Bf16* w, const moe::Bf16* x, int64_t rows, int64_t columns, moe::Bf16* y) {
  const int64_t row = int64_t(blockIdx.x) * (moe::kHeadThreads / moe::kWarp) + threadIdx.x / moe::kWarp;
  if (row >= rows) return;
  const float sum = moe::dot_row(w + row * columns, x, columns);
  if (threadIdx.x % moe::kWarp == 0) moe::round_to(sum, y + row);
}
