// The block on images: forward and backward of all L steps for a group of samples (maps.h) at a time, with products
// that are convolutions. What forward.h, backward.h and reconstruction.h say of rows holds here of samples.
//
//   z = W * h + hidden_bias,  s = sigma(z),  h <- h + scale (V * s + output_bias)
//   g = scale (Vᵀ * a) ⊙ sigma'(z),  dV = scale <a, s>,  dW = <g, h>,  a <- a + Wᵀ * g
//
// with <x, y> the correlations of correlation.h. Groups are too few for threads to share one; they take turns,
// and sums over samples run in the order of the groups, whatever the threads.
#pragma once

#include "backward.h"
#include "correlation.h"

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
LayerScratch<T> layer_scratch(const Problem& p, Arena& arena) {
  const int64_t points = points_size(p.kernel, p.dim, p.hidden);
  return {arena.take<T>(points), arena.take<T>(points), arena.take<T>(kWidened<S> ? layer_size(p) : 0)};
}

template <class S, class T = Compute<S>>
ImageLayer<T> image_layer(const Problem& p, int64_t k, const LayerScratch<T>& scratch) {
  const Layer<T> weights = layer<S>(p, k, scratch.widened);
  return {make_points(weights.V.data, p.dim, p.hidden, p.kernel, scratch.V),
          make_points(weights.W.data, p.hidden, p.dim, p.kernel, scratch.W), weights.hidden_bias, weights.output_bias,
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

template <class T>
GroupScratch<T> group_scratch(const Problem& p, const Maps& maps, bool backward, Arena& arena) {
  const int64_t channels = p.dim > p.hidden ? p.dim : p.hidden, convolution = convolve_scratch(maps, channels),
                correlation = backward ? correlate_scratch(maps, p.dim, p.hidden) : 0;
  const int64_t most = convolution > correlation ? convolution : correlation;
  return {arena.take<T>(compact_size<T>(maps, p.hidden)), arena.take<T>(backward ? compact_size<T>(maps, p.hidden) : 0),
          arena.take<T>(map_size<T>(maps, p.hidden)), arena.take<T>(most * kLanes<T>), arena.take<Mask<T>>(maps.rows)};
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
  Pointer state(int64_t n) const { return states + n * padded_rows(p.batch) * saved_width(p) * pixels; }
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

// ---- forward ---------------------------------------------------------------------------------------------

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
  return {layer_scratch<S>(p, arena), group_scratch<T>(p, maps, false, arena),
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
  for (int64_t k = 0; k < p.depth; k++) {
    const ImageLayer<T> weights = image_layer<S>(p, k, scratch.layer);
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

template <class S, class T = Compute<S>>
void forward_images(const ForwardProblem& p) {
  if (p.batch == 0) return;
  const Activate<T> sigma =
      with_activation(p.activation, [](auto a) -> Activate<T> { return activate<T, decltype(a)>; });
  const Maps maps = choose_maps<T>(p);
  // What is saved has room for more samples than there are.
  const SavedMaps<T, T*> states = {static_cast<T*>(p.states), p, maps};
  const int64_t samples = states.in_lanes ? maps.groups * kLanes<T> : p.batch;
  for (int64_t n = 0; n < saved_count(p); n++) {
    T *end = states.state(n + 1), *hidden = states.hidden(n, 0);
    if (!states.in_lanes || !saves_hidden(p)) hidden = end;
    T* padding = states.state(n) + samples * (states.in_lanes ? p.dim : saved_width(p)) * states.pixels;
    fill_zeros(padding, hidden - padding);
    if (hidden < end) fill_zeros(states.hidden(n, samples), end - states.hidden(n, samples));
  }
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

// ---- backward --------------------------------------------------------------------------------------------

template <class T>
struct ImageBackwardScratch {
  LayerScratch<T> layer;
  GroupScratch<T> group;
  T *h, *a, *g;        // maps
  T* sums;             // points of a gradient
  T* slots;            // [slots] of a map, and of z if kept
  T *x, *f;            // maps           adjoint, and below
  T *top, *anchor;     // maps: h_L, and a state that is known
  T* increments;       // [kHistory] maps
  RowMemory<T>* rows;  // of the group
  T* visible[2];       // of every vector of a map
  T* channels;         // [C]
};

template <class T>
int64_t slot_size(const Problem& p, const Maps& maps) {
  return map_size<T>(maps, p.dim) + (p.keep_hidden ? compact_size<T>(maps, p.hidden) : 0);
}

template <class S, class T = Compute<S>>
ImageBackwardScratch<T> image_backward_scratch(const Problem& p, const Maps& maps, Arena& arena) {
  const int64_t map = map_size<T>(maps, p.dim), adjoint = p.reconstruct ? 1 : 0;
  ImageBackwardScratch<T> scratch{};
  scratch.layer = layer_scratch<S>(p, arena);
  scratch.group = group_scratch<T>(p, maps, true, arena);
  for (T** array : {&scratch.h, &scratch.a}) *array = arena.take<T>(map);
  scratch.g = arena.take<T>(map_size<T>(maps, p.hidden));
  scratch.sums = arena.take<T>(points_size(p.kernel, p.dim, p.hidden));
  scratch.slots = arena.take<T>(!p.reconstruct && p.save_every > 1 ? p.slots * slot_size<T>(p, maps) : 0);
  for (T** array : {&scratch.x, &scratch.f, &scratch.top, &scratch.anchor}) *array = arena.take<T>(adjoint * map);
  scratch.increments = arena.take<T>(adjoint * kHistory * map);
  scratch.rows = arena.take<RowMemory<T>>(adjoint);
  for (T** array : {&scratch.visible[0], &scratch.visible[1]}) *array = arena.take<T>(adjoint * map / kLanes<T>);
  scratch.channels = arena.take<T>(adjoint * p.dim);
  return scratch;
}

// What the threads share; `sums` as in BackwardShared.
template <class T>
struct ImageShared {
  Progress* progress;
  ReconstructionReport* reports;
  T* sums;
};

template <class S, class T = Compute<S>>
ImageShared<T> image_shared(const Problem& p, const Maps& maps, Arena& arena) {
  const int threads = image_threads<T>(p, maps);
  return {arena.take<Progress>(threads), arena.take<ReconstructionReport>(threads),
          arena.take<T>(kWidened<S> ? (maps.groups == 1 ? 1 : p.depth) * layer_size(p) : 0)};
}

template <class S, class T = Compute<S>>
size_t image_backward_workspace(const Problem& p) {
  if (p.batch == 0) return 0;
  const Maps maps = choose_maps<T>(p);
  Arena arena(nullptr);
  image_shared<S>(p, maps, arena);
  for (int t = 0; t < image_threads<T>(p, maps); t++) image_backward_scratch<S>(p, maps, arena);
  return arena.bytes();
}

// A layer as the reconstruction of a group sees it.
template <class T>
struct ImageField {
  const ImageLayer<T>& weights;
  const ImageSteps<T>& steps;
  ActivateSlope<T> sigma;

  void evaluate(const T* x, T* f) {
    steps.hidden_values(weights, x, steps.scratch.z);
    steps.activate_slopes(sigma, steps.scratch.z);
    steps.residual(weights, nullptr, f);
  }
  void correct(const T* change) {
    T* z = steps.scratch.z;
    convolve(weights.W, steps.maps, change, steps.scratch.tiles, {z, steps.maps.compact, T(1), nullptr, z});
    steps.activate_slopes(sigma, z);
  }
};

template <class S>
class ImageBackward {
  typedef Compute<S> T;

 public:
  ImageBackward(const BackwardProblem& problem, const Maps& layout, const ImageShared<T>& common, Arena arena,
                int number, int threads)
      : p(problem), maps(layout), shared(common), thread(number), count(threads) {
    sigma = with_activation(p.activation, [](auto a) -> Activate<T> { return activate<T, decltype(a)>; });
    sigma_slope =
        with_activation(p.activation, [](auto a) -> ActivateSlope<T> { return activate_slope<T, decltype(a)>; });
    for (int i = 0; i <= thread; i++) scratch = image_backward_scratch<S>(p, maps, arena);
  }

  void run() {
    clear_borders();
    for (group = thread; group < maps.groups; group += count) {
      const ImageSteps<T> steps = {p, maps, make_group<T>(maps, p.batch, group, scratch.group.valid), scratch.group};
      const int64_t stride = p.dim * p.height * p.width;
      steps.load_samples(static_cast<const S*>(p.grad), stride, scratch.a);
      if (p.reconstruct)
        sweep_reconstructed(steps);
      else
        sweep_saved(steps);
      store_maps(scratch.a, stride, p.dim, maps, steps.group, maps.map, static_cast<S*>(p.dh));
    }
    shared.reports[thread] = report;
  }

 private:
  // Everything that a product reads around its map.
  void clear_borders() {
    const int64_t map = map_size<T>(maps, p.dim), hidden = map_size<T>(maps, p.hidden);
    fill_zeros(scratch.group.s, hidden);
    fill_zeros(scratch.g, hidden);
    fill_zeros(scratch.h, map);
    fill_zeros(scratch.a, map);
    if (!p.reconstruct) {
      fill_zeros(scratch.slots, p.save_every > 1 ? p.slots * slot_size<T>(p, maps) : 0);
      return;
    }
    for (T* array : {scratch.x, scratch.f, scratch.top, scratch.anchor}) fill_zeros(array, map);
    fill_zeros(scratch.increments, kHistory * map);
  }

  // store and checkpoint: segment after segment from the top.
  void sweep_saved(const ImageSteps<T>& steps) {
    const int64_t K = p.save_every, map = map_size<T>(maps, p.dim);
    const SavedMaps<T, const T*> states = {static_cast<const T*>(p.states), p, maps};
    for (int64_t n = (p.depth - 1) / K; n >= 0; n--) {
      const int64_t bottom = n * K, top = bottom + K < p.depth ? bottom + K : p.depth;
      states.load(n, steps.group, scratch.h);
      const T* saved = nullptr;
      if (saves_hidden(p)) saved = states.load_hidden(n, steps.group, scratch.group.z);
      sweep_chain<T>(
          scratch.h, bottom, top, p.slots, [&](int64_t j) { return scratch.slots + j * slot_size<T>(p, maps); },
          [&](const T* h, int64_t k, T* slot) {
            const ImageLayer<T> weights = image_layer<S>(p, k, scratch.layer);
            T* z = p.keep_hidden ? slot + map : scratch.group.z;
            steps.hidden_values(weights, h, z);
            steps.advance(weights, sigma, z, h, slot);
          },
          [&](const T* h, int64_t k, const T* slot) {
            const ImageLayer<T> weights = image_layer<S>(p, k, scratch.layer);
            const T* z = p.keep_hidden && slot ? slot + map : saved;
            if (!z) steps.hidden_values(weights, h, scratch.group.z);
            steps.activate_slopes(sigma_slope, z ? z : scratch.group.z);
            adjoint_step(steps, weights, k, h);
          });
    }
  }

  // adjoint: every state from the one above; at an anchor from what the forward saved.
  void sweep_reconstructed(const ImageSteps<T>& steps) {
    const int64_t features = map_size<T>(maps, p.dim) / kLanes<T>, real = p.batch - steps.group.sample[0];
    const SavedMaps<T, const T*> states = {static_cast<const T*>(p.states), p, maps};
    const T* checks = static_cast<const T*>(p.checks);
    T* h = scratch.h;
    states.load(saved_count(p) - 1, steps.group, h);
    copy(h, features * kLanes<T>, scratch.top);
    Reconstruction<T> reconstruction = {scratch.rows,
                                        scratch.increments,
                                        features * kLanes<T>,
                                        scratch.x,
                                        scratch.f,
                                        scratch.visible[0],
                                        scratch.visible[1],
                                        change_unit<T>(kUnit<S>, p.depth),
                                        state_limit<T>(kUnit<S>, p.depth),
                                        report};
    reconstruction.reset(0, 1, features);
    const auto compare = [&](const T* truth) {
      measure_drift(real, features, 1, p.depth, scratch.visible[0], Blocks<T>{truth, features}, h, scratch.top,
                    scratch.rows, reconstruction.report);
    };
    for (int64_t k = p.depth - 1; k >= 0; k--) {
      const ImageLayer<T> weights = image_layer<S>(p, k, scratch.layer);
      see_channels(p, weights.weights, scratch.channels);
      for (int64_t i = 0; i < features; i++) scratch.visible[1][i] = scratch.channels[i / maps.map.size];
      reconstruction.enter(features);
      ImageField<T> field = {weights, steps, sigma_slope};
      reconstruction.template solve<1>(field, is_smooth(p), features, real, p.depth - 1 - k, 0, h);
      if (k > 0 && k % check_every(p.depth) == 0) {
        store(scratch.x, project(p, maps, static_cast<const T*>(p.probe), scratch.channels, h));
        measure_projection(saved_check<T>(checks, p, k / check_every(p.depth) - 1, group), scratch.x,
                           scratch.visible[1], real, 1, features, h, reconstruction.report);
        fill_zeros(scratch.x, kLanes<T>);  // a border again
        scratch.rows[0].peak = Vec<T>{};
      }
      adjoint_step(steps, weights, k, h);
      if (p.save_every && k > 0 && k % p.save_every == 0) {
        states.load(k / p.save_every - 1, steps.group, scratch.anchor);
        compare(scratch.anchor);
        copy(scratch.anchor, features * kLanes<T>, h);
      }
    }
    reconstruction.finish(0, real, p.depth);
    steps.load_samples(static_cast<const S*>(p.h), p.dim * p.height * p.width, scratch.anchor);
    compare(scratch.anchor);
    report = reconstruction.report;
  }

  // From s = sigma(z) and its slope, in the scratch, at h.
  void adjoint_step(const ImageSteps<T>& steps, const ImageLayer<T>& weights, int64_t k, const T* h) {
    const T scale = static_cast<T>(p.scale);
    const Mask<T>* valid = steps.group.valid;
    T *a = scratch.a, *g = scratch.g, *tiles = scratch.group.tiles;
    convolve(weights.V.transposed(), maps, a, tiles,
             {g, maps.map, scale, nullptr, nullptr, scratch.group.slope, valid});
    exchange_borders(maps, p.hidden, g);
    if (p.dV) weight_gradients(k, h);
    convolve(weights.W.transposed(), maps, g, tiles, {a, maps.map, T(1), nullptr, a, nullptr, valid});
    exchange_borders(maps, p.dim, a);
  }

  // After the groups before this one have left theirs.
  void weight_gradients(int64_t k, const T* h) {
    const T scale = static_cast<T>(p.scale), *a = scratch.a, *g = scratch.g, *s = scratch.group.s;
    if (group > 0) {
      const int64_t before = group - 1;
      shared.progress[before % count].wait(before / count * p.depth + p.depth - k);
    }
    const bool add = group > 0, last = group == maps.groups - 1;
    T* sums = shared.sums + (maps.groups == 1 ? 0 : k * layer_size(p));
    const auto gradient = [&](void* array, int64_t size, auto sum) {
      if (!array) return;
      S* stored = static_cast<S*>(array) + k * size;
      if constexpr (kWidened<S>) {
        sum(sums);
        if (last) narrow(sums, size, stored);
        sums += size;
      } else {
        sum(stored);
      }
    };
    gradient(p.dV, matrix_size(p), [&](T* out) {
      correlate(maps, a, p.dim, s, p.hidden, scale, add, scratch.group.tiles, scratch.sums, out);
    });
    gradient(p.dW, matrix_size(p), [&](T* out) {
      correlate(maps, g, p.hidden, h, p.dim, T(1), add, scratch.group.tiles, scratch.sums, out);
    });
    gradient(p.dhidden_bias, p.hidden, [&](T* out) { channel_sums(maps, g, p.hidden, T(1), add, out); });
    gradient(p.doutput_bias, p.dim, [&](T* out) { channel_sums(maps, a, p.dim, scale, add, out); });
    shared.progress[thread].advance();
  }

  const BackwardProblem& p;
  const Maps& maps;
  const ImageShared<T>& shared;
  const int thread, count;  // this one of those there are
  int64_t group;            // the current one
  Activate<T> sigma;
  ActivateSlope<T> sigma_slope;
  ImageBackwardScratch<T> scratch;
  ReconstructionReport report;
};

template <class S>
void backward_images(const BackwardProblem& p) {
  if (p.batch == 0) {
    clear<S>(p.dV, p.depth * matrix_size(p));
    clear<S>(p.dW, p.depth * matrix_size(p));
    clear<S>(p.dhidden_bias, p.depth * p.hidden);
    clear<S>(p.doutput_bias, p.depth * p.dim);
    return;
  }
  typedef Compute<S> T;
  const Maps maps = choose_maps<T>(p);
  const int threads = image_threads<T>(p, maps);
  Arena arena(p.workspace);
  const ImageShared<T> shared = image_shared<S>(p, maps, arena);
  for (int i = 0; i < threads; i++) {
    new (&shared.progress[i]) Progress();
    shared.reports[i] = {};
  }
  on_threads(threads, [&](int thread, int count) { ImageBackward<S>(p, maps, shared, arena, thread, count).run(); });
  for (int i = 0; i < threads; i++) {
    if (i > 0) shared.reports[0].merge(shared.reports[i]);
    shared.progress[i].~Progress();
  }
  if (p.reconstruct) write_report(p, shared.reports[0]);
}

}  // namespace
}  // namespace odeblock
