// The scheduler of host.h.
#include "host.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

host::Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

Machine machine;

namespace {

void enter() {
  machine.body(machine.argument);
  yield(State::kDone);
}

#if defined(__x86_64__)
// Saves the callee-saved registers on the present stack, and continues on another one.
extern "C" void host_switch(void** from, void* to);
asm(R"(
.text
.globl host_switch
.type host_switch, @function
host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size host_switch, .-host_switch
)");

void begin(Fiber& fiber) {
  uintptr_t top = (uintptr_t(fiber.stack) + kStackBytes) & ~uintptr_t(63);
  void** at = reinterpret_cast<void**>(top) - 1;  // at entry of a function the stack is 8 bytes off a multiple of 16
  *at = nullptr;
  *--at = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; ++i) *--at = nullptr;
  fiber.stack_top = at;
}
void to_fiber(Fiber& fiber) { host_switch(&machine.scheduler, fiber.stack_top); }
void to_scheduler(Fiber& fiber) { host_switch(&fiber.stack_top, machine.scheduler); }
#else
ucontext_t scheduler_context, contexts[kMaxThreads];
void begin(Fiber& fiber) {
  ucontext_t& context = contexts[&fiber - machine.fibers];
  getcontext(&context);
  context.uc_stack = {fiber.stack, 0, kStackBytes};
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
}
void to_fiber(Fiber& fiber) { swapcontext(&scheduler_context, &contexts[&fiber - machine.fibers]); }
void to_scheduler(Fiber& fiber) { swapcontext(&contexts[&fiber - machine.fibers], &scheduler_context); }
#endif

void resume(unsigned thread) {
  machine.current = thread;
  threadIdx = {thread % blockDim.x, thread / blockDim.x, 0};
  to_fiber(machine.fibers[thread]);
}

unsigned in_order(unsigned i, unsigned count) {
  if (machine.order == 1) return count - 1 - i;
  if (machine.order == 2) return i < count / 2 ? 2 * i + 1 : 2 * (i - count / 2);
  return i;
}

// Runs a warp until each of its threads waits for the block or has ended.
void run_warp(unsigned warp) {
  const unsigned begin_at = 32 * warp, count = machine.threads - begin_at < 32 ? machine.threads - begin_at : 32;
  for (;;) {
    for (unsigned i = 0; i < count; ++i) {
      const unsigned thread = begin_at + in_order(i, count);
      if (machine.fibers[thread].state == State::kReady) resume(thread);
    }
    unsigned waiting = 0;
    for (unsigned i = 0; i < count; ++i) waiting += machine.fibers[begin_at + i].state == State::kWarp;
    if (waiting == 0) return;
    if (waiting < count)
      throw std::runtime_error("warp " + std::to_string(warp) + ": " + std::to_string(waiting) + " of " +
                               std::to_string(count) + " lanes reached a warp operation");
    for (unsigned i = 0; i < count; ++i) machine.fibers[begin_at + i].state = State::kReady;
  }
}

}  // namespace

void yield(State state) {
  Fiber& me = machine.fibers[machine.current];
  me.state = state;
  to_scheduler(me);
}

void run_block(unsigned threads, void (*body)(void*), void* argument) {
  machine.threads = threads;
  machine.body = body;
  machine.argument = argument;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    if (!fiber.stack) fiber.stack = static_cast<char*>(std::malloc(kStackBytes));
    fiber.state = State::kReady;
    fiber.generation = 0;
    begin(fiber);
  }
  const unsigned warps = (threads + 31) / 32;
  for (;;) {
    for (unsigned w = 0; w < warps; ++w) run_warp(in_order(w, warps));
    unsigned waiting = 0, done = 0;
    for (unsigned i = 0; i < threads; ++i) {
      waiting += machine.fibers[i].state == State::kBlock;
      done += machine.fibers[i].state == State::kDone;
    }
    if (done == threads) return;
    if (waiting < threads)
      throw std::runtime_error(std::to_string(waiting) + " of " + std::to_string(threads) +
                               " threads reached __syncthreads, " + std::to_string(done) + " are done");
    for (unsigned i = 0; i < threads; ++i) machine.fibers[i].state = State::kReady;
  }
}

}  // namespace host

float host_half_to_float(uint16_t bits) { return float(__builtin_bit_cast(_Float16, bits)); }
uint16_t host_float_to_half(float value) { return __builtin_bit_cast(uint16_t, _Float16(value)); }
