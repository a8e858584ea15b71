// Vectors of the instruction set that this file is compiled for: GCC's vector types, which carry + - * / and
// comparisons, and the few operations that they lack. Everything has internal linkage, because the same
// sources are compiled once per instruction set and linked into one library.
#pragma once

#include "../problem.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define ODEBLOCK_VECTOR_BYTES 32
#else
#define ODEBLOCK_VECTOR_BYTES 16  // SSE2, NEON
#endif

#define ODEBLOCK_NOINLINE __attribute__((noinline))

namespace odeblock {
namespace {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(ODEBLOCK_VECTOR_BYTES), may_alias));
  typedef int32_t Mask __attribute__((vector_size(ODEBLOCK_VECTOR_BYTES), may_alias));
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(ODEBLOCK_VECTOR_BYTES), may_alias));
  typedef int64_t Mask __attribute__((vector_size(ODEBLOCK_VECTOR_BYTES), may_alias));
};

template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
using Mask = typename Simd<T>::Mask;

// Rows that one vector holds.
template <class T>
constexpr int kLanes = ODEBLOCK_VECTOR_BYTES / sizeof(T);

typedef Vec<float> VecF;
typedef Vec<double> VecD;
typedef Mask<float> MaskF;
typedef Mask<double> MaskD;

template <class T>
ODEBLOCK_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
ODEBLOCK_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}
template <class T>
ODEBLOCK_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0 is x for every x, and compiles to the broadcast alone
}

// The constant x in the type of its first argument.
ODEBLOCK_INLINE VecF constant(VecF, double x) { return broadcast(static_cast<float>(x)); }
ODEBLOCK_INLINE VecD constant(VecD, double x) { return broadcast(x); }

// a b + c, rounded once where the instruction set has it. Contraction by the compiler is off (CMakeLists.txt):
// what is fused is written here, so that every row goes through the same roundings whatever its neighbours.
#if ODEBLOCK_VECTOR_BYTES == 32
ODEBLOCK_INLINE VecF fma(VecF a, VecF b, VecF c) { return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
ODEBLOCK_INLINE VecD fma(VecD a, VecD b, VecD c) { return (VecD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#else
ODEBLOCK_INLINE VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }
ODEBLOCK_INLINE VecD fma(VecD a, VecD b, VecD c) { return a * b + c; }
#endif

ODEBLOCK_INLINE VecF select(MaskF mask, VecF a, VecF b) { return mask ? a : b; }
ODEBLOCK_INLINE VecD select(MaskD mask, VecD a, VecD b) { return mask ? a : b; }

ODEBLOCK_INLINE VecF abs(VecF x) { return (VecF)((MaskF)x & 0x7fffffff); }
ODEBLOCK_INLINE VecD abs(VecD x) { return (VecD)((MaskD)x & 0x7fffffffffffffff); }

// The four sums over lanes of a, b, c, d, to out[0..3].
#if ODEBLOCK_VECTOR_BYTES == 32
ODEBLOCK_INLINE void sum_lanes(VecF a, VecF b, VecF c, VecF d, float* out) {
  const __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
  const __m256 s = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
ODEBLOCK_INLINE void sum_lanes(VecD a, VecD b, VecD c, VecD d, double* out) {
  const __m256d ab = _mm256_hadd_pd((__m256d)a, (__m256d)b), cd = _mm256_hadd_pd((__m256d)c, (__m256d)d);
  const __m256d low = _mm256_permute2f128_pd(ab, cd, 0x20), high = _mm256_permute2f128_pd(ab, cd, 0x31);
  _mm256_storeu_pd(out, _mm256_add_pd(low, high));
}
#else
ODEBLOCK_INLINE void sum_lanes(VecF a, VecF b, VecF c, VecF d, float* out) {
  const VecF v[4] = {a, b, c, d};
  for (int i = 0; i < 4; i++) out[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
}
ODEBLOCK_INLINE void sum_lanes(VecD a, VecD b, VecD c, VecD d, double* out) {
  const VecD v[4] = {a, b, c, d};
  for (int i = 0; i < 4; i++) out[i] = v[i][0] + v[i][1];
}
#endif

}  // namespace
}  // namespace odeblock
