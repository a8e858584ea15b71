// Activations where results are rounded at once to 8 bits (bfloat16) or 11 (float16, tf32): by the approximations that
// the hardware has of tanh, of 2^x and of 1/x, an operation each, where the exact functions of math.cuh are ten or
// more. Errors are absolute, 2^-12 |z| for 8 bits and 2^-17 for 11 at most: as what a tail of sigma leaves is lost in a
// sum.
#pragma once

#include <type_traits>

#include "math.cuh"
// math.cuh before activations.h, which is written on its functions
#include "../activations.h"
#include "simt.cuh"

namespace odeblock {
namespace {

// Whether there are approximations of an activation.
template <class Sigma>
constexpr bool kApproximated = std::is_same_v<Sigma, activation::Tanh> || std::is_same_v<Sigma, activation::Sigmoid> ||
                               std::is_same_v<Sigma, activation::Silu> || std::is_same_v<Sigma, activation::Gelu> ||
                               std::is_same_v<Sigma, activation::GeluTanh>;

// On tanh, to within 2^-11.
struct To8Bits {
  typedef activation::Value<float> Value;

  ODEBLOCK_DEVICE static Value at(activation::Tanh, float z) {
    const float t = simt::tanh_approximate(z);
    return {t, fma(-t, t, 1.f)};
  }
  ODEBLOCK_DEVICE static Value at(activation::Sigmoid, float z) {
    const float t = simt::tanh_approximate(0.5f * z);
    return {fma(0.5f, t, 0.5f), 0.25f * fma(-t, t, 1.f)};
  }
  ODEBLOCK_DEVICE static Value at(activation::Silu, float z) {
    const float half = 0.5f * z, t = simt::tanh_approximate(half);
    return {fma(half, t, half), fma(0.5f, t, 0.5f) + 0.5f * half * fma(-t, t, 1.f)};
  }
  // Phi(z) = (1 + tanh(z q(z²))) / 2; q by least error of z Phi(z): 3e-5. Beyond |z| = 5.5 it does not bend down.
  ODEBLOCK_DEVICE static Value at(activation::Gelu, float z) {
    const float half = 0.5f * z, square = z * z, held = square > 30.f ? 30.f : square;
    const float q = fma(fma(-3.5159243e-4f, held, 0.037005994f), held, 0.79750759f);
    const float t = simt::tanh_approximate(z * q);
    const float pdf = 0.39894228f * simt::exp2_approximate(-0.72134752f * square);
    return {fma(half, t, half), fma(z, pdf, fma(0.5f, t, 0.5f))};
  }
  ODEBLOCK_DEVICE static Value at(activation::GeluTanh, float z) {
    const float half = 0.5f * z, square = z * z;
    const float t = simt::tanh_approximate(z * fma(0.035677408f, square, 0.79788456f));
    return {fma(half, t, half), fma(0.5f, t, 0.5f) + half * fma(-t, t, 1.f) * fma(0.10703222f, square, 0.79788456f)};
  }
};

// On 2^x and 1/x, to within some 2^-22.
struct To11Bits {
  typedef activation::Value<float> Value;

  ODEBLOCK_DEVICE static Value at(activation::Tanh, float z) {
    const float square = z * z;
    const float far = fma(-2.f, logistic(2.88539008f * z).complement, 1.f);  // 1 - 2 / (1 + exp(2z))
    const float near = fma(z * square, fma(2.f / 15, square, -1.f / 3), z);
    const float t = square < 0.01f ? near : far;
    return {t, fma(-t, t, 1.f)};
  }
  ODEBLOCK_DEVICE static Value at(activation::Sigmoid, float z) {
    const activation::Logistic<float> y = logistic(1.44269504f * z);
    return {y.p, y.p * y.complement};
  }
  ODEBLOCK_DEVICE static Value at(activation::Silu, float z) {
    const activation::Logistic<float> y = logistic(1.44269504f * z);
    const float s = z * y.p;
    return {s, fma(s, y.complement, y.p)};
  }
  // Phi(z) = 1 / (1 + 2^(-z q(z²))), likewise: 3e-6.
  ODEBLOCK_DEVICE static Value at(activation::Gelu, float z) {
    const float square = z * z;
    float q = fma(3.2222082e-6f, square, -8.8119511e-5f);
    q = fma(q, square, -3.6091247e-4f), q = fma(q, square, 0.10522789f), q = fma(q, square, 2.3020448f);
    const float cdf = logistic(z * q).p, pdf = 0.39894228f * simt::exp2_approximate(-0.72134752f * square);
    return {z * cdf, fma(z, pdf, cdf)};
  }
  ODEBLOCK_DEVICE static Value at(activation::GeluTanh, float z) {
    const float square = z * z;
    const activation::Logistic<float> y = logistic(z * fma(0.10294324f, square, 2.3022082f));
    const float s = z * y.p;
    return {s, fma(s * y.complement, fma(0.21406445f, square, 1.5957691f), y.p)};
  }

 private:
  // 1 / (1 + 2^-x) and 1 less that.
  ODEBLOCK_DEVICE static activation::Logistic<float> logistic(float x) {
    // Beyond 2^64 e p would still be 1; 1 / e must not become 0.
    const float e = simt::exp2_approximate(x < -64.f ? 64.f : -x), p = simt::reciprocal_approximate(1.f + e);
    return {p, e * p};
  }
};

// sigma(z) and sigma'(z), to be rounded to kBits.
template <int kBits, class Sigma, class T>
ODEBLOCK_DEVICE activation::Value<T> evaluate(Sigma sigma, T z) {
  typedef std::conditional_t<kBits <= 8, To8Bits, To11Bits> Approximation;
  if constexpr (kBits <= 11 && kApproximated<Sigma>)
    return Approximation::at(sigma, z);
  else
    return Sigma::at(z);
}

}  // namespace
}  // namespace odeblock
