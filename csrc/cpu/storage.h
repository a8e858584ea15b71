// The types that rows and weights are stored in, and the type that is computed in: float for the 16-bit types,
// else the same. Widening is exact; narrowing rounds to the nearest, ties to even, as PyTorch does. The scalar
// conversions are plain integer arithmetic, so that they work everywhere and whether or not the processor
// flushes subnormal numbers.
#pragma once

#include <cstring>

#include "simd.h"

namespace odeblock {
namespace {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class S>
struct ComputeType {
  typedef S type;
};
template <>
struct ComputeType<Bfloat16> {
  typedef float type;
};
template <>
struct ComputeType<Float16> {
  typedef float type;
};
template <class S>
using Compute = typename ComputeType<S>::type;
template <class S>
constexpr bool kWidened = sizeof(S) != sizeof(Compute<S>);

ODEBLOCK_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
ODEBLOCK_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

ODEBLOCK_INLINE float widen(float x) { return x; }
ODEBLOCK_INLINE double widen(double x) { return x; }
ODEBLOCK_INLINE float widen(Bfloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
ODEBLOCK_INLINE float widen(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu, sign = (x.bits & 0x8000u) << 16;
  const uint32_t rebias = 112u << 23;  // 127 - 15 in float's exponent
  uint32_t bits = (magnitude << 13) + rebias;
  if (magnitude >= 0x7c00u) bits += rebias;                                           // infinity, NaN
  if (magnitude < 0x0400u) bits = to_bits(static_cast<float>(magnitude) * 0x1p-24f);  // zero, subnormal
  return from_bits(bits | sign);
}

ODEBLOCK_INLINE void narrow(float x, float& y) { y = x; }
ODEBLOCK_INLINE void narrow(double x, double& y) { y = x; }
ODEBLOCK_INLINE void narrow(float x, Bfloat16& y) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  y.bits = static_cast<uint16_t>(x == x ? rounded : bits >> 16 | 0x40u);
}
ODEBLOCK_INLINE void narrow(float x, Float16& y) {
  const uint32_t sign = to_bits(x) >> 16 & 0x8000u, a = to_bits(x) & 0x7fffffffu;
  uint32_t bits = (a - (112u << 23) + 0xfffu + (a >> 13 & 1u)) >> 13;
  if (a < 0x38800000u) bits = to_bits(from_bits(a) + 0.5f) - 0x3f000000u;  // below 2^-14: multiples of 2^-24
  if (a >= 0x477ff000u) bits = 0x7c00u;                                    // from 65520 on: infinity
  if (a > 0x7f800000u) bits = 0x7e00u;                                     // NaN
  y.bits = static_cast<uint16_t>(bits | sign);
}

// Arrays.
template <class S>
ODEBLOCK_NOINLINE void widen(const S* from, int64_t count, Compute<S>* to) {
  for (int64_t i = 0; i < count; i++) to[i] = widen(from[i]);
}
template <class S>
ODEBLOCK_NOINLINE void narrow(const Compute<S>* from, int64_t count, S* to) {
  for (int64_t i = 0; i < count; i++) narrow(from[i], to[i]);
}

#ifdef __F16C__
template <>
ODEBLOCK_NOINLINE void widen(const Float16* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < count; i++) to[i] = widen(from[i]);
}
template <>
ODEBLOCK_NOINLINE void narrow(const float* from, int64_t count, Float16* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; i++) narrow(from[i], to[i]);
}
#endif

}  // namespace
}  // namespace odeblock
