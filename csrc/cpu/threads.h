// The threads of a call: how they are started, and how they wait for each other, where those of one tile meet once per
// layer or others must have come so far.
//
// Waiting spins for some microseconds, then sleeps. OpenMP's own barrier spins for milliseconds: on a processor
// that another program shares, a spinning thread spends its share of time doing nothing, and the one it waits
// for is kept off the processor for a whole slice of the scheduler, at every layer (seen with one of two cores
// busy: a step took 30 times as long as on one thread).
//
// Defined in threads.cpp: what this uses of the standard library must not be compiled for one instruction set.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#include "../problem.h"

namespace odeblock {

// run(context, thread, count) on `count` threads, the caller's among them: at most `threads`, fewer where the system
// gives no more. OpenMP's, which are PyTorch's too: a second pool would share the processors with the first while that
// spins; without OpenMP, and in a child forked from the process that loaded this, new ones. All compute in the caller's
// floating-point mode (rounding, subnormals flushed to zero or not), which else belongs to each thread: the bits of a
// row must not depend on who computes it.
void run_threads(int threads, void (*run)(void* context, int thread, int count), void* context);

// Whether there is an OpenMP runtime that can be used. The first call starts its threads.
bool has_openmp();

template <class Run>
void on_threads(int threads, Run run) {
  const auto call = [](void* context, int thread, int count) { (*static_cast<Run*>(context))(thread, count); };
  run_threads(threads, call, &run);
}

// What ends a call early: no layer is computed any more, what was to be written is left as it is. None may wait for a
// thread that has gone: threads go on through their loops and meet where they have to, or agree when to leave (few.h).
class Stop {
 public:
  // asked() every so often, on the thread that makes this, and that makes the call. work: multiply-adds of a layer; of
  // layers with little only some look at the clock.
  Stop(bool (*asked)(), int64_t work, std::chrono::milliseconds every);
  Stop(const Stop&) = delete;
  Stop& operator=(const Stop&) = delete;
  // On any thread, at layer k: whether it is to be skipped.
  ODEBLOCK_INLINE bool at(int64_t k) {
    if ((k & skipped_) == 0) ask();
    return stopped_.load(std::memory_order_relaxed);
  }

 private:
  void ask();
  bool (*const asked_)();
  const std::chrono::milliseconds every_;
  int64_t skipped_;  // a power of two less 1
  std::atomic<bool> stopped_;
  const std::thread::id thread_;
  std::chrono::steady_clock::time_point next_;
};

class Barrier {
 public:
  Barrier();
  ~Barrier();
  // Returns once `threads` threads have called it.
  void wait(int threads);

 private:
  std::atomic<int> arrived_;
  std::atomic<unsigned> round_;
  std::mutex mutex_;
  std::condition_variable changed_;
};

// A count that one thread raises and another waits for. In a cache line of its own.
class alignas(64) Progress {
 public:
  Progress();
  ~Progress();
  void advance();
  // Returns once the count is at least `target`; what was written before it was reached can then be read.
  void wait(int64_t target);

 private:
  std::atomic<int64_t> count_;
  std::mutex mutex_;
  std::condition_variable changed_;
};

}  // namespace odeblock
