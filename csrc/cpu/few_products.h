// Products of a matrix with few rows, for few.h: vectorised over features or columns, of rows as the user has them.
#pragma once

#include "tiles.h"

namespace odeblock {
namespace {

template <class T>
constexpr int kFewRows = kLanes<T> / 2 < 4 ? kLanes<T> / 2 : 4;

// Of the vector at p the first `count` entries, at most W; the others are 0.
template <class T>
ODEBLOCK_INLINE Vec<T> load_part(const T* p, int64_t count) {
  if (count >= kLanes<T>) return load(p);
  Vec<T> v{};
  for (int lane = 0; lane < count; lane++) v[lane] = p[lane];
  return v;
}
template <class T>
ODEBLOCK_INLINE void store_part(T* p, Vec<T> v, int64_t count) {
  if (count >= kLanes<T>) return store(p, v);
  for (int lane = 0; lane < count; lane++) p[lane] = v[lane];
}

// Arrays of R rows of features are [R][stride], a whole number of vectors, zero beyond the features.

// out[r][i] = Σ_k A[i][k] x[r][k] + bias[i] for i < rows, k < cols; A has `step` entries a row. bias may be null.
// ahead: how far from here the entries are that are needed later, to be fetched meanwhile; or 0.
template <class T, int R>
ODEBLOCK_NOINLINE void dots(const T* A, int64_t step, int64_t rows, int64_t cols, int64_t ahead, const T* x,
                            int64_t x_stride, const T* bias, T* out, int64_t out_stride) {
  constexpr int W = kLanes<T>, G = 8 / R < W ? 8 / R : W;  // rows of A at a time, for as many sums that do not wait
  for (int64_t i = 0; i < rows; i += W) {
    Vec<T> sums[R][W];
    for (int first = 0; first < W; first += G) {
      Vec<T> sum[G][R] = {};
      const T* a[G];
#pragma GCC unroll 8
      for (int g = 0; g < G; g++) {  // beyond the matrix its last row, for nothing
        const int64_t row = i + first + g < rows ? i + first + g : rows - 1;
        a[g] = A + row * step;
        if (ahead) prefetch(a[g] + ahead, cols);
      }
      int64_t k = 0;
      for (; k + W <= cols; k += W) {
        Vec<T> xk[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) xk[r] = load(x + r * x_stride + k);
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) {
          const Vec<T> weights = load(a[g] + k);
#pragma GCC unroll 4
          for (int r = 0; r < R; r++) sum[g][r] = fma(weights, xk[r], sum[g][r]);
        }
      }
      if (k < cols)
        for (int g = 0; g < G; g++) {
          const Vec<T> weights = load_part(a[g] + k, cols - k);
          for (int r = 0; r < R; r++) sum[g][r] = fma(weights, load(x + r * x_stride + k), sum[g][r]);
        }
#pragma GCC unroll 8
      for (int g = 0; g < G; g++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sums[r][first + g] = sum[g][r];
    }
    for (int r = 0; r < R; r++) {
      Vec<T> y = sum_lanes<T>(sums[r]);
      if (bias) y += load_part(bias + i, rows - i);
      for (int64_t lane = rows - i; lane < W; lane++) y[lane] = T(0);
      store(out + r * out_stride + i, y);
    }
  }
}

// out[r][j .. j+GW) = Σ_i x[r][i] A[i][j ..] for i < rows, of which `left` columns exist.
template <class T, int R, int G>
ODEBLOCK_INLINE void combine_columns(const T* A, int64_t step, int64_t rows, int64_t left, int64_t ahead, const T* x,
                                     int64_t x_stride, T* out, int64_t out_stride) {
  constexpr int W = kLanes<T>;
  Vec<T> total[G][R] = {};
  for (int64_t begin = 0; begin < rows; begin += kRun) {
    const int64_t end = begin + kRun < rows ? begin + kRun : rows;
    Vec<T> sum[G][R] = {};
    for (int64_t i = begin; i < end; i++) {
      const T* a = A + i * step;
      if (ahead) prefetch(a + ahead, left < G * W ? left : G * W);
#pragma GCC unroll 8
      for (int g = 0; g < G; g++) {
        const Vec<T> weights = G > 1 ? load(a + g * W) : load_part(a, left);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sum[g][r] = fma(weights, broadcast(x[r * x_stride + i]), sum[g][r]);
      }
    }
#pragma GCC unroll 8
    for (int g = 0; g < G; g++)
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) total[g][r] += sum[g][r];
  }
#pragma GCC unroll 8
  for (int g = 0; g < G; g++)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) store(out + r * out_stride + g * W, total[g][r]);
}

// out[r][j] = Σ_i x[r][i] A[i][j] for j < cols, i < rows.
template <class T, int R>
ODEBLOCK_NOINLINE void combine(const T* A, int64_t step, int64_t rows, int64_t cols, int64_t ahead, const T* x,
                               int64_t x_stride, T* out, int64_t out_stride) {
  constexpr int W = kLanes<T>, G = 8 / R;
  int64_t j = 0;
  for (; j + G * W <= cols; j += G * W)
    combine_columns<T, R, G>(A + j, step, rows, G * W, ahead, x, x_stride, out + j, out_stride);
  for (; j < cols; j += W)
    combine_columns<T, R, 1>(A + j, step, rows, cols - j, ahead, x, x_stride, out + j, out_stride);
}

// out[i][j] = Σ_r scale x[r][i] y[r][j] for i < rows, j < cols; out has `step` entries a row. row: scratch of a row,
// where out is narrower. past_caches: whether to write there, whole vectors to whole vectors' addresses.
template <class S, int R, class T = Compute<S>>
ODEBLOCK_NOINLINE void outer(const T* x, int64_t x_stride, int64_t rows, T scale, const T* y, int64_t y_stride,
                             int64_t cols, bool past_caches, T* row, S* out, int64_t step) {
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < rows; i++, out += step) {
    Vec<T> xi[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) xi[r] = broadcast(scale * x[r * x_stride + i]);
    T* to;
    if constexpr (kWidened<S>)
      to = row;
    else
      to = out;
    for (int64_t j = 0; j < cols; j += W) {
      Vec<T> sum{};
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) sum = fma(xi[r], load(y + r * y_stride + j), sum);
      past_caches ? stream(to + j, sum) : store_part(to + j, sum, cols - j);
    }
    if constexpr (kWidened<S>) narrow(to, cols, out);
  }
}

// The products of `rows` rows.
template <class S, class T = Compute<S>>
struct FewProducts {
  void (*dots)(const T* A, int64_t step, int64_t rows, int64_t cols, int64_t ahead, const T* x, int64_t x_stride,
               const T* bias, T* out, int64_t out_stride);
  void (*combine)(const T* A, int64_t step, int64_t rows, int64_t cols, int64_t ahead, const T* x, int64_t x_stride,
                  T* out, int64_t out_stride);
  void (*outer)(const T* x, int64_t x_stride, int64_t rows, T scale, const T* y, int64_t y_stride, int64_t cols,
                bool past_caches, T* row, S* out, int64_t step);
};

template <class S, int R = 1, class T = Compute<S>>
FewProducts<S> few_products(int64_t rows) {
  if constexpr (R < kFewRows<T>)
    if (rows > R) return few_products<S, R + 1>(rows);
  return {dots<T, R>, combine<T, R>, outer<S, R>};
}

}  // namespace
}  // namespace odeblock
