// The kernels in force.
#pragma once
#include "isa.h"

namespace moe {

const IsaKernels& kernels();

}  // namespace moe
