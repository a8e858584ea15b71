// What the CUDA runtime finds on this machine.
#include <cuda_runtime.h>

#include "../api.h"

namespace odeblock {

CudaDevices cuda_devices() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return {count, nullptr};
  cudaGetLastError();  // leave no error behind for the next caller of the runtime
  return {0, cudaGetErrorString(status)};
}

}  // namespace odeblock
