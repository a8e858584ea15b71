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
  // The same of images with batch normalisation, at least one, which is never reconstructed.
  size_t (*normalised_forward_workspace)(const Problem&);
  void (*normalised_forward)(const NormalisedForwardProblem&);
  size_t (*normalised_backward_workspace)(const Problem&);
  void (*normalised_backward)(const NormalisedBackwardProblem&);
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

struct CudaDevices {
  int count;          // GPUs that the driver offers; 0 without a driver
  const char* error;  // the runtime's message where it could not count, else null
};

// The CUDA kernels. They run on `stream`, of that device, and nothing waits for them. Errors are texts, or null.
#if defined(ODEBLOCK_WITH_CUDA) || defined(ODEBLOCK_EMULATED)
CudaDevices cuda_devices();
// Why this build has no kernels for a device.
const char* cuda_unsupported(int device);
// Whether the kernels take a problem, forward or forward and backward, and take it faster than a matrix product a step;
// with `reconstruct`, the adjoint's states as well. tf32: float32 products may be rounded to 11 bits.
bool cuda_fuses(const Problem&, bool backward, bool tf32, int device);
const char* cuda_forward(const ForwardProblem&, bool tf32, int device, void* stream);
const char* cuda_sweep(const SweepProblem&, bool tf32, int device, void* stream);
// Blocks of threads of a sweep of maps; each leaves its sums (SweepProblem).
int cuda_map_blocks(const Problem&, bool tf32, int device);
const char* cuda_reconstruct(const ReconstructionProblem&, bool tf32, int device, void* stream);
#else
inline CudaDevices cuda_devices() { return {0, nullptr}; }
inline const char* cuda_unsupported(int) { return "odeblock was built without CUDA"; }
inline bool cuda_fuses(const Problem&, bool, bool, int) { return false; }
inline const char* cuda_forward(const ForwardProblem&, bool, int device, void*) { return cuda_unsupported(device); }
inline const char* cuda_sweep(const SweepProblem&, bool, int device, void*) { return cuda_unsupported(device); }
inline int cuda_map_blocks(const Problem&, bool, int) { return 0; }
inline const char* cuda_reconstruct(const ReconstructionProblem&, bool, int device, void*) {
  return cuda_unsupported(device);
}
#endif

}  // namespace odeblock
