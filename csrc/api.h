// Entry points of the native core. None allocates, keeps anything, or throws.
#pragma once

#include "problem.h"

namespace odeblock {

// One build of the CPU kernels. The same sources are compiled once per instruction set.
struct CpuKernels {
  const char* name;
  // Bytes of workspace for the sizes, save_every and threads of a problem.
  size_t (*forward_workspace)(const Problem&);
  void (*forward)(const ForwardProblem&);
  size_t (*backward_workspace)(const Problem&);
  void (*backward)(const BackwardProblem&);
};

extern const CpuKernels cpu_kernels_baseline;
#ifdef ODEBLOCK_WITH_AVX2
extern const CpuKernels cpu_kernels_avx2;
#endif

// The best build that this processor runs; ODEBLOCK_CPU=baseline|avx2 in the environment overrides the choice.
const CpuKernels& cpu_kernels();

#ifdef ODEBLOCK_WITH_CUDA
struct CudaDevices {
  int count;          // GPUs that the driver offers; 0 without a driver
  const char* error;  // the runtime's message where it could not count, else null
};
CudaDevices cuda_devices();
#endif

}  // namespace odeblock
