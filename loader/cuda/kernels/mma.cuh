// Products of int8 matrices on the tensor cores of a warp, or by shuffles if it has none for int8.
// Fragments as in the PTX ISA, "mma.m16n8k16 / m16n8k32" for .s8 (lane = 4 * group + member):
//   a[row / 8 + 2 * (k / 16)]: row % 8 = group, bytes are k % 16 = 4 * member + 0..3
//   b[k / 16]: column = group, bytes likewise;   c[2 * (row / 8) + column % 2]: row % 8 = group, column / 2 = member
#pragma once
#include "common.cuh"

namespace moe {

#if defined(MOE_NO_TENSOR_CORES) || (!defined(MOE_ON_HOST) && __CUDA_ARCH__ < 750)
#define MOE_MMA_BY_SHUFFLES
#endif

#if defined(MOE_MMA_BY_SHUFFLES)
// 8 rows, 8 columns, depth 16, by shuffles and dp4a: Volta's tensor cores do not support int8.
MOE_DEVICE void mma_8x8x16(int32_t& c0, int32_t& c1, uint32_t a, uint32_t b) {
  const int lane = threadIdx.x % kWarp, row = lane / 4 * 4, column = lane % 4 * 8;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t w = __shfl_sync(kAllLanes, a, row + i);
    c0 = __dp4a(int32_t(w), int32_t(__shfl_sync(kAllLanes, b, column + i)), c0);
    c1 = __dp4a(int32_t(w), int32_t(__shfl_sync(kAllLanes, b, column + 4 + i)), c1);
  }
}
#elif !defined(MOE_ON_HOST) && __CUDA_ARCH__ < 800
MOE_DEVICE void mma_8x8x16(int32_t& c0, int32_t& c1, uint32_t a, uint32_t b) {
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+r"(c0), "+r"(c1)
               : "r"(a), "r"(b));
}
#endif

// c += a * b, 16 rows, 8 columns, depth 16.
MOE_DEVICE void mma_k16(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
#if defined(MOE_ON_HOST) && !defined(MOE_MMA_BY_SHUFFLES)
  const uint32_t a[2] = {a0, a1};
  host::mma_s8(16, 16, a, &b, c);
#elif !defined(MOE_MMA_BY_SHUFFLES) && __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a0), "r"(a1), "r"(b));
#else
  mma_8x8x16(c[0], c[1], a0, b);
  mma_8x8x16(c[2], c[3], a1, b);
#endif
}

// The same, depth 32.
MOE_DEVICE void mma_k32(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if defined(MOE_ON_HOST) && !defined(MOE_MMA_BY_SHUFFLES)
  const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  host::mma_s8(16, 32, a, b, c);
#elif !defined(MOE_MMA_BY_SHUFFLES) && __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  mma_k16(c, a0, a1, b0);
  mma_k16(c, a2, a3, b1);
#endif
}

// Copies 16 bytes from global to shared memory, both aligned to 16 bytes. They are valid after copies_arrived and a
// barrier.
MOE_DEVICE void copy16(void* shared, const void* global) {
#if defined(MOE_ON_HOST)
  std::memcpy(shared, global, 16);
#elif __CUDA_ARCH__ >= 800
  uint32_t at;
  asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(at) : "l"(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(at), "l"(global) : "memory");
#else
  struct alignas(16) Line {
    uint32_t w[4];
  };
  *static_cast<Line*>(shared) = *static_cast<const Line*>(global);
#endif
}
MOE_DEVICE void copies_arrived() {
#if !defined(MOE_ON_HOST) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" : : : "memory");
#endif
}

}  // namespace moe
