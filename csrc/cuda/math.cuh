// The functions that activations.h is written on, for the scalars of a GPU thread; the same source compiles
// for the host.
#pragma once

#include <math.h>

#include "../problem.h"

namespace odeblock {

ODEBLOCK_INLINE float constant(float, double x) { return static_cast<float>(x); }
ODEBLOCK_INLINE double constant(double, double x) { return x; }

template <class T>
ODEBLOCK_INLINE T select(bool condition, T a, T b) {
  return condition ? a : b;
}

ODEBLOCK_INLINE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
ODEBLOCK_INLINE double fma(double a, double b, double c) { return ::fma(a, b, c); }
ODEBLOCK_INLINE float abs(float x) { return ::fabsf(x); }
ODEBLOCK_INLINE double abs(double x) { return ::fabs(x); }

// Of what is larger, activations have products with 1 / (1 + exp(x)): finite, so that none is infinity times 0.
ODEBLOCK_INLINE float exp(float x) { return ::expf(x > 88.f ? 88.f : x); }
ODEBLOCK_INLINE double exp(double x) { return ::exp(x > 709. ? 709. : x); }
ODEBLOCK_INLINE float exp2(float x) { return ::exp2f(x > 127.f ? 127.f : x); }
ODEBLOCK_INLINE double exp2(double x) { return ::exp2(x > 1023. ? 1023. : x); }
ODEBLOCK_INLINE float expm1(float x) { return ::expm1f(x > 88.f ? 88.f : x); }
ODEBLOCK_INLINE double expm1(double x) { return ::expm1(x > 709. ? 709. : x); }

// log(1 + x) for 0 <= x <= 1.
ODEBLOCK_INLINE float log1p_unit(float x) { return ::log1pf(x); }
ODEBLOCK_INLINE double log1p_unit(double x) { return ::log1p(x); }

// Φ(z) = erfc(-z / sqrt 2) / 2 and its density.
ODEBLOCK_INLINE void normal(float z, float& cdf, float& pdf) {
  cdf = 0.5f * ::erfcf(-0.70710678f * z);
  pdf = 0.39894228f * ::expf(-0.5f * z * z);
}
ODEBLOCK_INLINE void normal(double z, double& cdf, double& pdf) {
  cdf = 0.5 * ::erfc(-0.70710678118654752 * z);
  pdf = 0.39894228040143268 * ::exp(-0.5 * z * z);
}

}  // namespace odeblock
