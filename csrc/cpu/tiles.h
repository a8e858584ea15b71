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
  const T* next = nullptr;  // what will be needed in its place at the next layer, to be fetched meanwhile; or null

  Matrix transposed() const { return {data, cols, rows, next}; }
};

// Asks for `count` elements to be brought into the L2 cache, `from` on.
template <class T>
ODEBLOCK_INLINE void prefetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + i, 0, 2);
}

// A sum over features is taken in runs of this many terms, and the runs are added up: rounding then grows like
// the square root of a run and of their number, not of the number of features, for one addition more in 32.
constexpr int64_t kRun = 32;

// sum = A x over the columns [begin, end) of A, for M rows of it from `a` on and a slab of N blocks.
template <class T, int N, int M>
ODEBLOCK_INLINE void product_run(const T* a, int64_t row_step, int64_t col_step, const T* x, int64_t x_block,
                                 int64_t begin, int64_t end, Vec<T> (&sum)[M][N]) {
#pragma GCC unroll 8
  for (int r = 0; r < M; r++)
#pragma GCC unroll 3
    for (int j = 0; j < N; j++) sum[r][j] = Vec<T>{};
#pragma GCC unroll 4
  for (int64_t k = begin; k < end; k++) {
    Vec<T> xk[N];
#pragma GCC unroll 3
    for (int j = 0; j < N; j++) xk[j] = load(x + j * x_block + k * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      const Vec<T> w = broadcast(a[r * row_step + k * col_step]);
#pragma GCC unroll 3
      for (int j = 0; j < N; j++) sum[r][j] = fma(w, xk[j], sum[r][j]);
    }
  }
}

// Rows i .. i+M-1 of out = base + scale (bias + A x) for a slab of N blocks. The M N sums of a run fill the registers;
// those of the runs before wait in memory, so that one run needs nothing but its own.
template <class T, bool kTransposed, int N, int M>
ODEBLOCK_INLINE void product_rows(const Matrix<T>& A, int64_t i, const T* x, const T* bias, T scale, const T* base,
                                  T* out) {
  constexpr int W = kLanes<T>;
  const T* a = kTransposed ? A.data + i : A.data + i * A.cols;
  const int64_t row_step = kTransposed ? 1 : A.cols, col_step = kTransposed ? A.rows : 1, out_block = A.rows * W;
  Vec<T> sum[M][N], total[M][N];
  for (int64_t begin = 0;; begin += kRun) {
    const int64_t end = begin + kRun < A.cols ? begin + kRun : A.cols;
    product_run<T, N, M>(a, row_step, col_step, x, A.cols * W, begin, end, sum);
    if (begin > 0) {
#pragma GCC unroll 8
      for (int r = 0; r < M; r++)
#pragma GCC unroll 3
        for (int j = 0; j < N; j++) sum[r][j] = total[r][j] + sum[r][j];
    }
    if (end == A.cols) break;
#pragma GCC unroll 8
    for (int r = 0; r < M; r++)
#pragma GCC unroll 3
      for (int j = 0; j < N; j++) total[r][j] = sum[r][j];
  }

  if (bias) {
#pragma GCC unroll 8
    for (int r = 0; r < M; r++)
#pragma GCC unroll 3
      for (int j = 0; j < N; j++) sum[r][j] += broadcast(bias[i + r]);
  }
  if (base) {
#pragma GCC unroll 8
    for (int r = 0; r < M; r++)
#pragma GCC unroll 3
      for (int j = 0; j < N; j++) {
        const int64_t at = j * out_block + (i + r) * W;
        store(out + at, fma(broadcast(scale), sum[r][j], load(base + at)));
      }
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < M; r++)
#pragma GCC unroll 3
      for (int j = 0; j < N; j++) store(out + j * out_block + (i + r) * W, broadcast(scale) * sum[r][j]);
  }
}

// out = base + scale (bias + A x). x: N blocks of A.cols features; base and out: N blocks of A.rows features.
// base may be null (0) or out itself; bias [A.rows] may be null.
template <class T, bool kTransposed, int N>
ODEBLOCK_NOINLINE void product(Matrix<T> A, const T* x, const T* bias, T scale, const T* base, T* out) {
  constexpr int M = ODEBLOCK_SUM_REGISTERS / N < 8 ? ODEBLOCK_SUM_REGISTERS / N : 8;
  int64_t i = 0;
  for (; i + M <= A.rows; i += M) {
    if (A.next) prefetch(A.next + i * A.cols, M * A.cols);
    product_rows<T, kTransposed, N, M>(A, i, x, bias, scale, base, out);
  }
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

// Sums over rows, Σ x_i y_j, vectorise over the features of y: no sum over lanes is left at the end, so that a
// few rows are summed as fast as many. y is regrouped into panels one vector of features wide,
// [panel][row of the tile][W]; the last is filled up with zeros. x is read where it lies, in blocks.
constexpr int64_t kRowRun = 128;  // rows that are summed in registers, and stay in the L1 cache meanwhile

template <class T>
void pack(const T* block, int64_t features, int64_t index, int64_t blocks, T* panels) {
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < features; i += W) {
    Vec<T> v[W];
#pragma GCC unroll 16
    for (int c = 0; c < W; c++) v[c] = i + c < features ? load(block + (i + c) * W) : Vec<T>{};
    transpose<T>(v);
    T* panel = panels + (i * blocks + index * W) * W;
#pragma GCC unroll 16
    for (int c = 0; c < W; c++) store(panel + c * W, v[c]);
  }
}

// Elements of `blocks` blocks in panels.
template <class T>
ODEBLOCK_INLINE int64_t packed_size(int64_t features, int64_t blocks) {
  return (features + kLanes<T> - 1) / kLanes<T> * kLanes<T> * blocks * kLanes<T>;
}

// How sums reach memory. Past the caches: where they would not stay, as whole vectors at whole vectors' addresses, for
// sums over at most kRowRun rows.
enum class Write { store, add, past_caches };

// Leaves in M rows of out the sums over the rows [first, last) of the features of x from the i-th on and of N panels
// of y from the j-th feature on.
template <class T, int N, int M>
ODEBLOCK_INLINE void outer_rows(const T* x, int64_t features_x, int64_t i, const T* y, int64_t features_y, int64_t j,
                                int64_t blocks, int64_t first, int64_t last, T scale, Write how, T* out) {
  constexpr int W = kLanes<T>;
  const int64_t panel = blocks * W * W;
  const T* py = y + j * blocks * W;
  if (how == Write::add) {  // may have been written on another core: ask before the sums are taken
#pragma GCC unroll 8
    for (int r = 0; r < M; r++)
#pragma GCC unroll 2
      for (int c = 0; c < N * W; c += 64 / static_cast<int>(sizeof(T)))
        __builtin_prefetch(out + (i + r) * features_y + j + c, 1, 3);
  }
  Vec<T> sum[M][N] = {};
  for (int64_t begin = first; begin < last; begin += W) {  // a block
    const T* px = x + (begin * features_x + i * W);
    const int rows = last - begin < W ? static_cast<int>(last - begin) : W;
    for (int row = 0; row < rows; row++) {
      Vec<T> yr[N];
#pragma GCC unroll 3
      for (int c = 0; c < N; c++) yr[c] = load(py + c * panel + (begin + row) * W);
#pragma GCC unroll 8
      for (int r = 0; r < M; r++) {
        const Vec<T> xr = broadcast(px[r * W + row]);
#pragma GCC unroll 3
        for (int c = 0; c < N; c++) sum[r][c] = fma(xr, yr[c], sum[r][c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; r++)
#pragma GCC unroll 3
    for (int c = 0; c < N; c++) {
      T* to = out + (i + r) * features_y + j + c * W;
      const int64_t left = features_y - j - c * W;
      const Vec<T> part = broadcast(scale) * sum[r][c];
      if (how == Write::past_caches) {
        stream(to, part);
      } else if (left >= W) {
        store(to, how == Write::add ? part + load(to) : part);
      } else {
        for (int64_t lane = 0; lane < left; lane++) to[lane] = how == Write::add ? part[lane] + to[lane] : part[lane];
      }
    }
}

template <class T, int N>
ODEBLOCK_NOINLINE void outer_panels(const T* x, int64_t features_x, Range range, const T* y, int64_t features_y,
                                    int64_t j, int64_t blocks, int64_t first, int64_t last, T scale, Write how,
                                    T* out) {
  constexpr int M = ODEBLOCK_SUM_REGISTERS / N < 8 ? ODEBLOCK_SUM_REGISTERS / N : 8;
  const auto rows = [&](int64_t i, auto count) {
    outer_rows<T, N, decltype(count)::value>(x, features_x, i, y, features_y, j, blocks, first, last, scale, how, out);
  };
  int64_t i = range.begin;
  for (; i + M <= range.end; i += M) rows(i, Width<M>());
  for (; i + 2 <= range.end; i += 2) rows(i, Width<2>());
  for (; i < range.end; i++) rows(i, Width<1>());
}

// out[i][j] = or += scale Σ x_i y_j over the first `rows` rows, for the features i in `range` and all j; x: blocks of
// features_x, y: panels of features_y; out [features_x, features_y]. Every sum runs in the order of the rows.
template <class T>
void outer_product(const T* x, int64_t features_x, Range range, const T* y, int64_t features_y, int64_t blocks,
                   int64_t rows, T scale, Write how, T* out) {
  constexpr int W = kLanes<T>;
  for (int64_t first = 0; first < rows; first += kRowRun) {
    const int64_t last = first + kRowRun < rows ? first + kRowRun : rows;
    for (int64_t j = 0; j < features_y;) {
      if (features_y - j > W) {
        outer_panels<T, 2>(x, features_x, range, y, features_y, j, blocks, first, last, scale,
                           first > 0 ? Write::add : how, out);
        j += 2 * W;
      } else {
        outer_panels<T, 1>(x, features_x, range, y, features_y, j, blocks, first, last, scale,
                           first > 0 ? Write::add : how, out);
        j += W;
      }
    }
  }
}

// out[i] (+)= scale Σ x_i over the first `rows` rows, for the features i in `range`; x: blocks of `features`.
template <class T>
void row_sum(const T* x, int64_t features, Range range, int64_t rows, T scale, bool accumulate, T* out) {
  constexpr int W = kLanes<T>;
  for (int64_t i = range.begin; i < range.end; i++) {
    Vec<T> sum{};
    for (int64_t row = 0; row < rows; row += W) {
      const Vec<T> part = load(x + row * features + i * W);
      if (rows - row >= W)
        sum += part;
      else
        for (int lane = 0; lane < rows - row; lane++) sum[lane] += part[lane];
    }
    T total = 0;
    for (int lane = 0; lane < W; lane++) total += sum[lane];
    out[i] = scale * total + (accumulate ? out[i] : T(0));
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
