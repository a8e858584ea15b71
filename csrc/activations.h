// Activations and their derivatives, written once for every CPU instruction set and for CUDA.
//
// Each entry gives sigma(z) and sigma'(z) together, because they share their expensive part; where a caller
// uses only one of them the compiler drops the other. V is a vector of a CPU instruction set, or a scalar on
// a GPU. The functions of V used here (constant, select, abs, fma, exp, exp2, expm1, log1p_unit, normal) must be
// declared before this file is included: cpu/math.h does it for the CPU, cuda/math.cuh for the GPU. Comparisons are
// written so that NaN comes out as NaN.
#pragma once

#include "problem.h"

namespace odeblock {
namespace activation {

template <class V>
struct Value {
  V s;  // sigma(z)
  V d;  // sigma'(z)
};

struct Identity {
  template <class V>
  static ODEBLOCK_INLINE Value<V> at(V z) {
    return {z, constant(z, 1.0)};
  }
};

// sigma'(0) = 0, as in PyTorch.
struct Relu {
  template <class V>
  static ODEBLOCK_INLINE Value<V> at(V z) {
    const V zero = constant(z, 0.0), one = constant(z, 1.0);
    return {select(z < zero, zero, z), select(z <= zero, zero, one)};
  }
};

// Slope 0.01 below zero and at zero, as in PyTorch.
struct LeakyRelu {
  template <class V>
  static ODEBLOCK_INLINE Value<V> at(V z) {
    const V zero = constant(z, 0.0), one = constant(z, 1.0), slope = constant(z, 0.01);
    return {select(z > zero, z, slope * z), select(z > zero, one, slope)};
  }
};

// t = tanh |z| = e / (e + 2) with e = exp(2|z|) - 1: no cancellation near zero; nor has 1 - t² = (1 - t)(1 + t) one
// where t is near 1, with 1 - t = 2 / (e + 2).
struct Tanh {
  template <class V>
  static ODEBLOCK_INLINE Value<V> at(V z) {
    const V e = expm1(abs(z) + abs(z)), two = constant(z, 2.0);
    const V t = e / (e + two);
    return {select(z < constant(z, 0.0), -t, t), two / (e + two) * (constant(z, 1.0) + t)};
  }
};

// p = 1 / (1 + e) and 1 - p = e p, the latter without cancellation; of e = exp(-z).
template <class V>
struct Logistic {
  V p, complement;
};

template <class V>
ODEBLOCK_INLINE Logistic<V> logistic(V e) {
  const V p = constant(e, 1.0) / (constant(e, 1.0) + e);
  return {p, e * p};
}

struct Sigmoid {
  template <class V>
  static ODEBLOCK_INLINE Value<V> at(V z) {
    const Logistic<V> y = logistic(exp(-z));
    return {y.p, y.p * y.complement};
  }
};

// log(1 + exp z) = max(z, 0) + log(1 + exp(-|z|)). Above 20 it is z, as in PyTorch; in double the two differ there by
// up to 2e-9.
struct Softplus {
  template <class V>
  static ODEBLOCK_INLINE Value<V> at(V z) {
    const V zero = constant(z, 0.0), one = constant(z, 1.0);
    const V e = exp(-abs(z));  // in (0, 1]
    const V r = one / (one + e), linear = constant(z, 20.0);
    const V s = select(z < zero, zero, z) + log1p_unit(e), d = select(z < zero, e * r, r);
    return {select(z > linear, z, s), select(z > linear, one, d)};
  }
};

struct Silu {
  template <class V>
  static ODEBLOCK_INLINE Value<V> at(V z) {
    const Logistic<V> y = logistic(exp(-z));
    const V s = z * y.p;
    return {s, fma(s, y.complement, y.p)};
  }
};

// z Phi(z), Phi the normal distribution function, phi its density.
struct Gelu {
  template <class V>
  static ODEBLOCK_INLINE Value<V> at(V z) {
    V cdf, pdf;
    normal(z, cdf, pdf);
    return {z * cdf, fma(z, pdf, cdf)};
  }
};

// z/2 (1 + tanh u) = z / (1 + exp(-2u)), u = sqrt(2/pi) (z + 0.044715 z^3)  (Hendrycks & Gimpel 2016). The power is
// taken of 2: the argument is one rounding shorter, and its coefficients happen to lie close to floats.
struct GeluTanh {
  template <class V>
  static ODEBLOCK_INLINE Value<V> at(V z) {
    constexpr double c = 1.59576912160573071175978423974;  // 2 sqrt(2/pi)
    // c / ln 2, and 0.044715 times that.
    constexpr double c2 = 2.30220819814432488913389477044, k2 = 0.10294323958002348741762210466;
    const V z2 = z * z;
    const Logistic<V> y = logistic(exp2(z * fma(constant(z, -k2), z2, constant(z, -c2))));
    const V slope = fma(constant(z, 3 * c * 0.044715), z2, constant(z, c));  // d(2u)/dz
    const V s = z * y.p;
    return {s, fma(s * y.complement, slope, y.p)};
  }
};

}  // namespace activation

// The table: odeblock/activations.py has the same ids. Calls f(Activation()) for the activation of that id.
template <class F>
ODEBLOCK_INLINE auto with_activation(int id, F f) {
  switch (id) {
    case 1: return f(activation::Relu());
    case 2: return f(activation::LeakyRelu());
    case 3: return f(activation::Tanh());
    case 4: return f(activation::Sigmoid());
    case 5: return f(activation::Softplus());
    case 6: return f(activation::Silu());
    case 7: return f(activation::Gelu());
    case 8: return f(activation::GeluTanh());
    default: return f(activation::Identity());
  }
}

}  // namespace odeblock
