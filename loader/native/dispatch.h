// The kernels that calls use at present.
#pragma once
#include "isa.h"

namespace moe {

const IsaKernels& kernels();

}  // namespace moe
