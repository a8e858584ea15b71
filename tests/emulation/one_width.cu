// The kernels of one kind of product for 33 to 64 features alone, in the place of csrc/cuda/kernels.cu: what a test
// compiles again and again.
#include "cuda/forward.cuh"
#include "cuda/reconstruction.cuh"
#include "cuda/sweep.cuh"

namespace odeblock {

CudaKernels ODEBLOCK_CUDA_KERNELS(int64_t) {
  typedef ODEBLOCK_PRODUCTS P;
  return {kernel_of<ForwardShape<P, 64>>(forward_kernel<P, 64>), kernel_of<SweepShape<P, 64>>(sweep_kernel<P, 64>),
          kernel_of<ReconstructionShape<P, 64>>(reconstruction_kernel<P, 64>, 1)};
}

}  // namespace odeblock
