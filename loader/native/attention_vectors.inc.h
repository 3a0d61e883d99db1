// Registers of kLanes floats, for attention.inc.h. The including file defines kLanes and widened(), which loads kLanes
// bf16 values. Included inside an anonymous namespace (see elementwise.inc.h).

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));

constexpr int kParts = 16 / kLanes;  // registers of 16 floats

inline F load(const float* p) {
  F v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline F load(const uint16_t* p) { return F(widened(p)); }
inline void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }
inline F all_lanes(float x) { return x - F{}; }  // x + 0 would cost an addition, as it changes -0
inline F larger(F a, F b) { return a > b ? a : b; }

// exp(x) within a few ulp for x <= 0, at least exp(-87); NaN stays NaN. The polynomial of elementwise.inc.h.
inline F exp_lanes(F x) {
  const F low = all_lanes(-87.0f);
  x = x < low ? low : x;
  const F shifted = x * 1.44269504f + 12582912.0f;
  const F n = shifted - 12582912.0f;
  const F r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  F p = r * (1.0f / 720.0f) + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (F)(((U)shifted << 23) + 0x3f800000u);
}

// Half of a's lanes, then half of b's: groups of `size` lanes, those with an even number (odd = 1: with an odd number).
// Groups below 128 bits: a's and b's halves alternate every 128 bits, which one instruction can do.
template <int size, int odd, int... i>
MOE_INLINE inline F half_of(F a, F b, std::integer_sequence<int, i...>) {
  constexpr int kChunk = size < 4 ? 4 : kLanes;
  constexpr auto lane = [](int n) {
    const int j = n % (kChunk / 2), from_b = n % kChunk / (kChunk / 2);
    return n / kChunk * kChunk + j / size * 2 * size + odd * size + j % size + from_b * kLanes;
  };
  return __builtin_shufflevector(a, b, lane(i)...);
}

template <int size>
MOE_INLINE inline F even(F a, F b) {
  return half_of<size, 0>(a, b, std::make_integer_sequence<int, kLanes>{});
}
template <int size>
MOE_INLINE inline F odd(F a, F b) {
  return half_of<size, 1>(a, b, std::make_integer_sequence<int, kLanes>{});
}
template <int size>
MOE_INLINE inline F halved(F a, F b) {
  return even<size>(a, b) + odd<size>(a, b);
}

// Lane i: the sum of v[i]'s lanes, the upper half added to the lower half until one lane is left.
// A template, since clang compiles the discarded branches of other functions.
template <int lanes = kLanes>
MOE_INLINE inline F sums_of_lanes(const F* v) {
  F part[lanes];
  unrolled<lanes>([&](auto i) MOE_INLINE { part[i] = v[i]; });
  if constexpr (lanes == 16) {
    unrolled<4>([&](auto i) MOE_INLINE {
      part[i] = halved<8>(part[i], part[i + 4]);
      part[i + 4] = halved<8>(part[i + 8], part[i + 12]);
    });
  }
  if constexpr (lanes >= 8) unrolled<4>([&](auto i) MOE_INLINE { part[i] = halved<4>(part[i], part[i + 4]); });
  return halved<1>(halved<2>(part[0], part[1]), halved<2>(part[2], part[3]));
}

// 16 floats in registers, their upper half added to the lower half until one register is left.
MOE_INLINE inline F one_register(const F* part) {
  if constexpr (kParts == 1) return part[0];
  if constexpr (kParts == 2) return part[0] + part[1];
  if constexpr (kParts == 4) return (part[0] + part[2]) + (part[1] + part[3]);
}

// The largest lane; no lane is NaN.
template <int lanes = kLanes>
inline float largest_lane(F v) {
  if constexpr (lanes == 16) v = larger(even<8>(v, v), odd<8>(v, v));
  if constexpr (lanes >= 8) v = larger(even<4>(v, v), odd<4>(v, v));
  v = larger(even<2>(v, v), odd<2>(v, v));
  return larger(even<1>(v, v), odd<1>(v, v))[0];
}
