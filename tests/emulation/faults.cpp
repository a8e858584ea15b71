// Kernels with one fault each, which the emulation must find; `faults NAME SEED` prints what it found.
#include <cstdio>
#include <cstdlib>
#include <map>

#include "cuda/simt.cuh"

using namespace odeblock::simt;

namespace {

uint64_t source[64];
int results[64];

int* memory() { return reinterpret_cast<int*>(shared()); }

void no_fault() {
  memory()[thread()] = thread();
  sync_block();
  results[thread()] = memory()[63 - thread()];
}
void no_barrier() {
  memory()[thread()] = thread();
  results[thread()] = memory()[63 - thread()];
}
void no_warp_barrier() {
  memory()[thread()] = thread();
  shuffle_xor(1, 1);  // no barrier for memory
  results[thread()] = memory()[thread() ^ 1];
}
void a_barrier_that_half_reaches() {
  if (thread() < 32) sync_block();
}
void divergence() {
  if (lane() < 16)
    sync_warp();
  else
    shuffle_xor(1, 1);
}
void a_write_beyond() { memory()[64 + thread()] = 1; }
void a_copy_beyond() {
  copy_async<16>(shared() + 256, source, 16);
  commit_copies();
  wait_copies<0>();
}
void an_unaligned_copy() {
  copy_async<16>(shared() + 8, source, 16);
  commit_copies();
  wait_copies<0>();
}
void a_copy_not_waited_for() {
  if (thread() < 16) {
    copy_async<16>(shared() + 16 * thread(), source, 16);
    commit_copies();
  }
}
void a_group_too_early() {
  if (thread() < 16) {
    copy_async<16>(shared() + 16 * thread(), source, 16);
    commit_copies();
    wait_copies<1>();  // allows the one that matters to be under way
  }
  sync_block();
  results[thread()] = memory()[thread()];
  wait_copies<0>();
}

}  // namespace

int main(int, char** arguments) {
  static const std::map<std::string, void (*)()> kernels = {
      {"no_fault", no_fault},
      {"no_barrier", no_barrier},
      {"no_warp_barrier", no_warp_barrier},
      {"a_barrier_that_half_reaches", a_barrier_that_half_reaches},
      {"divergence", divergence},
      {"a_write_beyond", a_write_beyond},
      {"a_copy_beyond", a_copy_beyond},
      {"an_unaligned_copy", an_unaligned_copy},
      {"a_copy_not_waited_for", a_copy_not_waited_for},
      {"a_group_too_early", a_group_too_early},
  };
  odeblock::emulation::seed() = std::strtoull(arguments[2], nullptr, 10);
  try {
    launch(kernels.at(arguments[1]), 1, 64, 256, 256, nullptr);
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 0;
  }
  for (int i = 0; i < 64; i++) std::printf("%d ", results[i]);
  return 0;
}
