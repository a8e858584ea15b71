// What kernels.cu compiles, and launch.cu chooses from.
#pragma once

#include "../problem.h"
#include "bulk.cuh"

namespace odeblock {

constexpr int64_t kMostFeatures = 256, kMostFeaturesOfWarpgroupSweeps = 128;

template <class SomeProblem>
struct CudaArguments {
  SomeProblem problem;
  simt::Boxes W, V;  // of the kernels whose chunks come in bulk
};
typedef CudaArguments<ForwardProblem> ForwardArguments;
typedef CudaArguments<SweepProblem> SweepArguments;
typedef CudaArguments<ReconstructionProblem> ReconstructionArguments;

template <class SomeProblem>
struct CudaKernel {
  int features;                 // that it has room for
  int warp_rows;                // that a warp takes
  int least_warps, most_warps;  // of a block; a multiple of the least
  int bulk_units;               // of a chunk that comes in bulk, or 0
  int cluster;                  // blocks that share it, where there are several
  size_t (*shared_bytes)(int warps);
  void (*run)(CudaArguments<SomeProblem>);
};

struct CudaKernels {
  CudaKernel<ForwardProblem> forward;
  // Of warpgroups: up to kMostFeaturesOfWarpgroupSweeps.
  CudaKernel<SweepProblem> sweep;
  CudaKernel<ReconstructionProblem> reconstruction;
};

// The kernels for q <= kMostFeatures features, by how products are taken.
CudaKernels cuda_kernels_float32(int64_t q);
CudaKernels cuda_kernels_tf32(int64_t q);
CudaKernels cuda_kernels_float64(int64_t q);
CudaKernels cuda_kernels_bfloat16(int64_t q);
CudaKernels cuda_kernels_float16(int64_t q);
// On Hopper.
CudaKernels cuda_kernels_bfloat16_warpgroup(int64_t q);
CudaKernels cuda_kernels_float16_warpgroup(int64_t q);

}  // namespace odeblock
