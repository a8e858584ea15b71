// Fibers: stacks between which one thread of the system switches when it is told to. The address and the thread
// sanitizer are told as well.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef __SANITIZE_THREAD__
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#define ODEBLOCK_UNSANITIZED __attribute__((noinline, no_sanitize("thread")))
#else
#define ODEBLOCK_UNSANITIZED __attribute__((noinline))
#endif
#ifdef __SANITIZE_ADDRESS__
extern "C" {
void __sanitizer_start_switch_fiber(void** own_fake_stack, const void* next_bottom, size_t next_size);
void __sanitizer_finish_switch_fiber(void* own_fake_stack, const void** last_bottom, size_t* last_size);
}
#endif

namespace odeblock {
namespace emulation {

#ifdef __x86_64__
// Leaves the stack of the caller in *from and goes on where `to` was left: all that a callee must preserve is on it.
__attribute__((naked, noinline, unused)) static void swap_stacks(void** /*from: rdi*/, void* /*to: rsi*/) {
  __asm__(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
#endif

class Fiber {
 public:
  // The stack that the caller is on.
  Fiber() {
#ifdef __SANITIZE_THREAD__
    known_ = __tsan_get_current_fiber();
#endif
  }

  // A stack of its own, on which run(argument) begins with the first switch; it must never return.
  Fiber(void (*run)(void*), void* argument) : run_(run), argument_(argument), stack_(new char[kStack]) {
#ifdef __SANITIZE_THREAD__
    known_ = __tsan_create_fiber(0);
#endif
#ifdef __SANITIZE_ADDRESS__
    bottom_ = stack_.get();
    size_ = kStack;
#endif
#ifdef __x86_64__
    // As swap_stacks leaves it: six registers, and where to go on. There a function expects rsp = 8 modulo 16.
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack_.get()) + kStack - 64) & ~uintptr_t(15));
    *top = reinterpret_cast<void*>(&Fiber::enter);
    pointer_ = top - 6;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStack;
    context_.uc_link = nullptr;
    makecontext(&context_, &Fiber::enter, 0);
#endif
  }

  ~Fiber() {
#ifdef __SANITIZE_THREAD__
    if (stack_) __tsan_destroy_fiber(known_);
#endif
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // From this fiber, which is running, to the next; returns when somebody switches back.
  ODEBLOCK_UNSANITIZED void switch_to(Fiber& next) {
    last_ = this;
    running_ = &next;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.size_);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(next.known_, 1);  // 1: no synchronisation
#endif
#ifdef __x86_64__
    swap_stacks(&pointer_, next.pointer_);
#else
    swapcontext(&context_, &next.context_);
#endif
    arrive();
  }

 private:
  static constexpr size_t kStack = 256 << 10;

  static inline thread_local Fiber* running_ = nullptr;
  static inline thread_local Fiber* last_ = nullptr;

  static void enter() {
    Fiber* self = running_;
    self->arrive();
    self->run_(self->argument_);
    std::abort();
  }

  ODEBLOCK_UNSANITIZED void arrive() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack_, &last_->bottom_, &last_->size_);
#endif
  }

  void (*run_)(void*) = nullptr;
  void* argument_ = nullptr;
  std::unique_ptr<char[]> stack_;
#ifdef __x86_64__
  void* pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
#ifdef __SANITIZE_THREAD__
  void* known_ = nullptr;
#endif
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#endif
};

}  // namespace emulation
}  // namespace odeblock
