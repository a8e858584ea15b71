// Gradients of the weights of a convolution: correlations of two maps (maps.h) over pixels and samples,
//
//   D(r, c, tap) = Σ_pixels x(r, pixel) y(c, pixel + tap - pad)
//
// At points as in convolution.h. Of the 3 x 3 kernel the correlation is the adjoint of Winograd's convolution,
//
//   D(r, c) = Gᵀ ( Σ_tiles (P x Pᵀ) ⊙ (Bᵀ y B) ) G,      x: 2 x 2 pixels of a tile, y: the 4 x 4 around it
//
// again 4 products a pixel instead of 9.
#pragma once

#include "convolution.h"

namespace odeblock {
namespace {

// Rows and columns whose sums of products are in registers: as many vectors, or a multiple of it, as one has lanes.
constexpr int kRowsAtOnce = 4, kColsAtOnce = ODEBLOCK_SUM_REGISTERS >= 24 ? 4 : 2;
static_assert(kChannelPadding % kRowsAtOnce == 0 && kChannelPadding % kColsAtOnce == 0);

// sums [rows, padded][cols, padded] of products of channels; run(x, y, sum) adds the products of kRowsAtOnce channels x
// and kColsAtOnce channels y (in the padding: the last one once more) over pixels or tiles, lane by lane.
template <class T, class Run>
ODEBLOCK_INLINE void sum_products(int64_t rows, int64_t cols, T* sums, Run run) {
  constexpr int W = kLanes<T>, M = kRowsAtOnce, N = kColsAtOnce;
  const int64_t width = padded_channels(cols);
  for (int64_t r = 0; r < rows; r += M)
    for (int64_t c = 0; c < cols; c += N) {
      int64_t x[M], y[N];
      for (int i = 0; i < M; i++) x[i] = r + i < rows ? r + i : rows - 1;
      for (int j = 0; j < N; j++) y[j] = c + j < cols ? c + j : cols - 1;
      Vec<T> sum[M * N] = {};
      run(x, y, sum);
      alignas(64) T total[M * N];
#pragma GCC unroll 4
      for (int i = 0; i < M * N; i += W) store(total + i, sum_lanes<T>(sum + i));
      for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) sums[(r + i) * width + c + j] = total[i * N + j];
    }
}

// `count` more products of M x N channels.
template <class T>
ODEBLOCK_INLINE void add_products(const T* const (&x)[kRowsAtOnce], const T* const (&y)[kColsAtOnce], int64_t count,
                                  Vec<T>* sum) {
  constexpr int W = kLanes<T>;
  for (int64_t t = 0; t < count * W; t += W) {
    Vec<T> v[kColsAtOnce];
#pragma GCC unroll 4
    for (int j = 0; j < kColsAtOnce; j++) v[j] = load(y[j] + t);
#pragma GCC unroll 4
    for (int i = 0; i < kRowsAtOnce; i++) {
      const Vec<T> u = load(x[i] + t);
#pragma GCC unroll 4
      for (int j = 0; j < kColsAtOnce; j++) sum[i * kColsAtOnce + j] = fma(u, v[j], sum[i * kColsAtOnce + j]);
    }
  }
}

template <class T>
ODEBLOCK_NOINLINE void correlate_tap(const Maps& maps, const T* x, int64_t rows, const T* y, int64_t cols, int64_t dy,
                                     int64_t dx, T* sums) {
  constexpr int W = kLanes<T>;
  sum_products<T>(rows, cols, sums, [&](const int64_t* r, const int64_t* c, Vec<T>* sum) {
    Vec<T> total[kRowsAtOnce * kColsAtOnce] = {};
    for (int64_t row = 0; row < maps.rows; row++) {
      const T *px[kRowsAtOnce], *py[kColsAtOnce];
      for (int i = 0; i < kRowsAtOnce; i++) px[i] = x + maps.map.at(r[i], row, 0) * W;
      for (int j = 0; j < kColsAtOnce; j++) py[j] = y + maps.map.at(c[j], row + dy, dx) * W;
      add_products<T>(px, py, maps.width, total);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRowsAtOnce * kColsAtOnce; i++) sum[i] = total[i];
  });
}

// Row i of P x Pᵀ and of Bᵀ y B of every tile of a channel: to [4][channels][tiles][W], those of channel c from `to`
// on.
template <class T>
ODEBLOCK_NOINLINE void pull_tiles(const Maps& maps, const T* map, int64_t c, int i, int64_t step, T* to) {
  constexpr int W = kLanes<T>;
  const int64_t pitch = maps.map.pitch * W;
  for (int64_t y = 0; y < maps.rows; y += 2) {
    const T* from = map + maps.map.at(c, y, 0) * W;
    const auto column = [&](const T* x) {
      const Vec<T> x0 = load(x), x1 = load(x + pitch);
      return i == 0 ? x0 : i == 1 ? x0 + x1 : i == 2 ? x0 - x1 : -x1;
    };
    for (int64_t x = 0; x < maps.width; x += 2, from += 2 * W, to += W) {
      const Vec<T> left = column(from), right = column(from + W);  // of an odd width: from the border, zero
      store(to, left);
      store(to + step, left + right);
      store(to + 2 * step, left - right);
      store(to + 3 * step, -right);
    }
  }
}
template <class T>
ODEBLOCK_NOINLINE void push_tiles(const Maps& maps, const T* map, int64_t c, int i, int64_t step, T* to) {
  constexpr int W = kLanes<T>;
  const int64_t pitch = maps.map.pitch * W;
  // Of the four rows these two, and the sign of the second.
  const int64_t first = (i == 0 ? 0 : i == 2 ? 2 : 1) * pitch, second = (i < 2 ? 2 : i == 2 ? 1 : 3) * pitch;
  const Vec<T> sign = broadcast(T(i == 1 ? 1 : -1));
  for (int64_t y = 0; y < maps.rows; y += 2) {
    const T* from = map + maps.map.at(c, y - 1, -1) * W;
    const auto column = [&](const T* d) { return fma(sign, load(d + second), load(d + first)); };
    Vec<T> d2 = column(from), d3 = column(from + W);
    for (int64_t x = 0; x < maps.width; x += 2, from += 2 * W, to += W) {
      const Vec<T> d0 = d2, d1 = d3;
      d2 = column(from + 2 * W);
      d3 = column(from + 3 * W);
      Vec<T> d[4];
      times_B(d0, d1, d2, d3, d);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) store(to + j * step, d[j]);
    }
  }
}

ODEBLOCK_INLINE int64_t tile_count(const Maps& maps) { return maps.rows / 2 * divide_up(maps.width, 2); }

ODEBLOCK_INLINE int64_t correlate_scratch(const Maps& maps, int64_t rows, int64_t cols) {  // vectors
  return maps.winograd ? 4 * (rows + cols) * tile_count(maps) : 0;
}

// The points of D for rows i of the 4 x 4; sums [16][rows, padded][cols, padded].
template <class T>
void correlate_tiles(const Maps& maps, const T* x, int64_t rows, const T* y, int64_t cols, T* scratch, T* sums) {
  constexpr int W = kLanes<T>;
  const int64_t tiles = tile_count(maps), step = padded_channels(rows) * padded_channels(cols);
  T *xs = scratch, *ys = scratch + 4 * rows * tiles * W;
  for (int i = 0; i < 4; i++) {
    for (int64_t r = 0; r < rows; r++) pull_tiles(maps, x, r, i, rows * tiles * W, xs + r * tiles * W);
    for (int64_t c = 0; c < cols; c++) push_tiles(maps, y, c, i, cols * tiles * W, ys + c * tiles * W);
    for (int j = 0; j < 4; j++)
      sum_products<T>(rows, cols, sums + (i * 4 + j) * step, [&](const int64_t* r, const int64_t* c, Vec<T>* sum) {
        const T *px[kRowsAtOnce], *py[kColsAtOnce];
        for (int m = 0; m < kRowsAtOnce; m++) px[m] = xs + (j * rows + r[m]) * tiles * W;
        for (int n = 0; n < kColsAtOnce; n++) py[n] = ys + (j * cols + c[n]) * tiles * W;
        Vec<T> total[kRowsAtOnce * kColsAtOnce] = {};
        add_products<T>(px, py, tiles, total);
#pragma GCC unroll 16
        for (int m = 0; m < kRowsAtOnce * kColsAtOnce; m++) sum[m] = total[m];
      });
  }
}

// Rows of Gᵀ x.
template <class V>
ODEBLOCK_INLINE void times_G_transposed(V x0, V x1, V x2, V x3, V (&y)[3]) {
  const V half = constant(x0, 0.5), sum = half * (x1 + x2);
  y[0] = x0 + sum;
  y[1] = half * (x1 - x2);
  y[2] = sum + x3;
}

// out [rows, cols, k, k] = or += scale D, of two maps of `rows` and `cols` channels that are zero where there is no
// sample. sums: points_size(maps, rows, cols).
template <class T>
ODEBLOCK_NOINLINE void correlate(const Maps& maps, const T* x, int64_t rows, const T* y, int64_t cols, T scale,
                                 bool add, T* scratch, T* sums, T* out) {
  const int64_t taps = maps.kernel * maps.kernel, width = padded_channels(cols), step = padded_channels(rows) * width;
  if (maps.winograd) {
    correlate_tiles(maps, x, rows, y, cols, scratch, sums);
  } else {
    const int64_t pad = maps.kernel / 2;
    for (int64_t tap = 0; tap < taps; tap++)
      correlate_tap(maps, x, rows, y, cols, tap / maps.kernel - pad, tap % maps.kernel - pad, sums + tap * step);
  }
  for (int64_t r = 0; r < rows; r++) {
    T* row = sums + r * width;
    if (maps.winograd)
      for (int64_t c = 0; c < width; c++) {
        T half[4][3], found[3];
        for (int i = 0; i < 4; i++) {
          const T* d = row + i * 4 * step + c;
          times_G_transposed(d[0], d[step], d[2 * step], d[3 * step], half[i]);
        }
        for (int j = 0; j < 3; j++) {
          times_G_transposed(half[0][j], half[1][j], half[2][j], half[3][j], found);
          for (int i = 0; i < 3; i++) row[(i * 3 + j) * step + c] = found[i];
        }
      }
    for (int64_t c = 0; c < cols; c++)
      for (int64_t tap = 0; tap < taps; tap++) {
        T* to = out + (r * cols + c) * taps + tap;
        const T part = scale * row[tap * step + c];
        *to = add ? *to + part : part;
      }
  }
}

// out[c] = or += scale Σ over pixels and samples of channel c.
template <class T>
ODEBLOCK_NOINLINE void channel_sums(const Maps& maps, const T* map, int64_t channels, T scale, bool add, T* out) {
  constexpr int W = kLanes<T>;
  for (int64_t c = 0; c < channels; c++) {
    Vec<T> sum{};
    for (int64_t y = 0; y < maps.rows; y++) {  // row by row: of many pixels one after the other the rounding adds up
      Vec<T> row{};
      for (int64_t x = 0; x < maps.width; x++) row += load(map + maps.map.at(c, y, x) * W);
      sum += row;
    }
    T total = 0;
    for (int lane = 0; lane < W; lane++) total += sum[lane];
    out[c] = scale * total + (add ? out[c] : T(0));
  }
}

}  // namespace
}  // namespace odeblock
