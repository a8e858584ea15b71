// A part of an emulated GPU: the threads of a block, or of a cluster of blocks, as fibers in a random order, with
// barriers, what a warp does together, shared memory and asynchronous copies. simt.h, which says what it is for, gives
// them their names.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
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

constexpr int kLanes = 32, kMaxWarps = 32, kMaxBlocks = 2, kBarriers = 16;

struct Counts {
  int64_t bank_conflicts = 0;  // of ldmatrix: rows of 16 bytes that had to wait for another of the same eight
  int64_t products = 0;        // mma of a warp
};

// The multiprocessors of one cluster, with one block of `threads` each, and an engine that copies.
class Machine {
 public:
  Machine(int threads, size_t shared_bytes, uint64_t seed, int cluster = 1)
      : threads_(threads), cluster_(cluster), shared_bytes_(shared_bytes), seed_(seed), state_(threads * cluster + 1) {
    if (threads % kLanes || threads < 1 || threads > kLanes * kMaxWarps)
      throw std::runtime_error("launch: a block has " + std::to_string(threads) + " threads");
    if (shared_bytes > 227 << 10) throw std::runtime_error("launch: more than 227 KiB of shared memory");
    if (cluster < 1 || cluster > kMaxBlocks)
      throw std::runtime_error("launch: a cluster has " + std::to_string(cluster) + " blocks");
    for (size_t i = 0; i < state_.size(); i++) {
      state_[i].index = static_cast<int>(i);
      state_[i].machine = this;
      state_[i].fiber =
          std::make_unique<Fiber>(&state_[i] == &engine() ? &Machine::copy_boxes : &Machine::live, &state_[i]);
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

  // That of the cluster that is running.
  static Machine& current() { return *current_; }

  // The cluster whose first block this is.
  void run(int block, int blocks, const std::function<void()>& kernel) {
    const Unseen unseen;
    current_ = this;
    kernel_ = &kernel;
    block_ = block, blocks_ = blocks;
    random_ = (seed_ + 1) * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(block) * 0xd1b54a32d192ed03u + 1;
    memory_.assign(cluster_ * (shared_bytes_ + 2 * kGuard + kAlignment), 0);
    for (int rank = 0; rank < cluster_; rank++) {
      const uintptr_t begin = reinterpret_cast<uintptr_t>(memory_.data()) + memory_.size() / cluster_ * rank + kGuard;
      unsigned char* shared = reinterpret_cast<unsigned char*>((begin + kAlignment - 1) / kAlignment * kAlignment);
      std::memset(shared - kGuard, kCanary, kGuard);
      std::memset(shared, 0xff, shared_bytes_);  // NaN in every type
      std::memset(shared + shared_bytes_, kCanary, kGuard);
      shared_[rank] = shared;
      alive_[rank] = threads_;
    }
    hidden_.assign(cluster_ * shared_bytes_ / 2, false);
    for (Warp& warp : warps_) warp.arrived = 0, warp.apart = false;
    for (Barrier& barrier : barriers_) barrier.arrived = 0, barrier.waiting.clear();
    phases_.clear();
    boxes_.clear();
    ready_.clear();
    for (Thread& thread : state_) {
      thread.copies.clear(), thread.groups.clear(), thread.wrote.clear();
      if (&thread != &engine()) make_ready(thread);
    }
    shuffle_priorities();
    patience_ = random() % 2 ? 8 : 4096;
    release(&start_);
    thread_ = nullptr;
    go_to(*next());
    acquire(&end_);
    if (!error_.empty()) throw std::runtime_error(error_);
    for (int rank = 0; rank < cluster_; rank++)
      for (size_t i = 0; i < kGuard; i++)
        if (shared_[rank][-1 - static_cast<ptrdiff_t>(i)] != kCanary || shared_[rank][shared_bytes_ + i] != kCanary)
          throw std::runtime_error("a write outside of shared memory, " + std::to_string(i + 1) +
                                   " bytes before or after");
  }

  int thread() const { return thread_->index % threads_; }
  int thread_of_cluster() const { return thread_->index; }
  int threads() const { return threads_; }
  int block() const { return block_ + rank(); }
  int blocks() const { return blocks_; }
  int rank() const { return thread_->index / threads_; }  // of the block in its cluster
  int cluster() const { return cluster_; }
  unsigned char* shared() const { return shared_[rank()]; }
  // Where the block `rank` of the cluster has what this block has at p.
  unsigned char* elsewhere(const void* p, int rank) const {
    return shared_[rank] + (static_cast<const unsigned char*>(p) - shared());
  }
  Counts counts;

  [[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 2, 3))) {
    char text[300];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    error_ = "block " + std::to_string(block()) + ", thread " + std::to_string(thread()) + ": " + text;
    thread_->fiber->switch_to(outside_);
    std::abort();
  }

  void check_shared(const void* address, size_t bytes, const char* what) { check_shared(address, bytes, bytes, what); }
  void check_shared(const void* address, size_t bytes, size_t alignment, const char* what) {
    const unsigned char* p = static_cast<const unsigned char*>(address);
    if (p < shared() || p + bytes > shared() + shared_bytes_)
      fail("%s: byte %ld, of %zu of shared memory", what, static_cast<long>(p - shared()), shared_bytes_);
    if (reinterpret_cast<uintptr_t>(p) % alignment) fail("%s: not aligned to %zu bytes", what, alignment);
  }

  // Waits for `count` threads, each with the same count, at barrier `id` of the block.
  void meet(int id, int count, const char* name) { meet(barriers_[rank() * kBarriers + id], id, count, name); }
  // .. at barrier 0, all threads of the block, each with a vote; whether one is for it.
  bool vote(bool mine, const char* name) {
    Barrier& barrier = barriers_[rank() * kBarriers];
    bool* found;
    {
      const Unseen unseen;
      found = &barrier.found[barrier.round % 2];
      if (barrier.arrived == 0) *found = false;
      *found |= mine;
    }
    meet(barrier, 0, threads_, name);
    const Unseen unseen;
    return *found;
  }
  void meet_cluster(const char* name) { meet(barriers_[kMaxBlocks * kBarriers], 0, cluster_ * threads_, name); }

  // What a warp does together: each lane brings a T, the last to come does f(T*[32]) for all.
  template <class T, class F>
  void together(const char* name, T& mine, F f) {
    const Unseen unseen;
    Warp& warp = warps_[thread_->index / kLanes];
    if (warp.arrived > 0 && std::strcmp(warp.name, name) != 0)
      fail("diverged: in %s, while lanes of its warp wait in %s", name, warp.name);
    warp.name = name;
    warp.brought[thread() % kLanes] = &mine;
    if (++warp.arrived < kLanes) return wait(name);
    warp.arrived = 0;
    T* all[kLanes];
    for (int lane = 0; lane < kLanes; lane++) all[lane] = static_cast<T*>(warp.brought[lane]);
    f(all);
    const int first = thread_->index / kLanes * kLanes;
    for (int lane = 0; lane < kLanes; lane++)
      if (&state_[first + lane] != thread_) make_ready(state_[first + lane]);
  }
  // Where the lanes of a warp are ordered by a barrier of theirs.
  char* warp_order() {
    const Unseen unseen;
    Warp& warp = warps_[thread_->index / kLanes];
    return &warp.order[warp.round % 2];
  }
  void next_warp_round() {
    Warp& warp = warps_[thread_->index / kLanes];
    warp.round++;
    warp.apart = false;
  }
  // What a lane does apart from its warp, which must come together again before what all of it does at once.
  void goes_apart() { warps_[thread_->index / kLanes].apart = true; }
  void check_together(const char* name) {
    if (warps_[thread_->index / kLanes].apart)
      fail("%s: without a barrier of the warp since one lane went apart", name);
  }

  // Asynchronous copies of 16 bytes, of which the last may be zeros: they are done when they are waited for.
  void copy_later(void* to, const void* from, int bytes) {
    const Unseen unseen;
    thread_->copies.push_back({to, from, bytes});
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
      for (int i = 0; i < 4; i++) static_cast<uint32_t*>(copy.to)[i] = words[i];
      wrote(copy.to, 16);
    }
  }

  // What threads write to shared memory is hidden from products that read it themselves, until the thread that wrote
  // it says so.
  void wrote(const void* to, int size) {
    const Unseen unseen;
    const size_t first = place(to);
    for (size_t i = first / 2; i < (first + size) / 2; i++) hidden_[i] = true, thread_->wrote.push_back(i);
  }
  void fence_async() {
    const Unseen unseen;
    for (size_t i : thread_->wrote) hidden_[i] = false;
    thread_->wrote.clear();
  }
  void check_fenced(const void* entry) {
    if (hidden_[place(entry) / 2]) fail("wgmma: shared memory that was written without fence.proxy.async");
  }

  // A barrier in shared memory that counts arrivals and copied bytes; its phases end when both are complete.
  void init_phase(uint64_t* barrier, int count) {
    const Unseen unseen;
    check_shared(barrier, 8, "mbarrier.init");
    if (phases_.count(barrier)) fail("mbarrier.init: of a barrier that is in use");
    if (count < 1 || count >= 1 << 20) fail("mbarrier.init: of %d arrivals", count);
    Phase& phase = phases_[barrier];
    phase.expected = phase.pending = count;
    phase.rank = rank();
    *barrier = kMark;
  }
  void publish_phases() {
    const Unseen unseen;
    for (auto& [barrier, phase] : phases_)
      if (phase.rank == rank()) phase.published = true;
  }
  void arrive(uint64_t* barrier, int64_t bytes, const char* name) {
    Phase* phase;
    {
      const Unseen unseen;
      phase = &phase_of(barrier, name);
    }
    release(&phase->order[phase->number % 2]);
    const Unseen unseen;
    goes_apart();
    phase->bytes += bytes;
    if (phase->pending == 0) fail("%s: more arrivals than the %d of a phase", name, phase->expected);
    phase->pending--;
    end_phase(*phase);
  }
  void wait_phase(uint64_t* barrier, int parity) {
    Phase* phase;
    {
      const Unseen unseen;
      check_shared(barrier, 8, "mbarrier.try_wait");
      phase = &phase_of(barrier, "mbarrier.try_wait");
      while (static_cast<int>(phase->number % 2) == parity) {
        phase->waiting.push_back(thread_);
        wait("mbarrier.try_wait");
      }
    }
    acquire(&phase->order[parity]);
  }

  // A copy that the engine does when it likes: `write` into each of the blocks `mask` of the cluster, at the same
  // place, then so many bytes to the same barrier of each.
  void copy_box(unsigned char* to, int bytes, uint64_t* barrier, unsigned mask,
                std::function<void(unsigned char*)> write) {
    const char* const name = "cp.async.bulk";
    auto order = std::make_unique<char>();
    release(order.get());
    const Unseen unseen;
    goes_apart();
    for (int other = 0; other < kMaxBlocks; other++) {
      if (!(mask >> other & 1)) continue;
      if (other >= cluster_) fail("%s: to block %d of a cluster of %d", name, other, cluster_);
      uint64_t* there = reinterpret_cast<uint64_t*>(elsewhere(barrier, other));
      Phase& phase = phase_of(there, name);
      if (!phase.published) fail("%s: to a barrier without fence.mbarrier_init", name);
      const size_t first = other * shared_bytes_ + (to - shared());
      for (size_t i = first / 2; i < (first + bytes) / 2; i++)
        if (hidden_[i]) fail("%s: to what was written without fence.proxy.async", name);
    }
    boxes_.push_back({to, bytes, barrier, rank(), mask, std::move(write), std::move(order)});
  }

 private:
  struct Thread;
  struct Phase {
    int expected, pending, rank;
    int64_t bytes = 0;  // expected less copied
    unsigned number = 0;
    bool published = false;
    std::vector<Thread*> waiting;
    char order[2];
  };
  struct Box {
    unsigned char* to;
    int bytes;
    uint64_t* barrier;
    int rank;
    unsigned mask;
    std::function<void(unsigned char*)> write;
    std::unique_ptr<char> order;
  };
  struct Copy {
    void* to;
    const void* from;
    int bytes;
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
    bool apart = false;
    const char* name = nullptr;
    void* brought[kLanes];
    char order[2];
  };
  struct Barrier {
    int arrived = 0, count = 0;
    unsigned round = 0;
    const char* name = nullptr;
    bool found[2];  // of votes
    std::vector<Thread*> waiting;
    char order[2];
  };
  static constexpr size_t kGuard = 1024, kAlignment = 1024;
  static constexpr unsigned char kCanary = 0xa5;
  static constexpr uint64_t kMark = 0x7ff4deadbeef7ff4u;  // what a barrier in shared memory holds
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

  void meet(Barrier& barrier, int id, int count, const char* name) {
    char* order;
    {
      const Unseen unseen;
      if (barrier.arrived > 0 && std::strcmp(barrier.name, name) != 0)
        fail("diverged: in %s, while threads of its block wait in %s", name, barrier.name);
      if (barrier.arrived > 0 && barrier.count != count)
        fail("%s %d of %d threads, where others wait for %d", name, id, count, barrier.count);
      barrier.count = count;
      barrier.name = name;
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

  Thread& engine() { return state_.back(); }
  static void copy_boxes(void* argument) {
    Thread& self = *static_cast<Thread*>(argument);
    Machine& machine = *self.machine;
    for (;;) {
      acquire(&machine.start_);
      if (!machine.kernel_) {
        release(&machine.end_);
        self.fiber->switch_to(machine.outside_);  // for good
      }
      Box box;
      {
        const Unseen unseen;
        const size_t which = machine.random() % machine.boxes_.size();
        box = std::move(machine.boxes_[which]);
        machine.boxes_.erase(machine.boxes_.begin() + static_cast<ptrdiff_t>(which));
      }
      acquire(box.order.get());
      for (int other = 0; other < machine.cluster_; other++) {
        if (!(box.mask >> other & 1)) continue;
        const ptrdiff_t away = machine.shared_[other] - machine.shared_[box.rank];
        box.write(box.to + away);  // plain loads and stores, which the sanitizers see
        uint64_t* barrier = reinterpret_cast<uint64_t*>(reinterpret_cast<unsigned char*>(box.barrier) + away);
        Phase* phase;
        {
          const Unseen unseen;
          phase = &machine.phase_of(barrier, "cp.async.bulk");
        }
        release(&phase->order[phase->number % 2]);
        const Unseen unseen;
        phase->bytes -= box.bytes;
        machine.end_phase(*phase);
      }
      release(&machine.end_);
      const Unseen unseen;
      machine.wait("the engine");
    }
  }

  Phase& phase_of(uint64_t* barrier, const char* name) {
    const auto found = phases_.find(barrier);
    if (found == phases_.end()) fail("%s: of what is no barrier", name);
    if (*barrier != kMark) fail("%s: of a barrier that was written over", name);
    if (alive_[found->second.rank] == 0) fail("%s: of a block that has left the kernel", name);
    return found->second;
  }
  void end_phase(Phase& phase) {
    if (phase.pending > 0 || phase.bytes != 0) return;
    phase.pending = phase.expected;
    phase.number++;
    for (Thread* other : phase.waiting) make_ready(*other);
    phase.waiting.clear();
  }
  size_t place(const void* p) const {
    return rank() * shared_bytes_ + (static_cast<const unsigned char*>(p) - shared());
  }

  void leave() {
    if (!thread_->copies.empty()) fail("left the kernel without waiting for its copies");
    if (alive_[rank()] == 1)
      for (const Box& box : boxes_)
        if (box.mask >> rank() & 1) fail("left the kernel while copies to it are under way");
    alive_[rank()]--;
    for (int rank = 0; rank < cluster_; rank++)
      if (alive_[rank] > 0) return wait("left the kernel");
    thread_->fiber->switch_to(outside_);
  }

  uint64_t random() {
    random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
    return random_;
  }
  void shuffle_priorities() {
    for (int i = 0; i < kMaxBlocks * kMaxWarps; i++) {
      priorities_[i] = i;
      std::swap(priorities_[i], priorities_[random() % (i + 1)]);
    }
  }
  void make_ready(Thread& thread) { ready_.push_back(&thread); }

  // A random lane of the ready warp that comes first; now and then another warp does, or the engine.
  Thread* next() {
    if (!boxes_.empty() && (ready_.empty() || random() % patience_ == 0)) return &engine();
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
        if (&other != &engine() && (other.index == 0 || std::strcmp(other.place, state_[other.index - 1].place) != 0))
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

  const int threads_, cluster_;
  const size_t shared_bytes_;
  const uint64_t seed_;
  Fiber outside_;
  std::vector<Thread> state_;  // and the engine
  std::vector<Thread*> ready_;
  Thread* thread_ = nullptr;  // the one that is running
  Warp warps_[kMaxBlocks * kMaxWarps];
  Barrier barriers_[kMaxBlocks * kBarriers + 1];  // the last is the cluster's
  std::map<uint64_t*, Phase> phases_;
  std::vector<Box> boxes_;  // copies under way
  unsigned patience_ = 1;   // of threads with the engine
  int priorities_[kMaxBlocks * kMaxWarps];
  int alive_[kMaxBlocks], block_ = 0, blocks_ = 0;
  uint64_t random_ = 0;
  std::vector<unsigned char> memory_;
  unsigned char* shared_[kMaxBlocks];
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
