#include "refit.h"
#include "simd_portable.h"
#include "solver_kernel.h"

namespace moe {
const SolverKernels kSolverPortable = {quantize_tile<SimdPortable>, hqq_rows<SimdPortable>};
const RefitKernels kRefitPortable = {refit_panel<SimdPortable>};
}  // namespace moe
