// Where the threads of a backward meet once per layer.
//
// Waiting spins for some microseconds, then sleeps. OpenMP's own barrier spins for milliseconds: on a processor
// that another program shares, a spinning thread spends its share of time doing nothing, and the one it waits
// for is kept off the processor for a whole slice of the scheduler, at every layer (seen with one of two cores
// busy: a step took 30 times as long as on one thread).
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>

namespace odeblock {

// Defined in barrier.cpp: what this uses of the standard library must not be compiled for one instruction set.
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

}  // namespace odeblock
