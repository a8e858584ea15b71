// Feature maps of images as the CPU kernels keep them.
//
// A group of samples fills the lanes of vectors: each lane has one sample, or one of n strips of rows of a sample where
// a batch is too small to fill them (lane i n + j: strip j of the group's sample i). Two layouts,
//
//   map      [channels][R + 2 pad rows][pitch][W], with a border of zeros (or the rows of the neighbouring strips) for
//            convolutions; pitch = width + pad: the border to the right of a row is the border to the left of the next
//   compact  [channels][R][width][W]
//
// where R is the rows of a strip. No product depends on the strips, so neither does the result of a sample.
#pragma once

#include "forward.h"

namespace odeblock {
namespace {

// Where the vectors of a layout are: row y, column x of channel c at c size + start + y pitch + x.
struct Plane {
  int64_t start, pitch, size;
  int64_t at(int64_t c, int64_t y, int64_t x) const { return c * size + start + y * pitch + x; }
};

struct Maps {
  int64_t height, width, kernel;
  bool winograd;            // whether products are of tiles (convolution.h)
  int64_t strips, rows;     // n, R
  int64_t samples, groups;  // of a group; of the batch
  Plane map, compact;
};

// Groups that there should be for as many threads, and bytes of a map that the L2 cache has room for beside others.
constexpr int64_t kGroups = 4, kMapBytes = 160 << 10;
// What more strips may cost in rows that are computed for nothing, before larger maps are the lesser evil.
constexpr double kWaste = 1.1;
// Pairs of channels whose products go by the taps of the kernel, however large it is (docs/performance.md).
constexpr int64_t kFewProducts = 64;

ODEBLOCK_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class N>
ODEBLOCK_INLINE N smaller(N a, N b) {
  return b < a ? b : a;
}

// How the maps of a problem are laid out with n strips. Winograd's tiles take rows in pairs.
template <class T>
Maps make_maps(const Problem& p, int64_t n) {
  const int64_t pad = p.kernel / 2, rows = divide_up(p.height, n);
  // A map as small as a tile has few taps within it: these are less work. Tiles round more than taps, which shows where
  // few products are summed.
  const bool winograd = p.kernel == 3 && p.height > 2 && p.width > 2 && p.dim * p.hidden > kFewProducts;
  const int64_t even = winograd ? rows + rows % 2 : rows;
  Maps maps{};
  maps.height = p.height;
  maps.width = p.width;
  maps.kernel = p.kernel;
  maps.winograd = winograd;
  maps.strips = n;
  maps.rows = even;
  maps.samples = kLanes<T> / n;
  maps.groups = divide_up(p.batch, maps.samples);
  const int64_t pitch = p.width + pad;
  // A tile of an odd width reads one column more than there is.
  maps.map = {pad * pitch + pad, pitch, (even + 2 * pad) * pitch + pad + 1};
  maps.compact = {0, p.width, even * p.width};
  return maps;
}

// The adjoint wants a sample in one lane.
template <class T>
Maps choose_maps(const Problem& p) {
  const auto cost = [](const Maps& maps) { return static_cast<double>(divide_up(maps.groups, kGroups) * maps.rows); };
  double least = cost(make_maps<T>(p, 1));
  for (int64_t n = 2; n <= kLanes<T>; n *= 2) least = smaller(least, cost(make_maps<T>(p, n)));
  const int64_t channels = p.dim > p.hidden ? p.dim : p.hidden;
  Maps best = make_maps<T>(p, 1);
  bool found = p.reconstruct || p.batch == 0;
  for (int64_t n = 1; n <= kLanes<T> && !found; n *= 2) {
    const Maps maps = make_maps<T>(p, n);
    if (cost(maps) > kWaste * least) continue;
    best = maps;
    found = channels * maps.map.size * kLanes<T> * static_cast<int64_t>(sizeof(T)) <= kMapBytes;
  }
  return best;
}

// One group of samples: what its lanes have.
template <class T>
struct Group {
  int64_t sample[kLanes<T>], first[kLanes<T>];  // of the batch; pixel of it that the strip begins with
  int64_t count[kLanes<T>];                     // pixels of the strip that the sample has
  const Mask<T>* valid;                         // [R], lanes that have the row y; null where all have all
};

template <class T>
Group<T> make_group(const Maps& maps, int64_t batch, int64_t number, Mask<T>* valid) {
  Group<T> group;
  bool whole = true;
  for (int lane = 0; lane < kLanes<T>; lane++) {
    const int64_t sample = number * maps.samples + lane / maps.strips, row = lane % maps.strips * maps.rows;
    int64_t rows = sample < batch ? smaller(maps.height - row, maps.rows) : 0;
    if (rows < 0) rows = 0;
    group.sample[lane] = sample;
    group.first[lane] = row * maps.width;
    group.count[lane] = rows * maps.width;
    whole = whole && rows == maps.rows;
    for (int64_t y = 0; y < maps.rows; y++) valid[y][lane] = y < rows ? -1 : 0;
  }
  group.valid = whole ? nullptr : valid;
  return group;
}

// The pixels of a lane as its sample has them, in runs: all channels are one where the lane has whole samples, else
// each channel is one.
struct Runs {
  int64_t count, channels;  // runs; channels of each
  Runs(const Maps& maps, int64_t all) : count(maps.rows == maps.height ? 1 : all), channels(all / count) {}
};

// Calls f(i, where the vector is) for at most W pixels of a run that begins with channel c, from the position-th on.
template <class T, class F>
ODEBLOCK_INLINE void for_pixels(const Maps& maps, const Plane& plane, int64_t c, int64_t position, int64_t count, F f) {
  const int64_t strip = maps.rows * maps.width, within = position % strip;
  int64_t y = within / maps.width, x = within % maps.width, at = plane.at(c + position / strip, y, x);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; i++) {
    if (i < count) f(i, at * kLanes<T>);
    at++;
    if (++x < maps.width) continue;
    x = 0;
    at += plane.pitch - maps.width;
    if (++y < maps.rows) continue;
    y = 0;
    at += plane.size - maps.rows * plane.pitch;
  }
}

constexpr int64_t kAhead = 8;  // vectors of each lane

// samples [B, channels, H, W], of which sample b begins at b `stride` -> a group's maps, without the border.
template <class S, class T = Compute<S>>
ODEBLOCK_NOINLINE void load_maps(const S* samples, int64_t stride, int64_t channels, const Maps& maps,
                                 const Group<T>& group, const Plane& plane, T* to) {
  constexpr int W = kLanes<T>;
  const Runs runs(maps, channels);
  const int64_t length = runs.channels * maps.rows * maps.width, pixels = maps.height * maps.width;
  for (int64_t c = 0; c < channels; c += runs.channels)
    for (int64_t position = 0; position < length; position += W) {
      Vec<T> v[W];
      for (int lane = 0; lane < W; lane++) {
        const S* from = samples + group.sample[lane] * stride + c * pixels + group.first[lane] + position;
        const int64_t count = runs.channels * group.count[lane] - position;
        alignas(64) T row[W] = {};
        for (int i = 0; i < W && i < count; i++) row[i] = widen(from[i]);
        __builtin_prefetch(from + kAhead * W, 0, 3);  // of one sample's few lines, too few for the hardware to follow
        if constexpr (!kWidened<S>)
          v[lane] = count >= W ? load(from) : load(row);
        else
          v[lane] = load(row);
      }
      transpose<T>(v);
      for_pixels<T>(maps, plane, c, position, length - position, [&](int i, int64_t at) { store(to + at, v[i]); });
    }
}

// The reverse; what no sample has is not written. past_caches: see copy().
template <class S, class T = Compute<S>>
ODEBLOCK_NOINLINE void store_maps(const T* from, int64_t stride, int64_t channels, const Maps& maps,
                                  const Group<T>& group, const Plane& plane, S* samples, bool past_caches = false) {
  constexpr int W = kLanes<T>;
  const Runs runs(maps, channels);
  const int64_t length = runs.channels * maps.rows * maps.width, pixels = maps.height * maps.width;
  for (int64_t c = 0; c < channels; c += runs.channels)
    for (int64_t position = 0; position < length; position += W) {
      Vec<T> v[W] = {};
      for_pixels<T>(maps, plane, c, position, length - position, [&](int i, int64_t at) { v[i] = load(from + at); });
      transpose<T>(v);
      for (int lane = 0; lane < W; lane++) {
        S* to = samples + group.sample[lane] * stride + c * pixels + group.first[lane] + position;
        const int64_t count = runs.channels * group.count[lane] - position;
        if constexpr (!kWidened<S>) {
          if (count >= W) {
            if (past_caches && reinterpret_cast<uintptr_t>(to) % ODEBLOCK_VECTOR_BYTES == 0)
              stream(to, v[lane]);
            else
              store(to, v[lane]);
            continue;
          }
        }
        alignas(64) T row[W];
        store(row, v[lane]);
        for (int i = 0; i < W && i < count; i++) narrow(row[i], to[i]);
      }
    }
}

// Copies the rows of the strips above and below into the border of each. (With one strip it is zero for good.)
template <class T>
ODEBLOCK_NOINLINE void exchange_borders(const Maps& maps, int64_t channels, T* map) {
  constexpr int W = kLanes<T>;
  const int64_t pad = maps.kernel / 2, n = maps.strips, R = maps.rows;
  if (n == 1) return;
  const auto fill = [&](int64_t row, int64_t from, int64_t shift) {  // row of each strip: row `from` of the shift-th on
    Mask<T> lanes{};
    for (int lane = 0; lane < W; lane++) {
      const int64_t strip = lane % n + shift;
      lanes[lane] = strip >= 0 && strip < n ? lane + shift : W;  // W: of the second operand, zero
    }
    for (int64_t c = 0; c < channels; c++)
      for (int64_t x = 0; x < maps.width; x++)
        store(map + maps.map.at(c, row, x) * W, shuffle(load(map + maps.map.at(c, from, x) * W), Vec<T>{}, lanes));
  };
  for (int64_t i = 1; i <= pad; i++) {
    const int64_t above = divide_up(i, R), below = (R + i - 1) / R;
    fill(-i, above * R - i, -above);
    fill(R + i - 1, (i - 1) % R, below);
  }
}

}  // namespace
}  // namespace odeblock
