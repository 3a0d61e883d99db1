// C ABI of libmoe_solver.so: HQQ's solver, rounding to S and M, packing into tiles. Python calls it with ctypes.
// Functions keep no state and may run on several threads at once. Status codes, dtypes and instruction sets:
// formats/native/abi.h; packings: formats/native/packings.h.
#pragma once
#include <cstdint>

#include "../../formats/native/abi.h"

extern "C" {

// Add one for each change of a signature or of a result; for a result also RESULT_VERSION in
// converter/solvers/native/solver_library.py.
#define MOE_SOLVER_ABI_VERSION 4

enum {
  MOE_ROUND_ZERO = 1,  // start from a rounded zero, as hqq's BaseQuantizeConfig does for 4 bits (1-2 % more error)
  MOE_STATIC = 4,      // moe_refit: choose S and M for the original weights, before errors are carried to them
};

// A whole matrix, row-major, without gaps.
struct moe_weights {
  const void* data;
  int64_t rows, columns;
  int32_t dtype;
  int32_t reserved;
};

// Tiles begin..end-1 (32 rows each) of a matrix, and their destination.
struct moe_tiles {
  int64_t begin, end;
  uint8_t* out;          // tile t goes to out + (t - begin) * stride_bytes
  int64_t stride_bytes;  // >= the tile's bytes; twice that interleaves gate and up
  double* errors;        // [end - begin][2] or [4], see the functions; one row a tile, so that a sum in tile order does
                         // not depend on the threads
  int64_t non_finite;    // result: number of infinities and NaN in these rows
  int32_t packing;
  int32_t reserved;
};

// The weights of errors in moe_refit. All null and 0: all errors have equal weight.
struct moe_metric {
  // [blocks][factor_block][factor_block] fp32: V, upper triangular with H = V * V^T, one H for each factor_block
  // columns (a multiple of 256, or all columns). Null: no error is carried to other columns.
  const float* factor;
  int64_t factor_block;
  // [columns / group_size]: the groups in the order in which errors are carried, each factor block separately. The
  // factor and all fields below have their columns in that order. Null: the matrix's order. Groups must be whole.
  const int32_t* order;
  // [columns] fp32: weights of squared errors for the choice of S, M, ds and dm; with a factor, the squared diagonal of
  // V in any unit. Null: all 1.
  const float* importance;
  // [columns] fp32 each, in that unit. They approximate each row's gain <w, w> / <w, w'>: <w, w> is |G^T w|^2 plus the
  // sum of diagonal_k * w_k^2, and <w, w - w'> is (G^T w) * (G^T (w - w')) plus the sum of pairing_k * w_k * (rounding
  // error of column k). Null: the exact gain by H, at twice the cost.
  const float *diagonal, *pairing;
  const float* low_rank;  // G, [columns][rank] fp32, or null and 0
  int64_t rank;
  const double* damping;  // [blocks] or null: amount added to H's diagonal, in that unit; the sums exclude it
};

MOE_API int32_t moe_solver_abi(void);

// The instruction set that MOE_ISA_AUTO selects on this processor.
MOE_API int32_t moe_solver_isa(void);

// Returns the id of a packing by its name, -1 if unknown.
MOE_API int32_t moe_packing_id(const char* name);

// Quantizes and packs. errors, [2] or null: sum of (weight - dequantized)^2, sum of weight^2.
MOE_API int32_t moe_quantize(const moe_weights* weights, moe_tiles* tiles, uint32_t flags, int32_t isa);

// Quantizes and packs by search and least squares (refit_group.h), and keeps each row's gain (refit.h). With a factor
// it carries each column's error to the columns after it (feedback.h).
// errors, [4]: the two of moe_quantize, then sums over rows of e^T H e and w^T H w in the metric's unit.
MOE_API int32_t moe_refit(const moe_weights* weights, moe_tiles* tiles, const moe_metric* metric, uint32_t flags,
                          int32_t isa);

// HQQ alone, without S, M and tiles: the results of the hqq package, for tests and for other solvers.
//   scale, zero  [rows, groups of a row] fp32, w = (q - zero) * scale;  codes [rows, columns] u8
MOE_API int32_t moe_hqq(const moe_weights* weights, int32_t nbits, int32_t group_size, uint32_t flags, int32_t isa,
                        float* scale, float* zero, uint8_t* codes);

}  // extern "C"
