// The kernels of convolutions for one kind of product. Compiled once for each kind:
//
//   ODEBLOCK_PRODUCTS          the struct of products.cuh
//   ODEBLOCK_CUDA_MAP_KERNELS  the function of map_kernels.h
#include "map_forward.cuh"
#include "map_sweep.cuh"

namespace odeblock {

namespace {

template <class P, bool kUsual>
MapKernels kernels_of() {
  return {{MapForward<P>::kMostWarps, MapForward<P>::tasks, MapForward<P>::shared_bytes, map_forward_kernel<P, kUsual>},
          {MapSweep<P>::kMostWarps, MapSweep<P>::tasks, MapSweep<P>::shared_bytes, map_sweep_kernel<P, kUsual>}};
}

}  // namespace

MapKernels ODEBLOCK_CUDA_MAP_KERNELS(bool usual) {
  if constexpr (ODEBLOCK_PRODUCTS::kBits <= 11)  // else products take so long that nothing is gained
    if (usual) return kernels_of<ODEBLOCK_PRODUCTS, true>();
  return kernels_of<ODEBLOCK_PRODUCTS, false>();
}

}  // namespace odeblock
