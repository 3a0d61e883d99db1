// Scale and minimum of one group, sixteen rows at once. w ~ a * q - b is fitted by a search over shrunk ranges, each
// followed by least-squares steps. Then S and M are chosen under given super-scales by their error. Errors are weighted
// by the importance of columns.
#pragma once
#include <cstdint>

#include "../../formats/native/half_float.h"
#include "hqq_group.h"
#include "round_group.h"

namespace moe {
namespace {

// Ranges to try, relative to the group's range.
constexpr int kRanges = 6;
constexpr float kRangeOf[3][kRanges] = {{1.0f, 0.9f, 0.8f, 0.7f, 0.6f, 0.5f},
                                        {1.0f, 0.94f, 0.88f, 0.82f, 0.75f, 0.68f},
                                        {1.0f, 0.96f, 0.92f, 0.87f, 0.82f, 0.76f}};  // 2, 3 and 4 bits

// A group's weights and the importance of its columns.
template <class S>
struct WeightedGroup {
  const float* w;           // [count][16]
  const float* importance;  // [count]
  int count;
  typename S::F limit;  // the largest code
  bool unsigned_m;
  float share;          // 1 / sum of importance
  typename S::F w_sum;  // weighted by importance
  typename S::F low, high;

  WeightedGroup(const float* weights, const float* of_columns, int columns, typename S::F largest,
                bool unsigned_minimum)
      : w(weights), importance(of_columns), count(columns), limit(largest), unsigned_m(unsigned_minimum) {
    float total = 0.0f;
    w_sum = S::set(0.0f);
    low = high = S::load(w);
    for (int c = 0; c < count; ++c) {
      const typename S::F x = S::load(w + 16 * c);
      total += importance[c];
      w_sum = S::fma(S::set(importance[c]), x, w_sum);
      low = S::min(low, x);
      high = S::max(high, x);
    }
    share = total > 0.0f ? 1.0f / total : 0.0f;
  }
};

// w ~ a * q - b.
template <class S>
struct Line {
  typename S::F a, b;
};

// Sums over the codes of a line, weighted by importance.
template <class S>
struct Coded {
  typename S::F error;   // sum of (w - a q + b)^2
  typename S::F mean;    // mean of q
  typename S::F spread;  // sum of (q - mean)^2
  typename S::F qq, qw;  // sums of q * q and q * w
};

template <class S>
typename S::F reciprocal_or_zero(typename S::F x) {
  const typename S::F none = S::set(0.0f);
  return S::select(S::greater(x, none), S::div(S::set(1.0f), x), none);
}

template <class S>
Coded<S> code_line(const WeightedGroup<S>& group, const Line<S>& line) {
  using F = typename S::F;
  const F none = S::set(0.0f), inverse = reciprocal_or_zero<S>(line.a), zero = S::mul(line.b, inverse);
  const F limit = S::select(S::greater(line.a, none), group.limit, none);
  F error = none, q_sum = none, qq = none, qw = none;
  for (int c = 0; c < group.count; ++c) {
    const F x = S::load(group.w + 16 * c), h = S::set(group.importance[c]);
    const F q = S::sub(S::from_bits(biased_code<S>(S::fma(x, inverse, zero), limit)), S::set(kRounder));
    const F off = S::fnma(line.a, q, S::add(x, line.b)), hq = S::mul(h, q);
    error = S::fma(S::mul(h, off), off, error);
    q_sum = S::add(q_sum, hq);
    qq = S::fma(hq, q, qq);
    qw = S::fma(hq, x, qw);
  }
  const F mean = S::mul(q_sum, S::set(group.share));
  return {error, mean, S::fnma(q_sum, mean, qq), qq, qw};
}

// Least squares for given codes. a = 0 if all codes are equal, or if codes fall as weights rise. An unsigned M cannot
// hold a negative b: then the line goes through the origin.
template <class S>
Line<S> fit_codes(const WeightedGroup<S>& group, const Coded<S>& coded) {
  using F = typename S::F;
  const F none = S::set(0.0f), w_mean = S::mul(group.w_sum, S::set(group.share));
  const F slope = S::div(S::fnma(coded.mean, group.w_sum, coded.qw), coded.spread);
  const F least = S::mul(S::set(1e-5f), coded.qq);  // a smaller spread is rounding noise
  const typename S::M good = S::both(S::greater(coded.spread, least), S::greater(slope, none));
  F a = S::select(good, slope, none);
  F b = S::sub(S::mul(a, coded.mean), w_mean);
  if (group.unsigned_m) {
    const typename S::M negative = S::greater(none, b);
    const F through_origin = S::div(coded.qw, coded.qq);
    const typename S::M usable = S::both(S::greater(coded.qq, none), S::greater(through_origin, none));
    a = S::select(negative, S::select(usable, through_origin, none), a);
    b = S::select(negative, none, b);
  }
  return {a, b};
}

template <class S>
struct FittedGroup {
  Line<S> line;
  typename S::F mean, spread;
};

template <class S>
FittedGroup<S> fit_group(const WeightedGroup<S>& group, int nbits) {
  using F = typename S::F;
  const F none = S::set(0.0f), half = S::set(0.5f);
  F low = group.low;
  if (group.unsigned_m) low = S::min(low, none);
  const F range = S::sub(group.high, low), per_code = S::div(range, group.limit);
  const F middle = S::add(S::mul(half, low), S::mul(half, group.high)), radius = S::mul(half, range);
  FittedGroup<S> best{};
  F least = none;
  const auto keep = [&](const Line<S>& line, const Coded<S>& coded, bool first) {
    if (first) {
      best = {line, coded.mean, coded.spread};
      least = coded.error;
      return;
    }
    const typename S::M better = S::greater(least, coded.error);
    best.line.a = S::select(better, line.a, best.line.a);
    best.line.b = S::select(better, line.b, best.line.b);
    best.mean = S::select(better, coded.mean, best.mean);
    best.spread = S::select(better, coded.spread, best.spread);
    least = S::select(better, coded.error, least);
  };
  for (int i = 0; i < kRanges; ++i) {
    const F part = S::set(kRangeOf[nbits - 2][i]);
    Line<S> line{S::mul(per_code, part), S::sub(S::mul(radius, part), middle)};
    if (group.unsigned_m) line.b = S::max(line.b, none);
    Coded<S> coded = code_line<S>(group, line);
    keep(line, coded, i == 0);
    line = fit_codes<S>(group, coded);
    coded = code_line<S>(group, line);
    keep(line, coded, false);
  }
  for (int i = 0; i < 2; ++i) {
    // Computes the best line's codes again, which is cheaper than keeping all their sums.
    const Line<S> line = fit_codes<S>(group, code_line<S>(group, best.line));
    keep(line, code_line<S>(group, line), false);
  }
  return best;
}

// Chooses S and M with the smallest error under given super-scales. Tries S near the fitted a; M first for the mean of
// the fitted codes, then for the mean of the resulting codes.
template <class S>
ScalePair<S> choose_pair(const WeightedGroup<S>& group, const FittedGroup<S>& fitted, typename S::F ds,
                         typename S::F dm, const ScaleSteps& steps) {
  using F = typename S::F;
  const F none = S::set(0.0f), w_mean = S::mul(group.w_sum, S::set(group.share));
  const F to_m = reciprocal_or_zero<S>(dm);
  const F nearest = round_between<S>(S::mul(fitted.line.a, reciprocal_or_zero<S>(ds)), 0.0f, steps.s_max);
  ScalePair<S> best{nearest, none};
  F least = none;
  for (int i = 0; i < 3; ++i) {
    const F s = round_between<S>(S::add(nearest, S::set(i == 0 ? 0.0f : i == 1 ? -1.0f : 1.0f)), 0.0f, steps.s_max);
    const F a = S::mul(ds, s);
    F mean = fitted.mean;
    for (int j = 0; j < 2; ++j) {
      const F m = round_between<S>(S::mul(S::sub(S::mul(a, mean), w_mean), to_m), steps.m_min, steps.m_max);
      const Coded<S> coded = code_line<S>(group, {a, S::mul(dm, m)});
      mean = coded.mean;
      if (i == 0 && j == 0) {
        best.m = m;
        least = coded.error;
        continue;
      }
      const typename S::M better = S::greater(least, coded.error);
      best.s = S::select(better, s, best.s);
      best.m = S::select(better, m, best.m);
      least = S::select(better, coded.error, least);
    }
  }
  return best;
}

// ---- super-scales ----

// Fits of all groups of sixteen rows, [groups][16].
struct FittedRows {
  const float *a, *b, *mean, *spread;
  const float* total;  // [groups]: sum of importance of each group's columns
  int64_t groups;
};

// Candidate i is start * (first - i * step).
struct SuperScaleSearch {
  int count;
  float first;
  float step;
};

template <class S, class Value, class Weight>
void search_super_scale(int64_t groups, float low, float high, const SuperScaleSearch& search, const float* start,
                        Value value, Weight weight, uint16_t* chosen) {
  using F = typename S::F;
  float best[16] = {};
  uint16_t best_half[16] = {};
  for (int i = 0; i < search.count; ++i) {
    uint16_t half[16];
    float scale[16], inverse[16], error[16];
    for (int l = 0; l < 16; ++l) {
      half[l] = super_scale(start[l] * (search.first - (float)i * search.step));
      scale[l] = half_to_float(half[l]);
      inverse[l] = scale[l] > 0.0f ? 1.0f / scale[l] : 0.0f;
    }
    const F step = S::load(scale), to_steps = S::load(inverse);
    F sum = S::set(0.0f);
    for (int64_t g = 0; g < groups; ++g) {
      const F x = value(g);
      const F off = S::fnma(step, round_between<S>(S::mul(x, to_steps), low, high), x);
      sum = S::fma(S::mul(weight(g), off), off, sum);
    }
    S::store(error, sum);
    for (int l = 0; l < 16; ++l) {
      if (i != 0 && !(error[l] < best[l])) continue;
      best[l] = error[l];
      best_half[l] = half[l];
    }
  }
  for (int l = 0; l < 16; ++l) chosen[l] = best_half[l];
}

inline void widen(const uint16_t* half, float* to) {
  for (int l = 0; l < 16; ++l) to[l] = half_to_float(half[l]);
}

// Chooses ds by the rounding error of a, then dm by the rounding error of b, which is adjusted to the rounded a.
template <class S>
void search_super_scales(const FittedRows& rows, const ScaleSteps& steps, const float* start_s, const float* start_m,
                         uint16_t* ds, uint16_t* dm) {
  using F = typename S::F;
  const SuperScaleSearch search =
      steps.s_max < 16.0f ? SuperScaleSearch{48, 1.02f, 1.0f / 96} : SuperScaleSearch{9, 1.0f, 1.0f / 64};
  const auto a_of = [&](int64_t g) { return S::load(rows.a + 16 * g); };
  search_super_scale<S>(
      rows.groups, 0.0f, steps.s_max, search, start_s, a_of, [&](int64_t g) { return S::load(rows.spread + 16 * g); },
      ds);
  float scale[16];
  widen(ds, scale);
  const F step = S::load(scale), to_steps = reciprocal_or_zero<S>(step);
  const auto b_of = [&](int64_t g) {
    const F a = a_of(g), rounded = S::mul(step, round_between<S>(S::mul(a, to_steps), 0.0f, steps.s_max));
    return S::fma(S::sub(rounded, a), S::load(rows.mean + 16 * g), S::load(rows.b + 16 * g));
  };
  search_super_scale<S>(
      rows.groups, steps.m_min, steps.m_max, search, start_m, b_of, [&](int64_t g) { return S::set(rows.total[g]); },
      dm);
}

}  // namespace
}  // namespace moe
