// The elementary functions that activations.h is written on, for vectors of one instruction set.
//
// exp and expm1: x = n ln 2 + r with |r| <= ln(2)/2, n ln 2 subtracted in two parts (Cody & Waite 1980),
// exp(r) - 1 = r + r² p(r) with a polynomial p, and 2^n put together from its exponent bits. Arguments are clamped
// where 2^n would leave the normal range; NaN passes through. exp2: x = n + f, |f| <= 1/2, 2^f - 1 = f p(f).
#pragma once

#include "simd.h"

namespace odeblock {
namespace {

// Σ c[i] x^i for i = 0 .. N-1, by Horner's rule.
template <class V, int N>
ODEBLOCK_INLINE V polynomial(V x, const double (&c)[N]) {
  V p = constant(x, c[N - 1]);
#pragma GCC unroll 32
  for (int i = N - 2; i >= 0; i--) p = fma(p, x, constant(x, c[i]));
  return p;
}

// p(r). For float the polynomial of least relative error of exp(r) (Remez' algorithm, in 40 digits): 3e-9. For double
// Taylor's, 1/k! from k = 2 on: r^14/14! = 4e-18.
constexpr double kExpFloat[] = {0.499999934478, 0.166665206317, 0.0416683880453, 0.00836871687966, 0.0013814598649};
constexpr double kExpDouble[] = {1. / 2,       1. / 6,         1. / 24,        1. / 120,
                                 1. / 720,     1. / 5040,      1. / 40320,     1. / 362880,
                                 1. / 3628800, 1. / 39916800., 1. / 479001600, 1. / 6227020800.};

// The same for 2^f: 2e-9; Taylor's, ln(2)^k/k! from k = 1 on: (ln(2)/2)^14/14! = 4e-18.
constexpr double kExp2Float[] = {0.693147202858,   0.240226479133,   0.055503324651,
                                 0.00961843738326, 0.00133988769573, 0.0001535335971};
constexpr double kExp2Double[] = {0.6931471805599453094,   0.2402265069591007123,   0.05550410866482157995,
                                  0.009618129107628477162, 0.001333355814642844342, 0.0001540353039338160995,
                                  0.00001525273380405984,  1.321548679014430949e-6, 1.017808600923969973e-7,
                                  7.05491162080112333e-9,  4.445538271870811e-10,   2.567843599348820514e-11,
                                  1.369148885390412888e-12};

ODEBLOCK_INLINE VecF exp2_polynomial(VecF f) { return polynomial(f, kExp2Float); }
ODEBLOCK_INLINE VecD exp2_polynomial(VecD f) { return polynomial(f, kExp2Double); }
ODEBLOCK_INLINE VecF exp_polynomial(VecF r) { return polynomial(r, kExpFloat); }
ODEBLOCK_INLINE VecD exp_polynomial(VecD r) { return polynomial(r, kExpDouble); }

// 2^n from t = n + magic, whose low bits hold n and the bias of the exponent.
ODEBLOCK_INLINE VecF power_of_two(VecF t) { return (VecF)((MaskF)t << 23); }
ODEBLOCK_INLINE VecD power_of_two(VecD t) { return (VecD)((MaskD)t << 52); }

constexpr double magic(VecF) { return 12582912.0 + 127; }           // 1.5 * 2^23
constexpr double magic(VecD) { return 6755399441055744.0 + 1023; }  // 1.5 * 2^52
constexpr double largest_exponent(VecF) { return 88.0; }
constexpr double largest_exponent(VecD) { return 709.0; }
constexpr double smallest_exponent(VecF) { return -87.0; }
constexpr double smallest_exponent(VecD) { return -708.0; }
// ln 2 in two parts; the first has so few bits that n times it is exact.
constexpr double ln2_high(VecF) { return 0.693359375; }
constexpr double ln2_low(VecF) { return -2.1219444005469058e-4; }
constexpr double ln2_high(VecD) { return 0.693145751953125; }
constexpr double ln2_low(VecD) { return 1.4286068203094172e-6; }

// exp(x) = power + power * e.
template <class V>
struct Exponential {
  V power;  // 2^n
  V e;      // exp(r) - 1
};

template <class V>
ODEBLOCK_INLINE Exponential<V> exponential(V x) {
  x = minimum(constant(x, largest_exponent(V{})), maximum(constant(x, smallest_exponent(V{})), x));
  const V t = fma(x, constant(x, 1.4426950408889634), constant(x, magic(V{})));
  const V n = t - constant(x, magic(V{}));
  V r = fma(n, constant(x, -ln2_high(V{})), x);
  r = fma(n, constant(x, -ln2_low(V{})), r);
  return {power_of_two(t), fma(r * r, exp_polynomial(r), r)};
}

template <class V>
ODEBLOCK_INLINE V exp(V x) {
  const Exponential<V> y = exponential(x);
  return fma(y.power, y.e, y.power);
}

constexpr double smallest_power(VecF) { return -126.0; }
constexpr double largest_power(VecF) { return 127.0; }
constexpr double smallest_power(VecD) { return -1022.0; }
constexpr double largest_power(VecD) { return 1023.0; }

template <class V>
ODEBLOCK_INLINE V exp2(V x) {
  x = minimum(constant(x, largest_power(V{})), maximum(constant(x, smallest_power(V{})), x));
  const V t = x + constant(x, magic(V{}));
  const V f = x - (t - constant(x, magic(V{})));
  const V power = power_of_two(t);
  return fma(power, f * exp2_polynomial(f), power);
}

template <class V>
ODEBLOCK_INLINE V expm1(V x) {
  const Exponential<V> y = exponential(x);
  return fma(y.power, y.e, y.power - constant(x, 1.0));
}

// log(1 + x) for 0 <= x <= 1: 2 atanh(t), t = x / (2 + x) <= 1/3, by its series in t².
// Truncation: 9^-8/17 = 1.4e-9 for float, 9^-17/35 = 2e-18 for double.
constexpr double kAtanhFloat[] = {1., 1. / 3, 1. / 5, 1. / 7, 1. / 9, 1. / 11, 1. / 13, 1. / 15};
constexpr double kAtanhDouble[] = {1.,      1. / 3,  1. / 5,  1. / 7,  1. / 9,  1. / 11, 1. / 13, 1. / 15, 1. / 17,
                                   1. / 19, 1. / 21, 1. / 23, 1. / 25, 1. / 27, 1. / 29, 1. / 31, 1. / 33};

ODEBLOCK_INLINE VecF atanh_series(VecF w) { return polynomial(w, kAtanhFloat); }
ODEBLOCK_INLINE VecD atanh_series(VecD w) { return polynomial(w, kAtanhDouble); }

template <class V>
ODEBLOCK_INLINE V log1p_unit(V x) {
  const V t = x / (x + constant(x, 2.0));
  return (t + t) * atanh_series(t * t);
}

// The normal distribution. For x = |z|, Φ(-x) = exp(-x²/2) P(y) / (x + 4), where y = (x - 4)/(x + 4) maps
// x >= 0 to [-1, 1) and P interpolates the rest, a smooth function between 0.4 and 2, at Chebyshev nodes
// (fitted in 40 digits). Truncation: 1e-9 for float, 1e-17 for double.
constexpr double kNormalFloat[] = {0.7552851305,    -0.6078966314,    0.3871373939,    -0.1865221598,
                                   0.06039664828,   -0.00753771716,   -0.003479954637, 0.001622040106,
                                   0.0001336533871, -0.0002155737763, -1.731082301e-6, 2.118298426e-5};
constexpr double kNormalDouble[] = {
    0.755285130415751492,    -0.607896641971892300,    0.387137400742214917,    -0.186521857959636612,
    0.0603965748909178723,   -0.00754018896738631255,  -0.00347969236704797363, 0.00163081846740990846,
    0.000133344309411832544, -0.000231095017362774258, -1.90824635141457105e-6, 0.0000351451119028376513,
    7.16658764119512099e-7,  -5.92161104592397736e-6,  -6.29836733849236905e-7, 1.02478510165527734e-6,
    2.72462969511458721e-7,  -1.59773961422392205e-7,  -8.68664701599789276e-8, 1.78449277729814162e-8,
    2.14276038434523559e-8,  -5.87362676498719067e-10, -3.73064508186837027e-9, -1.19977820312530946e-10,
    3.40331230864949464e-10};

ODEBLOCK_INLINE VecF normal_polynomial(VecF y) { return polynomial(y, kNormalFloat); }
ODEBLOCK_INLINE VecD normal_polynomial(VecD y) { return polynomial(y, kNormalDouble); }

template <class V>
ODEBLOCK_INLINE void normal(V z, V& cdf, V& pdf) {
  const V x = abs(z);
  const V e = exp(constant(z, -0.5) * x * x);
  const V t = constant(z, 1.0) / (x + constant(z, 4.0));
  const V y = fma(constant(z, -8.0), t, constant(z, 1.0));
  const V tail = e * t * normal_polynomial(y);
  cdf = select(z < constant(z, 0.0), tail, constant(z, 1.0) - tail);
  pdf = e * constant(z, 0.3989422804014326779);
}

}  // namespace
}  // namespace odeblock
