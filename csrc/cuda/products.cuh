// How a warp multiplies on tensor cores, for each kind of number: float32 (rounded to tf32, or as three products of its
// halves), float64, and the 16-bit types.
//
// A tile is [kRows, 8]. Lane l has kNumbers of it: row l / 4, columns 2 (l % 4) and the next, and with kRows = 16 the
// same 8 rows below. Tiles that one product has summed are the operand A of the next in the lanes that have them: where
// an operand wants columns l % 4 and l % 4 + 4, it gets 2 (l % 4) and the next, for the terms of a sum have no order; B
// is read the same way.
//
// B(k, n) = M[n][k], M a matrix in shared memory, row by row as V and W are, `stride` elements apart so that the lanes
// of a warp meet other banks.
#pragma once

#include "simt.cuh"

namespace odeblock {
namespace {

// bfloat16 or float16, sums in float.
template <bool kBfloat16>
struct HalfProducts {
  typedef uint16_t Stored;
  typedef float Number;
  static constexpr int kRows = 16, kNumbers = 4;
  static constexpr int kColumns = 16;  // of A in one product
  struct A {
    uint32_t x[4];
  };
  struct B {  // of 16 rows of M: two tiles
    uint32_t x[2][2];
  };

  static constexpr int stride(int columns) { return columns + 8; }  // 16 bytes beyond a multiple of 32

  ODEBLOCK_DEVICE static float widen(Stored x) { return kBfloat16 ? simt::from_bfloat16(x) : simt::from_float16(x); }
  ODEBLOCK_DEVICE static uint32_t pair(float low, float high) {
    return kBfloat16 ? simt::pack_bfloat16(low, high) : simt::pack_float16(low, high);
  }
  ODEBLOCK_DEVICE static Stored narrow(float x) { return static_cast<Stored>(pair(x, x)); }

  // scale times two neighbouring tiles.
  ODEBLOCK_DEVICE static A pack(const float (*tiles)[kNumbers], float scale) {
    A a;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* two = &tiles[i / 2][2 * (i % 2)];
      a.x[i] = pair(scale * two[0], scale * two[1]);
    }
    return a;
  }
  ODEBLOCK_DEVICE static B load(const Stored* M, int stride) {
    const int row = simt::lane() % 8 + simt::lane() / 16 * 8, column = simt::lane() / 8 % 2 * 8;
    uint32_t x[4];
    simt::load_matrices(x, M + row * stride + column);
    return {{{x[0], x[1]}, {x[2], x[3]}}};
  }
  template <int kTile>
  ODEBLOCK_DEVICE static void multiply(float (&d)[kNumbers], const A& a, const B& b) {
    kBfloat16 ? simt::mma_bfloat16(d, a.x, b.x[kTile]) : simt::mma_float16(d, a.x, b.x[kTile]);
  }
};

// float32. kSplit: x = big + small, both tf32, and three of the four products: 2^-22 of an operand is lost instead of
// 2^-11; float32 itself loses 2^-24.
template <bool kSplit>
struct FloatProducts {
  typedef float Stored;
  typedef float Number;
  static constexpr int kRows = 16, kNumbers = 4, kColumns = 8;
  struct A {
    float x[4];
  };
  struct B {
    float x[2][2];
  };

  static constexpr int stride(int columns) { return columns + 8; }  // 8 or 24 banks beyond a multiple of 32

  ODEBLOCK_DEVICE static float widen(float x) { return x; }
  ODEBLOCK_DEVICE static float narrow(float x) { return x; }

  ODEBLOCK_DEVICE static A pack(const float (*tile)[kNumbers], float scale) {
    return {{scale * tile[0][0], scale * tile[0][2], scale * tile[0][1], scale * tile[0][3]}};
  }
  ODEBLOCK_DEVICE static B load(const float* M, int stride) {
    B b;
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
      const float* from = M + (simt::lane() / 4 + 8 * tile) * stride + 2 * (simt::lane() % 4);
      const simt::Pair<float> pair = simt::load_pair(from);
      b.x[tile][0] = pair.x, b.x[tile][1] = pair.y;
    }
    return b;
  }
  template <int kTile>
  ODEBLOCK_DEVICE static void multiply(float (&d)[kNumbers], const A& a, const B& b) {
    uint32_t big_a[4], big_b[2];
#pragma unroll
    for (int i = 0; i < 4; i++) big_a[i] = simt::to_tf32(a.x[i]);
#pragma unroll
    for (int i = 0; i < 2; i++) big_b[i] = simt::to_tf32(b.x[kTile][i]);
    if (kSplit) {
      uint32_t small_a[4], small_b[2];
#pragma unroll
      for (int i = 0; i < 4; i++) small_a[i] = simt::to_tf32(a.x[i] - simt::from_tf32(big_a[i]));
#pragma unroll
      for (int i = 0; i < 2; i++) small_b[i] = simt::to_tf32(b.x[kTile][i] - simt::from_tf32(big_b[i]));
      simt::mma_tf32(d, small_a, big_b);
      simt::mma_tf32(d, big_a, small_b);
    }
    simt::mma_tf32(d, big_a, big_b);
  }
};

struct DoubleProducts {
  typedef double Stored;
  typedef double Number;
  static constexpr int kRows = 8, kNumbers = 2, kColumns = 8;
  struct A {
    double x[2];
  };
  struct B {
    double x[2][2];
  };

  static constexpr int stride(int columns) { return columns + 8; }  // 16 banks beyond a multiple of 32

  ODEBLOCK_DEVICE static double widen(double x) { return x; }
  ODEBLOCK_DEVICE static double narrow(double x) { return x; }

  ODEBLOCK_DEVICE static A pack(const double (*tile)[kNumbers], double scale) {
    return {{scale * tile[0][0], scale * tile[0][1]}};
  }
  ODEBLOCK_DEVICE static B load(const double* M, int stride) {
    B b;
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
      const double* from = M + (simt::lane() / 4 + 8 * tile) * stride + 2 * (simt::lane() % 4);
      const simt::Pair<double> pair = simt::load_pair(from);
      b.x[tile][0] = pair.x, b.x[tile][1] = pair.y;
    }
    return b;
  }
  template <int kTile>
  ODEBLOCK_DEVICE static void multiply(double (&d)[kNumbers], const A& a, const B& b) {
    simt::mma_float64(d, a.x[0], b.x[kTile][0]);
    simt::mma_float64(d, a.x[1], b.x[kTile][1]);
  }
};

}  // namespace
}  // namespace odeblock
