// The kernels of convolutions for one kind of product. Compiled once for each kind:
//
//   ODEBLOCK_PRODUCTS          the struct of products.cuh
//   ODEBLOCK_CUDA_MAP_KERNELS  the function of map_kernels.h
#include "map_forward.cuh"
#include "map_sweep.cuh"

namespace odeblock {

MapKernels ODEBLOCK_CUDA_MAP_KERNELS() {
  typedef ODEBLOCK_PRODUCTS P;
  return {{MapForward<P>::kMostWarps, MapForward<P>::tasks, MapForward<P>::shared_bytes, map_forward_kernel<P>},
          {MapSweep<P>::kMostWarps, MapSweep<P>::tasks, MapSweep<P>::shared_bytes, map_sweep_kernel<P>}};
}

}  // namespace odeblock
