// A GPU simulated on the CPU, for tests of arithmetic and barriers without a GPU. The blocks of a launch run one after
// the other. Each thread is a fiber, and fibers switch only at barriers and warp operations. A kernel that lacks a
// barrier gives another result when threads run in another order. A kernel whose threads do not all reach a barrier
// ends with an error.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define MOE_DEVICE inline
#define MOE_KERNEL(...) static void
#define MOE_SHARED static
#define MOE_DYNAMIC_SHARED(name) unsigned char* const name = host::dynamic_shared()

namespace host {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

enum class State { kReady, kWarp, kBlock, kDone };

struct Fiber {
  void* stack_top = nullptr;  // saved stack pointer
  char* stack = nullptr;
  State state = State::kDone;
  unsigned generation = 0;  // number of warp operations so far; they alternate between two boards
};

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 64 << 10;
constexpr int kWords = 16;

struct Machine {
  Fiber fibers[kMaxThreads];
  uint32_t board[kMaxThreads / 32][2][32][kWords];  // values that lanes exchange
  void* scheduler = nullptr;
  unsigned current = 0, threads = 0;
  int order = 0;  // 0: ascending, 1: descending, 2: odd ones first
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  std::string error;
  std::vector<char> dynamic_shared;
};

extern Machine machine;

inline unsigned char* dynamic_shared() {
  const uintptr_t at = reinterpret_cast<uintptr_t>(machine.dynamic_shared.data());
  return reinterpret_cast<unsigned char*>((at + 15) & ~uintptr_t(15));
}

void yield(State state);
void run_block(unsigned threads, void (*body)(void*), void* argument);

inline uint32_t (*show(const uint32_t* words, int count))[kWords] {
  Fiber& me = machine.fibers[machine.current];
  uint32_t(*board)[kWords] = machine.board[machine.current / 32][me.generation++ % 2];
  std::memcpy(board[machine.current % 32], words, size_t(count) * 4);
  yield(State::kWarp);
  return board;
}

template <class T>
T from_lane(T value, unsigned lane) {
  static_assert(sizeof(T) % 4 == 0);
  uint32_t words[sizeof(T) / 4];
  std::memcpy(words, &value, sizeof value);
  std::memcpy(&value, show(words, sizeof(T) / 4)[lane % 32], sizeof value);
  return value;
}

// D = A * B + C of one warp, integers: rows of A and D, columns of B and D; lane = 4 * group + member.
// a[row / 8 + rows / 8 * (k / 16)]: row % 8 = group, k % 16 = 4 * member + byte. b[k / 16]: column = group, same k.
// d[2 * (row / 8) + column % 2]: row % 8 = group, column / 2 = member. (PTX ISA, "mma.m8n8k16", "m16n8k16",
// "m16n8k32".)
inline void mma_s8(int rows, int depth, const uint32_t* a, const uint32_t* b, int32_t* d) {
  const int a_words = rows / 8 * (depth / 16), b_words = depth / 16;
  uint32_t words[kWords];
  std::memcpy(words, a, size_t(a_words) * 4);
  std::memcpy(words + a_words, b, size_t(b_words) * 4);
  const auto board = show(words, a_words + b_words);
  const int lane = int(machine.current % 32), group = lane / 4, member = lane % 4;
  for (int half = 0; half < rows / 8; ++half)
    for (int c = 0; c < 2; ++c) {
      const int column = 2 * member + c;
      int32_t sum = d[2 * half + c];
      for (int k = 0; k < depth; ++k) {
        const int part = k / 16, owner = k % 16 / 4, byte = k % 4;
        const uint32_t wa = board[4 * group + owner][half + rows / 8 * part];
        const uint32_t wb = board[4 * column + owner][a_words + part];
        sum += int32_t(int8_t(wa >> (8 * byte))) * int32_t(int8_t(wb >> (8 * byte)));
      }
      d[2 * half + c] = sum;
    }
}

}  // namespace host

extern host::Dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { host::yield(host::State::kBlock); }
inline void __syncwarp(unsigned = 0xffffffffu) {
  const uint32_t nothing = 0;
  host::show(&nothing, 1);
}
inline void __threadfence() {}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return host::from_lane(value, host::machine.current % 32 ^ unsigned(mask));
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return host::from_lane(value, unsigned(lane));
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  const unsigned lane = host::machine.current % 32;
  return host::from_lane(value, lane + delta < 32 ? lane + delta : lane);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const uint32_t word = predicate != 0;
  const auto board = host::show(&word, 1);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= board[i][0] << i;
  return result;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += int(int8_t(unsigned(a) >> (8 * i))) * int(int8_t(unsigned(b) >> (8 * i)));
  return c;
}
inline float __uint_as_float(uint32_t v) { return __builtin_bit_cast(float, v); }
inline uint32_t __float_as_uint(float v) { return __builtin_bit_cast(uint32_t, v); }
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = T(before + value);
  return before;
}
template <class T>
const T& min(const T& a, const T& b) {
  return b < a ? b : a;
}
template <class T>
const T& max(const T& a, const T& b) {
  return a < b ? b : a;
}

float host_half_to_float(uint16_t bits);
uint16_t host_float_to_half(float value);
