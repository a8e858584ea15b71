// The kernels of one kind of product, for every number of features. Compiled once for each kind:
//
//   ODEBLOCK_PRODUCTS      the struct of products.cuh
//   ODEBLOCK_CUDA_KERNELS  the function of kernels.h
#include "forward.cuh"
#include "reconstruction.cuh"
#include "sweep.cuh"

namespace odeblock {
namespace {

template <class P, int Q>
CudaKernels kernels_of() {
  if constexpr (P::kWarps == 1 || Q <= kMostFeaturesOfWarpgroupSweeps)
    return {kernel_of<ForwardShape<P, Q>>(forward_kernel<P, Q>), kernel_of<SweepShape<P, Q>>(sweep_kernel<P, Q>),
            kernel_of<ReconstructionShape<P, Q>>(reconstruction_kernel<P, Q>, 1)};
  else
    return {kernel_of<ForwardShape<P, Q>>(forward_kernel<P, Q>), {}, {}};
}

}  // namespace

CudaKernels ODEBLOCK_CUDA_KERNELS(int64_t q) {
  if constexpr (ODEBLOCK_PRODUCTS::kWarps == 1) {
    if (q <= 16) return kernels_of<ODEBLOCK_PRODUCTS, 16>();
    if (q <= 32) return kernels_of<ODEBLOCK_PRODUCTS, 32>();
  }
  if (q <= 64) return kernels_of<ODEBLOCK_PRODUCTS, 64>();
  if (q <= 128) return kernels_of<ODEBLOCK_PRODUCTS, 128>();
  return kernels_of<ODEBLOCK_PRODUCTS, 256>();
}

}  // namespace odeblock
