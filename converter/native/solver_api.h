// C ABI of libmoe_solver.so: HQQ's solver, rounding to S and M, packing into tiles. Loaded with ctypes.
// Every function may run on several threads at once; none keeps state. Status codes, dtypes and instruction sets:
// formats/native/abi.h; packings: formats/native/packings.h.
#pragma once
#include <cstdint>

#include "../../formats/native/abi.h"

extern "C" {

// Raised by one with every change of a signature or of a result (of a result: RESULT_VERSION in
// converter/solvers/solver_library.py, too).
#define MOE_SOLVER_ABI_VERSION 4

enum {
  MOE_ROUND_ZERO = 1,  // start from a rounded zero, as hqq's BaseQuantizeConfig does for 4 bits (1-2 % more error)
  MOE_STATIC = 4,      // moe_refit: S and M for the weights as they are, before any error is carried to them
};

// A matrix, row-major, no gaps: always the whole one.
struct moe_weights {
  const void* data;
  int64_t rows, columns;
  int32_t dtype;
  int32_t reserved;
};

// Tiles begin..end-1 (32 rows each) of a matrix, and where they go.
struct moe_tiles {
  int64_t begin, end;
  uint8_t* out;          // where tile `begin` goes; tile t goes to out + (t - begin) * stride_bytes
  int64_t stride_bytes;  // >= the tile's bytes; twice that interleaves gate and up
  double* errors;        // [end - begin][2] or [4], see the functions; one row a tile, so that a sum in tile order does
                         // not depend on who computed which tile
  int64_t non_finite;    // written: infinities and NaN in these rows
  int32_t packing;
  int32_t reserved;
};

// By what moe_refit weighs errors. All null and 0: every error counts the same.
struct moe_metric {
  // [blocks][factor_block][factor_block] fp32, V upper triangular with H = V * V^T, one H for each factor_block
  // columns: a multiple of 256, or the number of columns; or null: no error is carried to other columns.
  const float* factor;
  int64_t factor_block;
  // [columns / group_size]: the groups in the order in which errors are carried, factor blocks each for themselves; all
  // that follows and the factor are of the columns in that order. Or null, for the order in which they stand. Only
  // whole groups can be ordered.
  const int32_t* order;
  // [columns] fp32: weights of the squared errors by which S, M, ds and dm are chosen; with a factor the squared
  // diagonals of V in some unit. Null: all 1.
  const float* importance;
  // Null for each row's gain <w, w> / <w, w'> by the whole of H, twice the work. Else <w, w> is |G^T w|^2 plus the sum
  // of diagonal_k * w_k^2, and <w, w - w'> is (G^T w) * (G^T (w - w')) plus the sum of pairing_k * w_k * (what rounding
  // left of column k). [columns] fp32 each, in that unit.
  const float *diagonal, *pairing;
  const float* low_rank;  // G, [columns][rank] fp32, or null and 0
  int64_t rank;
  const double*
      damping;  // [blocks], or null: what H's diagonal has too much, in that unit; only the sums lose it again
};

MOE_API int32_t moe_solver_abi(void);

// The instruction set that MOE_ISA_AUTO takes here.
MOE_API int32_t moe_solver_isa(void);

// Id of a named packing, -1 if unknown.
MOE_API int32_t moe_packing_id(const char* name);

// Quantizes and packs. errors may be null; [2]: sum of (weight - dequantized)^2, sum of weight^2.
MOE_API int32_t moe_quantize(const moe_weights* weights, moe_tiles* tiles, uint32_t flags, int32_t isa);

// Quantizes and packs like moe_quantize, but by search and least squares (refit_group.h), with each row's gain kept
// (refit.h), and, where there is a factor, with each column's error carried to the columns after it (feedback.h).
// errors [4]: as above; then sums over rows of e^T H e and w^T H w in the metric's unit.
MOE_API int32_t moe_refit(const moe_weights* weights, moe_tiles* tiles, const moe_metric* metric, uint32_t flags,
                          int32_t isa);

// HQQ alone, without S, M and tiles: what the hqq package returns, for tests and for other solvers.
//   scale, zero  [rows, groups of a row] fp32, w = (q - zero) * scale;  codes [rows, columns] u8
MOE_API int32_t moe_hqq(const moe_weights* weights, int32_t nbits, int32_t group_size, uint32_t flags, int32_t isa,
                        float* scale, float* zero, uint8_t* codes);

}  // extern "C"
