// The C ABI: checks, the choice of an ISA, and the walk over tiles.
#include "solver_api.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "../../formats/native/tile_layout.h"
#include "refit_job.h"
#include "solver_job.h"

namespace {

using namespace moe;

constexpr int32_t kAbi = 3;
// Sizes are products of these, and must fit in 63 bits.
constexpr int64_t kMaxRows = int64_t{1} << 31, kMaxColumns = int64_t{1} << 24;

int32_t best_isa() {
#if defined(MOE_SOLVER_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return MOE_ISA_AVX512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return MOE_ISA_AVX2;
#endif
  return MOE_ISA_PORTABLE;
}

struct Kernels {
  const SolverKernels* solver = nullptr;  // null: not here
  const RefitKernels* refit = nullptr;
};

Kernels kernels_of(int32_t isa) {
  const int32_t best = best_isa();
  if (isa == MOE_ISA_AUTO) isa = best;
  if (isa < 0 || isa > best) return {};
#if defined(MOE_SOLVER_X86)
  if (isa == MOE_ISA_AVX512) return {&kSolverAvx512, &kRefitAvx512};
  if (isa == MOE_ISA_AVX2) return {&kSolverAvx2, &kRefitAvx2};
#endif
  return {&kSolverPortable, &kRefitPortable};
}

bool good_matrix(int32_t dtype, const void* weights, int64_t rows, int64_t columns) {
  return weights != nullptr && dtype >= MOE_FP32 && dtype <= MOE_FP16 && rows >= 1 && rows <= kMaxRows && columns >= 1 &&
         columns <= kMaxColumns;
}

SolverJob job_of(int32_t dtype, const void* weights, int64_t rows, int64_t columns, uint32_t flags) {
  SolverJob job{};
  job.weights = static_cast<const uint8_t*>(weights);
  job.rows = rows;
  job.columns = columns;
  job.blocks = blocks_of(columns);
  job.dtype = dtype;
  job.element_bytes = dtype == MOE_FP32 ? 4 : 2;
  job.packing = -1;
  job.flags = flags;
  return job;
}

void set_packing(SolverJob* job, int32_t packing) {
  const PackingInfo& info = kPackingInfo[packing];
  job->packing = packing;
  job->block_bytes = info.block_bytes;
  job->nbits = info.nbits;
  job->group_size = info.group_size;
  job->scale_bits = info.scale_bits;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Hands out parts of one allocation; asked twice, first for the size.
class Scratch {
 public:
  explicit Scratch(uint8_t* base) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    T* at = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    return at;
  }

  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

struct ColumnCopies {
  float *inverse, *importance, *diagonal, *pairing, *low_rank;
  int32_t* position;
};

ColumnCopies place(RefitJob* job, Scratch* scratch) {
  const int64_t padded = job->padded, groups = padded / job->group_size, all = kPanelBatches * 16;
  job->w = scratch->take<float>(all * padded);
  job->e = scratch->take<float>(all * padded);
  job->codes = scratch->take<uint8_t>(all * padded);
  job->s = scratch->take<float>(all * groups);
  job->m = scratch->take<float>(all * groups);
  job->a = scratch->take<float>(16 * groups);
  job->b = scratch->take<float>(16 * groups);
  job->mean = scratch->take<float>(16 * groups);
  job->spread = scratch->take<float>(16 * groups);
  job->total = scratch->take<float>(groups);
  job->innovation = scratch->take<float>(all * kPanelColumns);
  job->packed = scratch->take<float>((kPanelColumns + kChunkColumns) * kPanelColumns);
  job->low_w = scratch->take<float>(all * job->rank);
  job->low_e = scratch->take<float>(all * job->rank);
  return {scratch->take<float>(padded), scratch->take<float>(padded), scratch->take<float>(padded),
          scratch->take<float>(padded), scratch->take<float>(job->rank * padded), scratch->take<int32_t>(groups)};
}

// The places of groups from their order; false if that is none, or crosses a factor block.
bool place_groups(const RefitJob& job, const int32_t* order, int32_t* position) {
  const int64_t all = job.padded / job.group_size;
  for (int64_t g = 0; g < all; ++g) position[g] = (int32_t)g;
  if (order == nullptr) return true;
  if (job.factor == nullptr || job.columns % job.group_size != 0) return false;
  for (int64_t g = 0; g < job.groups; ++g) position[g] = -1;
  for (int64_t i = 0; i < job.groups; ++i) {
    const int64_t g = order[i];
    if (g < 0 || g >= job.groups || position[g] != -1) return false;
    if (g * job.group_size / job.factor_block != i * job.group_size / job.factor_block) return false;
    position[g] = (int32_t)i;
  }
  return true;
}

}  // namespace

int32_t moe_solver_abi(void) { return kAbi; }

int32_t moe_solver_isa(void) { return best_isa(); }

int32_t moe_quantize(int32_t packing, int32_t dtype, const void* weights, int64_t rows, int64_t columns,
                     int64_t tile_begin, int64_t tile_end, uint8_t* out, int64_t tile_stride_bytes, uint32_t flags,
                     int32_t isa, double* errors, int64_t* non_finite) {
  if (packing < 0 || packing >= kPackings || !good_matrix(dtype, weights, rows, columns) || tile_begin < 0 ||
      tile_begin > tile_end || tile_end > tiles_of(rows) || out == nullptr || flags > MOE_ROUND_ZERO ||
      tile_stride_bytes < tile_bytes(static_cast<Packing>(packing), columns)) {
    return MOE_BAD_ARGUMENT;
  }
  const SolverKernels* kernels = kernels_of(isa).solver;
  if (kernels == nullptr) return MOE_NO_ISA;
  SolverJob job = job_of(dtype, weights, rows, columns, flags);
  set_packing(&job, packing);
  const size_t numbers = (size_t)job.blocks * (kBlockCols / job.group_size) * kHalfRows;
  const std::unique_ptr<float, Free> scratch(static_cast<float*>(std::aligned_alloc(64, 2 * numbers * sizeof(float))));
  if (scratch == nullptr) return MOE_NO_MEMORY;
  job.group_scale = scratch.get();
  job.group_minimum = scratch.get() + numbers;

  int32_t status = MOE_OK;
  int64_t bad = 0;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t index = tile - tile_begin;
    TileResult result{};
    const int32_t tile_status = kernels->tile(job, tile, out + index * tile_stride_bytes, &result);
    bad += result.non_finite;
    // All tiles are looked at, so that the count of non-finite weights is complete; it outranks an overflow.
    if (tile_status == MOE_NON_FINITE || status == MOE_OK) status = tile_status;
    if (errors != nullptr) {
      errors[2 * index] = result.squared_error;
      errors[2 * index + 1] = result.sum_squares;
    }
  }
  if (non_finite != nullptr) *non_finite = bad;
  return status;
}

int32_t moe_refit(int32_t packing, int32_t dtype, const void* weights, int64_t rows, int64_t columns, int64_t tile_begin,
                  int64_t tile_end, uint8_t* out, int64_t tile_stride_bytes, const float* factor, int64_t factor_block,
                  const int32_t* order, const float* importance, const float* diagonal, const float* pairing, const float* low_rank,
                  int64_t rank, const double* damping, uint32_t flags, int32_t isa, double* errors,
                  int64_t* non_finite) {
  if (packing < 0 || packing >= kPackings || !good_matrix(dtype, weights, rows, columns) || tile_begin < 0 ||
      tile_begin > tile_end || tile_end > tiles_of(rows) || out == nullptr || (flags & ~(uint32_t)MOE_STATIC) != 0 ||
      errors == nullptr || tile_stride_bytes < tile_bytes(static_cast<Packing>(packing), columns)) {
    return MOE_BAD_ARGUMENT;
  }
  if (factor != nullptr && (importance == nullptr || factor_block < 1 ||
                            (factor_block % kBlockCols != 0 && factor_block != columns))) {
    return MOE_BAD_ARGUMENT;
  }
  if ((diagonal != nullptr) != (pairing != nullptr) || (diagonal != nullptr && factor == nullptr) || rank < 0 ||
      rank > kMaxRank || (rank != 0) != (low_rank != nullptr) || (rank != 0 && diagonal == nullptr)) {
    return MOE_BAD_ARGUMENT;
  }
  const RefitKernels* kernels = kernels_of(isa).refit;
  if (kernels == nullptr) return MOE_NO_ISA;
  RefitJob job{};
  static_cast<SolverJob&>(job) = job_of(dtype, weights, rows, columns, flags);
  set_packing(&job, packing);
  job.factor = factor;
  job.factor_block = factor_block;
  job.damping = damping;
  job.rank = (rank + kStrip - 1) / kStrip * kStrip;
  job.exact = factor != nullptr && diagonal == nullptr;
  job.dynamic = (flags & MOE_STATIC) == 0;
  job.padded = job.blocks * kBlockCols;
  job.groups = (columns + job.group_size - 1) / job.group_size;
  Scratch sizes(nullptr);
  place(&job, &sizes);
  const std::unique_ptr<uint8_t, Free> memory(static_cast<uint8_t*>(std::aligned_alloc(64, (size_t)sizes.used())));
  if (memory == nullptr) return MOE_NO_MEMORY;
  Scratch scratch(memory.get());
  const ColumnCopies copies = place(&job, &scratch);
  if (!place_groups(job, order, copies.position)) return MOE_BAD_ARGUMENT;
  job.position = copies.position;
  for (int64_t k = 0; k < job.padded; ++k) {
    const bool inside = k < columns;
    copies.importance[k] = !inside ? 0.0f : importance != nullptr ? importance[k] : 1.0f;
    copies.diagonal[k] = !inside ? 0.0f : diagonal != nullptr ? diagonal[k] : copies.importance[k];
    copies.pairing[k] = !inside ? 0.0f : diagonal != nullptr ? pairing[k] : copies.importance[k];
    for (int64_t i = 0; i < job.rank; ++i) {
      const float part = inside && i < rank ? low_rank[k * rank + i] : 0.0f;
      copies.low_rank[(i / kStrip * job.padded + k) * kStrip + i % kStrip] = part;
    }
    copies.inverse[k] = 0.0f;
    if (!inside || factor == nullptr) continue;
    const int64_t block = k / factor_block, own = k % factor_block;
    copies.inverse[k] = 1.0f / factor[(block * factor_block + own) * factor_block + own];
  }
  job.importance = copies.importance;
  job.diagonal = copies.diagonal;
  job.pairing = copies.pairing;
  job.low_rank = copies.low_rank;
  job.inverse = copies.inverse;

  int32_t status = MOE_OK;
  int64_t bad = 0;
  for (int64_t tile = tile_begin; tile < tile_end; tile += kPanelTiles) {
    const int64_t index = tile - tile_begin, end = std::min<int64_t>(tile + kPanelTiles, tile_end);
    RefitResult results[kPanelTiles] = {};
    const int32_t panel_status = kernels->panel(job, tile, end, out + index * tile_stride_bytes, tile_stride_bytes, results);
    if (panel_status == MOE_NON_FINITE || status == MOE_OK) status = panel_status;
    for (int64_t i = 0; i < end - tile; ++i) {
      bad += results[i].plain.non_finite;
      double* to = errors + 4 * (index + i);
      to[0] = results[i].plain.squared_error;
      to[1] = results[i].plain.sum_squares;
      to[2] = results[i].error;
      to[3] = results[i].energy;
    }
  }
  if (non_finite != nullptr) *non_finite = bad;
  return status;
}

int32_t moe_hqq(int32_t nbits, int32_t group_size, int32_t dtype, const void* weights, int64_t rows, int64_t columns,
                uint32_t flags, int32_t isa, float* scale, float* zero, uint8_t* codes) {
  const bool good_group = group_size == 16 || group_size == 32 || group_size == 64;
  if (nbits < 2 || nbits > 4 || !good_group || !good_matrix(dtype, weights, rows, columns) || flags > MOE_ROUND_ZERO ||
      scale == nullptr || zero == nullptr || codes == nullptr) {
    return MOE_BAD_ARGUMENT;
  }
  const SolverKernels* kernels = kernels_of(isa).solver;
  if (kernels == nullptr) return MOE_NO_ISA;
  SolverJob job = job_of(dtype, weights, rows, columns, flags);
  job.nbits = nbits;
  job.group_size = group_size;
  for (int64_t row = 0; row < rows; row += kHalfRows) kernels->hqq(job, row, scale, zero, codes);
  return MOE_OK;
}
