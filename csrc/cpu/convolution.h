// Convolutions of maps (maps.h), their transposes, and the gradients of their weights.
//
// Products vectorise over the lanes of a group, so that any number of channels fills the vectors and weights are
// broadcast. A convolution is a sum of products over points,
//
//   out(r, t) = Σ_points  fold( Σ_c A_point(r, c) in_point(c, t) )
//
// With a 3 x 3 kernel, on maps larger than 2 x 2 that have more than a few channels, these are the 16 points of
// Winograd's F(2 x 2, 3 x 3): a tile t is 2 x 2 pixels, in_point is Bᵀ d B of the 4 x 4 pixels around it, A_point =
// G K Gᵀ of the kernel K, fold is Pᵀ · P: 4 products a pixel instead of 9, of factors that are sums with weights 1 and
// 1/2 (Lavin & Gray, "Fast algorithms for convolutional neural networks", CVPR 2016; the equations below are theirs),
//
//        1  0 -1  0        1   0   0         1 1  1  0
//   Bᵀ = 0  1  1  0    G = ½   ½   ½    Pᵀ =  0 1 -1 -1
//        0 -1  1  0        ½  -½   ½
//        0  1  0 -1        0   0   1
//
// Otherwise the points are the taps of the kernel, a tile is a pixel, and in_point is the map, shifted.
//
// The transpose runs with the kernel turned by 180 degrees. That is the same A at other points: its tap k² - 1 - i for
// i; of Winograd's, along either axis, 3 for 0 and 0 for 3.
#pragma once

#include "maps.h"

namespace odeblock {
namespace {

// Channels and tiles that a product of maps has sums for in registers.
constexpr int kChannels = ODEBLOCK_SUM_REGISTERS >= 24 ? 4 : 2;
constexpr int kTilesAtOnce = 6;
// What channels are rounded up to in weights and in sums of them.
constexpr int kChannelPadding = 4;
static_assert(kChannelPadding * kChannelPadding % kLanes<float> == 0);  // points are made in vectors
ODEBLOCK_INLINE int64_t padded_channels(int64_t n) { return divide_up(n, kChannelPadding) * kChannelPadding; }

ODEBLOCK_INLINE int64_t point_count(const Maps& maps) { return maps.winograd ? 16 : maps.kernel * maps.kernel; }

// A [points][rows, padded][cols, padded], zero in the padding. As it is, or transposed: rows and cols are those of the
// product that is asked for.
template <class T>
struct Points {
  const T* data;
  int64_t rows, cols;  // channels out, channels in
  int64_t row_step, col_step, point_step;
  int64_t count;
  bool winograd, turned;

  Points transposed() const { return {data, cols, rows, col_step, row_step, point_step, count, winograd, !turned}; }
  const T* at(int64_t point) const {
    if (turned && winograd) {
      const int64_t i = point / 4, j = point % 4;
      point = (i % 3 ? i : 3 - i) * 4 + (j % 3 ? j : 3 - j);
    } else if (turned) {
      point = count - 1 - point;
    }
    return data + point * point_step;
  }
};

ODEBLOCK_INLINE int64_t points_size(const Maps& maps, int64_t rows, int64_t cols) {
  return point_count(maps) * padded_channels(rows) * padded_channels(cols);
}

// Rows of G x.
template <class V>
ODEBLOCK_INLINE void times_G(V x0, V x1, V x2, V (&y)[4]) {
  const V half = constant(x0, 0.5), outer = half * (x0 + x2), inner = half * x1;
  y[0] = x0;
  y[1] = outer + inner;
  y[2] = outer - inner;
  y[3] = x2;
}

// The points of weights [rows, cols, k, k], left in `data`.
template <class T>
ODEBLOCK_NOINLINE Points<T> make_points(const T* weights, int64_t rows, int64_t cols, const Maps& maps, T* data) {
  constexpr int W = kLanes<T>;
  const int64_t taps = maps.kernel * maps.kernel, width = padded_channels(cols), step = padded_channels(rows) * width;
  if (step != rows * cols) fill_zeros(data, taps * step);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < cols; c++)
      for (int64_t tap = 0; tap < taps; tap++) data[tap * step + r * width + c] = *weights++;
  // The taps of W kernels are read before their points take the place.
  for (int64_t at = 0; maps.winograd && at < step; at += W) {
    T* d = data + at;
    Vec<T> half[3][4];  // (G K)ᵀ
#pragma GCC unroll 3
    for (int x = 0; x < 3; x++)
      times_G(load(d + x * step), load(d + (3 + x) * step), load(d + (6 + x) * step), half[x]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      Vec<T> y[4];
      times_G(half[0][i], half[1][i], half[2][i], y);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) store(d + (i * 4 + j) * step, y[j]);
    }
  }
  return {data, rows, cols, width, 1, step, point_count(maps), maps.winograd, false};
}

// What becomes of the sums of a product: out = (base + scale (bias + sum)) ⊙ factor, zero where a lane has no pixel.
template <class T>
struct Result {
  T* out;
  Plane plane;  // of out and base
  T scale = T(1);
  const T* bias = nullptr;         // [channels], or null
  const T* base = nullptr;         // may be out; or null
  const T* factor = nullptr;       // compact, or null
  const Mask<T>* valid = nullptr;  // see Group

  // The sums of N pixels, `step` apart, of row y from x on; at most `count` of them.
  template <int N>
  ODEBLOCK_INLINE void put(const Maps& maps, int64_t c, int64_t y, int64_t x, int64_t step, int64_t count,
                           Vec<T> (&sum)[N]) const {
    constexpr int W = kLanes<T>;
    const int64_t at = plane.at(c, y, x) * W, stride = step * W;
    if (bias) {
#pragma GCC unroll 8
      for (int i = 0; i < N; i++) sum[i] += broadcast(bias[c]);
    }
    if (base) {
#pragma GCC unroll 8
      for (int i = 0; i < N; i++)
        if (i < count) sum[i] = fma(broadcast(scale), sum[i], load(base + at + i * stride));
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < N; i++) sum[i] *= broadcast(scale);
    }
    if (factor) {
      const T* by = factor + maps.compact.at(c, y, x) * W;
#pragma GCC unroll 8
      for (int i = 0; i < N; i++)
        if (i < count) sum[i] *= load(by + i * stride);
    }
    if (valid) {
#pragma GCC unroll 8
      for (int i = 0; i < N; i++) sum[i] = select(valid[y], sum[i], Vec<T>{});
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; i++)
      if (i < count) store(out + at + i * stride, sum[i]);
  }
};

// sum[r][t] += Σ_c A(r, c) x(c, t) for M rows from `a` on and N vectors, those of channel c at x + c x_step.
template <class T, int M, int N>
ODEBLOCK_INLINE void accumulate(const T* a, int64_t row_step, int64_t col_step, int64_t cols, const T* x,
                                int64_t x_step, Vec<T> (&sum)[M][N]) {
#pragma GCC unroll 2
  for (int64_t c = 0; c < cols; c++) {
    Vec<T> v[N];
#pragma GCC unroll 8
    for (int t = 0; t < N; t++) v[t] = load(x + c * x_step + t * kLanes<T>);
#pragma GCC unroll 4
    for (int r = 0; r < M; r++) {
      const Vec<T> w = broadcast(a[r * row_step + c * col_step]);
#pragma GCC unroll 8
      for (int t = 0; t < N; t++) sum[r][t] = fma(w, v[t], sum[r][t]);
    }
  }
}

// ---- taps ------------------------------------------------------------------------------------------------

// N pixels of row y from x on, for all rows of A.
template <class T, int N>
ODEBLOCK_NOINLINE void convolve_pixels(const Points<T>& A, const Maps& maps, const T* in, int64_t y, int64_t x,
                                       const Result<T>& result) {
  constexpr int W = kLanes<T>;
  const int64_t pad = maps.kernel / 2;
  for (int64_t r = 0; r < A.rows; r += kChannels) {
    Vec<T> sum[kChannels][N] = {};
    for (int64_t dy = 0, tap = 0; dy < maps.kernel; dy++)
      for (int64_t dx = 0; dx < maps.kernel; dx++, tap++)
        accumulate<T, kChannels, N>(A.at(tap) + r * A.row_step, A.row_step, A.col_step, A.cols,
                                    in + maps.map.at(0, y + dy - pad, x + dx - pad) * W, maps.map.size * W, sum);
#pragma GCC unroll 4
    for (int i = 0; i < kChannels; i++)
      if (r + i < A.rows) result.template put<N>(maps, r + i, y, x, 1, N, sum[i]);
  }
}

// ---- Winograd --------------------------------------------------------------------------------------------

// Rows of Bᵀ x.
template <class V>
ODEBLOCK_INLINE void times_B(V x0, V x1, V x2, V x3, V (&y)[4]) {
  y[0] = x0 - x2;
  y[1] = x1 + x2;
  y[2] = x2 - x1;
  y[3] = x1 - x3;
}

// N tiles beside each other, from that of pixel (y, x) on, of all channels: to the first of [16
// points][channels][count] vectors.
template <class T, int N>
ODEBLOCK_NOINLINE void transform_tiles(const Maps& maps, const T* in, int64_t channels, int64_t y, int64_t x,
                                       int64_t count, T* to) {
  constexpr int W = kLanes<T>;
  const int64_t pitch = maps.map.pitch * W, point = channels * count * W;
  for (int64_t c = 0; c < channels; c++) {
    const T* from = in + maps.map.at(c, y - 1, x - 1) * W;
    Vec<T> column[4][4];  // of the four rows of Bᵀ d; a tile shares two with the one before it
#pragma GCC unroll 8
    for (int t = 0; t < N; t++, from += 2 * W) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        if (t > 0 && j < 2) {
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) column[j][i] = column[j + 2][i];
        } else {
          const T* d = from + j * W;
          times_B(load(d), load(d + pitch), load(d + 2 * pitch), load(d + 3 * pitch), column[j]);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        Vec<T> d[4];
        times_B(column[0][i], column[1][i], column[2][i], column[3][i], d);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) store(to + (i * 4 + j) * point + (c * count + t) * W, d[j]);
      }
    }
  }
}

// Rows of Pᵀ x.
template <class V>
ODEBLOCK_INLINE void times_P(V x0, V x1, V x2, V x3, V& y0, V& y1) {
  y0 = x0 + x1 + x2;
  y1 = x1 - x2 - x3;
}

// The pixels of N tiles from sums [16 points][N][W] of channel c.
template <class T, int N>
ODEBLOCK_INLINE void fold_tiles(const Maps& maps, const T* sums, int64_t point, int64_t c, int64_t y, int64_t x,
                                const Result<T>& result) {
  constexpr int W = kLanes<T>;
  Vec<T> left[2][N], right[2][N];
#pragma GCC unroll 8
  for (int t = 0; t < N; t++) {
    Vec<T> half[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const T* m = sums + j * point + t * W;
      times_P(load(m), load(m + 4 * point), load(m + 8 * point), load(m + 12 * point), half[0][j], half[1][j]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) times_P(half[i][0], half[i][1], half[i][2], half[i][3], left[i][t], right[i][t]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    result.template put<N>(maps, c, y + i, x, 2, N, left[i]);
    result.template put<N>(maps, c, y + i, x + 1, 2, (maps.width - x) / 2, right[i]);
  }
}

// N tiles from that of pixel (y, x) on, for all rows of A; transformed, they stay the first N of `tiles` [16][A.cols]
// [count] vectors. sums: 16 kChannels kTilesAtOnce vectors.
template <class T, int N>
ODEBLOCK_NOINLINE void convolve_tiles(const Points<T>& A, const Maps& maps, const T* in, int64_t y, int64_t x,
                                      int64_t count, T* tiles, T* sums, const Result<T>& result) {
  constexpr int W = kLanes<T>;
  transform_tiles<T, N>(maps, in, A.cols, y, x, count, tiles);
  for (int64_t r = 0; r < A.rows; r += kChannels) {
    for (int point = 0; point < 16; point++) {
      Vec<T> sum[kChannels][N] = {};
      accumulate<T, kChannels, N>(A.at(point) + r * A.row_step, A.row_step, A.col_step, A.cols,
                                  tiles + point * A.cols * count * W, count * W, sum);
#pragma GCC unroll 4
      for (int i = 0; i < kChannels; i++)
#pragma GCC unroll 8
        for (int t = 0; t < N; t++) store(sums + ((point * kChannels + i) * N + t) * W, sum[i][t]);
    }
    for (int i = 0; i < kChannels && r + i < A.rows; i++)
      fold_tiles<T, N>(maps, sums + i * N * W, kChannels * N * W, r + i, y, x, result);
  }
}

// ---- the convolution -------------------------------------------------------------------------------------

// Calls f(first, Width<n>) for parts of n <= kTilesAtOnce of [0, count), of nearly equal size.
template <class F>
ODEBLOCK_INLINE void in_parts(int64_t count, F f) {
  const int64_t parts = divide_up(count, kTilesAtOnce);
  for (int64_t i = 0; i < parts; i++) {
    const Range range = part(count, i, parts);
    switch (range.end - range.begin) {
      case 6: f(range.begin, Width<6>()); break;
      case 5: f(range.begin, Width<5>()); break;
      case 4: f(range.begin, Width<4>()); break;
      case 3: f(range.begin, Width<3>()); break;
      case 2: f(range.begin, Width<2>()); break;
      default: f(range.begin, Width<1>());
    }
  }
}

constexpr int64_t kTileSums = 16 * kChannels * kTilesAtOnce;                    // vectors
ODEBLOCK_INLINE int64_t convolve_scratch(const Maps& maps, int64_t channels) {  // vectors
  return maps.winograd ? kTileSums + 16 * channels * kTilesAtOnce : 0;
}

// The result of A * in; in: a map of A.cols channels.
template <class T>
ODEBLOCK_NOINLINE void convolve(const Points<T>& A, const Maps& maps, const T* in, T* scratch,
                                const Result<T>& result) {
  if (maps.winograd) {
    for (int64_t y = 0; y < maps.rows; y += 2)
      in_parts(divide_up(maps.width, 2), [&](int64_t t, auto n) {
        constexpr int N = decltype(n)::value;
        convolve_tiles<T, N>(A, maps, in, y, 2 * t, N, scratch + kTileSums * kLanes<T>, scratch, result);
      });
  } else {
    for (int64_t y = 0; y < maps.rows; y++)
      in_parts(maps.width,
               [&](int64_t x, auto n) { convolve_pixels<T, decltype(n)::value>(A, maps, in, y, x, result); });
  }
}

}  // namespace
}  // namespace odeblock
