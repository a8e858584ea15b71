// The block on images with batch normalisation after each convolution, in training: its steps, and the forward,
//
//   z = W * h + hidden_bias,  o = V * sigma(BN(z)) + output_bias,  h <- h + scale BN(o)
//
// Mean and variance are of all samples and pixels of a channel, so every thread takes its groups of samples (maps.h)
// through a layer and meets the others twice in it, once for those of z and once for those of o. Each group has its own
// moments, and they are put together in the order of the groups, so the result does not depend on the threads.
#pragma once

#include "images.h"

namespace odeblock {
namespace {

// Of the values of a channel that a group has: how many, their mean, the sum of squares of what they differ from it by.
struct Moments {
  double count, mean, squares;

  // And those of others (Chan, Golub & LeVeque 1979).
  void add(const Moments& other) {
    if (other.count == 0) return;
    const double all = count + other.count, apart = other.mean - mean;
    mean += apart * other.count / all;
    squares += other.squares + apart * apart * count * other.count / all;
    count = all;
  }
};

template <class T>
ODEBLOCK_INLINE double lane_sum(Vec<T> v) {
  double sum = 0;
  for (int lane = 0; lane < kLanes<T>; lane++) sum += v[lane];
  return sum;
}

// Sum over the pixels of channel c, lane by lane: f(where the value is in a compact map, and in a map), zero where
// there is no pixel. By parts of rows: of many values one after the other the rounding adds up.
constexpr int64_t kPixelRun = 32;
template <class T, class F>
ODEBLOCK_INLINE Vec<T> pixel_sum(const Maps& maps, const Group<T>& group, int64_t c, F f) {
  constexpr int W = kLanes<T>;
  Vec<T> sum{};
  for (int64_t y = 0; y < maps.rows; y++) {
    Vec<T> row{};
    const int64_t compact = maps.compact.at(c, y, 0) * W, map = maps.map.at(c, y, 0) * W;
    for (int64_t x = 0; x < maps.width; x += kPixelRun) {
      const int64_t end = smaller(x + kPixelRun, maps.width);
      Vec<T> run{};
      for (int64_t i = x * W; i < end * W; i += W) run += f(compact + i, map + i);
      row += run;
    }
    sum += group.valid ? select(group.valid[y], row, Vec<T>{}) : row;
  }
  return sum;
}

// moments [channels] of compact values. The second sums are of what values differ by from one close to their mean, so
// what the first was off by is seen (the corrected two-pass algorithm, Chan, Golub & LeVeque 1983).
template <class T>
ODEBLOCK_NOINLINE void measure(const Maps& maps, const Group<T>& group, int64_t channels, const T* values,
                               Moments* moments) {
  double count = 0;
  for (int lane = 0; lane < kLanes<T>; lane++) count += static_cast<double>(group.count[lane]);
  for (int64_t c = 0; c < channels; c++) {
    moments[c] = {count, 0, 0};
    if (count == 0) continue;
    const Vec<T> sum = pixel_sum(maps, group, c, [&](int64_t at, int64_t) { return load(values + at); });
    const T close = static_cast<T>(lane_sum<T>(sum) / count);
    const Vec<T> centre = broadcast(close);
    const Vec<T> apart = pixel_sum(maps, group, c, [&](int64_t at, int64_t) { return load(values + at) - centre; });
    const Vec<T> squares = pixel_sum(maps, group, c, [&](int64_t at, int64_t) {
      const Vec<T> difference = load(values + at) - centre;
      return difference * difference;
    });
    const double off = lane_sum<T>(apart) / count;
    moments[c] = {count, close + off, lane_sum<T>(squares) - count * off * off};
  }
}

// Mean and variance [channels] of the batch, from the moments [groups, channels].
template <class T>
void put_together(const Moments* moments, int64_t groups, int64_t channels, T* mean, T* variance) {
  for (int64_t c = 0; c < channels; c++) {
    Moments all = {0, 0, 0};
    for (int64_t g = 0; g < groups; g++) all.add(moments[g * channels + c]);
    mean[c] = static_cast<T>(all.mean);
    // What rounding leaves below zero is zero; NaN stays.
    variance[c] = static_cast<T>(all.squares > 0 ? all.squares / all.count : all.squares - all.squares);
  }
}

// A channel's normalisation: BN(x) = factor x + offset; inverse = 1 / sqrt(var + epsilon).
template <class T>
struct Scaling {
  T mean, inverse, factor, offset;
};

// Those of layer k after product i, [channels], from mean and variance.
template <class T>
void make_scalings(const Normalisation& norm, int i, int64_t k, int64_t channels, const T* mean, const T* variance,
                   Scaling<T>* scalings) {
  const T *weight = static_cast<const T*>(norm.weight[i]) + k * channels,
          *shift = static_cast<const T*>(norm.shift[i]) + k * channels;
  for (int64_t c = 0; c < channels; c++) {
    const T inverse = T(1) / std::sqrt(variance[c] + static_cast<T>(norm.epsilon)), factor = weight[c] * inverse;
    scalings[c] = {mean[c], inverse, factor, shift[c] - mean[c] * factor};
  }
}

// What threads work with for all groups, one after the other.
template <class T>
struct NormalisedGroups {
  const Maps& maps;
  int64_t dim, hidden;
  Mask<T>* valid;  // [groups, R]
  T *z, *o;        // [groups] compact
  Moments* moments[2];

  T* hidden_values(int64_t g) const { return z + g * compact_size<T>(maps, hidden); }
  T* outputs(int64_t g) const { return o + g * compact_size<T>(maps, dim); }
  Group<T> group(int64_t batch, int64_t g) const { return make_group<T>(maps, batch, g, valid + g * maps.rows); }
};

template <class T>
NormalisedGroups<T> normalised_groups(const Problem& p, const Maps& maps, Arena& arena) {
  NormalisedGroups<T> groups = {maps, p.dim, p.hidden, nullptr, nullptr, nullptr, {}};
  groups.valid = arena.take<Mask<T>>(maps.groups * maps.rows);
  groups.z = arena.take<T>(maps.groups * compact_size<T>(maps, p.hidden));
  groups.o = arena.take<T>(maps.groups * compact_size<T>(maps, p.dim));
  groups.moments[0] = arena.take<Moments>(maps.groups * p.hidden);
  groups.moments[1] = arena.take<Moments>(maps.groups * p.dim);
  return groups;
}

// What a thread works with at one layer.
template <class T>
struct NormalisedScratch {
  LayerScratch<T> layer;
  T* tiles;
  T* s;                // map
  Scaling<T>* of[2];   // of z [M] and of o [C]
  T *mean, *variance;  // [M or C]
};

template <class S, class T = Compute<S>>
NormalisedScratch<T> normalised_scratch(const Problem& p, const Maps& maps, int64_t tiles, Arena& arena) {
  const int64_t channels = p.dim > p.hidden ? p.dim : p.hidden;
  return {layer_scratch<S>(p, maps, arena),
          arena.take<T>(tiles * kLanes<T>),
          arena.take<T>(map_size<T>(maps, p.hidden)),
          {arena.take<Scaling<T>>(p.hidden), arena.take<Scaling<T>>(p.dim)},
          arena.take<T>(channels),
          arena.take<T>(channels)};
}

// The parts of a step of one group.
template <class T>
struct NormalisedSteps {
  const Problem& p;
  const Maps& maps;
  Group<T> group;
  const NormalisedScratch<T>& scratch;

  void hidden_values(const ImageLayer<T>& weights, const T* h, T* z) const {
    convolve(weights.W, maps, h, scratch.tiles, {z, maps.compact, T(1), weights.hidden_bias});
  }
  // activation(row of BN(z), where it is in a compact map, row of s) in place; then s as a map.
  template <class Activation>
  void activate(const T* z, T* s, Activation activation) const {
    constexpr int W = kLanes<T>;
    activate_maps(
        maps, p.hidden, group,
        [&](int64_t at, int64_t count, T* row) {
          const Scaling<T>& by = scratch.of[0][at / (maps.compact.size * W)];
          const Vec<T> factor = broadcast(by.factor), offset = broadcast(by.offset);
          for (int64_t x = 0; x < count; x += W) store(row + x, fma(factor, load(z + at + x), offset));
          activation(at, count, row);
        },
        s);
  }
  void outputs(const ImageLayer<T>& weights, const T* s, T* o) const {
    convolve(weights.V, maps, s, scratch.tiles, {o, maps.compact, T(1), weights.output_bias});
  }
  // next = h + scale BN(o); next may be h.
  ODEBLOCK_NOINLINE void advance(const T* o, const T* h, T* next) const {
    constexpr int W = kLanes<T>;
    const Vec<T> scale = broadcast(static_cast<T>(p.scale));
    for (int64_t c = 0; c < p.dim; c++) {
      const Vec<T> factor = broadcast(scratch.of[1][c].factor), offset = broadcast(scratch.of[1][c].offset);
      for (int64_t y = 0; y < maps.rows; y++) {
        const T* from = o + maps.compact.at(c, y, 0) * W;
        const int64_t at = maps.map.at(c, y, 0) * W;
        for (int64_t x = 0; x < maps.width * W; x += W) {
          const Vec<T> found = fma(scale, fma(factor, load(from + x), offset), load(h + at + x));
          store(next + at + x, group.valid ? select(group.valid[y], found, Vec<T>{}) : found);
        }
      }
    }
    exchange_borders(maps, p.dim, next);
  }
  template <class S>
  void load_samples(const S* samples, T* map) const {
    load_maps(samples, p.dim * p.height * p.width, p.dim, maps, group, maps.map, map);
    exchange_borders(maps, p.dim, map);
  }
};

template <class T>
struct NormalisedForwardShared {
  Barrier* barrier;
  NormalisedGroups<T> groups;
  T* h;  // [groups] maps
};

template <class T>
NormalisedForwardShared<T> normalised_forward_shared(const Problem& p, const Maps& maps, Arena& arena) {
  return {arena.take<Barrier>(1), normalised_groups<T>(p, maps, arena),
          arena.take<T>(maps.groups * map_size<T>(maps, p.dim))};
}

template <class S, class T = Compute<S>>
size_t normalised_forward_workspace(const Problem& p) {
  const Maps maps = choose_maps<T>(p);
  Arena arena(nullptr);
  normalised_forward_shared<T>(p, maps, arena);
  for (int t = 0; t < image_threads<T>(p, maps); t++) normalised_scratch<S>(p, maps, block_tiles(p, maps), arena);
  return arena.bytes();
}

// All steps for the groups of one of `threads` threads.
template <class S, class T = Compute<S>>
void normalised_forward_thread(const NormalisedForwardProblem& p, const Maps& maps,
                               const NormalisedForwardShared<T>& shared, const NormalisedScratch<T>& scratch,
                               int thread, int threads) {
  const Activate<T> sigma =
      with_activation(p.activation, [](auto a) -> Activate<T> { return activate<T, decltype(a)>; });
  const int64_t size = map_size<T>(maps, p.dim);
  const Range mine = part(maps.groups, thread, threads);
  const SavedMaps<T, T*> states = {static_cast<T*>(p.states), p, maps};
  const bool past_caches =
      saved_count(p) * (states.state(1) - states.state(0)) > kCachedBytes / static_cast<int64_t>(sizeof(T));
  const auto for_groups = [&](auto f) {
    for (int64_t g = mine.begin; g < mine.end; g++)
      f(g, NormalisedSteps<T>{p, maps, shared.groups.group(p.batch, g), scratch}, shared.h + g * size);
  };
  // Mean and variance after product i, once every thread has measured its groups.
  const auto agree = [&](int i, int64_t k, int64_t channels) {
    put_together(shared.groups.moments[i], maps.groups, channels, scratch.mean, scratch.variance);
    make_scalings(p.norm, i, k, channels, scratch.mean, scratch.variance, scratch.of[i]);
    if (thread > 0) return;
    for (int64_t c = 0; c < channels; c++) {
      static_cast<T*>(p.norm.mean[i])[k * channels + c] = scratch.mean[c];
      static_cast<T*>(p.norm.variance[i])[k * channels + c] = scratch.variance[c];
    }
  };
  fill_zeros(scratch.s, map_size<T>(maps, p.hidden));
  for_groups([&](int64_t, const NormalisedSteps<T>& steps, T* h) {
    fill_zeros(h, size);
    steps.load_samples(static_cast<const S*>(p.h), h);
  });
  for (int64_t k = 0, saved = 0; k < p.depth; k++) {
    const bool skip = stopped(p, k);  // threads may disagree, and go on to meet
    ImageLayer<T> weights{};
    if (!skip) {
      weights = image_layer<S>(p, maps, k, scratch.layer);
      const bool save = p.save_every && k % p.save_every == 0;
      for_groups([&](int64_t g, const NormalisedSteps<T>& steps, const T* h) {
        if (save) states.store(saved, steps.group, h, past_caches);
        T* z = shared.groups.hidden_values(g);
        steps.hidden_values(weights, h, z);
        measure(maps, steps.group, p.hidden, z, shared.groups.moments[0] + g * p.hidden);
      });
      saved += save;
    }
    shared.barrier->wait(threads);
    if (!skip) {
      agree(0, k, p.hidden);
      for_groups([&](int64_t g, const NormalisedSteps<T>& steps, const T*) {
        T* o = shared.groups.outputs(g);
        steps.activate(shared.groups.hidden_values(g), scratch.s,
                       [&](int64_t, int64_t count, T* row) { sigma(row, count, row); });
        steps.outputs(weights, scratch.s, o);
        measure(maps, steps.group, p.dim, o, shared.groups.moments[1] + g * p.dim);
      });
    }
    shared.barrier->wait(threads);
    if (skip) continue;
    agree(1, k, p.dim);
    for_groups(
        [&](int64_t g, const NormalisedSteps<T>& steps, T* h) { steps.advance(shared.groups.outputs(g), h, h); });
  }
  for_groups([&](int64_t, const NormalisedSteps<T>& steps, const T* h) {
    store_maps(h, p.dim * p.height * p.width, p.dim, maps, steps.group, maps.map, static_cast<S*>(p.y));
  });
  finish_streams();
}

template <class S, class T = Compute<S>>
void normalised_forward(const NormalisedForwardProblem& p) {
  const Maps maps = choose_maps<T>(p);
  clear_saved_padding<T>(p, maps);
  Arena arena(p.workspace);
  const NormalisedForwardShared<T> shared = normalised_forward_shared<T>(p, maps, arena);
  new (shared.barrier) Barrier();
  on_threads(image_threads<T>(p, maps), [&](int thread, int threads) {
    Arena own = arena;
    NormalisedScratch<T> scratch{};
    for (int i = 0; i <= thread; i++) scratch = normalised_scratch<S>(p, maps, block_tiles(p, maps), own);
    normalised_forward_thread<S>(p, maps, shared, scratch, thread, threads);
  });
  shared.barrier->~Barrier();
}

}  // namespace
}  // namespace odeblock
