// HQQ's solver for one group of columns, sixteen rows at once (hqq 0.2.8.post1: Quantizer.quantize with axis=1 and
// optimize_weights_proximal_legacy). The package's loop over a whole tensor is
//     q = clamp(round(w * scale + zero));  e = shrink(w - (q - zero) / scale);  zero = mean(q - (w - e) * scale)
// The package stops all groups when the mean error of the tensor stops falling. Here each group is independent and runs
// all 20 iterations, except those after its zero stops changing, which have no effect.
#pragma once
#include <cstdint>

namespace moe {
namespace {

constexpr int kHqqIterations = 20;
constexpr float kMaxInverseScale = 2e4f;  // the package's clamp, "to avoid half-precision problems"
constexpr float kMinRange = 1e-4f;        // a narrower group gets scale 1, and all its codes are 0
constexpr float kShrinkFactor = 0.1f;     // 1 / beta
// shrink(x) = sign(x) * max(|x| - |x|^-0.3 / 10, 0) is 0 up to |x| = 10^(-1/1.3) = 0.1701. Elements below the first
// bound are skipped; whole groups below the second one are skipped, which leaves room for rounding.
constexpr float kShrinkFrom = 0.1695f;
constexpr float kShrinkGroupFrom = 0.16f;
// Adding 1.5 * 2^23 rounds to an integer, ties to even, which is then in the low bits of the mantissa.
constexpr float kRounder = 12582912.0f;
constexpr uint32_t kRounderBits = 0x4b400000u;

// clamp(round(x), 0, limit) + kRounderBits. NaN gives code 0.
template <class S>
typename S::U biased_code(typename S::F x, typename S::F limit) {
  return S::bits(S::add(S::min(S::max(x, S::set(0.0f)), limit), S::set(kRounder)));
}

// a^-0.3 for a in [0.1, 1e30], relative error < 3e-7. Fitted, because the C library's pow differs between systems.
template <class S>
typename S::F power_minus_0_3(typename S::F a) {
  using F = typename S::F;
  using U = typename S::U;
  const U bits = S::bits(a);
  const U exponent =
      S::template right_signed<23>(S::sub_u(bits, S::set_u(0x3f3504f3u)));  // mantissa in sqrt(1/2)..sqrt(2)
  const F f = S::sub(S::from_bits(S::sub_u(bits, S::template left<23>(exponent))), S::set(1.0f));
  constexpr float kLog2[10] = {1.4426950216293335f,  -0.7213473320007324f,  0.48089852929115295f, -0.36069655418395996f,
                               0.28855255246162415f, -0.23960812389850616f, 0.20485764741897583f, -0.19138838350772858f,
                               0.18476031720638275f, -0.10749787837266922f};
  F p = S::set(kLog2[9]);
  for (int i = 8; i >= 0; --i) p = S::add(S::mul(p, f), S::set(kLog2[i]));
  const F y = S::mul(S::set(-0.3f), S::add(S::to_float(exponent), S::mul(p, f)));
  const U biased = S::bits(S::add(y, S::set(kRounder)));
  const F rest = S::sub(y, S::sub(S::from_bits(biased), S::set(kRounder)));
  constexpr float kExp2[7] = {1.0f,
                              0.6931471824645996f,
                              0.24022650718688965f,
                              0.05550327152013779f,
                              0.009618056938052177f,
                              0.0013400427997112274f,
                              0.00015461444854736328f};
  p = S::set(kExp2[6]);
  for (int i = 5; i >= 0; --i) p = S::add(S::mul(p, rest), S::set(kExp2[i]));
  return S::from_bits(S::add_u(S::bits(p), S::template left<23>(S::sub_u(biased, S::set_u(kRounderBits)))));
}

// Sum over the group of shrink(w - (q - zero) / inverse) * inverse: the shrunk errors change the sum of t by it.
template <class S>
typename S::F shrink_sum(const float* w, const float* t, int count, typename S::F inverse, typename S::F zero,
                         typename S::F limit) {
  using F = typename S::F;
  F sum = S::set(0.0f);
  for (int c = 0; c < count; ++c) {
    const F q = S::sub(S::from_bits(biased_code<S>(S::add(S::load(t + 16 * c), zero), limit)), S::set(kRounder));
    const F error = S::sub(S::load(w + 16 * c), S::div(S::sub(q, zero), inverse));
    const F size = S::from_bits(S::and_u(S::bits(error), S::set_u(0x7fffffffu)));
    const typename S::M large = S::greater(size, S::set(kShrinkFrom));
    if (!S::any(large)) continue;
    const F shrunk = S::max(S::sub(size, S::mul(S::set(kShrinkFactor), power_minus_0_3<S>(size))), S::set(0.0f));
    const F with_sign = S::from_bits(S::or_u(S::bits(shrunk), S::and_u(S::bits(error), S::set_u(0x80000000u))));
    sum = S::add(sum, S::select(large, S::mul(with_sign, inverse), S::set(0.0f)));
  }
  return sum;
}

template <class S>
struct HqqResult {
  typename S::F inverse;  // the package's scale while it solves, in codes per unit of weight
  typename S::F zero;
  typename S::F low, high;  // the group's smallest and largest weight

  // w = scale * q - minimum. A group with one code for all weights gets scale 0, and its value goes into the minimum.
  // The package gives narrow groups scale 1: as the largest of its row it would leave no precision for other groups.
  void scale_and_minimum(typename S::F limit, typename S::F* scale, typename S::F* minimum) const {
    using F = typename S::F;
    // Codes rise with the weights, so the smallest weight has the lowest code and the largest the highest.
    const auto code_of = [&](F w) {
      return S::sub(S::from_bits(biased_code<S>(S::add(S::mul(w, inverse), zero), limit)), S::set(kRounder));
    };
    const F lowest = code_of(low), full = S::div(S::set(1.0f), inverse);
    const typename S::M several = S::greater(code_of(high), lowest);
    *scale = S::select(several, full, S::set(0.0f));
    *minimum = S::mul(full, S::sub(zero, S::select(several, S::set(0.0f), lowest)));
  }
};

// w: [count][16], count >= 1; t: scratch of the same shape; limit: the largest code.
template <class S>
HqqResult<S> solve_group(const float* w, float* t, int count, float largest, bool round_zero) {
  using F = typename S::F;
  using U = typename S::U;
  F low = S::load(w), high = low;
  for (int c = 1; c < count; ++c) {
    const F x = S::load(w + 16 * c);
    low = S::min(low, x);
    high = S::max(high, x);
  }
  const F limit = S::set(largest), range = S::sub(high, low);
  // Rounded twice, because torch computes number / tensor as number times reciprocal.
  const F reciprocal = S::mul(S::div(S::set(1.0f), range), limit);
  F inverse = S::select(S::greater(range, S::set(kMinRange)), reciprocal, S::set(1.0f));
  inverse = S::min(inverse, S::set(kMaxInverseScale));
  F zero = S::mul(S::sub(S::set(0.0f), low), inverse);
  if (round_zero) zero = S::rint(zero);

  // Four sums hide the latency of an addition.
  F sums[4] = {S::set(0.0f), S::set(0.0f), S::set(0.0f), S::set(0.0f)};
  int c = 0;
  for (; c + 4 <= count; c += 4) {
    for (int k = 0; k < 4; ++k) {
      const F scaled = S::mul(S::load(w + 16 * (c + k)), inverse);
      S::store(t + 16 * (c + k), scaled);
      sums[k] = S::add(sums[k], scaled);
    }
  }
  for (int k = 0; c < count; ++c, ++k) {
    const F scaled = S::mul(S::load(w + 16 * c), inverse);
    S::store(t + 16 * c, scaled);
    sums[k] = S::add(sums[k], scaled);
  }
  const F t_sum = S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3]));

  const F share = S::set(1.0f / (float)count);
  const U bias = S::set_u(kRounderBits * (uint32_t)count);
  // No error exceeds the group's range, so a group narrower than the bound has nothing to shrink.
  const typename S::M wide = S::greater(range, S::set(kShrinkGroupFrom));
  const F shrink_from = S::mul(S::set(kShrinkGroupFrom), inverse);
  const bool any_wide = S::any(wide);
  for (int i = 0; i < kHqqIterations; ++i) {
    U q_sum = S::set_u(0);
    F shrunk = S::set(0.0f);
    if (!any_wide) {
#pragma GCC unroll 8
      for (int k = 0; k < count; ++k) q_sum = S::add_u(q_sum, biased_code<S>(S::add(S::load(t + 16 * k), zero), limit));
    } else {
      F worst = S::set(0.0f);
      for (int k = 0; k < count; ++k) {
        const F x = S::add(S::load(t + 16 * k), zero);
        const U code = biased_code<S>(x, limit);
        q_sum = S::add_u(q_sum, code);
        const F residual = S::sub(S::sub(S::from_bits(code), S::set(kRounder)), x);
        worst = S::max(worst, S::from_bits(S::and_u(S::bits(residual), S::set_u(0x7fffffffu))));
      }
      const typename S::M need = S::both(wide, S::greater(worst, shrink_from));
      if (S::any(need)) shrunk = S::select(need, shrink_sum<S>(w, t, count, inverse, zero, limit), shrunk);
    }
    const F next = S::mul(S::sub(S::to_float(S::sub_u(q_sum, bias)), S::sub(t_sum, shrunk)), share);
    const bool moved = S::any(S::differ(next, zero));
    zero = next;
    if (!moved) break;
  }
  return {inverse, zero, low, high};
}

}  // namespace
}  // namespace moe
