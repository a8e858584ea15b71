// The names of csrc/cuda/simt.cuh for the CPU, with the semantics that CUDA and PTX document: a kernel compiled with
// ODEBLOCK_EMULATED runs here, one block or cluster after the other, each thread a fiber.
//
// A thread gives way only where it must wait, so that between two calls it runs alone. Which thread goes on is random
// (by the seed): one warp runs as far ahead as barriers let it, lanes of a warp in any order. What a schedule cannot
// show, poison does: shared memory begins as NaN between canaries, and the target of an asynchronous copy is NaN until
// it is waited for. Under the thread sanitizer every fiber is a thread of its own that only barriers order: a missing
// one is a data race in any schedule.
//
// A fault (divergence, a barrier that not all reach, an access of a copy outside of shared memory, ..) ends the launch
// with an exception that names it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "machine.h"
#include "tensor_core.h"

#define ODEBLOCK_DEVICE inline
#define ODEBLOCK_KERNEL(...) static void
#define ODEBLOCK_PARAMETER

namespace odeblock {
namespace emulation {

inline float from_bfloat16(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }
inline float from_float16(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, sizeof x);
  return static_cast<float>(x);
}
inline uint16_t to_bfloat16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = to_bits(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t to_float16(float x) {
  const _Float16 y = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &y, sizeof bits);
  return bits;
}

struct MmaLane {
  float* d;           // [4]
  const uint32_t* a;  // [4]
  uint32_t b[2];
};
struct MmaLane64 {
  double* d;  // [2]
  double a, b;
};

// D += A B of a warp, A [16, K], B [K, 8]. Lane l has row l / 4 and columns 2 (l % 4) and the next of D, and the same 8
// rows below.
template <int K>
struct Product {
  Factors<K> rows[16], columns[8];

  void add_to(MmaLane** lanes) const {
    for (int l = 0; l < kLanes; l++)
      for (int i = 0; i < 4; i++) {
        float& sum = lanes[l]->d[i];
        sum = add_products(capability(), sum, rows[l / 4 + 8 * (i / 2)], columns[2 * (l % 4) + i % 2]);
      }
    Machine::current().counts.products++;
  }
};

// m16n8k16 of 16-bit operands. A pair of neighbours a register, the lower one in its lower half: a[0] row l / 4,
// columns 2 (l % 4) and the next; a[1] 8 rows below; a[2], a[3] the same 8 columns on. b[0] rows 2 (l % 4) and the next
// of column l / 4; b[1] 8 rows below.
template <float (*widen)(uint16_t)>
void mma_16816(MmaLane** lanes) {
  Product<16> product;
  for (int l = 0; l < kLanes; l++)
    for (int half = 0; half < 2; half++) {
      const int pair = 2 * (l % 4) + half, shift = 16 * half;
      for (int i = 0; i < 4; i++)
        product.rows[l / 4 + 8 * (i % 2)].set(pair + 8 * (i / 2),
                                              widen(static_cast<uint16_t>(lanes[l]->a[i] >> shift)));
      for (int i = 0; i < 2; i++)
        product.columns[l / 4].set(pair + 8 * i, widen(static_cast<uint16_t>(lanes[l]->b[i] >> shift)));
    }
  product.add_to(lanes);
}

// m16n8k8 of tf32, whose lower 13 bits do not count: a[0] row l / 4, column l % 4; a[1] 8 rows below; a[2], a[3] 4
// columns on; b[0] row l % 4, column l / 4; b[1] 4 rows below.
inline void mma_1688(MmaLane** lanes) {
  Product<8> product;
  for (int l = 0; l < kLanes; l++) {
    for (int i = 0; i < 4; i++)
      product.rows[l / 4 + 8 * (i % 2)].set(l % 4 + 4 * (i / 2), from_bits(lanes[l]->a[i] & 0xffffe000u));
    for (int i = 0; i < 2; i++) product.columns[l / 4].set(l % 4 + 4 * i, from_bits(lanes[l]->b[i] & 0xffffe000u));
  }
  product.add_to(lanes);
}

// m8n8k4 of float64, D += A B: a row l / 4, column l % 4; b row l % 4, column l / 4; d row l / 4, columns 2 (l % 4) and
// the next.
inline void mma_884(MmaLane64** lanes) {
  for (int l = 0; l < kLanes; l++)
    for (int i = 0; i < 2; i++) {
      double& sum = lanes[l]->d[i];
      for (int k = 0; k < 4; k++) sum += lanes[l / 4 * 4 + k]->a * lanes[(2 * (l % 4) + i) * 4 + k]->b;
    }
  Machine::current().counts.products++;
}

struct MatrixRow {
  uint16_t entry[8];
  int bank;      // of eight groups of four
  uint32_t* to;  // [4]
};

// Four 8 x 8 matrices of 16-bit entries: lane 8 i + r brings row r of matrix i; lane l gets of each row l / 4, columns
// 2 (l % 4) and the next; transposed, rows 2 (l % 4) and the next of column l / 4.
inline void distribute(MatrixRow** rows, bool transposed) {
  for (int i = 0; i < 4; i++) {
    unsigned banks = 0;
    for (int r = 0; r < 8; r++) banks |= 1u << rows[8 * i + r]->bank;
    Machine::current().counts.bank_conflicts += 8 - __builtin_popcount(banks);
    for (int l = 0; l < kLanes; l++) {
      const int line = l / 4, pair = 2 * (l % 4);
      const auto entry = [&](int r, int c) { return static_cast<uint32_t>(rows[8 * i + r]->entry[c]); };
      rows[l]->to[i] = transposed ? entry(pair, line) | entry(pair + 1, line) << 16
                                  : entry(line, pair) | entry(line, pair + 1) << 16;
    }
  }
}

inline void load_matrices(uint32_t (&to)[4], const void* row, bool transposed) {
  Machine& machine = Machine::current();
  MatrixRow mine;
  {
    const Unseen unseen;
    machine.check_shared(row, 16, "ldmatrix");
    mine.bank = static_cast<int>((static_cast<const unsigned char*>(row) - machine.shared()) / 16 % 8);
    mine.to = to;
  }
  const uint64_t* words = static_cast<const uint64_t*>(row);  // each lane reads its row itself, for all to see
  const uint64_t low = words[0], high = words[1];
  std::memcpy(mine.entry, &low, 8);
  std::memcpy(mine.entry + 4, &high, 8);
  machine.together(transposed ? "ldmatrix.trans" : "ldmatrix", mine,
                   [&](MatrixRow** rows) { distribute(rows, transposed); });
}

template <class T>
T exchange(T value, int source, const char* name) {
  struct Lane {
    T in, out;
    int source;
  } mine = {value, value, source};
  Machine::current().together(name, mine, [](Lane** lanes) {
    for (int l = 0; l < kLanes; l++) lanes[l]->out = lanes[lanes[l]->source]->in;
  });
  return mine.out;
}

}  // namespace emulation

namespace simt {

using emulation::Machine;

inline int thread() { return Machine::current().thread(); }
inline int thread_again() { return thread(); }
inline int lane() { return Machine::current().thread() % 32; }
inline int warp() { return Machine::current().thread() / 32; }
inline int block() { return Machine::current().block(); }
inline int threads() { return Machine::current().threads(); }
inline unsigned char* shared() { return Machine::current().shared(); }

inline int opaque(int x) { return x; }
inline void trap() { Machine::current().fail("trap"); }
inline void sync_block() { Machine::current().meet(0, Machine::current().threads(), "__syncthreads"); }
inline bool any_of_block(bool holds) { return Machine::current().vote(holds, "__syncthreads_or"); }
inline void sync_warp() {
  Machine& machine = Machine::current();
  char* order = machine.warp_order();
  emulation::release(order);
  machine.together("__syncwarp", machine, [](Machine** lanes) { lanes[0]->next_warp_round(); });
  emulation::acquire(order);
}

template <class T>
T shuffle_xor(T value, int mask) {
  return emulation::exchange(value, lane() ^ mask, "__shfl_xor_sync");
}

inline void copy_async(void* to, const void* from, int bytes) {
  Machine& machine = Machine::current();
  {
    const emulation::Unseen unseen;
    machine.check_shared(to, 16, "cp.async");
    if (bytes < 0 || bytes > 16) machine.fail("cp.async: %d of 16 bytes", bytes);
    if (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16) machine.fail("cp.async: the source is not aligned");
    machine.copy_later(to, from, bytes);
  }
  for (int i = 0; i < 4; i++) static_cast<uint32_t*>(to)[i] = ~0u;  // NaN until it is waited for
}
template <class T>
void store(T* to, T value) {
  {
    const emulation::Unseen unseen;
    Machine::current().check_shared(to, sizeof(T), "store");
  }
  *to = value;
  Machine::current().wrote(to, sizeof(T));
}
inline void commit_copies() { Machine::current().end_group(); }
template <int kGroupsLeft>
void wait_copies() {
  Machine::current().finish_copies(kGroupsLeft);
}

inline void load_matrices(uint32_t (&to)[4], const void* row) { emulation::load_matrices(to, row, false); }
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) { emulation::load_matrices(to, row, true); }

inline void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::MmaLane lane = {d, a, {b0, b1}};
  Machine::current().together("mma.bf16", lane, emulation::mma_16816<emulation::from_bfloat16>);
}
inline void mma_float16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::MmaLane lane = {d, a, {b0, b1}};
  Machine::current().together("mma.f16", lane, emulation::mma_16816<emulation::from_float16>);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::MmaLane lane = {d, a, {b0, b1}};
  Machine::current().together("mma.tf32", lane, emulation::mma_1688);
}
inline void mma_float64(double (&d)[2], double a, double b) {
  emulation::MmaLane64 lane = {d, a, b};
  Machine::current().together("mma.f64", lane, emulation::mma_884);
}

inline uint32_t pack_bfloat16(float low, float high) {
  return emulation::to_bfloat16(low) | static_cast<uint32_t>(emulation::to_bfloat16(high)) << 16;
}
inline uint32_t pack_float16(float low, float high) {
  return emulation::to_float16(low) | static_cast<uint32_t>(emulation::to_float16(high)) << 16;
}
inline float from_bfloat16(uint16_t bits) { return emulation::from_bfloat16(bits); }
inline float from_float16(uint16_t bits) { return emulation::from_float16(bits); }
// To nearest, ties away from zero.
inline uint32_t to_tf32(float x) { return (emulation::to_bits(x) + 0x1000u) & 0xffffe000u; }

// As wrong as the hardware may be, by all bits of x: the last ones of what tensor cores cut off are often zero.
inline float with_error(float y, float x, float error) {
  return y * (__builtin_parity(emulation::to_bits(x)) ? 1 + error : 1 - error);
}
inline float tanh_approximate(float x) {
  const float y = std::tanh(x);
  return std::fabs(x) > 9 ? y : with_error(y, x, 0x1p-11f);
}
inline float exp2_approximate(float x) {
  const float y = with_error(std::exp2(x), x, 0x1p-22f);
  return y < 0x1p-126f ? 0 : y;
}
inline float reciprocal_approximate(float x) {
  const float y = with_error(1 / x, x, 0x1p-22f);
  return std::fabs(y) < 0x1p-126f ? 0 : y;
}

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T x, y;
};
template <class T>
Pair<T> load_pair(const T* from) {
  {
    const emulation::Unseen unseen;
    Machine::current().check_shared(from, 2 * sizeof(T), "load_pair");
  }
  return *reinterpret_cast<const Pair<T>*>(from);
}

template <class T>
Pair<T> read_pair(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Pair<T>)) Machine::current().fail("read_pair: not aligned");
  return {from[0], from[1]};
}
template <class T>
void write_pair(T* to, Pair<T> pair) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Pair<T>)) Machine::current().fail("write_pair: not aligned");
  to[0] = pair.x, to[1] = pair.y;
}

template <int kCount>
struct alignas(4 * kCount) Words {
  uint32_t x[kCount];
};
template <int kCount>
void write_words(void* to, const Words<kCount>& words) {
  if (reinterpret_cast<uintptr_t>(to) % (4 * kCount)) Machine::current().fail("write_words: not aligned");
  for (int i = 0; i < kCount; i++) static_cast<uint32_t*>(to)[i] = words.x[i];
}

struct OnDevice {
  explicit OnDevice(int) {}
  const char* error() const { return nullptr; }
};
inline int capability(int) { return emulation::capability(); }
inline size_t most_shared_bytes(int device) {
  const int generation = capability(device);
  return (generation == 90 ? 227 : generation == 86 ? 99 : 163) << 10;
}
inline int multiprocessors(int) { return emulation::multiprocessors(); }
template <class... Parameters>
const char* unsupported(void (*)(Parameters...)) {
  return nullptr;
}

template <class... Parameters>
const char* prepare(void (*)(Parameters...), size_t) {
  return nullptr;
}

// Runs kernel(arguments) in `blocks` blocks; throws what it finds.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int blocks, int cluster, int threads, size_t shared_bytes,
                   void* /*stream*/, Arguments... arguments) {
  const std::function<void()> body = [=] { kernel(arguments...); };
  if (shared_bytes > most_shared_bytes(0)) throw std::runtime_error("launch: more shared memory than there is");
  if (blocks % cluster) throw std::runtime_error("launch: blocks that are in no cluster");
  Machine machine(threads, shared_bytes, emulation::seed(), cluster);
  for (int block = 0; block < blocks; block += cluster) machine.run(block, blocks, body);
  emulation::counts() = machine.counts;
  return nullptr;
}

}  // namespace simt
}  // namespace odeblock
