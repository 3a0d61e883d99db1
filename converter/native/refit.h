// Up to kPanelTiles tiles by moe_refit: fits every group, chooses the rows' super-scales, then codes (feedback.h), then
// the gain. Least squares alone shrinks weights: all outputs of a matrix come out too small, and the model is worse
// than HQQ's although its error is smaller (tiny-mixtral, 2 bits: KL .026 against .014). So each row's super-scales are
// multiplied by its gain <w, w> / <w, w'>, in H's metric if there is one (KL .0126).
#pragma once
#include <cstdint>

#include "feedback.h"
#include "refit_group.h"
#include "refit_job.h"
#include "solver_kernel.h"

namespace moe {
namespace {

constexpr double kMaxGain = 1.5;
// Super-scales are fitted to the original weights, but carried errors widen a group. Without this factor KL is .0066
// instead of .0063 on tiny-mixtral at 2 bits, and .0077 instead of .0074 on its outlier variant.
constexpr float kRoom = 1.06f;

// Loads the batch's weights into job.w, groups in the order of feedback; lanes past the matrix's end become 0. Returns
// false if a weight is too large for any packing.
template <class S>
bool load_batch(const RefitJob& job, const RowBatch<S>& batch, float* w) {
  using F = typename S::F;
  const F none = S::set(0.0f);
  F largest = none;
  alignas(64) float loaded[kBlockCols * kLanes];
  const int64_t groups_of_block = kBlockCols / job.group_size;
  for (int64_t block = 0; block < job.blocks; ++block) {
    const int columns = batch.columns_of(block);
    if (columns < kBlockCols) __builtin_memset(loaded, 0, sizeof loaded);
    batch.load_block(block, loaded);
    for (int c = 0; c < kBlockCols; ++c) {
      const F x = c < columns ? S::select(batch.valid, S::load(loaded + kLanes * c), none) : none;
      largest = S::max(S::from_bits(S::and_u(S::bits(x), S::set_u(0x7fffffffu))), largest);
      const int64_t to =
          job.position[block * groups_of_block + c / job.group_size] * job.group_size + c % job.group_size;
      S::store(w + kLanes * to, x);
    }
  }
  return !S::any(S::greater(largest, S::set(kTooLarge)));
}

// Chooses the batch's super-scales, and S and M for the original weights unless feedback chooses them later.
template <class S>
void fit_batch(const RefitJob& job, int batch, uint16_t* half_s, uint16_t* half_m) {
  using F = typename S::F;
  const F none = S::set(0.0f), limit = S::set((float)((1 << job.nbits) - 1));
  const ScaleSteps steps = scale_steps(job.scale_bits);
  const float* w = job.w + batch * 16 * job.padded;
  F max_a = none, max_b = none;
  const auto group_of = [&](int64_t g) {
    const int64_t first = g * job.group_size, left = job.columns - first;
    return WeightedGroup<S>(w + 16 * first, job.importance + first,
                            (int)(left < job.group_size ? left : job.group_size), limit, job.scale_bits == 4);
  };
  for (int64_t g = 0; g < job.groups; ++g) {
    const WeightedGroup<S> group = group_of(g);
    const FittedGroup<S> fitted = fit_group<S>(group, job.nbits);
    max_a = S::max(fitted.line.a, max_a);
    max_b = S::max(S::from_bits(S::and_u(S::bits(fitted.line.b), S::set_u(0x7fffffffu))), max_b);
    S::store(job.a + 16 * g, fitted.line.a);
    S::store(job.b + 16 * g, fitted.line.b);
    S::store(job.mean + 16 * g, fitted.mean);
    S::store(job.spread + 16 * g, fitted.spread);
    job.total[g] = group.share > 0.0f ? 1.0f / group.share : 0.0f;
  }
  float start_s[16], start_m[16];
  S::store(start_s, S::div(max_a, S::set(steps.s_max)));
  S::store(start_m, S::div(max_b, S::set(steps.m_max)));
  search_super_scales<S>({job.a, job.b, job.mean, job.spread, job.total, job.groups}, steps, start_s, start_m, half_s,
                         half_m);
  if (job.factor != nullptr && job.dynamic) {
    for (int l = 0; l < 16; ++l) {
      half_s[l] = super_scale(half_to_float(half_s[l]) * kRoom);
      half_m[l] = super_scale(half_to_float(half_m[l]) * kRoom);
    }
    return;
  }
  const BatchScales<S> scales(half_s, half_m);
  const int64_t stride = 16 * (job.padded / job.group_size);
  for (int64_t g = 0; g < job.groups; ++g) {
    const FittedGroup<S> fitted{{S::load(job.a + 16 * g), S::load(job.b + 16 * g)}, S::load(job.mean + 16 * g), none};
    const ScalePair<S> pair = choose_pair<S>(group_of(g), fitted, scales.ds, scales.dm, steps);
    S::store(job.s + batch * stride + 16 * g, pair.s);
    S::store(job.m + batch * stride + 16 * g, pair.m);
  }
}

// Multiplies the super-scales by the rows' gains, and adds the remaining error in H's metric to the result.
inline void apply_gains(const MetricSums& sums, int count, uint16_t* half_s, uint16_t* half_m, RefitResult* result) {
  for (int l = 0; l < count; ++l) {
    const double kept = sums.energy[l] - sums.cross[l];
    double gain = sums.energy[l] / kept;
    if (!(kept > 0.0 && gain < kMaxGain && gain > 1.0 / kMaxGain)) gain = 1.0;
    const uint16_t before = half_s[l];
    half_s[l] = super_scale(half_to_float(half_s[l]) * (float)gain);
    half_m[l] = super_scale(half_to_float(half_m[l]) * (float)gain);
    if (before != 0) gain = (double)half_to_float(half_s[l]) / (double)half_to_float(before);
    const double less = 1.0 - gain;
    result->error += less * less * sums.energy[l] + 2.0 * gain * less * sums.cross[l] + gain * gain * sums.error[l];
    result->energy += sums.energy[l];
  }
}

// Writes the batch's half tile from codes, S, M and super-scales.
template <class S>
void write_half(const RefitJob& job, int batch, int count, int r, const uint16_t* half_s, const uint16_t* half_m,
                uint8_t* tile, RefitResult* result) {
  using F = typename S::F;
  const int64_t stride = 16 * job.padded, group_stride = 16 * (job.padded / job.group_size);
  __builtin_memcpy(tile + 64 * r, half_s, 32);
  __builtin_memcpy(tile + 64 * r + 32, half_m, 32);
  const BatchScales<S> scales(half_s, half_m);
  alignas(64) uint32_t codes[kBlockCols * kLanes], s[16 * kLanes], m[16 * kLanes];
  double error_of[kLanes], squares_of[kLanes];
  for (int64_t block = 0; block < job.blocks; ++block) {
    const int64_t begin = block * kBlockCols, end = begin + kBlockCols < job.columns ? begin + kBlockCols : job.columns;
    if (end - begin < kBlockCols) {
      __builtin_memset(codes, 0, sizeof codes);
      __builtin_memset(s, 0, sizeof s);
      __builtin_memset(m, 0, sizeof m);
    }
    typename S::D squared_error = S::zero_d(), squares = S::zero_d();
    for (int64_t g0 = begin; g0 < end; g0 += job.group_size) {
      const int64_t g1 = g0 + job.group_size < end ? g0 + job.group_size : end, g = g0 / job.group_size;
      const int64_t p = job.position[g], moved = (p - g) * job.group_size;
      const F s_of = S::load(job.s + batch * group_stride + 16 * p),
              m_of = S::load(job.m + batch * group_stride + 16 * p);
      const F step = S::mul(scales.ds, s_of), offset = S::mul(scales.dm, m_of);
      S::store_u(s + kLanes * ((g0 - begin) / job.group_size), to_integer<S>(s_of));
      S::store_u(m + kLanes * ((g0 - begin) / job.group_size), to_integer<S>(m_of));
      for (int64_t k = g0; k < g1; ++k) {
        const typename S::U code = S::load_bytes(job.codes + batch * stride + 16 * (k + moved));
        S::store_u(codes + kLanes * (k - begin), code);
        const F w = S::load(job.w + batch * stride + 16 * (k + moved));
        squared_error = S::add_square(squared_error, S::sub(w, S::sub(S::mul(step, S::to_float(code)), offset)));
        squares = S::add_square(squares, w);
      }
    }
    pack_block<S>(job.packing, {codes, s, m}, r, tile + kHeadBytes + block * job.block_bytes);
    const double damping =
        job.factor != nullptr && job.damping != nullptr ? job.damping[begin / job.factor_block] : 0.0;
    S::store_d(error_of, squared_error);
    S::store_d(squares_of, squares);
    for (int l = 0; l < count; ++l) {
      result->plain.squared_error += error_of[l];
      result->plain.sum_squares += squares_of[l];
      result->error -= damping * error_of[l];
      result->energy -= damping * squares_of[l];
    }
  }
}

template <class S>
int32_t refit_panel(const RefitJob& job, int64_t tile_begin, int64_t tile_end, uint8_t* out, int64_t tile_stride,
                    RefitResult* results) {
  bool finite = true;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t left = job.rows - tile * kTileRows;
    results[tile - tile_begin] = {};
    TileResult& plain = results[tile - tile_begin].plain;
    plain.non_finite = non_finite_of(job, tile * kTileRows, left < kTileRows ? left : kTileRows);
    finite = finite && plain.non_finite == 0;
  }
  if (!finite) return MOE_E_NON_FINITE;
  const int64_t row0 = tile_begin * kTileRows, end = tile_end * kTileRows < job.rows ? tile_end * kTileRows : job.rows;
  const int batches = (int)((end - row0 + kLanes - 1) / kLanes);
  uint16_t half_s[kPanelBatches][16], half_m[kPanelBatches][16];
  MetricSums sums[kPanelBatches] = {};
  for (int batch = 0; batch < batches; ++batch) {
    if (!load_batch<S>(job, RowBatch<S>(job, row0 + batch * kLanes), job.w + batch * 16 * job.padded))
      return MOE_E_OVERFLOW;
    fit_batch<S>(job, batch, half_s[batch], half_m[batch]);
    if (!fit_in_fp16(half_s[batch], half_m[batch])) return MOE_E_OVERFLOW;
    __builtin_memset(job.e + batch * 16 * job.padded, 0, sizeof(float) * 16 * (uint64_t)job.padded);
  }
  code_panel<S>(job, batches, half_s, half_m, sums);
  if (job.rank != 0) {
    project<S>(job, batches, job.w, job.low_w);
    project<S>(job, batches, job.e, job.low_e);
    add_low_rank(job, batches, sums);
  }
  for (int batch = 0; batch < batches; ++batch) {
    const int64_t left = end - (row0 + batch * kLanes);
    const int count = left < kLanes ? (int)left : kLanes;
    uint8_t* tile = out + batch / 2 * tile_stride;
    RefitResult* result = results + batch / 2;
    apply_gains(sums[batch], count, half_s[batch], half_m[batch], result);
    if (!fit_in_fp16(half_s[batch], half_m[batch])) return MOE_E_OVERFLOW;
    if (batch % 2 == 0 && left <= kHalfRows) {
      __builtin_memset(tile, 0, (uint64_t)(kHeadBytes + job.blocks * job.block_bytes));
    }
    write_half<S>(job, batch, count, batch % 2, half_s[batch], half_m[batch], tile, result);
  }
  return MOE_OK;
}

}  // namespace
}  // namespace moe
