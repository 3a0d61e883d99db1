// The C ABI: checks, the choice of an ISA, and the walk over tiles.
#include "solver_api.h"

#include <cstdlib>
#include <memory>

#include "../../formats/native/tile_layout.h"
#include "solver_job.h"

namespace {

using namespace moe;

constexpr int32_t kAbi = 1;
// Sizes are products of these, and must fit in 63 bits.
constexpr int64_t kMaxRows = int64_t{1} << 31, kMaxColumns = int64_t{1} << 24;

int32_t best_isa() {
#if defined(MOE_SOLVER_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return MOE_ISA_AVX512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return MOE_ISA_AVX2;
#endif
  return MOE_ISA_PORTABLE;
}

// Null: not here.
const SolverKernels* kernels_of(int32_t isa) {
  const int32_t best = best_isa();
  if (isa == MOE_ISA_AUTO) isa = best;
  if (isa < 0 || isa > best) return nullptr;
#if defined(MOE_SOLVER_X86)
  if (isa == MOE_ISA_AVX512) return &kSolverAvx512;
  if (isa == MOE_ISA_AVX2) return &kSolverAvx2;
#endif
  return &kSolverPortable;
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

struct Free {
  void operator()(void* p) const { std::free(p); }
};

}  // namespace

int32_t moe_solver_abi(void) { return kAbi; }

int32_t moe_solver_isa(void) { return best_isa(); }

int32_t moe_quantize(int32_t packing, int32_t dtype, const void* weights, int64_t rows, int64_t columns,
                     int64_t tile_begin, int64_t tile_end, uint8_t* out, int64_t tile_stride_bytes, uint32_t flags,
                     int32_t isa, double* errors, int64_t* non_finite) {
  if (packing < 0 || packing >= kPackings || !good_matrix(dtype, weights, rows, columns) || tile_begin < 0 ||
      tile_begin > tile_end || tile_end > tiles_of(rows) || out == nullptr || flags > (MOE_ROUND_ZERO | MOE_REFINE) ||
      tile_stride_bytes < tile_bytes(static_cast<Packing>(packing), columns)) {
    return MOE_BAD_ARGUMENT;
  }
  const SolverKernels* kernels = kernels_of(isa);
  if (kernels == nullptr) return MOE_NO_ISA;
  const PackingInfo& info = kPackingInfo[packing];
  SolverJob job = job_of(dtype, weights, rows, columns, flags);
  job.packing = packing;
  job.block_bytes = info.block_bytes;
  job.nbits = info.nbits;
  job.group_size = info.group_size;
  job.scale_bits = info.scale_bits;
  const size_t numbers = (size_t)job.blocks * (kBlockCols / info.group_size) * kHalfRows;
  const size_t arrays = (flags & MOE_REFINE) != 0 ? 4 : 2;
  const std::unique_ptr<float, Free> scratch(
      static_cast<float*>(std::aligned_alloc(64, arrays * numbers * sizeof(float))));
  if (scratch == nullptr) return MOE_NO_MEMORY;
  job.group_scale = scratch.get();
  job.group_minimum = scratch.get() + numbers;
  if (arrays == 4) {
    job.group_spread = scratch.get() + 2 * numbers;
    job.group_mean = scratch.get() + 3 * numbers;
  }

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

int32_t moe_hqq(int32_t nbits, int32_t group_size, int32_t dtype, const void* weights, int64_t rows, int64_t columns,
                uint32_t flags, int32_t isa, float* scale, float* zero, uint8_t* codes) {
  const bool good_group = group_size == 16 || group_size == 32 || group_size == 64;
  if (nbits < 2 || nbits > 4 || !good_group || !good_matrix(dtype, weights, rows, columns) || flags > MOE_ROUND_ZERO ||
      scale == nullptr || zero == nullptr || codes == nullptr) {
    return MOE_BAD_ARGUMENT;
  }
  const SolverKernels* kernels = kernels_of(isa);
  if (kernels == nullptr) return MOE_NO_ISA;
  SolverJob job = job_of(dtype, weights, rows, columns, flags);
  job.nbits = nbits;
  job.group_size = group_size;
  for (int64_t row = 0; row < rows; row += kHalfRows) kernels->hqq(job, row, scale, zero, codes);
  return MOE_OK;
}
