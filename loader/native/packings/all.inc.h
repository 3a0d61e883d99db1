// The code of each packing. A file here has one part for each kind of kernel; the including unit selects parts:
//   MOE_PART_UNPACK  unpack<mode>(Tag<P>, block, unpacked): see unpack.inc.h
//   MOE_PART_AVX2    gemv_block(Tag<P>, block, activations, sums): see gemv_avx2.inc.h
//   MOE_PART_AVX512  gemv_block<T, R>(Tag<P>, block, half, activations, sums): see gemv_avx512.inc.h; for many tokens
//                    columns64<b>(Tag<P>, block, half, columns) (gemm_avx512.inc.h), or kGemvTokens<P> = kMaxTokens
// All are compiled inside an anonymous namespace (see elementwise.inc.h).
#include "q2_g16.inc.h"
#include "q3.inc.h"
#include "q3_g32.inc.h"
#include "q3_g64.inc.h"
#include "q4_g64.inc.h"
