// The kernels in force.
#pragma once
#include "isa.h"

namespace moe {

const IsaKernels& kernels();

inline bool known_packing(int32_t packing) { return packing >= 0 && packing < kPackings; }

}  // namespace moe
