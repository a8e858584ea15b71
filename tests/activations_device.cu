// Compiles the table of activations for a GPU, float and double.
#include "cuda/math.cuh"
// before the table, which is written on it
#include "activations.h"

template <class T>
struct Evaluate {
  T z, *s, *d;
  template <class A>
  ODEBLOCK_INLINE void operator()(A) const {
    const auto y = A::at(z);
    *s = y.s;
    *d = y.d;
  }
};

template <class T>
__global__ void evaluate(int id, const T* z, T* s, T* d) {
  const int i = threadIdx.x;
  odeblock::with_activation(id, Evaluate<T>{z[i], s + i, d + i});
}

template __global__ void evaluate(int, const float*, float*, float*);
template __global__ void evaluate(int, const double*, double*, double*);
