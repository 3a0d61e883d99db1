// S, M and codes of one group under the super-scales of its rows.
#pragma once
#include <cstdint>

#include "../../formats/native/half_float.h"
#include "hqq_group.h"

namespace moe {
namespace {

constexpr uint16_t kHalfInfinity = 0x7c00;

// Returns a row's super-scale in fp16. A positive number too small for fp16 gives the smallest subnormal; one too large
// gives infinity.
inline uint16_t super_scale(float wanted) {
  const uint16_t half = float_to_half(wanted);
  return half == 0 && wanted > 0.0f ? 1 : half;
}

struct ScaleSteps {
  float s_max;
  float m_min;
  float m_max;
};

inline ScaleSteps scale_steps(int scale_bits) {
  return scale_bits == 4 ? ScaleSteps{15.0f, 0.0f, 15.0f} : ScaleSteps{255.0f, -127.0f, 127.0f};
}

template <class S>
struct GroupTask {
  const float* w;  // [count][16]
  int count;
  typename S::F limit;  // the largest code
  typename S::F ds;
  typename S::F dm;
  ScaleSteps steps;
};

template <class S>
struct ScalePair {
  typename S::F s;  // whole numbers
  typename S::F m;
};

// clamp(rint(x), low, high); a NaN gives low.
template <class S>
typename S::F round_between(typename S::F x, float low, float high) {
  return S::sub(S::add(S::min(S::max(x, S::set(low)), S::set(high)), S::set(kRounder)), S::set(kRounder));
}

template <class S>
typename S::U to_integer(typename S::F whole) {
  return S::sub_u(S::bits(S::add(whole, S::set(kRounder))), S::set_u(kRounderBits));
}

// x / d; 0 if d is 0, because x is 0 too.
template <class S>
typename S::F quotient(typename S::F x, typename S::F d) {
  return S::div(x, S::select(S::greater(d, S::set(0.0f)), d, S::set(1.0f)));
}

template <class S>
ScalePair<S> round_scales(const GroupTask<S>& task, typename S::F scale, typename S::F minimum) {
  return {round_between<S>(quotient<S>(scale, task.ds), 0.0f, task.steps.s_max),
          round_between<S>(quotient<S>(minimum, task.dm), task.steps.m_min, task.steps.m_max)};
}

// Step and offset of a group's codes. Both products are exact in fp32.
template <class S>
struct Steps {
  typename S::F step;
  typename S::F offset;
  typename S::F limit;  // 0 if S is 0: it makes the code 0, whatever the division by 0 gave

  Steps(const GroupTask<S>& task, const ScalePair<S>& pair)
      : step(S::mul(task.ds, pair.s)), offset(S::mul(task.dm, pair.m)),
        limit(S::select(S::greater(pair.s, S::set(0.0f)), task.limit, S::set(0.0f))) {}

  typename S::U biased(typename S::F w) const { return biased_code<S>(S::div(S::add(w, offset), step), limit); }
};

// Writes codes [count][16], and adds to both sums.
template <class S>
void write_codes(const GroupTask<S>& task, const ScalePair<S>& pair, uint32_t* codes, typename S::D* squared_error,
                 typename S::D* squares) {
  using F = typename S::F;
  using U = typename S::U;
  const Steps<S> steps(task, pair);
  for (int c = 0; c < task.count; ++c) {
    const F w = S::load(task.w + 16 * c);
    const U biased = steps.biased(w);
    S::store_u(codes + 16 * c, S::sub_u(biased, S::set_u(kRounderBits)));
    const F q = S::sub(S::from_bits(biased), S::set(kRounder));
    *squared_error = S::add_square(*squared_error, S::sub(w, S::sub(S::mul(steps.step, q), steps.offset)));
    *squares = S::add_square(*squares, w);
  }
}

}  // namespace
}  // namespace moe
