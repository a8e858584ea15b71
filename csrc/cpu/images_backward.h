// The backward of the block on images, for one group of samples (maps.h) after the other, layer by layer from the top,
//
//   g = scale (Vᵀ * a) ⊙ sigma'(z),  dV = scale <a, s>,  dW = <g, h>,  a <- a + Wᵀ * g
//
// with <x, y> the correlations of correlation.h; dhidden_bias = Σ g and doutput_bias = scale Σ a over pixels and
// samples. What backward.h and reconstruction.h say of rows holds here of samples. A thread has a group for itself;
// sums over samples run in the order of the groups, whatever the threads.
#pragma once

#include "backward.h"
#include "correlation.h"
#include "images.h"

namespace odeblock {
namespace {

template <class T>
struct ImageBackwardScratch {
  LayerScratch<T> layer;
  GroupScratch<T> group;
  T *h, *a, *g;        // maps
  T* sums[2];          // points of dV and dW
  T* biases;           // sums of a and g
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
  scratch.layer = layer_scratch<S>(p, maps, arena);
  const int64_t convolution = block_tiles(p, maps),
                correlation = correlate_scratch(maps, p.dim > p.hidden ? p.dim : p.hidden);
  scratch.group = group_scratch<T>(p, maps, true, convolution > correlation ? convolution : correlation, arena);
  for (T** array : {&scratch.h, &scratch.a}) *array = arena.take<T>(map);
  scratch.g = arena.take<T>(map_size<T>(maps, p.hidden));
  for (T** array : {&scratch.sums[0], &scratch.sums[1]}) *array = arena.take<T>(points_size(maps, p.dim, p.hidden));
  scratch.biases = arena.take<T>(p.dim + p.hidden);
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
            if (stopped(p, k)) return;
            const ImageLayer<T> weights = image_layer<S>(p, maps, k, scratch.layer);
            T* z = p.keep_hidden ? slot + map : scratch.group.z;
            steps.hidden_values(weights, h, z);
            steps.advance(weights, sigma, z, h, slot);
          },
          [&](const T* h, int64_t k, const T* slot) {
            if (stopped(p, k)) return in_turn(k, [] {});
            const ImageLayer<T> weights = image_layer<S>(p, maps, k, scratch.layer);
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
      if (stopped(p, k)) {
        in_turn(k, [] {});
        continue;
      }
      const ImageLayer<T> weights = image_layer<S>(p, maps, k, scratch.layer);
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
    const Points<T> Vt = weights.V.transposed(), Wt = weights.W.transposed();
    T *a = scratch.a, *g = scratch.g, *s = scratch.group.s, *tiles = scratch.group.tiles;
    const Result<T> to_g = {g, maps.map, scale, nullptr, nullptr, scratch.group.slope, valid},
                    to_a = {a, maps.map, T(1), nullptr, a, nullptr, valid};
    if (!p.dV) {
      convolve(Vt, maps, a, tiles, to_g);
      exchange_borders(maps, p.hidden, g);
      convolve(Wt, maps, g, tiles, to_a);
      exchange_borders(maps, p.dim, a);
      return;
    }
    convolve_and_correlate(Vt, maps, a, s, p.hidden, tiles, scratch.sums[0], to_g);
    exchange_borders(maps, p.hidden, g);
    if (p.doutput_bias) channel_sums(maps, a, p.dim, scratch.biases);
    if (p.dhidden_bias) channel_sums(maps, g, p.hidden, scratch.biases + p.dim);
    convolve_and_correlate(Wt, maps, g, h, p.dim, tiles, scratch.sums[1], to_a);
    exchange_borders(maps, p.dim, a);
    in_turn(k, [&] {
      const int64_t matrix = matrix_size(p);
      const bool add = group > 0;
      gradient(p.dV, k, matrix, 0,
               [&](T* out) { add_correlation(maps, p.dim, p.hidden, scale, add, scratch.sums[0], out); });
      gradient(p.dW, k, matrix, matrix,
               [&](T* out) { add_correlation(maps, p.hidden, p.dim, T(1), add, scratch.sums[1], out); });
      gradient(p.dhidden_bias, k, p.hidden, 2 * matrix,
               [&](T* out) { add_sums(scratch.biases + p.dim, p.hidden, T(1), add, out); });
      gradient(p.doutput_bias, k, p.dim, 2 * matrix + p.hidden,
               [&](T* out) { add_sums(scratch.biases, p.dim, scale, add, out); });
    });
  }

  // add() to the gradients of layer k after the groups before this one have.
  template <class F>
  void in_turn(int64_t k, F add) {
    if (!p.dV) return;
    if (group > 0) {
      const int64_t before = group - 1;
      shared.progress[before % count].wait(before / count * p.depth + p.depth - k);
    }
    if (!stopped(p, k)) add();
    shared.progress[thread].advance();
  }

  // sum(out) to a gradient of layer k: to the array, or where that is narrower to the layer's sums, `at` from their
  // begin, and to the array after the last group.
  template <class F>
  void gradient(void* array, int64_t k, int64_t size, int64_t at, F sum) {
    if (!array) return;
    S* stored = static_cast<S*>(array) + k * size;
    if constexpr (kWidened<S>) {
      T* sums = shared.sums + (maps.groups == 1 ? 0 : k * layer_size(p)) + at;
      sum(sums);
      if (group == maps.groups - 1) narrow(sums, size, stored);
    } else {
      sum(stored);
    }
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
  if (p.batch == 0) return backward_of_none<S>(p, matrix_size(p));
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
