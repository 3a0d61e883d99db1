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
  MOE_REFINE = 2,      // least-squares steps after HQQ, S and M by their error, gain kept (refine_group.h); same size
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

// HQQ alone, without S, M and tiles: what the hqq package returns, for tests and for other solvers.
//   scale, zero  [rows, groups of a row] fp32, w = (q - zero) * scale;  codes [rows, columns] u8
MOE_API int32_t moe_hqq(int32_t nbits, int32_t group_size, int32_t dtype, const void* weights, int64_t rows,
                        int64_t columns, uint32_t flags, int32_t isa, float* scale, float* zero, uint8_t* codes);
