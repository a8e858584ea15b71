// The CPU kernels for one instruction set: compiled once for each, see CMakeLists.txt.
#include "../api.h"
#include "backward.h"
#include "forward.h"

namespace odeblock {
namespace {

template <class F>
auto with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float64: return f(double());
    case Dtype::bfloat16: return f(Bfloat16());
    case Dtype::float16: return f(Float16());
    default: return f(float());
  }
}

}  // namespace

extern const CpuKernels ODEBLOCK_KERNELS = {
    ODEBLOCK_KERNELS_NAME,
    [](const Problem& p) { return with_dtype(p.dtype, [&](auto t) { return forward_workspace<decltype(t)>(p); }); },
    [](const ForwardProblem& p) { with_dtype(p.dtype, [&](auto t) { forward<decltype(t)>(p); }); },
    [](const Problem& p) { return with_dtype(p.dtype, [&](auto t) { return backward_workspace<decltype(t)>(p); }); },
    [](const BackwardProblem& p) { with_dtype(p.dtype, [&](auto t) { backward<decltype(t)>(p); }); },
};

}  // namespace odeblock
