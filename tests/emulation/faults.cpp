// Kernels with one fault each, which the emulation must find; `faults NAME SEED` prints what it found.
#include <cstdio>
#include <cstdlib>
#include <map>

#include "cuda/bulk.cuh"
#include "cuda/warpgroup.cuh"

using namespace odeblock::simt;

namespace {

alignas(16) uint64_t source[64];
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
  copy_async(shared() + 256, source, 16);
  commit_copies();
  wait_copies<0>();
}
void an_unaligned_copy() {
  copy_async(shared() + 8, source, 16);
  commit_copies();
  wait_copies<0>();
}
void a_copy_not_waited_for() {
  if (thread() < 16) {
    copy_async(shared() + 16 * thread(), source, 16);
    commit_copies();
  }
}
void a_group_too_early() {
  if (thread() < 16) {
    copy_async(shared() + 16 * thread(), source, 16);
    commit_copies();
    wait_copies<1>();  // allows the one that matters to be under way
  }
  sync_block();
  results[thread()] = memory()[thread()];
  wait_copies<0>();
}

// A barrier for one arrival behind the data, and 256 bytes copied to every block of the cluster.
uint64_t* phase() { return reinterpret_cast<uint64_t*>(shared() + 256); }
void make_phase(bool publish = true) {
  if (thread() == 0) {
    init_barrier(phase(), 1);
    if (publish) fence_barriers();
  }
  sync_cluster();
}
void ask(int bytes = 256) {
  if (thread() == 0) {
    arrive_expecting(phase(), bytes);
    copy_bulk(shared(), source, 256, phase());
  }
}
void no_fault_of_bulk() {
  make_phase();
  ask();
  wait_phase(phase(), 0);
  if (cluster_rank() == 0) results[thread()] = 63 - thread() + memory()[thread()];
}
void a_box_not_waited_for() {
  make_phase();
  ask();
  if (cluster_rank() == 0) results[thread()] = 63 - thread() + memory()[thread()];
  wait_phase(phase(), 0);
}
void a_box_of_other_bytes() {
  make_phase();
  ask(128);
  wait_phase(phase(), 0);
}
void the_wrong_parity() {
  make_phase();
  ask();
  wait_phase(phase(), 0);
  wait_phase(phase(), 1);
}
void one_arrival_more() {
  make_phase();
  if (thread() == 0) {
    arrive_expecting(phase(), 16);
    arrive(phase(), 0);
  }
}
void an_unpublished_barrier() {
  make_phase(false);
  ask();
  wait_phase(phase(), 0);
}
void a_barrier_written_over() {
  make_phase();
  if (thread() == 0) *phase() = 0;
  sync_block();
  wait_phase(phase(), 0);
}
void a_copy_to_one_that_left() {
  make_phase();
  ask();
}
void a_barrier_of_one_that_left() {
  make_phase();
  if (cluster_rank() == 0) return;
  for (int i = 0; i < 100; i++) shuffle_xor(i, 1);
  sync_block();
  arrive(phase(), 0);
}
void a_warp_apart() {
  make_phase();
  ask();
  struct {
    float x[4];
  } d[4];
  uint32_t a[1][4] = {};
  before_products<true>(d, a);
}

}  // namespace

int main(int, char** arguments) {
  static const std::map<std::string, void (*)()> of_a_block =
                                                     {
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
                                                     },
                                                 of_a_cluster = {
                                                     {"no_fault_of_bulk", no_fault_of_bulk},
                                                     {"a_box_not_waited_for", a_box_not_waited_for},
                                                     {"a_box_of_other_bytes", a_box_of_other_bytes},
                                                     {"the_wrong_parity", the_wrong_parity},
                                                     {"one_arrival_more", one_arrival_more},
                                                     {"an_unpublished_barrier", an_unpublished_barrier},
                                                     {"a_barrier_written_over", a_barrier_written_over},
                                                     {"a_copy_to_one_that_left", a_copy_to_one_that_left},
                                                     {"a_barrier_of_one_that_left", a_barrier_of_one_that_left},
                                                     {"a_warp_apart", a_warp_apart},
                                                 };
  const bool cluster = of_a_cluster.count(arguments[1]);
  odeblock::emulation::seed() = std::strtoull(arguments[2], nullptr, 10);
  try {
    if (cluster)
      launch(of_a_cluster.at(arguments[1]), 2, 2, 64, 512, nullptr);
    else
      launch(of_a_block.at(arguments[1]), 1, 1, 64, 256, nullptr);
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 0;
  }
  for (int i = 0; i < 64; i++) std::printf("%d ", results[i]);
  return 0;
}
