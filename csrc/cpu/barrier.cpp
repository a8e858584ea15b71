#include "barrier.h"

namespace odeblock {
namespace {

constexpr int kSpins = 2000;  // some 20 to 60 microseconds: longer than threads of equal shares differ

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Barrier::Barrier() : arrived_(0), round_(0) {}
Barrier::~Barrier() = default;

void Barrier::wait(int threads) {
  if (threads == 1) return;
  const unsigned round = round_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
    arrived_.store(0, std::memory_order_relaxed);
    {
      const std::lock_guard<std::mutex> lock(mutex_);  // a thread about to sleep sees the new round
      round_.store(round + 1, std::memory_order_release);
    }
    changed_.notify_all();
    return;
  }
  for (int i = 0; i < kSpins; i++) {
    if (round_.load(std::memory_order_acquire) != round) return;
    relax();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != round; });
}

Progress::Progress() : count_(0) {}
Progress::~Progress() = default;

void Progress::advance() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    count_.store(count_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
  }
  changed_.notify_all();
}

void Progress::wait(int64_t target) {
  for (int i = 0; i < kSpins; i++) {
    if (count_.load(std::memory_order_acquire) >= target) return;
    relax();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return count_.load(std::memory_order_acquire) >= target; });
}

}  // namespace odeblock
