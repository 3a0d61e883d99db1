// A small pool of threads: dynamic chunks, a short spin, then sleep.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace moe {

// f(context, item) for each item in [0, items), in any order, on any thread of the pool or the calling one.
using RegionFn = void (*)(void* context, int64_t item);

class Pool {
 public:
  // The process's pool. Never destroyed: its threads sleep until the process ends. A forked child gets a new one.
  static Pool& get();

  std::mutex& mutex() { return mutex_; }  // held for a whole call: pool and scratch belong to one call at a time

  int threads() const { return threads_.load(std::memory_order_relaxed); }
  int set_threads(int n);  // 0: default_threads()
  static int default_threads();

  // Wakes sleeping helpers early, so that they are there when the first region opens.
  void prepare();
  void run(int64_t items, RegionFn fn, void* context);

  template <class F>
  void run(int64_t items, const F& f) {
    run(
        items, [](void* c, int64_t item) { (*static_cast<const F*>(c))(item); }, const_cast<F*>(&f));
  }

  // Grow-only scratch for the call that holds the mutex; 64-byte aligned; null if memory is short.
  void* scratch(int slot, size_t bytes);
  void trim();  // gives back slots of more than 64 MiB

 private:
  void helper(int number);
  void work();

  // generation << 32 | open << 31 | helpers inside. A helper enters by adding one while the region is open; the
  // caller closes it when no item is left and waits only for those inside: a helper that never woke costs nothing.
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> doorbell_{0};  // what idle helpers sleep on
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
