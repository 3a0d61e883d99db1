#include "refit.h"
#include "simd_avx2.h"
#include "solver_kernel.h"

namespace moe {
const SolverKernels kSolverAvx2 = {quantize_tile<SimdAvx2>, hqq_rows<SimdAvx2>};
const RefitKernels kRefitAvx2 = {refit_panel<SimdAvx2>};
}  // namespace moe
