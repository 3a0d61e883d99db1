// The choice of an instruction set, and the ABI's small functions.
#include "dispatch.h"

#include <atomic>

#include "../../formats/native/cpu_features.h"
#include "moe_kernels.h"
#include "pool.h"

namespace moe {
namespace {

struct Choice {
  int32_t isa;
  const char* reason;
};

bool supported(int32_t isa) { return cpu_runs(isa) && (isa != MOE_ISA_AVX512 || cpu_has_vnni()); }

Choice automatic() {
#if defined(MOE_X86)
  if (supported(MOE_ISA_AVX512)) return {MOE_ISA_AVX512, "AVX-512 VNNI: the processor has F, BW, DQ, VL and VNNI"};
  if (supported(MOE_ISA_AVX2)) return {MOE_ISA_AVX2, "AVX2: the processor has AVX2, FMA and F16C but no AVX-512 VNNI"};
  return {MOE_ISA_PORTABLE, "portable C++: the processor lacks AVX2, FMA or F16C"};
#else
  return {MOE_ISA_PORTABLE, "portable C++: this build is for a processor that is not x86-64"};
#endif
}

std::atomic<int32_t> g_forced{MOE_ISA_AUTO};

const Choice& automatic_once() {
  static const Choice choice = automatic();
  return choice;
}

int32_t current() {
  const int32_t forced = g_forced.load(std::memory_order_relaxed);
  return forced == MOE_ISA_AUTO ? automatic_once().isa : forced;
}

}  // namespace

const IsaKernels& kernels() {
#if defined(MOE_X86)
  if (current() == MOE_ISA_AVX512) return kAvx512Kernels;
  if (current() == MOE_ISA_AVX2) return kAvx2Kernels;
#endif
  return kPortableKernels;
}

}  // namespace moe

using namespace moe;

extern "C" {

int32_t moe_abi_version(void) { return MOE_ABI_VERSION; }

int32_t moe_set_threads(int32_t threads) {
  Pool& pool = Pool::get();
  std::lock_guard<std::mutex> lock(pool.mutex());
  return pool.set_threads(threads);
}

int32_t moe_threads(void) { return Pool::get().threads(); }

int32_t moe_isa(void) { return current(); }

const char* moe_isa_reason(void) {
  switch (g_forced.load()) {
    case MOE_ISA_AUTO: return automatic_once().reason;
    case MOE_ISA_AVX512: return "AVX-512 VNNI: forced by moe_set_isa";
    case MOE_ISA_AVX2: return "AVX2: forced by moe_set_isa";
    default: return "portable C++: forced by moe_set_isa";
  }
}

int32_t moe_set_isa(int32_t isa) {
  if (isa != MOE_ISA_AUTO && !supported(isa)) return MOE_E_ISA;
  Pool& pool = Pool::get();
  std::lock_guard<std::mutex> lock(pool.mutex());  // not in the middle of a call
  g_forced.store(isa);
  return MOE_OK;
}

int64_t moe_packed_bytes(int32_t packing, int64_t rows, int64_t columns) {
  if (!known_packing(packing) || rows < 0 || columns < 0) return -1;
  return tiles_of(rows) * tile_bytes(Packing(packing), columns);
}

int64_t moe_expert_bytes(int32_t gate_up_packing, int32_t down_packing, int64_t hidden, int64_t intermediate) {
  const int64_t gate = moe_packed_bytes(gate_up_packing, intermediate, hidden);
  const int64_t down = moe_packed_bytes(down_packing, hidden, intermediate);
  return gate < 0 || down < 0 ? -1 : 2 * gate + down;
}

int32_t moe_packing_id(const char* name) { return packing_named(name); }

}  // extern "C"
