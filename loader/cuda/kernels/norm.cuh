// The step between two products of one token: residual sum, RMSNorm and quantization of its result.
#pragma once
#include "common.cuh"

namespace moe {

constexpr int kNormThreads = 256;

// Values that one instruction reads or writes.
template <class T>
struct alignas(2 * sizeof(T)) Two {
  T v[2];
};
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};

// y = x + rounded(added), or x if `added` is null. normed = RMSNorm of y, rounded to T before and after the weight, as
// in transformers. acts = normed, quantized. One block of kNormThreads; columns is a multiple of 4. Squares are summed
// in float64, in another order than on the CPU: rounded to fp32, the factor is the same (docs/numerics.md).
template <class T>
MOE_DEVICE void add_norm_row(const T* x, const float* added, const T* weight, float eps, int64_t columns, T* y,
                             T* normed, ActBlock* acts) {
  MOE_SHARED double sums[kNormThreads / kWarp];
  MOE_SHARED float factor;
  constexpr int64_t kStep = 4 * kNormThreads;
  double sum = 0.0;
  for (int64_t c = 4 * threadIdx.x; c < columns; c += kStep) {
    Four<T> value = *reinterpret_cast<const Four<T>*>(x + c);
    for (int i = 0; i < 4; ++i) {
      if (added) round_to(to_float(value.v[i]) + rounded<T>(added[c + i]), &value.v[i]);
      const double wide = to_float(value.v[i]);
      sum = fma(wide, wide, sum);
    }
    *reinterpret_cast<Four<T>*>(y + c) = value;
  }
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double all = 0.0;
    for (int i = 0; i < kNormThreads / kWarp; ++i) all += sums[i];
    factor = float(1.0 / sqrt(all / double(columns) + double(eps)));
  }
  __syncthreads();
  const int64_t blocks = blocks64(columns);
  for (int64_t c = 4 * threadIdx.x; c < blocks * kActCols; c += kStep) {
    float v[4] = {};
    if (c < columns) {
      // This thread wrote these values in the first loop, so no barrier is needed.
      const Four<T> value = *reinterpret_cast<const Four<T>*>(y + c);
      const Four<T> scale = *reinterpret_cast<const Four<T>*>(weight + c);
      Four<T> result;
      for (int i = 0; i < 4; ++i) {
        round_to(to_float(scale.v[i]) * rounded<T>(to_float(value.v[i]) * factor), &result.v[i]);
        v[i] = to_float(result.v[i]);
      }
      *reinterpret_cast<Four<T>*>(normed + c) = result;
    }
    quantize_by_16(v, threadIdx.x % 16, acts + c / kActCols);
  }
}

}  // namespace moe

MOE_KERNEL(moe::kNormThreads)
add_norm_f32(const float* x, const float* added, const float* weight, float eps, int64_t columns, float* y,
             float* normed, moe::ActBlock* acts) {
  moe::add_norm_row(x, added, weight, eps, columns, y, normed, acts);
}
MOE_KERNEL(moe::kNormThreads)
add_norm_bf16(const moe::Bf16* x, const float* added, const moe::Bf16* weight, float eps, int64_t columns, moe::Bf16* y,
              moe::Bf16* normed, moe::ActBlock* acts) {
  moe::add_norm_row(x, added, weight, eps, columns, y, normed, acts);
}
MOE_KERNEL(moe::kNormThreads)
add_norm_f16(const moe::F16* x, const float* added, const moe::F16* weight, float eps, int64_t columns, moe::F16* y,
             moe::F16* normed, moe::ActBlock* acts) {
  moe::add_norm_row(x, added, weight, eps, columns, y, normed, acts);
}
