// Codes of a panel of rows, left to right; each column's error is carried to the columns after it (GPTQ/OBQ). With
// H = V * V^T, V upper triangular, e^T H e is the sum over k of (V_kk * (e_k + sum over j < k of e_j * V_jk / V_kk))^2.
// So the best rounding of column k is that of w_k plus the inner sum. No inverse of H is needed.
//
// Each sum is one chain of FMAs, j ascending, for every blocking. So every ISA and every split of the rows gives the
// same bits.
#pragma once
#include <cstdint>

#include "refit_group.h"
#include "refit_job.h"

namespace moe {
namespace {

// Writes V_jk / V_kk for j in j0..j1-1 and k in k0..k1-1 in strips, [strip][j - j0][kStrip]; 0 for j >= k and k >= k1.
inline void pack_factor(const float* block, int64_t ld, const float* inverse, int64_t j0, int64_t j1, int64_t k0,
                        int64_t k1, float* to) {
  typedef float F4 __attribute__((vector_size(16), aligned(4)));
  const int64_t count = j1 - j0, whole = (k1 - k0) / kStrip, strips = (k1 - k0 + kStrip - 1) / kStrip;
  int64_t j = j0;
  // Four rows at a time fill a cache line of `to`.
  for (; j + 4 <= j1 && j + 4 <= k0; j += 4) {
    const float* row = block + j * ld + k0;
    // The rows of the next chunk are pages apart: prefetched now, they are in L2 when they are needed.
    for (int i = 0; i < 4; ++i) {
      for (int64_t k = 0; k < k1 - k0; k += 16) __builtin_prefetch(row + (kChunkColumns + i) * ld + k);
    }
    for (int64_t s = 0; s < whole; ++s) {
      const F4 scale = *(const F4*)(inverse + k0 + kStrip * s);
      for (int i = 0; i < 4; ++i) {
        *(F4*)(to + (s * count + j - j0 + i) * kStrip) = *(const F4*)(row + i * ld + kStrip * s) * scale;
      }
    }
  }
  const int64_t packed = j;
  for (int64_t s = 0; s < strips; ++s) {
    for (j = s < whole ? packed : j0; j < j1; ++j) {
      for (int c = 0; c < kStrip; ++c) {
        const int64_t k = k0 + s * kStrip + c;
        to[(s * count + j - j0) * kStrip + c] = j < k && k < k1 ? block[j * ld + k] * inverse[k] : 0.0f;
      }
    }
  }
}

// acc[r][c] += from_r[j] * strip[j][c] for j in 0..count-1. Batches r are `stride` floats apart.
template <class S, int R>
inline __attribute__((always_inline)) void add_products(const float* from, int64_t stride, const float* strip,
                                                        int64_t count, typename S::F (&acc)[R][kStrip]) {
  using F = typename S::F;
  for (int64_t j = 0; j < count; ++j) {
    F x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = S::load(from + r * stride + 16 * j);
#pragma GCC unroll 4
    for (int c = 0; c < kStrip; ++c) {
      const F v = S::set(strip[kStrip * j + c]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][c] = S::fma(x[r], v, acc[r][c]);
    }
  }
}

// to[k] += sum over j of from[j] * packed[j][k], for strips of columns k.
template <class S, int R>
void update_strips(const float* from, int64_t from_stride, float* to, int64_t to_stride, const float* packed,
                   int64_t packed_rows, int64_t count, int64_t strips) {
  for (int64_t s = 0; s < strips; ++s) {
    typename S::F acc[R][kStrip];
    float* at = to + 16 * kStrip * s;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < kStrip; ++c) acc[r][c] = S::load(at + r * to_stride + 16 * c);
    }
    add_products<S, R>(from, from_stride, packed + s * packed_rows * kStrip, count, acc);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < kStrip; ++c) S::store(at + r * to_stride + 16 * c, acc[r][c]);
    }
  }
}

// Sums over a batch in H's metric, for each row.
struct MetricSums {
  double error[16];   // e^T H e
  double energy[16];  // w^T H w
  double cross[16];   // w^T H e
};

template <class S>
void add_lanes(typename S::F x, double* to) {
  float lanes[16];
  S::store(lanes, x);
  for (int l = 0; l < 16; ++l) to[l] += lanes[l];
}

// The super-scales of a batch as floats.
template <class S>
struct BatchScales {
  typename S::F ds, dm;

  BatchScales(const uint16_t* half_s, const uint16_t* half_m) {
    float s[16], m[16];
    widen(half_s, s);
    widen(half_m, m);
    ds = S::load(s);
    dm = S::load(m);
  }
};

// Data that all groups of a panel share: super-scales and sums of its batches, and the factor's diagonal block.
struct Panel {
  const uint16_t (*half_s)[16];
  const uint16_t (*half_m)[16];
  const float* diagonal_block;
  MetricSums* sums;
  int64_t begin, columns;
};

// Computes the codes of one group, columns g0..g1-1, of R batches.
template <class S, int R>
void code_group(const RefitJob& job, const Panel& panel, int batch0, int64_t g0, int64_t g1) {
  using F = typename S::F;
  const int64_t p0 = panel.begin;
  const F none = S::set(0.0f), limit = S::set((float)((1 << job.nbits) - 1));
  const ScaleSteps steps = scale_steps(job.scale_bits);
  const int64_t stride = 16 * job.padded, group = g0 / job.group_size,
                group_stride = 16 * (job.padded / job.group_size);
  float *w = job.w + batch0 * stride, *e = job.e + batch0 * stride;
  const int64_t rows = panel.columns, strips = (g1 - g0 + kStrip - 1) / kStrip;
  const float* strips_of_group = panel.diagonal_block + (g0 - p0) / kStrip * rows * kStrip;
  const bool feedback = job.factor != nullptr;
  if (feedback && g0 > p0) {
    update_strips<S, R>(e + 16 * p0, stride, e + 16 * g0, stride, strips_of_group, rows, g0 - p0, strips);
  }
  F a[R], b[R], inverse[R], zero[R], largest[R];
  for (int r = 0; r < R; ++r) {
    const BatchScales<S> scales(panel.half_s[batch0 + r], panel.half_m[batch0 + r]);
    float* s = job.s + (batch0 + r) * group_stride + 16 * group;
    float* m = job.m + (batch0 + r) * group_stride + 16 * group;
    if (feedback && job.dynamic) {
      alignas(64) float x[64 * 16];
      for (int64_t k = g0; k < g1; ++k) {
        S::store(x + 16 * (k - g0), S::add(S::load(w + r * stride + 16 * k), S::load(e + r * stride + 16 * k)));
      }
      const WeightedGroup<S> moved(x, job.importance + g0, (int)(g1 - g0), limit, job.scale_bits == 4);
      const ScalePair<S> pair = choose_pair<S>(moved, fit_group<S>(moved, job.nbits), scales.ds, scales.dm, steps);
      S::store(s, pair.s);
      S::store(m, pair.m);
    }
    a[r] = S::mul(scales.ds, S::load(s));
    b[r] = S::mul(scales.dm, S::load(m));
    inverse[r] = reciprocal_or_zero<S>(a[r]);
    zero[r] = S::mul(b[r], inverse[r]);
    largest[r] = S::select(S::greater(a[r], none), limit, none);
  }
  F error[R], energy[R], cross[R];
  for (int r = 0; r < R; ++r) error[r] = energy[r] = cross[r] = none;
  for (int64_t k0 = g0; k0 < g1; k0 += kStrip) {
    const float* strip = strips_of_group + (k0 - g0) * rows;
    F acc[R][kStrip];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < kStrip; ++c) acc[r][c] = S::load(e + r * stride + 16 * (k0 + c));
    }
    if (feedback) add_products<S, R>(e + 16 * g0, stride, strip + kStrip * (g0 - p0), k0 - g0, acc);
#pragma GCC unroll 4
    for (int c = 0; c < kStrip; ++c) {
      const int64_t k = k0 + c;
      const float* next = strip + kStrip * (k - p0);
      const F h = S::set(job.importance[k]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const F weight = S::load(w + r * stride + 16 * k), x = S::add(weight, acc[r][c]);
        const typename S::U biased = biased_code<S>(S::fma(x, inverse[r], zero[r]), largest[r]);
        const F q = S::sub(S::from_bits(biased), S::set(kRounder));
        const F off = S::fnma(a[r], q, S::add(x, b[r])), residual = S::fnma(a[r], q, S::add(weight, b[r]));
        S::store(e + r * stride + 16 * k, residual);
        S::store_bytes(job.codes + (batch0 + r) * stride + 16 * k, S::sub_u(biased, S::set_u(kRounderBits)));
        const F weighted = S::mul(h, off);
        error[r] = S::fma(weighted, off, error[r]);
        if (job.exact) {
          const F base = S::add(weight, S::load(job.innovation + (batch0 + r) * 16 * kPanelColumns + 16 * (k - p0)));
          energy[r] = S::fma(S::mul(h, base), base, energy[r]);
          cross[r] = S::fma(weighted, base, cross[r]);
        } else {
          energy[r] = S::fma(S::mul(S::set(job.diagonal[k]), weight), weight, energy[r]);
          cross[r] = S::fma(S::mul(S::set(job.pairing[k]), weight), off, cross[r]);
        }
        if (feedback) {
#pragma GCC unroll 4
          for (int d = c + 1; d < kStrip; ++d) acc[r][d] = S::fma(residual, S::set(next[d]), acc[r][d]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    add_lanes<S>(error[r], panel.sums[batch0 + r].error);
    add_lanes<S>(energy[r], panel.sums[batch0 + r].energy);
    add_lanes<S>(cross[r], panel.sums[batch0 + r].cross);
  }
}

// Calls f.template operator()<R>(batch0) for runs of R batches, as many as suit the ISA.
template <class S, class Function>
void each_run(int batches, Function f) {
  int batch = 0;
  if constexpr (S::kBatchesAtOnce == 4) {
    for (; batch + 4 <= batches; batch += 4) f.template operator()<4>(batch);
    if (batch + 2 <= batches) {
      f.template operator()<2>(batch);
      batch += 2;
    }
  }
  for (; batch < batches; ++batch) f.template operator()<1>(batch);
}

// Multiplies every batch's vectors by G^T: to [rank][16] for each batch.
template <class S>
void project(const RefitJob& job, int batches, const float* from, float* to) {
  const int64_t stride = 16 * job.padded;
  __builtin_memset(to, 0, sizeof(float) * 16 * (uint64_t)(batches * job.rank));
  for (int64_t j = 0; j < job.columns; j += kChunkColumns) {
    const int64_t count = job.columns - j < kChunkColumns ? job.columns - j : kChunkColumns;
    each_run<S>(batches, [&]<int R>(int batch) {
      update_strips<S, R>(from + batch * stride + 16 * j, stride, to + batch * 16 * job.rank, 16 * job.rank,
                          job.low_rank + kStrip * j, job.padded, count, job.rank / kStrip);
    });
  }
}

// Adds G's part of the metric's sums, which code_group omits.
inline void add_low_rank(const RefitJob& job, int batches, MetricSums* sums) {
  for (int batch = 0; batch < batches; ++batch) {
    for (int64_t i = 0; i < job.rank; ++i) {
      const int64_t at = (batch * job.rank + i) * 16;
      for (int l = 0; l < 16; ++l) {
        const double projected = job.low_w[at + l];
        sums[batch].energy[l] += projected * projected;
        sums[batch].cross[l] += projected * (double)job.low_e[at + l];
      }
    }
  }
}

template <class S>
void code_panel(const RefitJob& job, int batches, const uint16_t (*half_s)[16], const uint16_t (*half_m)[16],
                MetricSums* sums) {
  const int64_t stride = 16 * job.padded, block = job.factor != nullptr ? job.factor_block : job.columns;
  float* const diagonal_block = job.packed;
  float* const chunk = job.packed + kPanelColumns * kPanelColumns;
  for (int64_t block0 = 0; block0 < job.columns; block0 += block) {
    const int64_t block1 = block0 + block < job.columns ? block0 + block : job.columns;
    // Indexed by column of the matrix from here on.
    const float* factor = job.factor == nullptr ? nullptr : job.factor + block0 / block * block * block;
    const float* inverse = job.inverse + block0;
    for (int64_t p0 = block0; p0 < block1; p0 += kPanelColumns) {
      const int64_t p1 = p0 + kPanelColumns < block1 ? p0 + kPanelColumns : block1;
      const int64_t strips = (p1 - p0 + kStrip - 1) / kStrip;
      const Panel panel = {half_s, half_m, diagonal_block, sums, p0, p1 - p0};
      if (job.exact) __builtin_memset(job.innovation, 0, sizeof(float) * kPanelBatches * kPanelColumns * 16);
      if (factor != nullptr) {
        for (int64_t j0 = block0; j0 < p0; j0 += kChunkColumns) {
          const int64_t j1 = j0 + kChunkColumns;  // p0 - block0 is a multiple of it
          pack_factor(factor, block, inverse, j0 - block0, j1 - block0, p0 - block0, p1 - block0, chunk);
          each_run<S>(batches, [&]<int R>(int batch) {
            update_strips<S, R>(job.e + batch * stride + 16 * j0, stride, job.e + batch * stride + 16 * p0, stride,
                                chunk, kChunkColumns, kChunkColumns, strips);
            if (job.exact) {
              update_strips<S, R>(job.w + batch * stride + 16 * j0, stride, job.innovation + batch * 16 * kPanelColumns,
                                  16 * kPanelColumns, chunk, kChunkColumns, kChunkColumns, strips);
            }
          });
        }
        pack_factor(factor, block, inverse, p0 - block0, p1 - block0, p0 - block0, p1 - block0, diagonal_block);
      }
      each_run<S>(batches, [&]<int R>(int batch) {
        if (factor != nullptr && job.exact) {
          update_strips<S, R>(job.w + batch * stride + 16 * p0, stride, job.innovation + batch * 16 * kPanelColumns,
                              16 * kPanelColumns, diagonal_block, p1 - p0, p1 - p0, strips);
        }
        for (int64_t g0 = p0; g0 < p1; g0 += job.group_size) {
          const int64_t g1 = g0 + job.group_size < p1 ? g0 + job.group_size : p1;
          code_group<S, R>(job, panel, batch, g0, g1);
        }
      });
    }
  }
}

}  // namespace
}  // namespace moe
