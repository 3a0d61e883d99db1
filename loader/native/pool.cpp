#include "pool.h"

#include <new>
#include <set>
#include <string>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#endif

namespace moe {
namespace {

constexpr uint64_t kOpen = uint64_t{1} << 31;
constexpr uint64_t kInside = kOpen - 1;
constexpr int kSpins = 2000;  // longer spins stall for tens of ms if another job runs on the core (measured)
constexpr size_t kKeepBytes = size_t{64} << 20;

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline void sleep_while(std::atomic<uint32_t>& word, uint32_t seen) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
  word.wait(seen);
#endif
}

inline void wake_all(std::atomic<uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
#else
  word.notify_all();
#endif
}

constexpr std::align_val_t kAlignment{64};  // not aligned_alloc, which Windows lacks
void release(void* memory) { ::operator delete(memory, kAlignment); }

std::atomic<Pool*> g_pool{nullptr};
std::atomic<int> g_threads{0};

}  // namespace

Pool& Pool::get() {
  Pool* pool = g_pool.load(std::memory_order_acquire);
  if (pool) return *pool;
  auto* fresh = new Pool;
  fresh->threads_.store(g_threads.load() > 0 ? g_threads.load() : default_threads());
  if (!g_pool.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) {
    delete fresh;
    return *pool;
  }
#if defined(__linux__) || defined(__APPLE__)
  // A child has none of the threads, and the mutex may be locked: it leaks the old pool and makes a new one.
  static const int once = pthread_atfork(nullptr, nullptr, [] { g_pool.store(nullptr); });
  (void)once;
#endif
  return *fresh;
}

int Pool::default_threads() {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) {
    // One thread a core: a memory-bound kernel fills the load ports, which hyperthreads of a core share.
    std::set<std::string> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &set)) continue;
      const std::string path = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list";
      char line[128] = {};
      if (FILE* f = std::fopen(path.c_str(), "r")) {
        if (!std::fgets(line, sizeof line, f)) line[0] = 0;
        std::fclose(f);
      }
      cores.insert(line[0] ? line : std::to_string(cpu));
    }
    return int(cores.size());
  }
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n ? int(n) : 1;
}

int Pool::set_threads(int n) {
  if (n <= 0) n = default_threads();
  if (n > 256) n = 256;
  g_threads.store(n);
  threads_.store(n);
  park_.fetch_add(1);
  wake_all(park_);
  return n;
}

void Pool::work() {
  const int64_t items = items_;
  for (;;) {
    const int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
    if (item >= items) return;
    fn_(context_, item);
  }
}

void Pool::helper(int number) {
  uint64_t seen = state_.load(std::memory_order_acquire) & ~kInside & ~kOpen;
  if (state_.load(std::memory_order_acquire) & kOpen) seen -= kOpen << 1;  // the region that started this thread
  for (;;) {
    while (number >= threads()) {  // set_threads asked for fewer: sleep where the doorbell does not wake
      const uint32_t parked = park_.load();
      if (number >= threads()) sleep_while(park_, parked);
    }
    const uint32_t bell = doorbell_.load(std::memory_order_acquire);
    bool entered = false;
    for (int spin = 0; spin < kSpins; ++spin) {
      uint64_t s = state_.load(std::memory_order_acquire);
      while ((s & kOpen) && (s >> 32) != (seen >> 32) && number < threads()) {
        if (state_.compare_exchange_weak(s, s + 1, std::memory_order_acq_rel)) {
          entered = true;
          seen = s;
          break;
        }
      }
      if (entered) break;
      pause();
    }
    if (entered) {
      work();
      const uint64_t left = state_.fetch_sub(1, std::memory_order_seq_cst) - 1;
      if (!(left & kOpen) && (left & kInside) == 0 && caller_sleeps_.load(std::memory_order_seq_cst)) {
        doorbell_.fetch_add(1);
        wake_all(doorbell_);
      }
      continue;
    }
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    const uint64_t s = state_.load(std::memory_order_seq_cst);
    if (!((s & kOpen) && (s >> 32) != (seen >> 32) && number < threads())) sleep_while(doorbell_, bell);
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  }
}

void Pool::prepare() {
  try {
    for (; started_ < threads() - 1; ++started_) {
      std::thread([this, number = started_ + 1] { helper(number); }).detach();
    }
  } catch (const std::system_error&) {  // the system's limit on threads: use those that exist
    threads_.store(started_ + 1);
  }
  if (threads() > 1 && sleepers_.load(std::memory_order_seq_cst) > 0) {
    doorbell_.fetch_add(1, std::memory_order_seq_cst);
    wake_all(doorbell_);
  }
}

void Pool::run(int64_t items, RegionFn fn, void* context) {
  if (items <= 0) return;
  if (threads() == 1 || items == 1) {
    for (int64_t i = 0; i < items; ++i) fn(context, i);
    return;
  }
  items_ = items;
  fn_ = fn;
  context_ = context;
  next_.store(0, std::memory_order_relaxed);
  const uint64_t generation = (state_.load(std::memory_order_relaxed) >> 32) + 1;
  state_.store(generation << 32 | kOpen, std::memory_order_seq_cst);
  prepare();
  work();
  uint64_t s = state_.fetch_and(~kOpen, std::memory_order_seq_cst) & ~kOpen;
  for (int spin = 0; (s & kInside) != 0; ++spin) {
    if (spin < kSpins) {
      pause();
    } else {
      const uint32_t bell = doorbell_.load(std::memory_order_seq_cst);
      caller_sleeps_.store(true, std::memory_order_seq_cst);
      if ((state_.load(std::memory_order_seq_cst) & kInside) != 0) sleep_while(doorbell_, bell);
      caller_sleeps_.store(false, std::memory_order_seq_cst);
    }
    s = state_.load(std::memory_order_acquire);
  }
}

void* Pool::scratch(int slot, size_t bytes) {
  if (bytes > slot_bytes_[slot]) {
    release(slots_[slot]);
    slot_bytes_[slot] = 0;
    const size_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    slots_[slot] = ::operator new(rounded, kAlignment, std::nothrow);
    if (!slots_[slot]) return nullptr;
    slot_bytes_[slot] = rounded;
  }
  return slots_[slot];
}

void Pool::trim() {
  for (int i = 0; i < 4; ++i) {
    if (slot_bytes_[i] <= kKeepBytes) continue;
    release(slots_[i]);
    slots_[i] = nullptr;
    slot_bytes_[i] = 0;
  }
}

}  // namespace moe
