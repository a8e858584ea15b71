// The names of csrc/cuda/warpgroup.cuh for the CPU. A product's operands must stay as they are from where it begins to
// where it is waited for: shared memory is read at both ends, and what it adds to is NaN between.
#pragma once

#include <vector>

#include "simt.h"

namespace odeblock {
namespace emulation {

// Products of one lane that are under way: a lane does its own numbers of d, from the rows of a that its warp brought.
struct PendingProduct {
  float* d;  // [tiles, 4]
  int tiles;
  Factors<16> rows[2];  // rows l / 4 and 8 below
  uint64_t matrix;
  bool transposed;
  float (*widen)(uint16_t);
  std::vector<uint16_t> entries;  // what it found in the matrix when it began
};

struct LaneProducts {
  std::vector<PendingProduct> begun, committed;
  std::vector<std::pair<float*, std::vector<float>>> before;  // what d was
  bool ordered = false;
};

inline LaneProducts& lane_products() {
  static thread_local std::vector<LaneProducts> lanes(kLanes * kMaxWarps * kMaxBlocks);
  return lanes[Machine::current().thread_of_cluster()];
}

// Of the matrix the columns that a lane multiplies with: 2 (l % 4) and the next of every tile; [tiles, 2, 16].
inline std::vector<uint16_t> entries_of(const PendingProduct& product) {
  Machine& machine = Machine::current();
  const int lane = machine.thread() % kLanes, row_bytes = product.matrix >> 62 == 1 ? 128 : 64;
  const uint64_t first = (product.matrix & 0x3fff) << 4, eight_rows = (product.matrix >> 32 & 0x3fff) << 4;
  const uint64_t leading = (product.matrix >> 16 & 0x3fff) << 4;
  std::vector<uint16_t> entries;
  entries.reserve(32 * product.tiles);
  for (int i = 0; i < 2 * product.tiles; i++) {
    const int n = i / 2 * 8 + lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      uint64_t byte = first;
      if (product.transposed)
        byte += k / 8 * eight_rows + k % 8 * row_bytes + 2 * n / row_bytes * leading + 2 * n % row_bytes;
      else
        byte += n / 8 * eight_rows + n % 8 * row_bytes + 2 * k;
      byte ^= (byte >> 7 & (row_bytes / 16 - 1)) << 4;
      const uint16_t* entry = reinterpret_cast<const uint16_t*>(machine.shared() + byte);
      {
        const Unseen unseen;
        machine.check_shared(entry, 2, "wgmma");
        machine.check_fenced(entry);
      }
      entries.push_back(*entry);
    }
  }
  return entries;
}

template <float (*widen)(uint16_t)>
void begin_product(float* d, int tiles, bool fresh, const uint32_t (&a)[4], uint64_t matrix, bool transposed) {
  struct Lane {
    const uint32_t* a;
    Factors<16> rows[2];
  } lane = {a, {}};
  Machine& machine = Machine::current();
  {
    const Unseen unseen;
    machine.check_together("wgmma");
  }
  machine.together("wgmma", lane, [](Lane** lanes) {
    for (int l = 0; l < kLanes; l++)
      for (int t = 0; t < 4; t++)
        for (int i = 0; i < 8; i++)  // a register and a half of it
          lanes[l]->rows[i / 2 % 2].set(2 * t + i % 2 + i / 4 * 8,
                                        widen(static_cast<uint16_t>(lanes[l / 4 * 4 + t]->a[i / 2] >> 16 * (i % 2))));
  });
  PendingProduct product = {d, tiles, {lane.rows[0], lane.rows[1]}, matrix, transposed, widen, {}};
  product.entries = entries_of(product);
  const Unseen unseen;
  LaneProducts& mine = lane_products();
  if (!mine.ordered) machine.fail("wgmma: no wgmma.fence since what its registers held was waited for or written");
  for (const auto& [target, values] : mine.before)
    if (target == d) {
      if (fresh) machine.fail("wgmma: begins anew what it has begun");
      return mine.begun.push_back(std::move(product));
    }
  mine.before.push_back({d, fresh ? std::vector<float>(4 * tiles) : std::vector<float>(d, d + 4 * tiles)});
  for (int i = 0; i < 4 * tiles; i++) d[i] = NAN;
  mine.begun.push_back(std::move(product));
}

inline void finish_products() {
  Machine& machine = Machine::current();
  LaneProducts& mine = lane_products();
  std::vector<PendingProduct> due;
  {
    const Unseen unseen;
    machine.check_together("wgmma.wait_group");
    if (!mine.begun.empty()) machine.fail("wgmma: waited for products that are in no group");
    due.swap(mine.committed);
    for (auto& [d, values] : mine.before) std::memcpy(d, values.data(), values.size() * sizeof(float));
    mine.before.clear();
    mine.ordered = false;
  }
  for (const PendingProduct& product : due) {
    if (entries_of(product) != product.entries) machine.fail("wgmma: its matrix changed while it was under way");
    for (int i = 0; i < 2 * product.tiles; i++) {
      Factors<16> column;
      for (int k = 0; k < 16; k++) column.set(k, product.widen(product.entries[16 * i + k]));
      for (int half = 0; half < 2; half++) {
        float& sum = product.d[i / 2 * 4 + half * 2 + i % 2];
        sum = add_products(capability(), sum, product.rows[half], column);
      }
    }
  }
}

}  // namespace emulation

namespace simt {

constexpr bool kWarpgroups = true;

inline void fence_async() { Machine::current().fence_async(); }

template <int kRowBytes>
uint64_t matrix_descriptor(const void* first, int leading = 16) {
  const ptrdiff_t address = static_cast<const unsigned char*>(first) - Machine::current().shared();
  return uint64_t(kRowBytes == 128 ? 1 : 2) << 62 | uint64_t(8 * kRowBytes >> 4) << 32 |
         static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(address) >> 4;
}

template <bool kFresh, class Tile, int kTiles, int kOperands>
void before_products(Tile (&)[kTiles], uint32_t (&)[kOperands][4]) {
  const emulation::Unseen unseen;
  Machine::current().check_together("wgmma.fence");
  Machine::current().together("wgmma.fence", Machine::current(), [](Machine**) {});
  emulation::lane_products().ordered = true;
}
inline void commit_products() {
  const emulation::Unseen unseen;
  emulation::LaneProducts& mine = emulation::lane_products();
  for (emulation::PendingProduct& product : mine.begun) mine.committed.push_back(std::move(product));
  mine.begun.clear();
}
template <class Tile, int kTiles>
void after_products(Tile (&)[kTiles]) {
  emulation::finish_products();
}

template <bool kBfloat16, bool kTransposed, class Tile, int kTiles>
void multiply_warpgroup(bool fresh, Tile (&d)[kTiles], const uint32_t (&a)[4], uint64_t matrix) {
  static_assert(sizeof(Tile) == 4 * sizeof(float));
  constexpr auto widen = kBfloat16 ? emulation::from_bfloat16 : emulation::from_float16;
  emulation::begin_product<widen>(d[0].x, kTiles, fresh, a, matrix, kTransposed);
}

}  // namespace simt
}  // namespace odeblock
