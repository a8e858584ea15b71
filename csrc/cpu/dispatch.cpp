// Chooses the build of the CPU kernels, once.
#include <cstdlib>
#include <cstring>

#include "../api.h"

#ifdef ODEBLOCK_X86
#include <cpuid.h>
#endif

namespace odeblock {
namespace {

#ifdef ODEBLOCK_X86
// Not among the names that every compiler's __builtin_cpu_supports knows. bit_F16C: leaf 1, ecx.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

const CpuKernels& choose() {
  const CpuKernels* builds[kMaxCpuBuilds];
  const int count = cpu_builds(builds);
  const char* wanted = std::getenv("ODEBLOCK_CPU");
  for (int i = 0; wanted && i < count; i++)
    if (std::strcmp(wanted, builds[i]->name) == 0) return *builds[i];
  return *builds[count - 1];
}

}  // namespace

int cpu_builds(const CpuKernels* (&builds)[kMaxCpuBuilds]) {
  int count = 0;
  builds[count++] = &cpu_kernels_baseline;
#ifdef ODEBLOCK_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    builds[count++] = &cpu_kernels_avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) builds[count++] = &cpu_kernels_avx512;
  }
#endif
  return count;
}

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose();
  return chosen;
}

}  // namespace odeblock
