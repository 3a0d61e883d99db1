// C ABI of libmoe_solver.so: HQQ's solver, rounding to S and M, packing into tiles. Loaded with ctypes.
// Every function may run on several threads at once; none keeps state.
#pragma once
#include <cstdint>

#if defined(_WIN32)
#define MOE_API extern "C" __declspec(dllexport)
#else
#define MOE_API extern "C" __attribute__((visibility("default")))
#endif

enum MoeDtype : int32_t { MOE_FP32 = 0, MOE_BF16 = 1, MOE_FP16 = 2 };

// Which code runs. All give the same bytes.
enum MoeIsa : int32_t { MOE_ISA_AUTO = -1, MOE_ISA_PORTABLE = 0, MOE_ISA_AVX2 = 1, MOE_ISA_AVX512 = 2 };

enum MoeFlags : uint32_t {
  MOE_ROUND_ZERO = 1,  // start from a rounded zero, as hqq's BaseQuantizeConfig does for 4 bits (1-2 % more error)
  MOE_STATIC = 4,      // moe_refit: S and M for the weights as they are, before any error is carried to them
};

enum MoeStatus : int32_t {
  MOE_OK = 0,
  MOE_BAD_ARGUMENT = 1,
  MOE_NON_FINITE = 2,  // infinities or NaN among the weights; tiles that hold one are not written
  MOE_OVERFLOW = 3,    // a super-scale does not fit in fp16; its tile is not written
  MOE_NO_MEMORY = 4,
  MOE_NO_ISA = 5,      // this processor or this build lacks the wanted ISA
};

// Bumped on every change of a signature or of a result.
MOE_API int32_t moe_solver_abi(void);

// The ISA that MOE_ISA_AUTO takes here.
MOE_API int32_t moe_solver_isa(void);

// Quantizes and packs tiles tile_begin..tile_end-1 (32 rows each) of a matrix.
//   weights            row-major [rows, columns], first element of the whole matrix, no gaps
//   out                where tile tile_begin goes; tile t goes to out + (t - tile_begin) * tile_stride_bytes
//   tile_stride_bytes  >= the tile's bytes; twice that interleaves gate and up
//   errors             [tile_end - tile_begin][2] doubles or null: sum of (weight - dequantized)^2, sum of weight^2.
//                      One pair a tile, so that a sum in tile order does not depend on who computed which tile.
//   non_finite         number of infinities and NaN in these rows; or null
MOE_API int32_t moe_quantize(int32_t packing, int32_t dtype, const void* weights, int64_t rows, int64_t columns,
                             int64_t tile_begin, int64_t tile_end, uint8_t* out, int64_t tile_stride_bytes,
                             uint32_t flags, int32_t isa, double* errors, int64_t* non_finite);

// Quantizes and packs like moe_quantize, but by search and least squares (refit_group.h), with each row's gain kept
// (refit.h), and, where there is a factor, with each column's error carried to the columns after it (feedback.h).
//   factor        [blocks][factor_block][factor_block] fp32, V upper triangular with H = V * V^T, one H for each
//                 factor_block columns: a multiple of 256, or the number of columns; or null
//   order         [columns / group_size]: the groups in the order in which errors are carried, factor blocks each for
//                 themselves; factor, importance, diagonal, pairing and low_rank are of the columns in that order. Or
//                 null, for the order in which they stand. Only whole groups can be ordered.
//   importance    [columns] fp32: weights of the squared errors by which S, M, ds and dm are chosen; with a factor the
//                 squared diagonals of V in some unit. Null: all 1.
//   diagonal, pairing, low_rank: null for each row's gain <w, w> / <w, w'> by the whole of H, twice the work. Else
//                 <w, w> is |G^T w|^2 plus the sum of diagonal_k * w_k^2, and <w, w - w'> is (G^T w) * (G^T (w - w')) plus
//                 the sum of pairing_k * w_k * (what rounding left of column k). [columns] fp32 each, in that unit;
//                 low_rank: G, [columns][rank] fp32, or null and 0.
//   damping       [blocks] doubles, or null: what H's diagonal has too much, in that unit; only the sums lose it again
//   errors        [tile_end - tile_begin][4] doubles: as above; then sums over rows of e^T H e and w^T H w in that unit
MOE_API int32_t moe_refit(int32_t packing, int32_t dtype, const void* weights, int64_t rows, int64_t columns,
                          int64_t tile_begin, int64_t tile_end, uint8_t* out, int64_t tile_stride_bytes,
                          const float* factor, int64_t factor_block, const int32_t* order,
                          const float* importance, const float* diagonal,
                          const float* pairing, const float* low_rank, int64_t rank, const double* damping,
                          uint32_t flags, int32_t isa, double* errors, int64_t* non_finite);

// HQQ alone, without S, M and tiles: what the hqq package returns, for tests and for other solvers.
//   scale, zero  [rows, groups of a row] fp32, w = (q - zero) * scale;  codes [rows, columns] u8
MOE_API int32_t moe_hqq(int32_t nbits, int32_t group_size, int32_t dtype, const void* weights, int64_t rows,
                        int64_t columns, uint32_t flags, int32_t isa, float* scale, float* zero, uint8_t* codes);
