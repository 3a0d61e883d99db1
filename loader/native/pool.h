// A small pool of threads: items are handed out dynamically; idle threads spin shortly, then sleep.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace moe {

// Called as fn(context, item) for each item in [0, items), in any order, on the pool's threads and the calling one.
using RegionFn = void (*)(void* context, int64_t item);

class Pool {
 public:
  // Returns the process's pool, which is never destroyed: its threads sleep until the process ends. A forked child gets
  // a new pool.
  static Pool& get();

  std::mutex& mutex() { return mutex_; }  // held for a whole call, which owns pool and scratch meanwhile

  int threads() const { return threads_.load(std::memory_order_relaxed); }
  int set_threads(int n);  // 0: default_threads()
  static int default_threads();

  // Wakes sleeping helpers early, so that they are awake when the first region opens.
  void prepare();
  void run(int64_t items, RegionFn fn, void* context);

  template <class F>
  void run(int64_t items, const F& f) {
    run(
        items, [](void* c, int64_t item) { (*static_cast<const F*>(c))(item); }, const_cast<F*>(&f));
  }

  // Scratch for the call that holds the mutex, 64-byte aligned; a slot only grows. Null if memory is short.
  void* scratch(int slot, size_t bytes);
  void trim();  // frees slots larger than 64 MiB

 private:
  void helper(int number);
  void work();

  // generation << 32 | open << 31 | helpers inside. A helper enters by adding one while the region is open. The caller
  // closes the region when no item is left, and waits only for the helpers inside: one that never woke costs nothing.
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> doorbell_{0};  // idle helpers sleep on this futex
  std::atomic<uint32_t> park_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<int> threads_{0};
  int64_t items_ = 0;
  RegionFn fn_ = nullptr;
  void* context_ = nullptr;
  int started_ = 0;
  std::mutex mutex_;
  void* slots_[4] = {};
  size_t slot_bytes_[4] = {};
};

}  // namespace moe
