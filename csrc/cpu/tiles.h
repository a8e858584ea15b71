// The pieces that forward.h and backward.h are made of: loops over blocks of rows, products with the weights
// of a layer, activations, and sums over rows.
//
// Layout. A block is one vector's worth of rows, W = kLanes<T>, stored feature by feature: [features][W].
// Arrays of rows are sequences of blocks. Products vectorise over the rows of a block, so that weights are
// broadcast from where the user keeps them and nothing is packed. Up to three neighbouring blocks (a slab) go
// through a product together; each row's sums run in the order of the features whatever the slab, so that a
// row's result does not depend on its neighbours, nor on how rows are dealt to threads.
#pragma once

#include "math.h"
// math.h before activations.h, which is written on its functions
#include "../activations.h"
#include "storage.h"

namespace odeblock {
namespace {

template <int N>
struct Width {
  static constexpr int value = N;
};

// Calls f(first block, Width<n>) for slabs of n <= 3 blocks that cover [begin, end).
template <class F>
ODEBLOCK_INLINE void for_slabs(int64_t begin, int64_t end, F f) {
  while (begin < end) {
    const int64_t left = end - begin;
    if (left == 1) {
      f(begin, Width<1>());
      begin += 1;
    } else if (left == 2 || left == 4) {
      f(begin, Width<2>());
      begin += 2;
    } else {
      f(begin, Width<3>());
      begin += 3;
    }
  }
}

// Blocks of `batch` rows.
template <class T>
ODEBLOCK_INLINE int64_t block_count(int64_t batch) {
  return (batch + kLanes<T> - 1) / kLanes<T>;
}

// Part t of n of the range [0, size).
struct Range {
  int64_t begin, end;
};
ODEBLOCK_INLINE Range part(int64_t size, int64_t t, int64_t n) { return {size * t / n, size * (t + 1) / n}; }

// rows [batch, features] -> blocks [first, first + count); rows beyond the batch become zero.
template <class S, class T = Compute<S>>
void load_blocks(const S* rows, int64_t batch, int64_t features, int64_t first, int64_t count, T* blocks) {
  constexpr int W = kLanes<T>;
  for (int64_t b = 0; b < count; b++, blocks += features * W)
    for (int lane = 0; lane < W; lane++) {
      const int64_t row = (first + b) * W + lane;
      for (int64_t i = 0; i < features; i++)
        blocks[i * W + lane] = row < batch ? widen(rows[row * features + i]) : T(0);
    }
}

// The reverse; rows beyond the batch are not written.
template <class S, class T = Compute<S>>
void store_blocks(const T* blocks, int64_t batch, int64_t features, int64_t first, int64_t count, S* rows) {
  constexpr int W = kLanes<T>;
  for (int64_t b = 0; b < count; b++, blocks += features * W)
    for (int lane = 0; lane < W; lane++) {
      const int64_t row = (first + b) * W + lane;
      if (row < batch)
        for (int64_t i = 0; i < features; i++) narrow(blocks[i * W + lane], rows[row * features + i]);
    }
}

// One layer's weight matrix A: rows x cols, element (i, k) at data[i * cols + k]; or, transposed, its
// transpose: A(i, k) at data[k * rows + i]. So W and Wᵀ are read from the same memory.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, cols;
};

// A sum over features is taken in runs of this many terms, and the runs are added up: rounding then grows like
// the square root of a run and of their number, not of the number of features, for one addition more in 32.
constexpr int64_t kRun = 32;

// Rows i .. i+M-1 of out = base + scale (bias + A x) for a slab of N blocks. M N accumulators.
template <class T, bool kTransposed, int N, int M>
ODEBLOCK_INLINE void product_rows(const Matrix<T>& A, int64_t i, const T* x, const T* bias, T scale, const T* base,
                                  T* out) {
  constexpr int W = kLanes<T>;
  const T* a = kTransposed ? A.data + i : A.data + i * A.cols;
  const int64_t row_step = kTransposed ? 1 : A.cols, col_step = kTransposed ? A.rows : 1;
  const int64_t x_block = A.cols * W, out_block = A.rows * W;

  Vec<T> total[M][N] = {};
  for (int64_t begin = 0; begin < A.cols; begin += kRun) {
    const int64_t end = begin + kRun < A.cols ? begin + kRun : A.cols;
    Vec<T> sum[M][N] = {};
#pragma GCC unroll 4
    for (int64_t k = begin; k < end; k++) {
      Vec<T> xk[N];
#pragma GCC unroll 3
      for (int j = 0; j < N; j++) xk[j] = load(x + j * x_block + k * W);
#pragma GCC unroll 8
      for (int r = 0; r < M; r++) {
        const Vec<T> w = broadcast(a[r * row_step + k * col_step]);
#pragma GCC unroll 3
        for (int j = 0; j < N; j++) sum[r][j] = fma(w, xk[j], sum[r][j]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; r++)
#pragma GCC unroll 3
      for (int j = 0; j < N; j++) total[r][j] = begin == 0 ? sum[r][j] : total[r][j] + sum[r][j];
  }

#pragma GCC unroll 8
  for (int r = 0; r < M; r++)
#pragma GCC unroll 3
    for (int j = 0; j < N; j++) {
      const int64_t at = j * out_block + (i + r) * W;
      const Vec<T> y = bias ? total[r][j] + broadcast(bias[i + r]) : total[r][j];
      store(out + at, base ? fma(broadcast(scale), y, load(base + at)) : broadcast(scale) * y);
    }
}

// out = base + scale (bias + A x). x: N blocks of A.cols features; base and out: N blocks of A.rows features.
// base may be null (0) or out itself; bias [A.rows] may be null.
template <class T, bool kTransposed, int N>
ODEBLOCK_NOINLINE void product(Matrix<T> A, const T* x, const T* bias, T scale, const T* base, T* out) {
  constexpr int M = ODEBLOCK_SUM_REGISTERS / N < 8 ? ODEBLOCK_SUM_REGISTERS / N : 8;
  int64_t i = 0;
  for (; i + M <= A.rows; i += M) product_rows<T, kTransposed, N, M>(A, i, x, bias, scale, base, out);
  for (; i + 2 <= A.rows; i += 2) product_rows<T, kTransposed, N, 2>(A, i, x, bias, scale, base, out);
  for (; i < A.rows; i++) product_rows<T, kTransposed, N, 1>(A, i, x, bias, scale, base, out);
}

// s = sigma(z), element by element; `count` is a multiple of W. s may be z.
template <class T>
using Activate = void (*)(const T* z, int64_t count, T* s);

template <class T, class A>
ODEBLOCK_NOINLINE void activate(const T* z, int64_t count, T* s) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store(s + i, A::at(load(z + i)).s);
}

// s = sigma(z) and slope = sigma'(z). s may be z.
template <class T>
using ActivateSlope = void (*)(const T* z, int64_t count, T* s, T* slope);

template <class T, class A>
ODEBLOCK_NOINLINE void activate_slope(const T* z, int64_t count, T* s, T* slope) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const auto y = A::at(load(z + i));
    store(slope + i, y.d);
    store(s + i, y.s);
  }
}

// Sums over rows. Two arrays of rows, x [features_x] and y [features_y], are regrouped into panels of P
// features over all blocks of a tile, [panel][block][P][W], so that the sums stream through memory; the last
// panel is filled up with zeros.
constexpr int kPanelX = 3, kPanelY = 4;  // 12 sums, 3 vectors of x; y is read from memory

template <class T, int P>
void pack(const T* block, int64_t features, int64_t index, int64_t blocks, T* panels) {
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < features; i += P) {
    T* panel = panels + (i * blocks + index * P) * W;
    for (int p = 0; p < P; p++) store(panel + p * W, i + p < features ? load(block + (i + p) * W) : Vec<T>{});
  }
}

// Elements of `blocks` blocks in panels of P features.
template <class T, int P>
ODEBLOCK_INLINE int64_t packed_size(int64_t features, int64_t blocks) {
  return (features + P - 1) / P * P * blocks * kLanes<T>;
}

// out[i][j] (+)= scale Σ_rows x_i y_j for the features i of the panels [first, last) of x and all j;
// out [features_x, features_y]. The sum runs over the blocks in their order, then over the lanes.
template <class T>
ODEBLOCK_NOINLINE void outer_product(const T* x, int64_t features_x, int64_t first, int64_t last, const T* y,
                                     int64_t features_y, int64_t blocks, T scale, bool accumulate, T* out) {
  constexpr int W = kLanes<T>;
  for (int64_t j = 0; j < features_y; j += kPanelY)
    for (int64_t panel = first; panel < last; panel++) {
      const int64_t i = panel * kPanelX;
      const T *px = x + i * blocks * W, *py = y + j * blocks * W;
      Vec<T> sum[kPanelX][kPanelY] = {};
      for (int64_t b = 0; b < blocks; b++, px += kPanelX * W, py += kPanelY * W) {
        const Vec<T> x0 = load(px), x1 = load(px + W), x2 = load(px + 2 * W);
#pragma GCC unroll 4
        for (int c = 0; c < kPanelY; c++) {
          const Vec<T> yc = load(py + c * W);
          sum[0][c] = fma(x0, yc, sum[0][c]);
          sum[1][c] = fma(x1, yc, sum[1][c]);
          sum[2][c] = fma(x2, yc, sum[2][c]);
        }
      }
      T total[kPanelX][kPanelY];
#pragma GCC unroll 3
      for (int r = 0; r < kPanelX; r++) sum_lanes(sum[r][0], sum[r][1], sum[r][2], sum[r][3], total[r]);
      for (int r = 0; r < kPanelX && i + r < features_x; r++) {
        T* row = out + (i + r) * features_y + j;
        for (int c = 0; c < kPanelY && j + c < features_y; c++)
          row[c] = scale * total[r][c] + (accumulate ? row[c] : T(0));
      }
    }
}

// out[i] (+)= scale Σ_rows x_i, for the features of the panels [first, last) of x.
template <class T>
void row_sum(const T* x, int64_t features, int64_t first, int64_t last, int64_t blocks, T scale, bool accumulate,
             T* out) {
  constexpr int W = kLanes<T>;
  for (int64_t panel = first; panel < last; panel++) {
    const T* px = x + panel * kPanelX * blocks * W;
    Vec<T> sum[kPanelX] = {};
    for (int64_t b = 0; b < blocks; b++, px += kPanelX * W)
      for (int r = 0; r < kPanelX; r++) sum[r] += load(px + r * W);
    T total[4];
    sum_lanes(sum[0], sum[1], sum[2], Vec<T>{}, total);
    for (int r = 0; r < kPanelX && panel * kPanelX + r < features; r++) {
      T& value = out[panel * kPanelX + r];
      value = scale * total[r] + (accumulate ? value : T(0));
    }
  }
}

// Scratch memory handed out piece by piece, each at a cache line's start. With no memory behind it, it only
// counts: the workspace's size and its use come from the same code.
class Arena {
 public:
  explicit Arena(void* memory) : base_(static_cast<char*>(memory)) {
    if (base_) base_ += (kLine - reinterpret_cast<uintptr_t>(base_) % kLine) % kLine;
  }
  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kLine - 1) / kLine * kLine;
    return piece;
  }
  size_t bytes() const { return used_ + kLine; }  // and room to align the first piece

 private:
  static constexpr size_t kLine = 64;
  char* base_;
  size_t used_ = 0;
};

}  // namespace
}  // namespace odeblock
