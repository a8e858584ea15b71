// Chooses the build of the CPU kernels, once.
#include <cstdlib>
#include <cstring>

#include "../api.h"

namespace odeblock {
namespace {

const CpuKernels& choose() {
#ifdef ODEBLOCK_WITH_AVX2
  const char* wanted = std::getenv("ODEBLOCK_CPU");
  const bool baseline = wanted && std::strcmp(wanted, cpu_kernels_baseline.name) == 0;
  if (!baseline && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return cpu_kernels_avx2;
#endif
  return cpu_kernels_baseline;
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose();
  return chosen;
}

}  // namespace odeblock
