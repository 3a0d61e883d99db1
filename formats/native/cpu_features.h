// Instruction sets of this processor. Only units compiled without -m flags may include this, and its namespace is
// unnamed: otherwise the linker could keep a copy that was compiled for an instruction set the processor lacks.
#pragma once
#include <cstdint>

#include "abi.h"

namespace moe {
namespace {

// False also if the operating system does not save the wide registers. MOE_X86: the build has x86-64 units.
inline bool cpu_runs(int32_t isa) {
  if (isa == MOE_ISA_PORTABLE) return true;
#if defined(MOE_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == MOE_ISA_AVX2) return avx2;
  if (isa == MOE_ISA_AVX512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return false;
}

// True if the processor has the integer dot products that packed products use with MOE_ISA_AVX512.
inline bool cpu_has_vnni() {
#if defined(MOE_X86)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

}  // namespace
}  // namespace moe
