// A router's choice of experts for one token, and a guess of the next layer's choice from the same input.
#pragma once
#include "attention.cuh"
#include "common.cuh"
#include "head.cuh"

namespace moe {

constexpr int kRouteThreads = 512;

// fp32 routers are summed in float64, in another order than on the CPU: rounded to fp32 the sums are equal.
MOE_DEVICE float dot_row(const float* w, const float* x, int64_t n) {
  double sum = 0.0;
#pragma unroll 8
  for (int64_t k = threadIdx.x % kWarp; k < n; k += kWarp) sum = fma(double(w[k]), double(x[k]), sum);
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return float(sum);
}

// chosen [count]: indices of the largest of n values, of equal ones the first. taken [n] marks them.
MOE_DEVICE void largest(const float* values, int32_t* taken, int64_t n, int64_t count, int32_t* chosen) {
  for (int64_t e = 0; e < n; ++e) taken[e] = 0;
  for (int64_t k = 0; k < count; ++k) {
    int32_t best = -1;
    for (int32_t e = 0; e < n; ++e)
      // !(<=) instead of >: if a value is NaN, some expert must still be chosen.
      if (!taken[e] && (best < 0 || !(values[e] <= values[best]))) best = e;
    taken[best] = 1;
    chosen[k] = best;
  }
}

// The next layer's router [experts, hidden], or null, and how many of its experts to guess.
template <class T>
struct Guess {
  const T* router;
  int64_t count;
};

// x [hidden], router [experts, hidden] -> choice [top_k] by rank, and its weights [top_k], which sum to 1. The guessed
// experts follow the choice. One block of kRouteThreads; shared memory: 16 bytes an expert.
template <class T>
MOE_DEVICE void route(const T* x, const T* router, const Guess<T>& guess, int64_t hidden, int64_t experts,
                      int64_t top_k, float* weights, int32_t* choice) {
  MOE_DYNAMIC_SHARED(room);
  float* const p = reinterpret_cast<float*>(room);  // logits of the router, then of the next one
  int32_t* const taken = reinterpret_cast<int32_t*>(p + 2 * experts);
  const int warp = threadIdx.x / kWarp;
  const T* const next = guess.router;
  const int64_t rows = next ? 2 * experts : experts;
  for (int64_t e = warp; e < rows; e += kRouteThreads / kWarp) {
    const T* row = e < experts ? router + e * hidden : next + (e - experts) * hidden;
    const float logit = rounded<T>(dot_row(row, x, hidden));
    if (threadIdx.x % kWarp == 0) p[e] = logit;
  }
  __syncthreads();
  if (warp == 0) {
    float max = float_of(0xff800000u);
    for (int64_t e = 0; e < experts; ++e) max = p[e] > max ? p[e] : max;
    __syncwarp();
    for (int64_t e = threadIdx.x; e < experts; e += kWarp) p[e] = exp_of_negative(p[e] - max);
    __syncwarp();
  }
  if (threadIdx.x == 0) {
    float sum = 0.0f, chosen = 0.0f;
    for (int64_t e = 0; e < experts; ++e) sum += p[e];
    largest(p, taken, experts, top_k, choice);
    for (int64_t k = 0; k < top_k; ++k) chosen += p[choice[k]] / sum;
    for (int64_t k = 0; k < top_k; ++k) weights[k] = p[choice[k]] / sum / chosen;
  }
  if (next && threadIdx.x == kWarp) largest(p + experts, taken + experts, experts, guess.count, choice + top_k);
}

}  // namespace moe

#define MOE_ROUTE(name, T)                                                                           \
  MOE_KERNEL(moe::kRouteThreads)                                                                     \
  name(const T* x, const T* router, MOE_STRUCT moe::Guess<T> guess, int64_t hidden, int64_t experts, \
       int64_t top_k, float* weights, int32_t* choice) {                                             \
    moe::route(x, router, guess, hidden, experts, top_k, weights, choice);                           \
  }
MOE_ROUTE(route_f32, float)
MOE_ROUTE(route_bf16, moe::Bf16)
MOE_ROUTE(route_f16, moe::F16)
#undef MOE_ROUTE
