// One multiprocessor of an emulated GPU: the threads of a block as fibers, in a random order, with barriers, what a
// warp does together, shared memory and asynchronous copies. simt.h, which says what it is for, gives them their names.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

#ifdef __SANITIZE_THREAD__
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace odeblock {
namespace emulation {

// Orders what came before release(x) before what comes after acquire(x), for the thread sanitizer.
inline void release([[maybe_unused]] void* x) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(x);
#endif
}
inline void acquire([[maybe_unused]] void* x) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(x);
#endif
}

// While one lives, what the emulation itself reads and writes is none of the thread sanitizer's business.
class Unseen {
 public:
  Unseen() {
#ifdef __SANITIZE_THREAD__
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  }
  ~Unseen() {
#ifdef __SANITIZE_THREAD__
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
  }
  Unseen(const Unseen&) = delete;
};

constexpr int kLanes = 32, kMaxWarps = 32, kBarriers = 16;

struct Counts {
  int64_t bank_conflicts = 0;  // of ldmatrix: rows of 16 bytes that had to wait for another of the same eight
  int64_t products = 0;        // mma of a warp
};

// One multiprocessor with one block at a time.
class Machine {
 public:
  Machine(int threads, size_t shared_bytes, uint64_t seed)
      : threads_(threads), shared_bytes_(shared_bytes), seed_(seed), state_(threads) {
    if (threads % kLanes || threads < 1 || threads > kLanes * kMaxWarps)
      throw std::runtime_error("launch: a block has " + std::to_string(threads) + " threads");
    if (shared_bytes > 227 << 10) throw std::runtime_error("launch: more than 227 KiB of shared memory");
    for (int i = 0; i < threads; i++) {
      state_[i].index = i;
      state_[i].machine = this;
      state_[i].fiber = std::make_unique<Fiber>(&Machine::live, &state_[i]);
    }
  }
  Machine(const Machine&) = delete;
  ~Machine() {  // every fiber must have left its Unseen
    if (!kernel_ || !error_.empty()) return;
    kernel_ = nullptr;
    release(&start_);
    for (Thread& thread : state_) {
      thread_ = &thread;
      outside_.switch_to(*thread.fiber);
    }
    acquire(&end_);
  }

  // That of the block that is running.
  static Machine& current() { return *current_; }

  void run(int block, int blocks, const std::function<void()>& kernel) {
    const Unseen unseen;
    current_ = this;
    kernel_ = &kernel;
    block_ = block, blocks_ = blocks;
    random_ = (seed_ + 1) * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(block) * 0xd1b54a32d192ed03u + 1;
    memory_.assign(shared_bytes_ + 2 * kGuard + kAlignment, 0);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory_.data()) + kGuard;
    shared_ = reinterpret_cast<unsigned char*>((begin + kAlignment - 1) / kAlignment * kAlignment);
    std::memset(shared_ - kGuard, kCanary, kGuard);
    std::memset(shared_, 0xff, shared_bytes_);  // NaN in every type
    std::memset(shared_ + shared_bytes_, kCanary, kGuard);
    hidden_.assign(shared_bytes_ / 2, false);
    for (Warp& warp : warps_) warp.arrived = 0;
    for (Barrier& barrier : barriers_) barrier.arrived = 0, barrier.waiting.clear();
    alive_ = threads_;
    ready_.clear();
    for (Thread& thread : state_) {
      thread.copies.clear(), thread.groups.clear(), thread.wrote.clear();
      make_ready(thread);
    }
    shuffle_priorities();
    release(&start_);
    thread_ = nullptr;
    go_to(*next());
    acquire(&end_);
    if (!error_.empty()) throw std::runtime_error(error_);
    for (size_t i = 0; i < kGuard; i++)
      if (shared_[-1 - static_cast<ptrdiff_t>(i)] != kCanary || shared_[shared_bytes_ + i] != kCanary)
        throw std::runtime_error("a write outside of shared memory, " + std::to_string(i + 1) +
                                 " bytes before or after");
  }

  int thread() const { return thread_->index; }
  int threads() const { return threads_; }
  int block() const { return block_; }
  int blocks() const { return blocks_; }
  unsigned char* shared() const { return shared_; }
  Counts counts;

  [[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 2, 3))) {
    char text[300];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    error_ = "block " + std::to_string(block_) + ", thread " + std::to_string(thread()) + ": " + text;
    thread_->fiber->switch_to(outside_);
    std::abort();
  }

  void check_shared(const void* address, size_t bytes, const char* what) {
    const unsigned char* p = static_cast<const unsigned char*>(address);
    if (p < shared_ || p + bytes > shared_ + shared_bytes_)
      fail("%s: byte %ld, of %zu of shared memory", what, static_cast<long>(p - shared_), shared_bytes_);
    if (reinterpret_cast<uintptr_t>(p) % bytes) fail("%s: not aligned to %zu bytes", what, bytes);
  }

  // Waits for `count` threads, each with the same count, at barrier `id`.
  void meet(int id, int count, const char* name) {
    Barrier& barrier = barriers_[id];
    char* order;
    {
      const Unseen unseen;
      if (barrier.arrived > 0 && barrier.count != count)
        fail("%s %d of %d threads, where others wait for %d", name, id, count, barrier.count);
      barrier.count = count;
      order = &barrier.order[barrier.round % 2];
    }
    release(order);
    {
      const Unseen unseen;
      if (++barrier.arrived == count) {
        barrier.arrived = 0;
        barrier.round++;
        for (Thread* other : barrier.waiting) make_ready(*other);
        barrier.waiting.clear();
      } else {
        barrier.waiting.push_back(thread_);
        wait(name);
      }
    }
    acquire(order);
  }

  // What a warp does together: each lane brings a T, the last to come does f(T*[32]) for all.
  template <class T, class F>
  void together(const char* name, T& mine, F f) {
    const Unseen unseen;
    Warp& warp = warps_[thread() / kLanes];
    if (warp.arrived > 0 && std::strcmp(warp.name, name) != 0)
      fail("diverged: in %s, while lanes of its warp wait in %s", name, warp.name);
    warp.name = name;
    warp.brought[thread() % kLanes] = &mine;
    if (++warp.arrived < kLanes) return wait(name);
    warp.arrived = 0;
    T* all[kLanes];
    for (int lane = 0; lane < kLanes; lane++) all[lane] = static_cast<T*>(warp.brought[lane]);
    f(all);
    const int first = thread() / kLanes * kLanes;
    for (int lane = 0; lane < kLanes; lane++)
      if (&state_[first + lane] != thread_) make_ready(state_[first + lane]);
  }
  // Where the lanes of a warp are ordered by a barrier of theirs.
  char* warp_order() {
    const Unseen unseen;
    Warp& warp = warps_[thread() / kLanes];
    return &warp.order[warp.round % 2];
  }
  void next_warp_round() { warps_[thread() / kLanes].round++; }

  // Asynchronous copies of `size` bytes, of which the last may be zeros: they are done when they are waited for.
  void copy_later(void* to, int size, const void* from, int bytes) {
    const Unseen unseen;
    thread_->copies.push_back({to, from, size, bytes});
  }
  void end_group() {
    const Unseen unseen;
    thread_->groups.push_back(thread_->copies.size());
  }
  void finish_copies(size_t groups_left) {
    std::vector<Copy> due;
    {
      const Unseen unseen;
      Thread& thread = *thread_;
      if (thread.groups.size() <= groups_left) return;
      const size_t count = thread.groups[thread.groups.size() - groups_left - 1];
      due.assign(thread.copies.begin(), thread.copies.begin() + count);
      thread.copies.erase(thread.copies.begin(), thread.copies.begin() + count);
      thread.groups.erase(thread.groups.begin(), thread.groups.end() - groups_left);
      for (size_t& end : thread.groups) end -= count;
    }
    for (const Copy& copy : due) {  // plain loads and stores, which the sanitizers see
      uint32_t words[4] = {0, 0, 0, 0};
      std::memcpy(words, copy.from, copy.bytes);
      for (int i = 0; i < copy.size / 4; i++) static_cast<uint32_t*>(copy.to)[i] = words[i];
      wrote(copy.to, copy.size);
    }
  }

  // What threads write to shared memory is hidden from products that read it themselves, until the thread that wrote
  // it says so.
  void wrote(const void* to, int size) {
    const Unseen unseen;
    const size_t first = static_cast<const unsigned char*>(to) - shared_;
    for (size_t i = first / 2; i < (first + size) / 2; i++) hidden_[i] = true, thread_->wrote.push_back(i);
  }
  void fence_async() {
    const Unseen unseen;
    for (size_t i : thread_->wrote) hidden_[i] = false;
    thread_->wrote.clear();
  }
  void check_fenced(const void* entry) {
    if (hidden_[(static_cast<const unsigned char*>(entry) - shared_) / 2])
      fail("wgmma: shared memory that was written without fence.proxy.async");
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    int size, bytes;
  };
  struct Thread {
    int index;
    Machine* machine;
    std::unique_ptr<Fiber> fiber;
    const char* place;           // where it waits
    std::vector<Copy> copies;    // begun, in their order
    std::vector<size_t> groups;  // ends of groups among them
    std::vector<size_t> wrote;   // halves of words, since its last fence_async
  };
  struct Warp {
    int arrived = 0;
    unsigned round = 0;
    const char* name = nullptr;
    void* brought[kLanes];
    char order[2];
  };
  struct Barrier {
    int arrived = 0, count = 0;
    unsigned round = 0;
    std::vector<Thread*> waiting;
    char order[2];
  };
  static constexpr size_t kGuard = 1024, kAlignment = 1024;
  static constexpr unsigned char kCanary = 0xa5;
  static inline thread_local Machine* current_ = nullptr;

  static void live(void* argument) {
    Thread& self = *static_cast<Thread*>(argument);
    for (;;) {
      acquire(&self.machine->start_);
      if (!self.machine->kernel_) {
        Fiber &own = *self.fiber, &outside = self.machine->outside_;
        release(&self.machine->end_);
        own.switch_to(outside);  // for good
      }
      (*self.machine->kernel_)();
      release(&self.machine->end_);
      const Unseen unseen;
      self.machine->leave();
    }
  }

  void leave() {
    if (!thread_->copies.empty()) fail("left the kernel without waiting for its copies");
    if (--alive_ > 0) return wait("left the kernel");
    thread_->fiber->switch_to(outside_);
  }

  uint64_t random() {
    random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
    return random_;
  }
  void shuffle_priorities() {
    for (int i = 0; i < kMaxWarps; i++) {
      priorities_[i] = i;
      std::swap(priorities_[i], priorities_[random() % (i + 1)]);
    }
  }
  void make_ready(Thread& thread) { ready_.push_back(&thread); }

  // A random lane of the ready warp that comes first; now and then another warp does.
  Thread* next() {
    if (random() % 128 == 0) shuffle_priorities();
    size_t best = ready_.size();
    uint64_t best_key = ~uint64_t(0);
    for (size_t i = 0; i < ready_.size(); i++) {
      const uint64_t key =
          static_cast<uint64_t>(priorities_[ready_[i]->index / kLanes]) << 32 | (random() & 0xffffffff);
      if (key < best_key) best = i, best_key = key;
    }
    if (best == ready_.size()) return nullptr;
    Thread* thread = ready_[best];
    ready_[best] = ready_.back();
    ready_.pop_back();
    return thread;
  }

  void wait(const char* place) {
    thread_->place = place;
    Thread* thread = next();
    if (!thread) {
      std::string places;
      for (const Thread& other : state_)
        if (other.index == 0 || std::strcmp(other.place, state_[other.index - 1].place) != 0)
          places += " from " + std::to_string(other.index) + " on: " + other.place;
      fail("deadlock, threads%.200s", places.c_str());
    }
    if (thread != thread_) go_to(*thread);
  }

  void go_to(Thread& thread) {
    Fiber& from = thread_ ? *thread_->fiber : outside_;
    thread_ = &thread;
    from.switch_to(*thread.fiber);
  }

  const int threads_;
  const size_t shared_bytes_;
  const uint64_t seed_;
  Fiber outside_;
  std::vector<Thread> state_;
  std::vector<Thread*> ready_;
  Thread* thread_ = nullptr;  // the one that is running
  Warp warps_[kMaxWarps];
  Barrier barriers_[kBarriers];
  int priorities_[kMaxWarps];
  int alive_ = 0, block_ = 0, blocks_ = 0;
  uint64_t random_ = 0;
  std::vector<unsigned char> memory_;
  unsigned char* shared_ = nullptr;
  std::vector<bool> hidden_;  // for each half of a word
  const std::function<void()>* kernel_ = nullptr;
  std::string error_;
  char start_ = 0, end_ = 0;
};

inline uint64_t& seed() {
  static uint64_t value = 0;
  return value;
}
inline int& capability() {
  static int value = 80;
  return value;
}
inline int& multiprocessors() {
  static int value = 1;
  return value;
}
inline Counts& counts() {  // of the last launch
  static Counts value;
  return value;
}

}  // namespace emulation
}  // namespace odeblock
