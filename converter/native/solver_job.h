// The data that solver.cpp passes to the code of one ISA. No functions here: of a function compiled with different -m
// flags the linker may keep the copy that this processor cannot run.
#pragma once
#include <cstdint>

namespace moe {

struct SolverJob {
  const uint8_t* weights;
  int64_t rows;
  int64_t columns;
  int64_t blocks;  // superblocks of a row
  int64_t block_bytes;
  int32_t dtype;
  int32_t element_bytes;
  int32_t packing;  // -1: HQQ alone
  int32_t nbits;
  int32_t group_size;
  int32_t scale_bits;
  uint32_t flags;
  float* group_scale;    // scratch, [blocks * 256 / group_size][16]: scale of each group and row of a half tile
  float* group_minimum;  // scratch, same shape: w = scale * q - minimum
};

struct TileResult {
  double squared_error;
  double sum_squares;
  int64_t non_finite;
};

struct SolverKernels {
  // Writes one tile. Returns a moe_status.
  int32_t (*tile)(const SolverJob&, int64_t tile, uint8_t* out, TileResult* result);
  // Runs HQQ for the 16 rows from row0.
  void (*hqq)(const SolverJob&, int64_t row0, float* scale, float* zero, uint8_t* codes);
};

extern const SolverKernels kSolverPortable;
#if defined(MOE_X86)
extern const SolverKernels kSolverAvx2;
extern const SolverKernels kSolverAvx512;
#endif

}  // namespace moe
