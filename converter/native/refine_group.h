// The optional refinement (MOE_REFINE): the same file format with a lower squared error. HQQ minimizes |error|^0.7;
// here its result is the start of least-squares steps w ~ a * q - b, and the two super-scales and S and M are chosen
// by the squared error that they cause. Least squares alone shrinks: <w, w'> = <w', w'>, so all of a matrix's outputs
// come out too small, and the model is worse than HQQ's (tiny-mixtral, 2 bits: KL .026 against .014) although the error
// is smaller. So in the end each row's super-scales are multiplied by its gain <w, w> / <w, w'> (KL .0126).
#pragma once
#include <cstdint>

#include "half_float.h"
#include "hqq_group.h"
#include "round_group.h"
#include "solver_job.h"

namespace moe {
namespace {

constexpr int kLeastSquaresSteps = 3;
// Super-scales tried for nibble scales: the one under which nothing is clipped, times 1 - i / 32.
constexpr int kSuperScales = 14;
constexpr float kSuperScaleStep = 1.0f / 32;
constexpr float kMaxGain = 1.5f;

// Sums over one group under given codes. Those of q and q * q are exact.
template <class S>
struct CodeSums {
  typename S::F q, qq, qw;
};

// Codes are clamp(round(w * inverse + zero)): no division, so a tie may fall otherwise than in the final codes.
template <class S>
CodeSums<S> sum_codes(const float* w, int count, typename S::F inverse, typename S::F zero, typename S::F limit) {
  using F = typename S::F;
  CodeSums<S> sums{S::set(0.0f), S::set(0.0f), S::set(0.0f)};
  for (int c = 0; c < count; ++c) {
    const F x = S::load(w + 16 * c);
    const F q = S::sub(S::from_bits(biased_code<S>(S::add(S::mul(x, inverse), zero), limit)), S::set(kRounder));
    sums.q = S::add(sums.q, q);
    sums.qq = S::add(sums.qq, S::mul(q, q));
    sums.qw = S::add(sums.qw, S::mul(q, x));
  }
  return sums;
}

// What a row's gain is made of, summed over its groups.
template <class S>
struct GainSums {
  typename S::F ww, wr;  // <w, w>, <w, w'>
};

// ds and dm times the gain.
template <class S>
void apply_gain(const GainSums<S>& sums, uint16_t* ds, uint16_t* dm) {
  float ww[16], wr[16];
  S::store(ww, sums.ww);
  S::store(wr, sums.wr);
  for (int l = 0; l < 16; ++l) {
    const float gain = ww[l] / wr[l];
    if (!(gain > 1.0f && gain < kMaxGain)) continue;  // 0 / 0, or a row of which next to nothing is left
    ds[l] = super_scale(half_to_float(ds[l]) * gain);
    dm[l] = super_scale(half_to_float(dm[l]) * gain);
  }
}

template <class S>
typename S::F sum_weights(const float* w, int count) {
  typename S::F sum = S::set(0.0f);
  for (int c = 0; c < count; ++c) sum = S::add(sum, S::load(w + 16 * c));
  return sum;
}

// w ~ a * q - b. spread: how much a squared error of a adds to the group's, b being free; mean: of q.
template <class S>
struct Line {
  typename S::F a, b, spread, mean;
};

// Least squares from HQQ's result, or, for a group so narrow that the package clamps its scale, from its range.
// A group with one value only gets a = 0, so that it does not set the row's super-scale. With an unsigned M a group
// of positive weights only is fitted through the origin.
template <class S>
Line<S> fit_line(const float* w, int count, const HqqResult<S>& hqq, typename S::F limit, bool unsigned_m) {
  using F = typename S::F;
  const F none = S::set(0.0f), share = S::set(1.0f / (float)count);
  const F w_sum = sum_weights<S>(w, count);
  const F range = S::sub(hqq.high, hqq.low);
  F a = none, b = none, spread = none, mean = none;
  const typename S::M narrow = S::greater(S::div(limit, S::set(kMaxInverseScale)), range);
  const F from_range = S::div(limit, S::max(range, S::set(1e-30f)));
  F inverse = S::select(narrow, from_range, hqq.inverse);
  F zero = S::select(narrow, S::mul(S::sub(none, hqq.low), from_range), hqq.zero);
  typename S::M through_origin = S::greater(none, none);
  if (unsigned_m) {
    through_origin = S::greater(hqq.low, none);
    const F high = S::max(hqq.high, S::set(1e-30f));
    inverse = S::select(through_origin, S::div(limit, high), inverse);
    zero = S::select(through_origin, none, zero);
  }
  for (int i = 0; i < kLeastSquaresSteps; ++i) {
    const CodeSums<S> sums = sum_codes<S>(w, count, inverse, zero, limit);
    mean = S::mul(sums.q, share);
    spread = S::sub(sums.qq, S::mul(sums.q, mean));
    F slope = S::div(S::sub(sums.qw, S::mul(mean, w_sum)), spread);
    if (unsigned_m) {
      spread = S::select(through_origin, sums.qq, spread);
      slope = S::select(through_origin, S::div(sums.qw, sums.qq), slope);
    }
    // One code only, or codes that fall as the weights rise: no line.
    const typename S::M good = S::both(S::greater(spread, S::set(0.25f / (float)count)), S::greater(slope, none));
    a = S::select(good, slope, none);
    spread = S::select(good, spread, none);
    b = S::sub(S::mul(a, mean), S::mul(w_sum, share));
    inverse = S::select(good, S::div(S::set(1.0f), a), none);
    if (unsigned_m) b = S::select(through_origin, none, b);
    zero = S::mul(b, inverse);
  }
  return {a, b, spread, mean};
}

// The candidate with the smallest sum over groups of weight * (value - candidate * nearest integer)^2.
template <class S, class Value, class Weight>
void choose_super_scale(int64_t groups, float low, float high, const float* start, Value value, Weight weight,
                        uint16_t* chosen) {
  using F = typename S::F;
  float best[16] = {};
  for (int i = 0; i < kSuperScales; ++i) {
    uint16_t half[16];
    float scale[16], inverse[16], error[16];
    for (int l = 0; l < 16; ++l) {
      half[l] = super_scale(start[l] * (1.0f - (float)i * kSuperScaleStep));
      scale[l] = half_to_float(half[l]);
      inverse[l] = scale[l] > 0.0f ? 1.0f / scale[l] : 0.0f;
    }
    const F step = S::load(scale), to_steps = S::load(inverse);
    F sum = S::set(0.0f);
    for (int64_t g = 0; g < groups; ++g) {
      const F x = value(g);
      const F off = S::sub(x, S::mul(step, round_between<S>(S::mul(x, to_steps), low, high)));
      sum = S::add(sum, S::mul(weight(g), S::mul(off, off)));
    }
    S::store(error, sum);
    for (int l = 0; l < 16; ++l) {
      if (i != 0 && !(error[l] < best[l])) continue;
      best[l] = error[l];
      chosen[l] = half[l];
    }
  }
}

// ds by the error that the rounding of a causes; then dm by that of b, moved to fit the rounded a.
template <class S>
void choose_super_scales(const SolverJob& job, int64_t groups, const ScaleSteps& steps, const float* start_s,
                         const float* start_m, uint16_t* ds, uint16_t* dm) {
  using F = typename S::F;
  const auto a_of = [&](int64_t g) { return S::load(job.group_scale + 16 * g); };
  choose_super_scale<S>(
      groups, 0.0f, steps.s_max, start_s, a_of, [&](int64_t g) { return S::load(job.group_spread + 16 * g); }, ds);
  float scale[16];
  for (int l = 0; l < 16; ++l) scale[l] = half_to_float(ds[l]);
  const F step = S::load(scale), one = S::set(1.0f);
  const auto b_of = [&](int64_t g) {
    const F a = a_of(g), rounded = S::mul(step, round_between<S>(quotient<S>(a, step), 0.0f, steps.s_max));
    return S::add(S::load(job.group_minimum + 16 * g), S::mul(S::sub(rounded, a), S::load(job.group_mean + 16 * g)));
  };
  choose_super_scale<S>(groups, steps.m_min, steps.m_max, start_m, b_of, [&](int64_t) { return one; }, dm);
}

// Best M for S under the sums of some codes: the mean residual.
template <class S>
typename S::F best_m(const GroupTask<S>& task, typename S::F s, typename S::F q_sum, typename S::F w_sum) {
  const typename S::F b = S::mul(S::sub(S::mul(S::mul(task.ds, s), q_sum), w_sum), S::set(1.0f / (float)task.count));
  return round_between<S>(quotient<S>(b, task.dm), task.steps.m_min, task.steps.m_max);
}

// Tries the S nearest to a / ds and, for nibble scales, its two neighbours, each with its best M and codes of its own.
template <class S>
ScalePair<S> refine_scales(const GroupTask<S>& task, typename S::F a, typename S::F mean, typename S::M valid,
                           GainSums<S>* gain) {
  using F = typename S::F;
  const F none = S::set(0.0f), w_sum = sum_weights<S>(task.w, task.count), n = S::set((float)task.count);
  const F nearest = round_between<S>(quotient<S>(a, task.ds), 0.0f, task.steps.s_max);
  const int tries = task.steps.s_max < 16.0f ? 3 : 1;
  ScalePair<S> best{nearest, none};
  F least = none, dot = none;
  for (int i = 0; i < tries; ++i) {
    const F s = round_between<S>(S::add(nearest, S::set(i == 0 ? 0.0f : i == 1 ? -1.0f : 1.0f)), 0.0f, task.steps.s_max);
    const F step = S::mul(task.ds, s);
    const F inverse = S::select(S::greater(step, none), S::div(S::set(1.0f), step), none);
    F m = best_m<S>(task, s, S::mul(mean, n), w_sum);
    const CodeSums<S> sums = sum_codes<S>(task.w, task.count, inverse, S::mul(S::mul(task.dm, m), inverse), task.limit);
    m = best_m<S>(task, s, sums.q, w_sum);
    // Sum of (w - step * q + offset)^2 less that of w^2, which is the same for every try.
    const F offset = S::mul(task.dm, m);
    const F linear = S::sub(S::mul(offset, w_sum), S::mul(step, sums.qw));
    const F square = S::add(S::mul(S::mul(step, step), sums.qq), S::mul(n, S::mul(offset, offset)));
    const F cross = S::mul(S::mul(step, offset), sums.q);
    const F error = S::add(square, S::mul(S::set(2.0f), S::sub(linear, cross)));
    if (i == 0) {
      best.m = m;
      least = error;
      dot = S::sub(S::mul(step, sums.qw), S::mul(offset, w_sum));
      continue;
    }
    const typename S::M better = S::greater(least, error);
    best.s = S::select(better, s, best.s);
    best.m = S::select(better, m, best.m);
    least = S::select(better, error, least);
    dot = S::select(better, S::sub(S::mul(step, sums.qw), S::mul(offset, w_sum)), dot);
  }
  F squares = none;
  for (int c = 0; c < task.count; ++c) squares = S::add(squares, S::mul(S::load(task.w + 16 * c), S::load(task.w + 16 * c)));
  gain->ww = S::add(gain->ww, squares);
  gain->wr = S::add(gain->wr, dot);
  // Rows past the matrix's end, whose super-scales are 0, must hold zeros.
  return {S::select(valid, best.s, none), S::select(valid, best.m, none)};
}

}  // namespace
}  // namespace moe
