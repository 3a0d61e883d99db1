// Loops unrolled by templates. gcc keeps an array in registers only if its indices are constants before its late
// unrolling pass. `#pragma GCC unroll` acts later and leaves the accumulators in memory (1.5x slower, measured).
#pragma once
#include <utility>

namespace moe {

#define MOE_INLINE __attribute__((always_inline))

template <class F, int... i>
MOE_INLINE constexpr void unrolled_over(const F& f, std::integer_sequence<int, i...>) {
  (f(std::integral_constant<int, i>{}), ...);
}

// Calls f(0) ... f(N - 1); each argument is a compile-time constant.
template <int N, class F>
MOE_INLINE constexpr void unrolled(const F& f) {
  unrolled_over(f, std::make_integer_sequence<int, N>{});
}

}  // namespace moe
