// The packings' own code. A file here has a part for each user; the including unit defines which it wants:
//   MOE_PART_UNPACK  unpack<mode>(Of<P>, block, unpacked): see unpack.inc.h
//   MOE_PART_AVX2    gemv_block(Of<P>, block, activations, sums): see gemv_avx2.inc.h
//   MOE_PART_AVX512  gemv_block<T, R>(Of<P>, block, half, activations, sums): see gemv_avx512.inc.h; for many tokens
//                    columns64<b>(Of<P>, block, half, columns) (gemm_avx512.inc.h), or kGemvTokens<P> = kMaxTokens
// All are compiled inside an anonymous namespace (see elementwise.inc.h).
#include "q2_g16.inc.h"
#include "q3.inc.h"
#include "q3_g32.inc.h"
#include "q3_g64.inc.h"
#include "q4_g64.inc.h"
