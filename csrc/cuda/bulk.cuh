// What Hopper has besides for blocks that share what they read: clusters of blocks, an engine that copies boxes of
// matrices to their shared memory by itself, and barriers in shared memory that count what has arrived. As in simt.cuh,
// the emulation has the same names.
//
// A barrier (an uint64_t in shared memory) goes through phases 0, 1, 2, ..: one ends when all arrivals that it was made
// for and all bytes that they announced are there.
#pragma once

#include "simt.cuh"

#ifdef ODEBLOCK_EMULATED
#include "bulk.h"
#else

#include <cuda.h>

#include <atomic>

namespace odeblock {
namespace simt {

ODEBLOCK_DEVICE int cluster_blocks() {
  int blocks;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}
ODEBLOCK_DEVICE int cluster_rank() {  // of this block in its cluster
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
ODEBLOCK_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\n barrier.cluster.wait.acquire;" ::: "memory");
}

ODEBLOCK_DEVICE void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Barriers that this thread made are there for the cluster and the engine, after a barrier.
ODEBLOCK_DEVICE void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, with bytes that the phase is to wait for.
ODEBLOCK_DEVICE void arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// At the barrier that lies there in the block `rank` of the cluster. Says that this warp has read, which orders nothing
// else: a release for the cluster would wait for all that the warp has written anywhere, at every chunk.
ODEBLOCK_DEVICE void arrive(uint64_t* barrier, int rank) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// Returns when the present phase is not one of this parity.
ODEBLOCK_DEVICE void wait_phase(uint64_t* barrier, int parity) {
  int done;
  do {
    asm volatile(
        "{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.b32 %0, 1, 0, done; }"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

// Matrices [layers, rows, columns] of 16-bit numbers as the engine sees them, and the box that it copies at a time: so
// many rows and columns, a row 128 or 64 bytes in shared memory, one after the other, swizzled as matrix_descriptor has
// it. What a box has beyond the matrix is zero.
typedef CUtensorMap Boxes;

ODEBLOCK_DEVICE void copy_box(void* to, const Boxes& from, int column, int row, int layer, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
          "r"(shared_address(to)),
      "l"(&from), "r"(column), "r"(row), "r"(layer), "r"(shared_address(barrier))
      : "memory");
}
// .. to the same place in each block whose bit is in `blocks`, the bytes counted by each one's barrier.
ODEBLOCK_DEVICE void copy_box_to(unsigned blocks, void* to, const Boxes& from, int column, int row, int layer,
                                 uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, "
      "%3, %4}], [%5], %6;" ::"r"(shared_address(to)),
      "l"(&from), "r"(column), "r"(row), "r"(layer), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(blocks))
      : "memory");
}
// Bytes, a multiple of 16 at multiples of 16.
ODEBLOCK_DEVICE void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// The driver's function that describes boxes, or an error's text; found once, for this library links no driver.
inline const char* find_encoder(void*& encode) {
  static std::atomic<void*> found{nullptr};
  encode = found;
  if (encode) return nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &encode, cudaEnableDefault, &result);
#endif
  if (const char* problem = text(error)) return problem;
  if (result != cudaDriverEntryPointSuccess) return "the driver has no cuTensorMapEncodeTiled";
  found = encode;
  return nullptr;
}

// An error's text, or null. `first` at a multiple of 16 bytes, columns a multiple of 8. A call of the driver, which
// wants this thread to have a context: `prepare` sees to that.
inline const char* describe(Boxes& boxes, const void* first, int64_t layers, int64_t rows, int64_t columns,
                            int box_rows, int box_columns) {
  void* encode = nullptr;
  if (const char* error = find_encoder(encode)) return error;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(layers)};
  const cuuint64_t strides[] = {2 * sizes[0], 2 * sizes[0] * sizes[1]};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t steps[] = {1, 1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      &boxes, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(first), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  switch (result) {
    case CUDA_SUCCESS: return nullptr;
    case CUDA_ERROR_INVALID_VALUE: return "cuTensorMapEncodeTiled: invalid value";
    case CUDA_ERROR_INVALID_CONTEXT: return "cuTensorMapEncodeTiled: this thread has no context";
    default: return "cuTensorMapEncodeTiled: an error of an earlier kernel";
  }
}

}  // namespace simt
}  // namespace odeblock
#endif
