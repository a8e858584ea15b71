// The CPU kernels for one instruction set: compiled once for each, see CMakeLists.txt.
#include "../api.h"
#include "backward.h"
#include "few.h"
#include "forward.h"
#include "images.h"
#include "images_backward.h"
#include "normalised.h"
#include "normalised_backward.h"

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
    [](const Problem& p) {
      return with_dtype(p.dtype, [&](auto t) {
        typedef decltype(t) S;
        if (is_image(p)) return image_forward_workspace<S>(p);
        return is_few<S>(p) ? few_workspace<S>(p, false) : forward_workspace<S>(p);
      });
    },
    [](const ForwardProblem& p) {
      with_dtype(p.dtype, [&](auto t) {
        typedef decltype(t) S;
        if (is_image(p)) return forward_images<S>(p);
        is_few<S>(p) ? forward_few<S>(p) : forward<S>(p);
      });
    },
    [](const Problem& p) {
      return with_dtype(p.dtype, [&](auto t) {
        typedef decltype(t) S;
        if (is_image(p)) return image_backward_workspace<S>(p);
        return is_few<S>(p) ? few_workspace<S>(p, true) : backward_workspace<S>(p);
      });
    },
    [](const BackwardProblem& p) {
      with_dtype(p.dtype, [&](auto t) {
        typedef decltype(t) S;
        if (is_image(p)) return backward_images<S>(p);
        is_few<S>(p) ? backward_few<S>(p) : backward<S>(p);
      });
    },
    [](const Problem& p) {
      return with_dtype(p.dtype, [&](auto t) { return normalised_forward_workspace<decltype(t)>(p); });
    },
    [](const NormalisedForwardProblem& p) { with_dtype(p.dtype, [&](auto t) { normalised_forward<decltype(t)>(p); }); },
    [](const Problem& p) {
      return with_dtype(p.dtype, [&](auto t) { return normalised_backward_workspace<decltype(t)>(p); });
    },
    [](const NormalisedBackwardProblem& p) {
      with_dtype(p.dtype, [&](auto t) { normalised_backward<decltype(t)>(p); });
    },
};

}  // namespace odeblock
