// One tile from weights to bytes, for one ISA. Each half of 16 rows takes two passes over its weights, which are in L2
// for the second pass. The first runs HQQ for a scale and a zero of each group. The second chooses S, M and codes under
// the super-scales.
#pragma once
#include <cstdint>

#include "../../formats/native/half_float.h"
#include "hqq_group.h"
#include "round_group.h"
#include "solver_api.h"
#include "solver_job.h"
#include "tile_pack.h"

namespace moe {
namespace {

constexpr int kLanes = kHalfRows;
// No packing can represent this weight with fp16 super-scales. It is rejected before sums over it overflow.
constexpr float kTooLarge = 1e9f;
constexpr float kInfinity = __builtin_inff();

// 16 rows of the matrix. Rows past its end repeat the first one, and their results are discarded.
template <class S>
struct RowBatch {
  const SolverJob* job;
  const uint8_t* rows[kLanes];
  int count;
  typename S::M valid;

  RowBatch(const SolverJob& from, int64_t row0) : job(&from) {
    const int64_t row_bytes = from.columns * from.element_bytes, left = from.rows - row0;
    count = left < kLanes ? (int)left : kLanes;
    float is_valid[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      rows[l] = from.weights + (row0 + (l < count ? l : 0)) * row_bytes;
      is_valid[l] = l < count ? 1.0f : 0.0f;
    }
    valid = S::greater(S::load(is_valid), S::set(0.0f));
  }

  int columns_of(int64_t block) const {
    const int64_t left = job->columns - block * kBlockCols;
    return left < kBlockCols ? (int)left : kBlockCols;
  }

  // w: [256][16]; columns past the end of the matrix keep their values.
  void load_block(int64_t block, float* w) const {
    const int columns = columns_of(block), size = job->element_bytes;
    const uint8_t* at[kLanes];
    for (int first = 0; first < columns; first += 32) {
      const int64_t offset = (block * kBlockCols + first) * size;
      const int left = columns - first;
      uint8_t tail[kLanes][128];
      for (int l = 0; l < kLanes; ++l) {
        at[l] = rows[l] + offset;
        if (left >= 32) continue;
        for (int i = 0; i < 32 * size; ++i) tail[l][i] = i < left * size ? at[l][i] : 0;
        at[l] = tail[l];
      }
      S::load_columns(at, job->dtype, w + kLanes * first);
    }
  }
};

// Counts infinities and NaN among `count` words of 16 or 32 bits. exponent: mask of the exponent bits.
template <class Word>
int64_t count_non_finite(const uint8_t* from, int64_t count, Word exponent) {
  int64_t total = 0;
  for (int64_t first = 0; first < count; first += 32768) {
    const int64_t end = first + 32768 < count ? first + 32768 : count;
    Word sum = 0;  // as wide as a word, so that the loop uses narrow lanes
    for (int64_t i = first; i < end; ++i) {
      Word word;
      __builtin_memcpy(&word, from + i * (int64_t)sizeof word, sizeof word);
      sum = (Word)(sum + (Word)((word & exponent) == exponent));
    }
    total += sum;
  }
  return total;
}

int64_t non_finite_of(const SolverJob& job, int64_t row0, int64_t rows) {
  const uint8_t* from = job.weights + row0 * job.columns * job.element_bytes;
  const int64_t count = rows * job.columns;
  if (job.dtype == MOE_F32) return count_non_finite<uint32_t>(from, count, 0x7f800000u);
  return count_non_finite<uint16_t>(from, count, job.dtype == MOE_BF16 ? 0x7f80 : 0x7c00);
}

// Runs HQQ for every group of the batch, into the job's scratch, and computes the rows' super-scales.
template <class S>
void solve_rows(const RowBatch<S>& batch, uint16_t* ds, uint16_t* dm) {
  using F = typename S::F;
  const SolverJob& job = *batch.job;
  alignas(64) float w[kBlockCols * kLanes], t[64 * kLanes];
  const F none = S::set(0.0f), limit = S::set((float)((1 << job.nbits) - 1));
  F max_scale = none, max_minimum = none;
  int64_t group = 0;
  for (int64_t block = 0; block < job.blocks; ++block) {
    const int columns = batch.columns_of(block);
    batch.load_block(block, w);
    for (int first = 0; first < columns; first += job.group_size, ++group) {
      const int count = columns - first < job.group_size ? columns - first : job.group_size;
      const HqqResult<S> hqq = solve_group<S>(w + kLanes * first, t, count, (float)((1 << job.nbits) - 1),
                                              (job.flags & MOE_ROUND_ZERO) != 0);
      F scale, minimum;
      hqq.scale_and_minimum(limit, &scale, &minimum);
      scale =
          S::select(S::greater(S::max(S::sub(none, hqq.low), hqq.high), S::set(kTooLarge)), S::set(kInfinity), scale);
      scale = S::select(batch.valid, scale, none);
      minimum = S::select(batch.valid, minimum, none);
      max_scale = S::max(scale, max_scale);
      // An unsigned M cannot hold a negative minimum, which therefore must not determine the row's dm.
      const F size = job.scale_bits == 4 ? minimum : S::from_bits(S::and_u(S::bits(minimum), S::set_u(0x7fffffffu)));
      max_minimum = S::max(size, max_minimum);
      S::store(job.group_scale + kLanes * group, scale);
      S::store(job.group_minimum + kLanes * group, minimum);
    }
  }
  const ScaleSteps steps = scale_steps(job.scale_bits);
  float start_s[kLanes], start_m[kLanes];
  S::store(start_s, S::div(max_scale, S::set(steps.s_max)));
  S::store(start_m, S::div(max_minimum, S::set(steps.m_max)));
  for (int l = 0; l < kLanes; ++l) {
    ds[l] = super_scale(start_s[l]);
    dm[l] = super_scale(start_m[l]);
  }
}

// The super-scales of a batch as floats, for the choice of codes.
template <class S>
struct RowScales {
  typename S::F ds, dm;

  RowScales(const uint16_t* half_s, const uint16_t* half_m) {
    float s[kLanes], m[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      s[l] = half_to_float(half_s[l]);
      m[l] = half_to_float(half_m[l]);
    }
    ds = S::load(s);
    dm = S::load(m);
  }
};

inline bool fit_in_fp16(const uint16_t* half_s, const uint16_t* half_m) {
  for (int l = 0; l < kLanes; ++l) {
    if (half_s[l] == kHalfInfinity || half_m[l] == kHalfInfinity) return false;
  }
  return true;
}

// Calls f(group, task, first column within the superblock) for each group of the batch. w: scratch for a superblock.
template <class S, class Function, class EndOfBlock>
void each_group(const RowBatch<S>& batch, const RowScales<S>& scales, float* w, Function f, EndOfBlock end_of_block) {
  const SolverJob& job = *batch.job;
  const ScaleSteps steps = scale_steps(job.scale_bits);
  const typename S::F limit = S::set((float)((1 << job.nbits) - 1));
  int64_t group = 0;
  for (int64_t block = 0; block < job.blocks; ++block) {
    const int columns = batch.columns_of(block);
    batch.load_block(block, w);
    for (int first = 0; first < columns; first += job.group_size, ++group) {
      const int count = columns - first < job.group_size ? columns - first : job.group_size;
      f(group, GroupTask<S>{w + kLanes * first, count, limit, scales.ds, scales.dm, steps}, first);
    }
    end_of_block(block);
  }
}

template <class S>
int32_t half_tile(const SolverJob& job, int64_t row0, int r, uint8_t* tile, TileResult* result) {
  const RowBatch<S> batch(job, row0);
  uint16_t half_s[kLanes], half_m[kLanes];
  solve_rows<S>(batch, half_s, half_m);
  if (!fit_in_fp16(half_s, half_m)) return MOE_E_OVERFLOW;
  const RowScales<S> scales(half_s, half_m);
  alignas(64) float w[kBlockCols * kLanes];
  __builtin_memcpy(tile + 64 * r, half_s, sizeof half_s);
  __builtin_memcpy(tile + 64 * r + 32, half_m, sizeof half_m);

  // Cleared before a last superblock with missing columns; all others are full.
  alignas(64) uint32_t codes[kBlockCols * kLanes], s[16 * kLanes], m[16 * kLanes];
  typename S::D squared_error = S::zero_d(), squares = S::zero_d();
  const auto clear_for = [&](int64_t block) {
    if (block >= job.blocks || batch.columns_of(block) == kBlockCols) return;
    __builtin_memset(codes, 0, sizeof codes);
    __builtin_memset(s, 0, sizeof s);
    __builtin_memset(m, 0, sizeof m);
  };
  clear_for(0);
  each_group<S>(
      batch, scales, w,
      [&](int64_t group, const GroupTask<S>& task, int first) {
        const ScalePair<S> pair = round_scales<S>(task, S::load(job.group_scale + kLanes * group),
                                                  S::load(job.group_minimum + kLanes * group));
        write_codes<S>(task, pair, codes + kLanes * first, &squared_error, &squares);
        const int g = first / job.group_size;
        S::store_u(s + kLanes * g, to_integer<S>(pair.s));
        S::store_u(m + kLanes * g, to_integer<S>(pair.m));
      },
      [&](int64_t block) {
        pack_block<S>(job.packing, {codes, s, m}, r, tile + kHeadBytes + block * job.block_bytes);
        clear_for(block + 1);
      });
  double error_of[kLanes], squares_of[kLanes];
  S::store_d(error_of, squared_error);
  S::store_d(squares_of, squares);
  for (int l = 0; l < batch.count; ++l) {
    result->squared_error += error_of[l];
    result->sum_squares += squares_of[l];
  }
  return MOE_OK;
}

template <class S>
int32_t quantize_tile(const SolverJob& job, int64_t tile, uint8_t* out, TileResult* result) {
  const int64_t row0 = tile * kTileRows, left = job.rows - row0;
  const int64_t rows = left < kTileRows ? left : kTileRows;
  *result = {0.0, 0.0, non_finite_of(job, row0, rows)};
  if (result->non_finite != 0) return MOE_E_NON_FINITE;
  if (rows <= kHalfRows) __builtin_memset(out, 0, (uint64_t)(kHeadBytes + job.blocks * job.block_bytes));
  for (int r = 0; r < 2 && r * kHalfRows < rows; ++r) {
    const int32_t status = half_tile<S>(job, row0 + r * kHalfRows, r, out, result);
    if (status != MOE_OK) return status;
  }
  return MOE_OK;
}

template <class S>
void hqq_rows(const SolverJob& job, int64_t row0, float* scale, float* zero, uint8_t* codes) {
  const RowBatch<S> batch(job, row0);
  alignas(64) float w[kBlockCols * kLanes], t[64 * kLanes];
  const int64_t groups = (job.columns + job.group_size - 1) / job.group_size;
  const float largest = (float)((1 << job.nbits) - 1);
  for (int64_t block = 0; block < job.blocks; ++block) {
    const int columns = batch.columns_of(block);
    batch.load_block(block, w);
    for (int first = 0; first < columns; first += job.group_size) {
      const int count = columns - first < job.group_size ? columns - first : job.group_size;
      const HqqResult<S> hqq = solve_group<S>(w + kLanes * first, t, count, largest, (job.flags & MOE_ROUND_ZERO) != 0);
      float scales[kLanes], zeros[kLanes];
      S::store(scales, S::div(S::set(1.0f), hqq.inverse));
      S::store(zeros, hqq.zero);
      const int64_t group = (block * kBlockCols + first) / job.group_size;
      for (int l = 0; l < batch.count; ++l) {
        scale[(row0 + l) * groups + group] = scales[l];
        zero[(row0 + l) * groups + group] = zeros[l];
      }
      for (int c = 0; c < count; ++c) {
        uint32_t lanes[kLanes];
        S::store_u(lanes, biased_code<S>(S::add(S::load(t + kLanes * c), hqq.zero), S::set(largest)));
        const int64_t column = block * kBlockCols + first + c;
        for (int l = 0; l < batch.count; ++l) codes[(row0 + l) * job.columns + column] = (uint8_t)lanes[l];
      }
    }
  }
}

}  // namespace
}  // namespace moe
