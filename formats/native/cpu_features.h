// Instruction sets that this processor runs. Include it only in units compiled without -m flags. In an unnamed
// namespace: of a function compiled with different flags the linker may keep the copy that this processor cannot run.
#pragma once
#include <cstdint>

#include "abi.h"

namespace moe {
namespace {

// True only if the operating system saves the wide registers too. MOE_X86: the build has x86-64 units.
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

// True for AVX-512 VNNI, which products of packed weights need beside MOE_ISA_AVX512.
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
