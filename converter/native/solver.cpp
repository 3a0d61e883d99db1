// The C ABI: checks of arguments, the choice of an ISA, and the loop over tiles.
#include "solver_api.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "../../formats/native/cpu_features.h"
#include "../../formats/native/tile_layout.h"
#include "refit_job.h"
#include "solver_job.h"

namespace {

using namespace moe;

// Sizes in bytes are products of these and must fit in 63 bits.
constexpr int64_t kMaxRows = int64_t{1} << 31, kMaxColumns = int64_t{1} << 24;

int32_t best_isa() {
  return cpu_runs(MOE_ISA_AVX512) ? MOE_ISA_AVX512 : cpu_runs(MOE_ISA_AVX2) ? MOE_ISA_AVX2 : MOE_ISA_PORTABLE;
}

struct Kernels {
  const SolverKernels* solver = nullptr;  // null: this processor or this build lacks the instruction set
  const RefitKernels* refit = nullptr;
};

Kernels kernels_of(int32_t isa) {
  if (isa == MOE_ISA_AUTO) isa = best_isa();
  if (!cpu_runs(isa)) return {};
#if defined(MOE_X86)
  if (isa == MOE_ISA_AVX512) return {&kSolverAvx512, &kRefitAvx512};
  if (isa == MOE_ISA_AVX2) return {&kSolverAvx2, &kRefitAvx2};
#endif
  return {&kSolverPortable, &kRefitPortable};
}

bool good_matrix(const moe_weights& weights) {
  return weights.data != nullptr && weights.dtype >= MOE_F32 && weights.dtype <= MOE_F16 && weights.rows >= 1 &&
         weights.rows <= kMaxRows && weights.columns >= 1 && weights.columns <= kMaxColumns;
}

int32_t check(const moe_weights& weights, const moe_tiles& tiles) {
  if (!known_packing(tiles.packing)) return MOE_E_PACKING;
  const bool good = good_matrix(weights) && tiles.begin >= 0 && tiles.begin <= tiles.end &&
                    tiles.end <= tiles_of(weights.rows) && tiles.out != nullptr &&
                    tiles.stride_bytes >= tile_bytes(Packing(tiles.packing), weights.columns);
  return good ? MOE_OK : MOE_E_ARGUMENT;
}

bool good_metric(const moe_metric& metric, int64_t columns) {
  const bool has_factor = metric.factor != nullptr, has_diagonal = metric.diagonal != nullptr;
  if (has_factor && metric.importance == nullptr) return false;
  if (has_factor &&
      (metric.factor_block < 1 || (metric.factor_block % kBlockCols != 0 && metric.factor_block != columns))) {
    return false;
  }
  if (has_diagonal != (metric.pairing != nullptr) || (has_diagonal && !has_factor)) return false;
  if ((metric.rank != 0) != (metric.low_rank != nullptr) || (metric.rank != 0 && !has_diagonal)) return false;
  return metric.rank >= 0 && metric.rank <= kMaxRank;
}

SolverJob job_of(const moe_weights& weights, uint32_t flags) {
  SolverJob job{};
  job.weights = static_cast<const uint8_t*>(weights.data);
  job.rows = weights.rows;
  job.columns = weights.columns;
  job.blocks = blocks_of(weights.columns);
  job.dtype = weights.dtype;
  job.element_bytes = weights.dtype == MOE_F32 ? 4 : 2;
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

// Hands out parts of one allocation. With a null base it only computes the size.
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
  return {scratch->take<float>(padded),
          scratch->take<float>(padded),
          scratch->take<float>(padded),
          scratch->take<float>(padded),
          scratch->take<float>(job->rank * padded),
          scratch->take<int32_t>(groups)};
}

// Computes the positions of groups. Returns false if `order` is no permutation, or moves a group to another factor
// block.
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

// Copies the metric's columns into the job's layout, with 0 past the last column.
void copy_metric(const moe_metric& metric, const ColumnCopies& copies, RefitJob* job) {
  for (int64_t k = 0; k < job->padded; ++k) {
    const bool inside = k < job->columns;
    copies.importance[k] = !inside ? 0.0f : metric.importance != nullptr ? metric.importance[k] : 1.0f;
    copies.diagonal[k] = !inside ? 0.0f : metric.diagonal != nullptr ? metric.diagonal[k] : copies.importance[k];
    copies.pairing[k] = !inside ? 0.0f : metric.diagonal != nullptr ? metric.pairing[k] : copies.importance[k];
    for (int64_t i = 0; i < job->rank; ++i) {
      const float part = inside && i < metric.rank ? metric.low_rank[k * metric.rank + i] : 0.0f;
      copies.low_rank[(i / kStrip * job->padded + k) * kStrip + i % kStrip] = part;
    }
    copies.inverse[k] = 0.0f;
    if (!inside || metric.factor == nullptr) continue;
    const int64_t size = metric.factor_block, block = k / size, column = k % size;
    copies.inverse[k] = 1.0f / metric.factor[(block * size + column) * size + column];
  }
  job->importance = copies.importance;
  job->diagonal = copies.diagonal;
  job->pairing = copies.pairing;
  job->low_rank = copies.low_rank;
  job->inverse = copies.inverse;
}

}  // namespace

int32_t moe_solver_abi(void) { return MOE_SOLVER_ABI_VERSION; }

int32_t moe_solver_isa(void) { return best_isa(); }

int32_t moe_packing_id(const char* name) { return packing_named(name); }

int32_t moe_quantize(const moe_weights* weights, moe_tiles* tiles, uint32_t flags, int32_t isa) {
  if (const int32_t error = check(*weights, *tiles)) return error;
  if (flags > MOE_ROUND_ZERO) return MOE_E_ARGUMENT;
  const SolverKernels* kernels = kernels_of(isa).solver;
  if (kernels == nullptr) return MOE_E_ISA;
  SolverJob job = job_of(*weights, flags);
  set_packing(&job, tiles->packing);
  const size_t numbers = (size_t)job.blocks * (kBlockCols / job.group_size) * kHalfRows;
  const std::unique_ptr<float, Free> scratch(static_cast<float*>(std::aligned_alloc(64, 2 * numbers * sizeof(float))));
  if (scratch == nullptr) return MOE_E_MEMORY;
  job.group_scale = scratch.get();
  job.group_minimum = scratch.get() + numbers;

  int32_t status = MOE_OK;
  tiles->non_finite = 0;
  for (int64_t tile = tiles->begin; tile < tiles->end; ++tile) {
    const int64_t index = tile - tiles->begin;
    TileResult result{};
    const int32_t tile_status = kernels->tile(job, tile, tiles->out + index * tiles->stride_bytes, &result);
    tiles->non_finite += result.non_finite;
    // All tiles are computed, so that the count of non-finite weights is complete. Their status outranks an overflow.
    if (tile_status == MOE_E_NON_FINITE || status == MOE_OK) status = tile_status;
    if (tiles->errors != nullptr) {
      tiles->errors[2 * index] = result.squared_error;
      tiles->errors[2 * index + 1] = result.sum_squares;
    }
  }
  return status;
}

int32_t moe_refit(const moe_weights* weights, moe_tiles* tiles, const moe_metric* metric, uint32_t flags, int32_t isa) {
  if (const int32_t error = check(*weights, *tiles)) return error;
  if ((flags & ~(uint32_t)MOE_STATIC) != 0 || tiles->errors == nullptr || !good_metric(*metric, weights->columns)) {
    return MOE_E_ARGUMENT;
  }
  const RefitKernels* kernels = kernels_of(isa).refit;
  if (kernels == nullptr) return MOE_E_ISA;
  RefitJob job{};
  static_cast<SolverJob&>(job) = job_of(*weights, flags);
  set_packing(&job, tiles->packing);
  job.factor = metric->factor;
  job.factor_block = metric->factor_block;
  job.damping = metric->damping;
  job.rank = (metric->rank + kStrip - 1) / kStrip * kStrip;
  job.exact = metric->factor != nullptr && metric->diagonal == nullptr;
  job.dynamic = (flags & MOE_STATIC) == 0;
  job.padded = job.blocks * kBlockCols;
  job.groups = (job.columns + job.group_size - 1) / job.group_size;
  Scratch sizes(nullptr);
  place(&job, &sizes);
  const std::unique_ptr<uint8_t, Free> memory(static_cast<uint8_t*>(std::aligned_alloc(64, (size_t)sizes.used())));
  if (memory == nullptr) return MOE_E_MEMORY;
  Scratch scratch(memory.get());
  const ColumnCopies copies = place(&job, &scratch);
  if (!place_groups(job, metric->order, copies.position)) return MOE_E_ARGUMENT;
  job.position = copies.position;
  copy_metric(*metric, copies, &job);

  int32_t status = MOE_OK;
  tiles->non_finite = 0;
  for (int64_t tile = tiles->begin; tile < tiles->end; tile += kPanelTiles) {
    const int64_t index = tile - tiles->begin, end = std::min<int64_t>(tile + kPanelTiles, tiles->end);
    RefitResult results[kPanelTiles] = {};
    const int32_t panel_status =
        kernels->panel(job, tile, end, tiles->out + index * tiles->stride_bytes, tiles->stride_bytes, results);
    if (panel_status == MOE_E_NON_FINITE || status == MOE_OK) status = panel_status;
    for (int64_t i = 0; i < end - tile; ++i) {
      tiles->non_finite += results[i].plain.non_finite;
      double* to = tiles->errors + 4 * (index + i);
      to[0] = results[i].plain.squared_error;
      to[1] = results[i].plain.sum_squares;
      to[2] = results[i].error;
      to[3] = results[i].energy;
    }
  }
  return status;
}

int32_t moe_hqq(const moe_weights* weights, int32_t nbits, int32_t group_size, uint32_t flags, int32_t isa,
                float* scale, float* zero, uint8_t* codes) {
  const bool good_group = group_size == 16 || group_size == 32 || group_size == 64;
  if (nbits < 2 || nbits > 4 || !good_group || !good_matrix(*weights) || flags > MOE_ROUND_ZERO || scale == nullptr ||
      zero == nullptr || codes == nullptr) {
    return MOE_E_ARGUMENT;
  }
  const SolverKernels* kernels = kernels_of(isa).solver;
  if (kernels == nullptr) return MOE_E_ISA;
  SolverJob job = job_of(*weights, flags);
  job.nbits = nbits;
  job.group_size = group_size;
  for (int64_t row = 0; row < job.rows; row += kHalfRows) kernels->hqq(job, row, scale, zero, codes);
  return MOE_OK;
}
