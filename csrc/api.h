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
#ifdef ODEBLOCK_X86
extern const CpuKernels cpu_kernels_avx2;
extern const CpuKernels cpu_kernels_avx512;
#endif

// The builds in this binary that this processor runs, best last; returns their number.
constexpr int kMaxCpuBuilds = 3;
int cpu_builds(const CpuKernels* (&builds)[kMaxCpuBuilds]);

// The best of them, or the one that ODEBLOCK_CPU in the environment names; chosen once.
const CpuKernels& cpu_kernels();

#ifdef ODEBLOCK_WITH_CUDA
struct CudaDevices {
  int count;          // GPUs that the driver offers; 0 without a driver
  const char* error;  // the runtime's message where it could not count, else null
};
CudaDevices cuda_devices();
#endif

}  // namespace odeblock
