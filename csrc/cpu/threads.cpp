#include "threads.h"

#include <unistd.h>

#include <exception>
#include <vector>

// OpenMP's calls as GCC compiles a parallel region to them, of whatever runtime PyTorch has loaded for all to see. None
// is linked here: it might be another one, whose threads would compete with PyTorch's. Null where there is none.
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*run)(void* data), void* data, unsigned threads, unsigned flags);
__attribute__((weak)) int omp_get_thread_num();
__attribute__((weak)) int omp_get_num_threads();
}

namespace odeblock {
namespace {

// What MXCSR or FPCR hold: how to round, which exceptions trap, whether subnormals count as zero.
#if defined(__x86_64__) || defined(__i386__)
typedef unsigned FloatMode;
constexpr FloatMode kSeen = 0x3f;  // bits that report exceptions of the past
FloatMode float_mode() { return __builtin_ia32_stmxcsr() & ~kSeen; }
void set_float_mode(FloatMode mode) { __builtin_ia32_ldmxcsr(mode); }
#elif defined(__aarch64__)
typedef uint64_t FloatMode;
FloatMode float_mode() {
  FloatMode mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
void set_float_mode(FloatMode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
typedef int FloatMode;
FloatMode float_mode() { return 0; }
void set_float_mode(FloatMode) {}
#endif

struct Call {
  void (*run)(void* context, int thread, int count);
  void* context;
  FloatMode mode;

  void operator()(int thread, int count) const {
    const FloatMode own = float_mode();
    if (own != mode) set_float_mode(mode);
    run(context, thread, count);
    if (own != mode) set_float_mode(own);
  }
};

const pid_t kLoadedBy = getpid();

constexpr int kSpins = 2000;  // some 20 to 60 microseconds: longer than threads of equal shares differ

// changed.wait(lock, done), which GCC 12 and later compile to a symbol that only their own libstdc++ has: a wheel would
// not load where that is older.
template <class Done>
void sleep_until(std::condition_variable& changed, std::unique_lock<std::mutex>& lock, Done done) {
  while (!changed.wait_until(lock, std::chrono::system_clock::now() + std::chrono::hours(1), done)) {
  }
}

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

// Whether threads of a region have numbers of their own: the three might be of two libraries.
bool has_openmp() {
  if (getpid() != kLoadedBy) return false;  // a forked child: OpenMP may wait for threads of its parent, for ever
  static const bool found = [] {
    if (!GOMP_parallel || !omp_get_thread_num || !omp_get_num_threads) return false;
    struct Seen {
      std::atomic<int> threads{0}, numbers{0}, count{0};
    } seen;
    const auto region = [](void* data) {
      Seen& s = *static_cast<Seen*>(data);
      s.threads++;
      s.numbers += omp_get_thread_num();
      s.count = omp_get_num_threads();
    };
    GOMP_parallel(region, &seen, 2, 0);
    return seen.threads == seen.count && seen.numbers == seen.count - 1;  // 0, or 0 and 1
  }();
  return found;
}

void run_threads(int threads, void (*run)(void* context, int thread, int count), void* context) {
  Call call = {run, context, float_mode()};
  if (threads <= 1) return call(0, 1);
  if (has_openmp()) {
    const auto region = [](void* data) { (*static_cast<Call*>(data))(omp_get_thread_num(), omp_get_num_threads()); };
    return GOMP_parallel(region, &call, static_cast<unsigned>(threads), 0);
  }
  std::vector<std::thread> others;
  std::mutex mutex;
  std::condition_variable started;
  int count = 0;  // known once all are there
  try {
    others.reserve(threads - 1);
    for (int t = 1; t < threads; t++)
      others.emplace_back([&, t] {
        {
          std::unique_lock<std::mutex> lock(mutex);
          sleep_until(started, lock, [&] { return count > 0; });
        }
        call(t, count);
      });
  } catch (const std::exception&) {  // no more to be had: those that there are
  }
  {
    const std::lock_guard<std::mutex> lock(mutex);
    count = static_cast<int>(others.size()) + 1;
  }
  started.notify_all();
  call(0, count);
  for (std::thread& thread : others) thread.join();
}

constexpr int64_t kWorkBetweenLooks = 1 << 18;  // some 10 microseconds

Stop::Stop(bool (*asked)(), int64_t work, std::chrono::milliseconds every)
    : asked_(asked),
      every_(every),
      skipped_(0),
      stopped_(false),
      thread_(std::this_thread::get_id()),
      next_(std::chrono::steady_clock::now() + every) {
  if (work < 1) work = 1;
  while ((skipped_ + 1) * work < kWorkBetweenLooks) skipped_ = 2 * skipped_ + 1;
}

void Stop::ask() {
  if (std::this_thread::get_id() != thread_ || stopped_.load(std::memory_order_relaxed)) return;
  if (std::chrono::steady_clock::now() < next_) return;
  if (asked_()) stopped_.store(true, std::memory_order_relaxed);
  next_ = std::chrono::steady_clock::now() + every_;
}

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
  sleep_until(changed_, lock, [&] { return round_.load(std::memory_order_acquire) != round; });
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
  sleep_until(changed_, lock, [&] { return count_.load(std::memory_order_acquire) >= target; });
}

}  // namespace odeblock
