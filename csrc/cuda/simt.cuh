// What kernels ask of a GPU: barriers, shuffles, asynchronous copies, fragments of matrices and their products. nvcc
// compiles CUDA and PTX from this; with ODEBLOCK_EMULATED the same names come from tests/emulation/simt.h, and the
// kernels run on a CPU, which checks them.
//
// Blocks have one dimension and whole warps; shared memory is the dynamic one. What a warp does together (sync_warp,
// shuffles, load_matrices, mma) all its lanes call. tests/primitives.cu compares each of these with the emulation.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef ODEBLOCK_EMULATED
#include "simt.h"
#else

#include <cuda_runtime.h>

#define ODEBLOCK_DEVICE __device__ __forceinline__
#define ODEBLOCK_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define ODEBLOCK_PARAMETER __grid_constant__  // of a kernel, which takes its address

namespace odeblock {
namespace simt {

ODEBLOCK_DEVICE int thread() { return threadIdx.x; }
ODEBLOCK_DEVICE int lane() { return threadIdx.x % 32; }
ODEBLOCK_DEVICE int warp() { return threadIdx.x / 32; }
// thread(), asked for anew: what is made of it is not kept in registers for the next time.
ODEBLOCK_DEVICE int thread_again() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}
ODEBLOCK_DEVICE int block() { return blockIdx.x; }
ODEBLOCK_DEVICE int threads() { return blockDim.x; }  // of a block

ODEBLOCK_DEVICE unsigned char* shared() {
  extern __shared__ __align__(1024) unsigned char odeblock_shared[];
  return odeblock_shared;
}
ODEBLOCK_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

ODEBLOCK_DEVICE void sync_block() { __syncthreads(); }
// The same; whether it holds for a thread of the block.
ODEBLOCK_DEVICE bool any_of_block(bool holds) { return __syncthreads_or(holds); }
ODEBLOCK_DEVICE void sync_warp() { __syncwarp(); }

// x, of which the compiler knows nothing: what is made of it is not made before, and kept.
ODEBLOCK_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

ODEBLOCK_DEVICE void trap() { __trap(); }

template <class T>
ODEBLOCK_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// 16 bytes to shared memory, of which the first `bytes` come from global memory and the others are zero, both at
// multiples of 16. Copies between two commits are a group; wait_copies<N> returns when all groups but
// the latest N are there, for the thread that asked.
ODEBLOCK_DEVICE void copy_async(void* to, const void* from, int bytes) {  // past the L1 cache
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
// To shared memory.
template <class T>
ODEBLOCK_DEVICE void store(T* to, T value) {
  *to = value;
}
ODEBLOCK_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft>
ODEBLOCK_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// Four 8 x 8 matrices of 16-bit entries: lane 8 i + r brings the address of row r of matrix i, 16 bytes in shared
// memory; lane l gets in to[i] of row l / 4 the columns 2 (l % 4) and the next. Transposed: of column l / 4 those rows.
ODEBLOCK_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
ODEBLOCK_DEVICE void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b for a warp. Lane l has of d [16, 8] row l / 4, columns 2 (l % 4) and the next, and the same 8 rows below.
// 16-bit operands, a [16, 16], b [16, 8], two neighbours a register: a[0] as d's first two; a[1] 8 rows below; a[2] and
// a[3] 8 columns on; b0 of column l / 4 rows 2 (l % 4) and the next, b1 8 rows below.
ODEBLOCK_DEVICE void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
ODEBLOCK_DEVICE void mma_float16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// tf32, a [16, 8], b [8, 8]: a[0] row l / 4, column l % 4; a[1] 8 rows below; a[2] and a[3] 4 columns on; b0 row
// l % 4, column l / 4; b1 4 rows below.
ODEBLOCK_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// float64, d [8, 8]: row l / 4, columns 2 (l % 4) and the next; a [8, 4]: row l / 4, column l % 4; b [4, 8]: row l % 4,
// column l / 4.
ODEBLOCK_DEVICE void mma_float64(double (&d)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(d[0]), "+d"(d[1])
               : "d"(a), "d"(b));
}

// Two numbers, rounded to nearest, in one register; the first in its lower half.
ODEBLOCK_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));  // the first source is the upper half
  return packed;
}
ODEBLOCK_DEVICE uint32_t pack_float16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
ODEBLOCK_DEVICE float from_bfloat16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
ODEBLOCK_DEVICE float from_float16(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
// To nearest, ties away from zero.
ODEBLOCK_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// To within 2^-11 of its size.
ODEBLOCK_DEVICE float tanh_approximate(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 2^x and 1/x to within 2^-22 of their size; what is smaller than 2^-126 is 0.
ODEBLOCK_DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ODEBLOCK_DEVICE float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two neighbours in one access, at a multiple of their size.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T x, y;
};
template <class T>
ODEBLOCK_DEVICE Pair<T> load_pair(const T* from) {  // from shared memory
  return *reinterpret_cast<const Pair<T>*>(from);
}
template <class T>
ODEBLOCK_DEVICE Pair<T> read_pair(const T* from) {  // from global memory
  return *reinterpret_cast<const Pair<T>*>(from);
}
template <class T>
ODEBLOCK_DEVICE void write_pair(T* to, Pair<T> pair) {  // to global memory
  *reinterpret_cast<Pair<T>*>(to) = pair;
}

template <int kCount>
struct alignas(4 * kCount) Words {
  uint32_t x[kCount];
};
template <int kCount>
ODEBLOCK_DEVICE void write_words(void* to, const Words<kCount>& words) {  // to global memory, at a multiple of its size
  *reinterpret_cast<Words<kCount>*>(to) = words;
}

// As the kernel's own parameters, not as whatever is passed for them.
template <class T>
struct Same {
  typedef T type;
};

// What a host asks for. Errors are texts, or null.

inline const char* text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // leave no error behind for the next caller of the runtime
  return cudaGetErrorString(error);
}

// Makes a device the current one as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error_ = text(cudaGetDevice(&before_));
    if (!error_ && before_ != device) {
      error_ = text(cudaSetDevice(device));
      changed_ = !error_;
    }
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  const char* error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  const char* error_;
};

// 0 where there is no such device.
inline int attribute(cudaDeviceAttr what, int device) {
  int value = 0;
  return text(cudaDeviceGetAttribute(&value, what, device)) ? 0 : value;
}
inline int capability(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}
inline size_t most_shared_bytes(int device) {  // of a block
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}
inline int multiprocessors(int device) {
  const int count = attribute(cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
}

// Why the current device cannot run a kernel.
template <class... Parameters>
const char* unsupported(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes;
  return text(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
}

// Before a launch: so much shared memory is allowed to any launch of this kernel. The limit is the kernel's, not the
// launch's, and others may be about to launch it: it never falls. Leaves this thread with a context.
template <class... Parameters>
const char* prepare(void (*kernel)(Parameters...), size_t most_shared_bytes) {
  return text(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(most_shared_bytes)));
}

// Does not wait. In clusters of blocks, if of more than one.
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), int blocks, int cluster, int threads, size_t shared_bytes,
                   void* stream, typename Same<Parameters>::type... arguments) {
  void* pointers[] = {&arguments...};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute, config.numAttrs = cluster > 1;
  return text(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers));
}

}  // namespace simt
}  // namespace odeblock
#endif
