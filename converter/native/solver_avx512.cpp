#include "refit.h"
#include "simd_avx512.h"
#include "solver_kernel.h"

namespace moe {
const SolverKernels kSolverAvx512 = {quantize_tile<SimdAvx512>, hqq_rows<SimdAvx512>};
const RefitKernels kRefitAvx512 = {refit_panel<SimdAvx512>};
}  // namespace moe
