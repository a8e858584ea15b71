// Gradients of the weights of a convolution: correlations of two maps (maps.h) over pixels and samples,
//
//   D(r, c, tap) = Σ_pixels x(r, pixel) y(c, pixel + tap - pad)
//
// At points as in convolution.h. Of the 3 x 3 kernel, turned by 180 degrees, the correlation is the adjoint of
// Winograd's convolution,
//
//   D(r, c) = Gᵀ ( Σ_tiles (Bᵀ x B) ⊙ (P y Pᵀ) ) G,      y: 2 x 2 pixels of a tile, x: the 4 x 4 around it
//
// again 4 products a pixel instead of 9. In the backward x is what goes through the layer's transpose as well: its
// tiles Bᵀ x B are made once for both. Those of y are put together where they are multiplied, but for the sums and
// differences of two rows. (The last rows of P and of G have the other sign here, so that P y Pᵀ are the pixels, their
// sums and their differences.)
#pragma once

#include <type_traits>

#include "convolution.h"

namespace odeblock {
namespace {

// Rows and columns whose sums of products are in registers: as many vectors, or a multiple of it, as one has lanes.
constexpr int kRowsAtOnce = 4, kColsAtOnce = ODEBLOCK_SUM_REGISTERS >= 24 ? 4 : 2;
static_assert(kChannelPadding % kRowsAtOnce == 0 && kChannelPadding % kColsAtOnce == 0);

// sums [rows, padded][cols, padded] += products of channels; run(x, y, sum) adds the products of kRowsAtOnce channels x
// and kColsAtOnce channels y (in the padding: the last one once more) over pixels or tiles, lane by lane.
template <class T, class Run>
ODEBLOCK_INLINE void sum_products(int64_t rows, int64_t cols, T* sums, Run run) {
  constexpr int W = kLanes<T>, M = kRowsAtOnce, N = kColsAtOnce;
  const int64_t width = padded_channels(cols);
  for (int64_t c = 0; c < cols; c += N)
    for (int64_t r = 0; r < rows; r += M) {
      int64_t x[M], y[N];
      for (int i = 0; i < M; i++) x[i] = r + i < rows ? r + i : rows - 1;
      for (int j = 0; j < N; j++) y[j] = c + j < cols ? c + j : cols - 1;
      Vec<T> sum[M * N] = {};
      run(x, y, sum);
      alignas(64) T total[M * N];
#pragma GCC unroll 4
      for (int i = 0; i < M * N; i += W) store(total + i, sum_lanes<T>(sum + i));
      for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) sums[(r + i) * width + c + j] += total[i * N + j];
    }
}

// What products take of y: its pixels, or of pairs of them the left, the sum, the difference, the right.
enum class Take { each, left, sum, difference, right };

// `count` more products of M x N channels.
template <Take take, class T>
ODEBLOCK_INLINE void add_products(const T* const (&x)[kRowsAtOnce], const T* const (&y)[kColsAtOnce], int64_t count,
                                  Vec<T>* sum) {
  constexpr int W = kLanes<T>, step = take == Take::each ? 1 : 2;
  for (int64_t t = 0; t < count * W; t += W) {
    Vec<T> v[kColsAtOnce];
#pragma GCC unroll 4
    for (int j = 0; j < kColsAtOnce; j++) {
      const T* at = y[j] + t * step;
      if constexpr (take == Take::sum)
        v[j] = load(at) + load(at + W);
      else if constexpr (take == Take::difference)
        v[j] = load(at) - load(at + W);
      else
        v[j] = load(take == Take::right ? at + W : at);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRowsAtOnce; i++) {
      const Vec<T> u = in_register(load(x[i] + t));
#pragma GCC unroll 4
      for (int j = 0; j < kColsAtOnce; j++) sum[i * kColsAtOnce + j] = fma(u, v[j], sum[i * kColsAtOnce + j]);
    }
  }
}

// The same over `lines` of them, x_step and y_step apart.
template <Take take, class T>
ODEBLOCK_INLINE void add_lines(const T* const (&x)[kRowsAtOnce], int64_t x_step, const T* const (&y)[kColsAtOnce],
                               int64_t y_step, int64_t lines, int64_t count, Vec<T>* sum) {
  Vec<T> total[kRowsAtOnce * kColsAtOnce] = {};
  for (int64_t line = 0; line < lines; line++) {
    const T *px[kRowsAtOnce], *py[kColsAtOnce];
    for (int i = 0; i < kRowsAtOnce; i++) px[i] = x[i] + line * x_step;
    for (int j = 0; j < kColsAtOnce; j++) py[j] = y[j] + line * y_step;
    add_products<take>(px, py, count, total);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRowsAtOnce * kColsAtOnce; i++) sum[i] = total[i];
}

template <class T>
ODEBLOCK_NOINLINE void correlate_tap(const Maps& maps, const T* x, int64_t rows, const T* y, int64_t cols, int64_t dy,
                                     int64_t dx, T* sums) {
  constexpr int W = kLanes<T>;
  const int64_t pitch = maps.map.pitch * W;
  sum_products<T>(rows, cols, sums, [&](const int64_t* r, const int64_t* c, Vec<T>* sum) {
    const T *px[kRowsAtOnce], *py[kColsAtOnce];
    for (int i = 0; i < kRowsAtOnce; i++) px[i] = x + maps.map.at(r[i], 0, 0) * W;
    for (int j = 0; j < kColsAtOnce; j++) py[j] = y + maps.map.at(c[j], dy, dx) * W;
    add_lines<Take::each>(px, pitch, py, pitch, maps.rows, maps.width, sum);
  });
}

// Rows of an even width of all channels, for the tiles of two rows of a map each.
template <class T>
struct Lines {
  const T* data;
  int64_t channel, step;  // elements from one to the next
};

// Row i of P y for the tiles from row `first` to row `end` of the map: a row of the map itself, or made in `to`
// [channels][lines][width].
template <class T>
ODEBLOCK_NOINLINE Lines<T> pull_lines(const Maps& maps, const T* map, int64_t channels, int64_t first, int64_t end,
                                      int i, T* to) {
  constexpr int W = kLanes<T>;
  const int64_t pitch = maps.map.pitch * W, width = 2 * divide_up(maps.width, 2) * W;
  const Vec<T> sign = broadcast(T(i == 1 ? 1 : -1));
  if (i % 3 == 0) return {map + maps.map.at(0, first + (i == 3), 0) * W, maps.map.size * W, 2 * pitch};
  const Lines<T> lines = {to, (end - first) / 2 * width, width};
  for (int64_t c = 0; c < channels; c++)
    for (int64_t y = first; y < end; y += 2) {
      const T* from = map + maps.map.at(c, y, 0) * W;  // of an odd width the last is of the border, zero
      for (int64_t x = 0; x < width; x += W, to += W) store(to, fma(sign, load(from + pitch + x), load(from + x)));
    }
  return lines;
}

// Rows of the map whose tiles are kept at once, in the L2 cache: they are four times as large as the pixels.
constexpr int64_t kTileBytes = 512 << 10;
ODEBLOCK_INLINE int64_t tiled_rows(const Maps& maps, int64_t channels) {
  const int64_t row = 16 * channels * divide_up(maps.width, 2) * ODEBLOCK_VECTOR_BYTES;
  const int64_t parts = divide_up(maps.rows / 2 * row, kTileBytes);
  return 2 * divide_up(maps.rows / 2, parts);
}

// Of convolve_and_correlate() with maps of at most as many channels.
ODEBLOCK_INLINE int64_t correlate_scratch(const Maps& maps, int64_t channels) {  // vectors
  return maps.winograd ? kTileSums + 18 * channels * (tiled_rows(maps, channels) / 2) * divide_up(maps.width, 2) : 0;
}

// The result of A * x, x a map of A.cols channels that is zero where there is no sample, and in sums
// [points][A.cols, padded][cols, padded] the points of D of x and a map y of `cols` channels, turned if Winograd's.
template <class T>
ODEBLOCK_NOINLINE void convolve_and_correlate(const Points<T>& A, const Maps& maps, const T* x, const T* y,
                                              int64_t cols, T* scratch, T* sums, const Result<T>& result) {
  constexpr int W = kLanes<T>;
  const int64_t rows = A.cols, step = padded_channels(rows) * padded_channels(cols);
  fill_zeros(sums, point_count(maps) * step);
  if (!maps.winograd) {
    convolve(A, maps, x, scratch, result);
    const int64_t pad = maps.kernel / 2;
    for (int64_t dy = -pad; dy <= pad; dy++)
      for (int64_t dx = -pad; dx <= pad; dx++, sums += step) correlate_tap(maps, x, rows, y, cols, dy, dx, sums);
    return;
  }
  const int64_t width = divide_up(maps.width, 2), at_once = tiled_rows(maps, rows > cols ? rows : cols);
  for (int64_t first = 0; first < maps.rows; first += at_once) {
    const int64_t end = smaller(first + at_once, maps.rows), count = (end - first) / 2 * width;
    T *pushed = scratch + kTileSums * W, *pulled = pushed + 16 * rows * count * W;
    for (int64_t row = first; row < end; row += 2)
      in_parts(width, [&](int64_t t, auto n) {
        convolve_tiles<T, decltype(n)::value>(A, maps, x, row, 2 * t, count,
                                              pushed + ((row - first) / 2 * width + t) * W, scratch, result);
      });
    for (int i = 0; i < 4; i++) {
      const Lines<T> lines = pull_lines(maps, y, cols, first, end, i, pulled);
      const auto correlate = [&](int point, auto take) {
        sum_products<T>(rows, cols, sums + point * step, [&](const int64_t* r, const int64_t* c, Vec<T>* sum) {
          const T *px[kRowsAtOnce], *py[kColsAtOnce];
          for (int m = 0; m < kRowsAtOnce; m++) px[m] = pushed + (point * rows + r[m]) * count * W;
          for (int n = 0; n < kColsAtOnce; n++) py[n] = lines.data + c[n] * lines.channel;
          add_lines<decltype(take)::value>(px, width * W, py, lines.step, (end - first) / 2, width, sum);
        });
      };
      correlate(4 * i, std::integral_constant<Take, Take::left>());
      correlate(4 * i + 1, std::integral_constant<Take, Take::sum>());
      correlate(4 * i + 2, std::integral_constant<Take, Take::difference>());
      correlate(4 * i + 3, std::integral_constant<Take, Take::right>());
    }
  }
}

// Rows of Gᵀ x, the last column with the other sign.
template <class V>
ODEBLOCK_INLINE void times_G_transposed(V x0, V x1, V x2, V x3, V (&y)[3]) {
  const V half = constant(x0, 0.5), sum = half * (x1 + x2);
  y[0] = x0 + sum;
  y[1] = half * (x1 - x2);
  y[2] = sum - x3;
}

// out [rows, cols, k, k] = or += scale D, of sums from convolve_and_correlate(), which are spent.
template <class T>
ODEBLOCK_NOINLINE void add_correlation(const Maps& maps, int64_t rows, int64_t cols, T scale, bool add, T* sums,
                                       T* out) {
  constexpr int W = kLanes<T>;
  const int64_t taps = maps.kernel * maps.kernel, width = padded_channels(cols), step = padded_channels(rows) * width;
  for (int64_t at = 0; maps.winograd && at < step; at += W) {
    T* d = sums + at;
    Vec<T> half[4][3];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++, d += 4 * step)
      times_G_transposed(load(d), load(d + step), load(d + 2 * step), load(d + 3 * step), half[i]);
#pragma GCC unroll 3
    for (int j = 0; j < 3; j++) {
      Vec<T> found[3];
      times_G_transposed(half[0][j], half[1][j], half[2][j], half[3][j], found);
#pragma GCC unroll 3
      for (int i = 0; i < 3; i++) store(sums + at + (8 - i * 3 - j) * step, found[i]);  // turned back
    }
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < cols; c++)
      for (int64_t tap = 0; tap < taps; tap++, out++)
        *out = scale * sums[tap * step + r * width + c] + (add ? *out : T(0));
}

// Sums [channels] over pixels and samples.
template <class T>
ODEBLOCK_NOINLINE void channel_sums(const Maps& maps, const T* map, int64_t channels, T* sums) {
  constexpr int W = kLanes<T>;
  for (int64_t c = 0; c < channels; c++) {
    Vec<T> sum{};
    for (int64_t y = 0; y < maps.rows; y++) {  // row by row: of many pixels one after the other the rounding adds up
      Vec<T> row{};
      for (int64_t x = 0; x < maps.width; x++) row += load(map + maps.map.at(c, y, x) * W);
      sum += row;
    }
    sums[c] = 0;
    for (int lane = 0; lane < W; lane++) sums[c] += sum[lane];
  }
}

// out [count] = or += scale sums.
template <class T>
ODEBLOCK_INLINE void add_sums(const T* sums, int64_t count, T scale, bool add, T* out) {
  for (int64_t i = 0; i < count; i++) out[i] = scale * sums[i] + (add ? out[i] : T(0));
}

}  // namespace
}  // namespace odeblock
