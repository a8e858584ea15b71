// How tensor cores add products of 16-bit and of tf32 numbers in float.
//
// They take some products at a time, which are exact. Every addend, the sum so far among them, is cut off below
// 2^(e - F), where e is the largest of their exponents, and a product's exponent is the sum of its factors' (it may
// itself be twice as large). What the addends make together is cut off to float, toward zero. On A100 F = 24, half of
// an instruction's products at a time; on H100 F = 25, and all of them: Fasi, Higham, Mikaitis and Pranesh, "Numerical
// behavior of NVIDIA tensor cores" (2021); bit by bit Xie, Wang, Yang and Yang, "MMA-Sim" (arXiv:2511.10909, 2025).
// tests/primitives.cu shows what a GPU does.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace odeblock {
namespace emulation {

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// 2^exponent, for -1022 <= exponent <= 1023.
inline double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Of float: a denormal number has that of the least normal one; zero has one below those of all products with others,
// infinity and NaN one above, by themselves and in a product with zero.
constexpr int kNoExponent = 1 << 10, kNotFinite = 1 << 20, kLeastExponent = -126;
inline int exponent_of(float x) {
  const uint32_t magnitude = to_bits(x) & 0x7fffffffu;
  if (magnitude == 0) return -kNoExponent;
  if (magnitude >= 0x7f800000u) return kNotFinite;
  return std::max(static_cast<int>(magnitude >> 23) - 127, kLeastExponent);
}

// A row or a column of K numbers.
template <int K>
struct Factors {
  float x[K];
  int exponent[K];

  void set(int k, float value) { x[k] = value, exponent[k] = exponent_of(value); }
};

// Toward zero (to the nearest below float's normal numbers).
inline float cut_off(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= ~uint64_t{0x1fffffff};
  std::memcpy(&x, &bits, sizeof x);
  return static_cast<float>(x);
}

// sum + Σ_k a_k b_k, kTogether products at a time; kKept: F.
template <int kTogether, int kKept, int K>
float add_products(float sum, const Factors<K>& a, const Factors<K>& b) {
  for (int first = 0; first < K; first += kTogether) {
    int most = std::max(exponent_of(sum), kLeastExponent);
    for (int k = first; k < first + kTogether; k++) most = std::max(most, a.exponent[k] + b.exponent[k]);
    if (most > kNoExponent) {
      for (int k = first; k < first + kTogether; k++) sum += a.x[k] * b.x[k];
      continue;
    }
    const double scale = power_of_two(kKept - most);
    int64_t total = static_cast<int64_t>(sum * scale);
    for (int k = first; k < first + kTogether; k++)
      total += static_cast<int64_t>(static_cast<double>(a.x[k]) * b.x[k] * scale);
    sum = cut_off(static_cast<double>(total) * power_of_two(most - kKept));
  }
  return sum;
}
template <int K>
float add_products(int capability, float sum, const Factors<K>& a, const Factors<K>& b) {
  return capability < 90 ? add_products<K / 2, 24>(sum, a, b) : add_products<K, 25>(sum, a, b);
}

}  // namespace emulation
}  // namespace odeblock
