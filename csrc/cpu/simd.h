// Vectors of the instruction set that this file is compiled for: GCC's vector types, which carry + - * / and
// comparisons, and the few operations that they lack. Everything has internal linkage, because the same
// sources are compiled once per instruction set and linked into one library.
#pragma once

#include "../problem.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define ODEBLOCK_VECTOR_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define ODEBLOCK_VECTOR_BYTES 32
#elif defined(__aarch64__)
#include <arm_neon.h>
#define ODEBLOCK_VECTOR_BYTES 16
#else
#define ODEBLOCK_VECTOR_BYTES 16  // SSE2
#endif

// Of the vector registers, so many hold the sums of a product; the rest are its operands.
#if ODEBLOCK_VECTOR_BYTES == 64 || defined(__aarch64__)
#define ODEBLOCK_SUM_REGISTERS 24  // of 32
#else
#define ODEBLOCK_SUM_REGISTERS 12  // of 16
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

// At any address of a T: saved states come back from whoever kept them, at whatever alignment. (Where the address
// is aligned, as here it is, an unaligned access costs the same.)
template <class T>
struct Unaligned {
  typedef Vec<T> type __attribute__((aligned(alignof(T)), may_alias));
};
template <class T>
ODEBLOCK_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Unaligned<T>::type*>(p);
}
template <class T>
ODEBLOCK_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Unaligned<T>::type*>(p) = v;
}
// The same past the caches, to a multiple of the vector's size; finish_streams() before another thread reads it.
#if ODEBLOCK_VECTOR_BYTES == 64
ODEBLOCK_INLINE void stream(float* p, Vec<float> v) { _mm512_stream_ps(p, (__m512)v); }
ODEBLOCK_INLINE void stream(double* p, Vec<double> v) { _mm512_stream_pd(p, (__m512d)v); }
ODEBLOCK_INLINE void finish_streams() { _mm_sfence(); }
#elif ODEBLOCK_VECTOR_BYTES == 32
ODEBLOCK_INLINE void stream(float* p, Vec<float> v) { _mm256_stream_ps(p, (__m256)v); }
ODEBLOCK_INLINE void stream(double* p, Vec<double> v) { _mm256_stream_pd(p, (__m256d)v); }
ODEBLOCK_INLINE void finish_streams() { _mm_sfence(); }
#else
template <class T>
ODEBLOCK_INLINE void stream(T* p, Vec<T> v) {
  store(p, v);
}
ODEBLOCK_INLINE void finish_streams() {}
#endif
// v, which is loaded here once: of a vector that is multiplied several times the compiler makes an operand in memory of
// each product, and loads are what there are too few of.
template <class V>
ODEBLOCK_INLINE V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
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
#if ODEBLOCK_VECTOR_BYTES == 64
ODEBLOCK_INLINE VecF fma(VecF a, VecF b, VecF c) { return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
ODEBLOCK_INLINE VecD fma(VecD a, VecD b, VecD c) { return (VecD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#elif ODEBLOCK_VECTOR_BYTES == 32
ODEBLOCK_INLINE VecF fma(VecF a, VecF b, VecF c) { return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
ODEBLOCK_INLINE VecD fma(VecD a, VecD b, VecD c) { return (VecD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#elif defined(__aarch64__)
ODEBLOCK_INLINE VecF fma(VecF a, VecF b, VecF c) {
  return (VecF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
ODEBLOCK_INLINE VecD fma(VecD a, VecD b, VecD c) {
  return (VecD)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
ODEBLOCK_INLINE VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }
ODEBLOCK_INLINE VecD fma(VecD a, VecD b, VecD c) { return a * b + c; }
#endif

ODEBLOCK_INLINE VecF select(MaskF mask, VecF a, VecF b) { return mask ? a : b; }
ODEBLOCK_INLINE VecD select(MaskD mask, VecD a, VecD b) { return mask ? a : b; }

// Lanes of a and b, of which the mask names one for each lane: of a from 0, of b from W.
template <class V, class M>
ODEBLOCK_INLINE V shuffle(V a, V b, M lanes) {
#ifdef __clang__
  constexpr int W = sizeof(V) / sizeof(a[0]);
  V found{};
  for (int i = 0; i < W; i++) found[i] = lanes[i] < W ? a[lanes[i]] : b[lanes[i] - W];
  return found;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

// The smaller and the larger of two; where either is NaN, b. (The masks are all ones: of the plain intrinsics GCC 12
// warns that they use something undefined, its bug 105593.)
#if ODEBLOCK_VECTOR_BYTES == 64
ODEBLOCK_INLINE VecF minimum(VecF a, VecF b) { return (VecF)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
ODEBLOCK_INLINE VecD minimum(VecD a, VecD b) { return (VecD)_mm512_maskz_min_pd(0xff, (__m512d)a, (__m512d)b); }
ODEBLOCK_INLINE VecF maximum(VecF a, VecF b) { return (VecF)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
ODEBLOCK_INLINE VecD maximum(VecD a, VecD b) { return (VecD)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b); }
#elif ODEBLOCK_VECTOR_BYTES == 32
ODEBLOCK_INLINE VecF minimum(VecF a, VecF b) { return (VecF)_mm256_min_ps((__m256)a, (__m256)b); }
ODEBLOCK_INLINE VecD minimum(VecD a, VecD b) { return (VecD)_mm256_min_pd((__m256d)a, (__m256d)b); }
ODEBLOCK_INLINE VecF maximum(VecF a, VecF b) { return (VecF)_mm256_max_ps((__m256)a, (__m256)b); }
ODEBLOCK_INLINE VecD maximum(VecD a, VecD b) { return (VecD)_mm256_max_pd((__m256d)a, (__m256d)b); }
#else
ODEBLOCK_INLINE VecF minimum(VecF a, VecF b) { return select(a < b, a, b); }
ODEBLOCK_INLINE VecD minimum(VecD a, VecD b) { return select(a < b, a, b); }
ODEBLOCK_INLINE VecF maximum(VecF a, VecF b) { return select(a > b, a, b); }
ODEBLOCK_INLINE VecD maximum(VecD a, VecD b) { return select(a > b, a, b); }
#endif

ODEBLOCK_INLINE VecF abs(VecF x) { return (VecF)((MaskF)x & 0x7fffffff); }
ODEBLOCK_INLINE VecD abs(VecD x) { return (VecD)((MaskD)x & 0x7fffffffffffffff); }

// W vectors as the rows of a square matrix, turned into its columns: bit by bit of the lane's number, the halves that
// lie across the diagonal change places.
template <class T>
ODEBLOCK_INLINE void transpose(Vec<T> (&v)[kLanes<T>]) {
  constexpr int W = kLanes<T>;
#pragma GCC unroll 4
  for (int d = W / 2; d > 0; d /= 2) {
    Mask<T> low{}, high{};
#pragma GCC unroll 16
    for (int lane = 0; lane < W; lane++) {
      low[lane] = lane & d ? W + lane - d : lane;  // lanes of the second operand count from W
      high[lane] = lane & d ? W + lane : lane + d;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
      if (!(i & d)) {
        const Vec<T> a = v[i], b = v[i + d];
        v[i] = shuffle(a, b, low);
        v[i + d] = shuffle(a, b, high);
      }
  }
}

// Lane i of the result is the sum of the lanes of v[i], i < W, by halves. v is overwritten.
template <class T>
ODEBLOCK_INLINE Vec<T> sum_lanes(Vec<T>* v) {
  constexpr int W = kLanes<T>;
#pragma GCC unroll 4
  for (int d = 1; d < W; d *= 2) {
    Mask<T> own{}, other{};
#pragma GCC unroll 16
    for (int lane = 0; lane < W; lane++) {
      own[lane] = lane & d ? W + lane : lane;
      other[lane] = lane & d ? W + lane - d : lane + d;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 2 * d) v[i] = shuffle(v[i], v[i + d], own) + shuffle(v[i], v[i + d], other);
  }
  return v[0];
}

}  // namespace
}  // namespace odeblock
