// The names of csrc/cuda/bulk.cuh for the CPU. From where a copy is asked for its target is NaN, until the engine, a
// fiber of its own, has done it: at once, or when no thread can go on.
#pragma once

#include "simt.h"

namespace odeblock {
namespace simt {

inline int cluster_blocks() { return Machine::current().cluster(); }
inline int cluster_rank() { return Machine::current().rank(); }
inline void sync_cluster() { Machine::current().meet_cluster("barrier.cluster"); }

inline void init_barrier(uint64_t* barrier, int arrivals) { Machine::current().init_phase(barrier, arrivals); }
inline void fence_barriers() { Machine::current().publish_phases(); }
inline void arrive_expecting(uint64_t* barrier, int bytes) {
  Machine::current().arrive(barrier, bytes, "mbarrier.arrive.expect_tx");
}
inline void arrive(uint64_t* barrier, int rank) {
  Machine& machine = Machine::current();
  if (rank < 0 || rank >= machine.cluster()) machine.fail("mapa: block %d of a cluster of %d", rank, machine.cluster());
  machine.arrive(reinterpret_cast<uint64_t*>(machine.elsewhere(barrier, rank)), 0, "mbarrier.arrive");
}
inline void wait_phase(uint64_t* barrier, int parity) { Machine::current().wait_phase(barrier, parity); }

struct Boxes {
  const uint16_t* first;
  int64_t layers, rows, columns;
  int box_rows, box_columns;
};

inline const char* describe(Boxes& boxes, const void* first, int64_t layers, int64_t rows, int64_t columns,
                            int box_rows, int box_columns) {
  boxes = {static_cast<const uint16_t*>(first), layers, rows, columns, box_rows, box_columns};
  const bool right = reinterpret_cast<uintptr_t>(first) % 16 == 0 && columns % 8 == 0 && box_rows >= 1 &&
                     box_rows <= 256 && (box_columns == 32 || box_columns == 64);
  return right ? nullptr : "cuTensorMapEncodeTiled: invalid value";
}

inline void copy_box_to(unsigned blocks, void* to, const Boxes& from, int column, int row, int layer,
                        uint64_t* barrier) {
  Machine& machine = Machine::current();
  const int row_bytes = 2 * from.box_columns, bytes = from.box_rows * row_bytes;
  unsigned char* const target = static_cast<unsigned char*>(to);
  machine.check_shared(to, bytes, 128, "cp.async.bulk.tensor");
  for (int rank = 0; rank < machine.cluster(); rank++)
    if (blocks >> rank & 1)
      for (int i = 0; i < bytes / 4; i++) reinterpret_cast<uint32_t*>(machine.elsewhere(to, rank))[i] = ~0u;
  // The engine swizzles by the address in a block's shared memory, which begins at a multiple of 1024.
  machine.copy_box(target, bytes, barrier, blocks, [=, boxes = from](unsigned char* there) {
    const uintptr_t mask = row_bytes / 16 - 1, begin = reinterpret_cast<uintptr_t>(there);
    for (int r = 0; r < boxes.box_rows; r++)
      for (int c = 0; c < boxes.box_columns; c++) {
        const bool inside = layer < boxes.layers && row + r < boxes.rows && column + c < boxes.columns;
        const uint16_t value =
            inside ? boxes.first[(layer * boxes.rows + row + r) * boxes.columns + column + c] : uint16_t(0);
        const uintptr_t plain = begin + r * row_bytes + 2 * c;
        *reinterpret_cast<uint16_t*>(plain ^ (plain >> 7 & mask) << 4) = value;
      }
  });
}
inline void copy_box(void* to, const Boxes& from, int column, int row, int layer, uint64_t* barrier) {
  copy_box_to(1u << cluster_rank(), to, from, column, row, layer, barrier);
}
inline void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  Machine& machine = Machine::current();
  if (bytes <= 0 || bytes % 16) machine.fail("cp.async.bulk: %d bytes", bytes);
  if (reinterpret_cast<uintptr_t>(from) % 16) machine.fail("cp.async.bulk: the source is not aligned");
  machine.check_shared(to, bytes, 16, "cp.async.bulk");
  for (int i = 0; i < bytes / 4; i++) static_cast<uint32_t*>(to)[i] = ~0u;
  machine.copy_box(static_cast<unsigned char*>(to), bytes, barrier, 1u << machine.rank(), [=](unsigned char* there) {
    for (int i = 0; i < bytes / 4; i++) reinterpret_cast<uint32_t*>(there)[i] = static_cast<const uint32_t*>(from)[i];
  });
}

}  // namespace simt
}  // namespace odeblock
