// The block on images: the steps of a group of samples (maps.h), and the forward, all L of them for some groups before
// the next. What forward.h says of rows holds here of samples, with products that are convolutions,
//
//   z = W * h + hidden_bias,  s = sigma(z),  h <- h + scale (V * s + output_bias)
#pragma once

#include "convolution.h"
#include "reconstruction.h"

namespace odeblock {
namespace {

ODEBLOCK_INLINE bool is_image(const Problem& p) { return p.kernel > 0; }

template <class T>
int image_threads(const Problem& p, const Maps& maps) {
  return static_cast<int>(smaller<int64_t>(p.threads < 1 ? 1 : p.threads, maps.groups < 1 ? 1 : maps.groups));
}

// A layer's weights as the products want them.
template <class T>
struct ImageLayer {
  Points<T> V, W;
  const T *hidden_bias, *output_bias;
  const T* weights;  // W [M, C, k, k]
};

template <class T>
struct LayerScratch {
  T *V, *W;    // points
  T* widened;  // a layer's weights, where they are
};

template <class S, class T = Compute<S>>
LayerScratch<T> layer_scratch(const Problem& p, const Maps& maps, Arena& arena) {
  const int64_t points = points_size(maps, p.dim, p.hidden);
  return {arena.take<T>(points), arena.take<T>(points), arena.take<T>(kWidened<S> ? layer_size(p) : 0)};
}

template <class S, class T = Compute<S>>
ImageLayer<T> image_layer(const Problem& p, const Maps& maps, int64_t k, const LayerScratch<T>& scratch) {
  const Layer<T> weights = layer<S>(p, k, scratch.widened);
  return {make_points(weights.V.data, p.dim, p.hidden, maps, scratch.V),
          make_points(weights.W.data, p.hidden, p.dim, maps, scratch.W), weights.hidden_bias, weights.output_bias,
          weights.W.data};
}

// Elements of a map and of compact values of `channels`.
template <class T>
int64_t map_size(const Maps& maps, int64_t channels) {
  return channels * maps.map.size * kLanes<T>;
}
template <class T>
int64_t compact_size(const Maps& maps, int64_t channels) {
  return channels * maps.compact.size * kLanes<T>;
}

// What a thread works with for one group.
template <class T>
struct GroupScratch {
  T* z;      // compact
  T* slope;  // compact, backward
  T* s;      // map
  T* tiles;  // of a convolution or correlation
  Mask<T>* valid;
};

// Vectors of tiles of the larger of the two convolutions.
ODEBLOCK_INLINE int64_t block_tiles(const Problem& p, const Maps& maps) {
  return convolve_scratch(maps, p.dim > p.hidden ? p.dim : p.hidden);
}

// tiles: vectors of them.
template <class T>
GroupScratch<T> group_scratch(const Problem& p, const Maps& maps, bool backward, int64_t tiles, Arena& arena) {
  return {arena.take<T>(compact_size<T>(maps, p.hidden)), arena.take<T>(backward ? compact_size<T>(maps, p.hidden) : 0),
          arena.take<T>(map_size<T>(maps, p.hidden)), arena.take<T>(tiles * kLanes<T>), arena.take<Mask<T>>(maps.rows)};
}

// s = activation(row of z, row of s) for all rows; then as a map.
template <class T, class Activation>
void activate_maps(const Maps& maps, int64_t channels, const Group<T>& group, Activation activation, T* s) {
  constexpr int W = kLanes<T>;
  for (int64_t c = 0; c < channels; c++)
    for (int64_t y = 0; y < maps.rows; y++) {
      T* row = s + maps.map.at(c, y, 0) * W;
      activation(maps.compact.at(c, y, 0) * W, maps.width * W, row);
      for (int64_t x = 0; group.valid && x < maps.width * W; x += W)
        store(row + x, select(group.valid[y], load(row + x), Vec<T>{}));
    }
  exchange_borders(maps, channels, s);
}

// The steps of one group.
template <class T>
struct ImageSteps {
  const Problem& p;
  const Maps& maps;
  Group<T> group;
  GroupScratch<T> scratch;

  void hidden_values(const ImageLayer<T>& weights, const T* h, T* z) const {
    convolve(weights.W, maps, h, scratch.tiles, {z, maps.compact, T(1), weights.hidden_bias});
  }

  // next = h + scale (V * sigma(z) + output_bias); next may be h, which may be null for zero.
  void advance(const ImageLayer<T>& weights, Activate<T> sigma, const T* z, const T* h, T* next) const {
    activate_maps(maps, p.hidden, group, [&](int64_t at, int64_t count, T* s) { sigma(z + at, count, s); }, scratch.s);
    residual(weights, h, next);
    exchange_borders(maps, p.dim, next);
  }

  // The same of s = sigma(z) in the scratch, without the borders.
  void residual(const ImageLayer<T>& weights, const T* h, T* next) const {
    convolve(weights.V, maps, scratch.s, scratch.tiles,
             {next, maps.map, static_cast<T>(p.scale), weights.output_bias, h, nullptr, group.valid});
  }

  // s = sigma(z) and its slope in the scratch.
  void activate_slopes(ActivateSlope<T> sigma, const T* z) const {
    activate_maps(
        maps, p.hidden, group, [&](int64_t at, int64_t count, T* s) { sigma(z + at, count, s, scratch.slope + at); },
        scratch.s);
  }

  template <class S>
  void load_samples(const S* samples, int64_t stride, T* map) const {
    load_maps(samples, stride, p.dim, maps, group, maps.map, map);
    exchange_borders(maps, p.dim, map);
  }
};

// The states of a group as they are saved: those of rows of C H W features, and as many hidden units. In lanes,
// compact, where every lane has a whole sample; else the samples as they are, each with its z behind it.
template <class T, class Pointer>
struct SavedMaps {
  Pointer states;
  const Problem& p;
  const Maps& maps;
  int64_t pixels = p.height * p.width;
  bool in_lanes = are_in_lanes(p, maps);

  static bool are_in_lanes(const Problem& p, const Maps& maps) {
    return maps.strips == 1 && maps.rows == maps.height && maps.groups * kLanes<T> <= padded_rows(p.batch);
  }
  int64_t size() const { return padded_rows(p.batch) * saved_width(p) * pixels; }
  Pointer state(int64_t n) const { return states + n * size(); }
  // Of the group that begins with a sample.
  Pointer map(int64_t n, int64_t sample) const { return state(n) + (in_lanes ? sample * p.dim * pixels : 0); }
  Pointer hidden(int64_t n, int64_t sample) const {
    return state(n) + (in_lanes ? (padded_rows(p.batch) * p.dim + sample * p.hidden) * pixels : p.dim * pixels);
  }

  void store(int64_t n, const Group<T>& group, const T* from, bool past_caches) const {
    T* to = map(n, group.sample[0]);
    if (in_lanes)
      for_rows(
          [&](int64_t at, int64_t compact) { copy(from + at, maps.width * kLanes<T>, past_caches, to + compact); });
    else
      store_maps(from, saved_width(p) * pixels, p.dim, maps, group, maps.map, to, past_caches);
  }
  void store_hidden(int64_t n, const Group<T>& group, const T* z, bool past_caches) const {
    T* to = hidden(n, group.sample[0]);
    if (in_lanes)
      copy(z, p.hidden * maps.compact.size * kLanes<T>, past_caches, to);
    else
      store_maps(z, saved_width(p) * pixels, p.hidden, maps, group, maps.compact, to, past_caches);
  }
  void load(int64_t n, const Group<T>& group, T* to) const {
    const T* from = map(n, group.sample[0]);
    if (in_lanes)
      for_rows([&](int64_t at, int64_t compact) { copy(from + compact, maps.width * kLanes<T>, to + at); });
    else
      load_maps(from, saved_width(p) * pixels, p.dim, maps, group, maps.map, to);
    exchange_borders(maps, p.dim, to);
  }
  // z, compact: in place, or in `scratch`.
  const T* load_hidden(int64_t n, const Group<T>& group, T* scratch) const {
    const T* from = hidden(n, group.sample[0]);
    if (in_lanes) return from;
    load_maps(from, saved_width(p) * pixels, p.hidden, maps, group, maps.compact, scratch);
    return scratch;
  }

 private:
  // f(where a row of a map is, where it is when compact)
  template <class F>
  void for_rows(F f) const {
    for (int64_t c = 0; c < p.dim; c++)
      for (int64_t y = 0; y < maps.rows; y++) f(maps.map.at(c, y, 0) * kLanes<T>, maps.compact.at(c, y, 0) * kLanes<T>);
  }
};

// The direction of (15) over the pixels of channel c: probe ⊙ c. Projections of a group's maps: [W].
template <class T>
Vec<T> project(const Problem& p, const Maps& maps, const T* probe, const T* visible, const T* h) {
  Vec<T> total{};
  for (int64_t c = 0; c < p.dim; c++) {
    Vec<T> sum{};
    for (int64_t y = 0; y < p.height; y++)
      for (int64_t x = 0; x < p.width; x++)
        sum = fma(broadcast(probe[(c * p.height + y) * p.width + x]), load(h + maps.map.at(c, y, x) * kLanes<T>), sum);
    total = fma(broadcast(visible[c]), sum, total);
  }
  return total;
}

// How well a layer sees each channel [C]: see() of the convolution.
template <class T>
void see_channels(const Problem& p, const T* W, T* visible) {
  const int64_t taps = p.kernel * p.kernel;
  for (int64_t c = 0; c < p.dim; c++) visible[c] = T(0);
  for (int64_t m = 0; m < p.hidden; m++)
    for (int64_t c = 0; c < p.dim; c++)
      for (int64_t tap = 0; tap < taps; tap++) {
        const T entry = std::fabs(W[(m * p.dim + c) * taps + tap]);
        visible[c] = visible[c] >= entry ? visible[c] : entry;
      }
  over_largest(p.dim, visible);
}

// Groups that a thread takes through a layer before the next: for the cost of its points, and as many as fit the cache.
constexpr int64_t kForwardGroupBytes = 512 << 10;

template <class T>
int64_t forward_groups(const Problem& p, const Maps& maps) {
  const int64_t most = kForwardGroupBytes / (map_size<T>(maps, p.dim) * static_cast<int64_t>(sizeof(T)));
  return most < 1 ? 1 : most > maps.groups ? maps.groups : most;
}

template <class T>
struct ImageForwardScratch {
  LayerScratch<T> layer;
  GroupScratch<T> group;
  T* h;            // [groups] maps
  Mask<T>* valid;  // [groups, R]
  T* visible;      // [C]
};

template <class S, class T = Compute<S>>
ImageForwardScratch<T> image_forward_scratch(const Problem& p, const Maps& maps, Arena& arena) {
  const int64_t groups = forward_groups<T>(p, maps);
  return {layer_scratch<S>(p, maps, arena), group_scratch<T>(p, maps, false, block_tiles(p, maps), arena),
          arena.take<T>(groups * map_size<T>(maps, p.dim)), arena.take<Mask<T>>(groups * maps.rows),
          arena.take<T>(p.dim)};
}

template <class S, class T = Compute<S>>
size_t image_forward_workspace(const Problem& p) {
  const Maps maps = choose_maps<T>(p);
  Arena arena(nullptr);
  for (int t = 0; t < image_threads<T>(p, maps); t++) image_forward_scratch<S>(p, maps, arena);
  return arena.bytes();
}

// All steps for `count` groups from the first on.
template <class S, class T = Compute<S>>
void forward_group(const ForwardProblem& p, const Maps& maps, Activate<T> sigma, const ImageForwardScratch<T>& scratch,
                   int64_t first, int64_t count) {
  const int64_t stride = p.dim * p.height * p.width, size = map_size<T>(maps, p.dim);
  const auto steps = [&](int64_t i) {
    const Group<T> group = make_group<T>(maps, p.batch, first + i, scratch.valid + i * maps.rows);
    return ImageSteps<T>{p, maps, group, scratch.group};
  };
  fill_zeros(scratch.h, count * size);
  for (int64_t i = 0; i < count; i++) steps(i).load_samples(static_cast<const S*>(p.h), stride, scratch.h + i * size);
  const SavedMaps<T, T*> states = {static_cast<T*>(p.states), p, maps};
  const bool past_caches =
      saved_count(p) * (states.state(1) - states.state(0)) > kCachedBytes / static_cast<int64_t>(sizeof(T));
  T* checks = static_cast<T*>(p.checks);
  int64_t saved = 0, checked = 0;
  for (int64_t k = 0; k < p.depth && !stopped(p, k); k++) {
    const ImageLayer<T> weights = image_layer<S>(p, maps, k, scratch.layer);
    const bool save = p.save_every && k % p.save_every == 0 && (k > 0 || !p.reconstruct);
    const bool check = p.reconstruct && k > 0 && k % check_every(p.depth) == 0;
    if (check) see_channels(p, weights.weights, scratch.visible);
    for (int64_t i = 0; i < count; i++) {
      const ImageSteps<T> group = steps(i);
      T* h = scratch.h + i * size;
      if (save) states.store(saved, group.group, h, past_caches);
      if (check)
        store(saved_check<T>(checks, p, checked, first + i),
              project(p, maps, static_cast<const T*>(p.probe), scratch.visible, h));
      group.hidden_values(weights, h, scratch.group.z);
      if (saves_hidden(p)) states.store_hidden(saved, group.group, scratch.group.z, past_caches);
      group.advance(weights, sigma, scratch.group.z, h, h);
    }
    saved += save;
    checked += check;
  }
  for (int64_t i = 0; i < count; i++) {
    const Group<T> group = steps(i).group;
    const T* h = scratch.h + i * size;
    if (p.reconstruct) states.store(saved, group, h, false);
    store_maps(h, stride, p.dim, maps, group, maps.map, static_cast<S*>(p.y));
  }
  finish_streams();
}

// What is saved has room for more samples than there are: zeros there.
template <class T>
void clear_saved_padding(const ForwardProblem& p, const Maps& maps) {
  const SavedMaps<T, T*> states = {static_cast<T*>(p.states), p, maps};
  const int64_t samples = states.in_lanes ? maps.groups * kLanes<T> : p.batch;
  for (int64_t n = 0; n < saved_count(p); n++) {
    T *end = states.state(n + 1), *hidden = states.hidden(n, 0);
    if (!states.in_lanes || !saves_hidden(p)) hidden = end;
    T* padding = states.state(n) + samples * (states.in_lanes ? p.dim : saved_width(p)) * states.pixels;
    fill_zeros(padding, hidden - padding);
    if (hidden < end) fill_zeros(states.hidden(n, samples), end - states.hidden(n, samples));
  }
}

template <class S, class T = Compute<S>>
void forward_images(const ForwardProblem& p) {
  if (p.batch == 0) return;
  const Activate<T> sigma =
      with_activation(p.activation, [](auto a) -> Activate<T> { return activate<T, decltype(a)>; });
  const Maps maps = choose_maps<T>(p);
  clear_saved_padding<T>(p, maps);
  clear_checks<T>(p);
  const int64_t most = forward_groups<T>(p, maps);
  on_threads(image_threads<T>(p, maps), [&](int thread, int threads) {
    Arena arena(p.workspace);
    ImageForwardScratch<T> scratch{};
    for (int i = 0; i <= thread; i++) scratch = image_forward_scratch<S>(p, maps, arena);
    fill_zeros(scratch.group.s, map_size<T>(maps, p.hidden));
    const Range groups = part(maps.groups, thread, threads);
    for (int64_t g = groups.begin; g < groups.end; g += most)
      forward_group<S>(p, maps, sigma, scratch, g, smaller(most, groups.end - g));
  });
}

}  // namespace
}  // namespace odeblock
