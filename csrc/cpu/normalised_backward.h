// The backward of the block on images with batch normalisation (normalised.h). Of x with x' = (x - mean) / sqrt(var +
// ε), n values of each channel and dy = d loss / d BN(x),
//
//   dweight = Σ dy x',  dshift = Σ dy,  dx = weight / sqrt(var + ε) (dy - dshift / n - x' dweight / n)
//
// so with a = d loss / d h_{k+1}, from the top,
//
//   do = dx of scale a at o,    ds = Vᵀ * do,  dV = <do, s>,  doutput_bias = Σ do
//   dz = dx of ds ⊙ sigma' at z,  a <- a + Wᵀ * dz,  dW = <dz, h>,  dhidden_bias = Σ dz
//
// (<x, y>: correlation.h). The sums over the batch are why threads meet, twice a layer. Where states are run forward
// again mean and variance are known, and a group is by itself.
#pragma once

#include "correlation.h"
#include "normalised.h"

namespace odeblock {
namespace {

// Of a channel: Σ dy and Σ dy (x - mean).
struct GradientSums {
  double shift, weight;
};

// sums [channels] of a group; dy: a map, zero where there is no pixel; x: compact.
template <class T>
ODEBLOCK_NOINLINE void sum_gradients(const Maps& maps, const Group<T>& group, int64_t channels, const T* dy, const T* x,
                                     const Scaling<T>* by, GradientSums* sums) {
  for (int64_t c = 0; c < channels; c++) {
    const Vec<T> mean = broadcast(by[c].mean);
    sums[c].shift = lane_sum<T>(pixel_sum(maps, group, c, [&](int64_t, int64_t at) { return load(dy + at); }));
    sums[c].weight = lane_sum<T>(pixel_sum(
        maps, group, c, [&](int64_t compact, int64_t at) { return load(dy + at) * (load(x + compact) - mean); }));
  }
}

// dx = by_dy dy + by_x (x - mean) + offset
template <class T>
struct Pull {
  T mean, by_dy, by_x, offset;
};

// Of all groups; dy is `scale` times what was summed. Also dweight and dshift [channels], where they are asked for.
template <class T>
void make_pulls(const GradientSums* sums, int64_t groups, int64_t channels, double count, double scale,
                const Scaling<T>* by, Pull<T>* pulls, T* dweight, T* dshift) {
  for (int64_t c = 0; c < channels; c++) {
    GradientSums all = {0, 0};
    for (int64_t g = 0; g < groups; g++) {
      all.shift += sums[g * channels + c].shift;
      all.weight += sums[g * channels + c].weight;
    }
    const double inverse = by[c].inverse, factor = scale * by[c].factor;
    pulls[c] = {by[c].mean, static_cast<T>(factor), static_cast<T>(-factor * inverse * inverse * all.weight / count),
                static_cast<T>(-factor * all.shift / count)};
    if (!dweight) continue;
    dweight[c] = static_cast<T>(scale * inverse * all.weight);
    dshift[c] = static_cast<T>(scale * all.shift);
  }
}

// out = dx, a map; may be dy.
template <class T>
ODEBLOCK_NOINLINE void pull_normalisation(const Maps& maps, const Group<T>& group, int64_t channels,
                                          const Pull<T>* pulls, const T* x, const T* dy, T* out) {
  constexpr int W = kLanes<T>;
  for (int64_t c = 0; c < channels; c++) {
    const Vec<T> mean = broadcast(pulls[c].mean), by_dy = broadcast(pulls[c].by_dy), by_x = broadcast(pulls[c].by_x),
                 offset = broadcast(pulls[c].offset);
    for (int64_t y = 0; y < maps.rows; y++) {
      const T* values = x + maps.compact.at(c, y, 0) * W;
      const int64_t at = maps.map.at(c, y, 0) * W;
      for (int64_t i = 0; i < maps.width * W; i += W) {
        const Vec<T> dx = fma(by_dy, load(dy + at + i), fma(by_x, load(values + i) - mean, offset));
        store(out + at + i, group.valid ? select(group.valid[y], dx, Vec<T>{}) : dx);
      }
    }
  }
  exchange_borders(maps, channels, out);
}

template <class T>
struct NormalisedBackwardShared {
  Barrier* barrier;
  NormalisedGroups<T> groups;
  GradientSums* sums[2];     // [groups, M], [groups, C]
  T *h, *a, *s, *g, *slope;  // [groups]: maps of C, C, M and M channels; compact
  T* slots;                  // [slots] states as they are saved
  T* products[2];            // [groups] points of dV, of dW
  T* biases;                 // [groups, C + M]
};

template <class T>
NormalisedBackwardShared<T> normalised_backward_shared(const Problem& p, const Maps& maps, Arena& arena) {
  NormalisedBackwardShared<T> shared = {arena.take<Barrier>(1),
                                        normalised_groups<T>(p, maps, arena),
                                        {},
                                        nullptr,
                                        nullptr,
                                        nullptr,
                                        nullptr,
                                        nullptr,
                                        nullptr,
                                        {},
                                        nullptr};
  const int64_t n = maps.groups, map = n * map_size<T>(maps, p.dim), hidden = n * map_size<T>(maps, p.hidden);
  shared.sums[0] = arena.take<GradientSums>(n * p.hidden);
  shared.sums[1] = arena.take<GradientSums>(n * p.dim);
  for (T** array : {&shared.h, &shared.a}) *array = arena.take<T>(map);
  for (T** array : {&shared.s, &shared.g}) *array = arena.take<T>(hidden);
  shared.slope = arena.take<T>(n * compact_size<T>(maps, p.hidden));
  shared.slots = arena.take<T>(p.save_every > 1 ? p.slots * SavedMaps<T, T*>{nullptr, p, maps}.size() : 0);
  for (T*& array : shared.products) array = arena.take<T>(n * points_size(maps, p.dim, p.hidden));
  shared.biases = arena.take<T>(n * (p.dim + p.hidden));
  return shared;
}

template <class T>
struct NormalisedBackwardScratch {
  NormalisedScratch<T> steps;
  T* output;       // do, a map
  Pull<T>* pulls;  // [M or C]
  T* gradient;     // of a layer's matrix
};

template <class S, class T = Compute<S>>
NormalisedBackwardScratch<T> normalised_backward_scratch(const Problem& p, const Maps& maps, Arena& arena) {
  const int64_t channels = p.dim > p.hidden ? p.dim : p.hidden, convolution = block_tiles(p, maps),
                correlation = correlate_scratch(maps, channels);
  return {normalised_scratch<S>(p, maps, convolution > correlation ? convolution : correlation, arena),
          arena.take<T>(map_size<T>(maps, p.dim)), arena.take<Pull<T>>(channels),
          arena.take<T>(kWidened<S> ? matrix_size(p) : 0)};
}

template <class S, class T = Compute<S>>
size_t normalised_backward_workspace(const Problem& p) {
  const Maps maps = choose_maps<T>(p);
  Arena arena(nullptr);
  normalised_backward_shared<T>(p, maps, arena);
  for (int t = 0; t < image_threads<T>(p, maps); t++) normalised_backward_scratch<S>(p, maps, arena);
  return arena.bytes();
}

// What one of `threads` threads does.
template <class S>
class NormalisedBackward {
  typedef Compute<S> T;

 public:
  NormalisedBackward(const NormalisedBackwardProblem& problem, const Maps& layout,
                     const NormalisedBackwardShared<T>& common, const NormalisedBackwardScratch<T>& own, int number,
                     int all)
      : p(problem), maps(layout), shared(common), scratch(own), thread(number), threads(all) {
    sigma = with_activation(p.activation, [](auto a) -> Activate<T> { return activate<T, decltype(a)>; });
    sigma_slope =
        with_activation(p.activation, [](auto a) -> ActivateSlope<T> { return activate_slope<T, decltype(a)>; });
    mine = part(maps.groups, thread, threads);
  }

  void run() {
    for_groups([&](int64_t g, const NormalisedSteps<T>& steps) {
      for (T* array : {shared.h, shared.a}) fill_zeros(array + g * map, map);
      for (T* array : {shared.s, shared.g}) fill_zeros(array + g * hidden_map, hidden_map);
      steps.load_samples(static_cast<const S*>(p.grad), shared.a + g * map);
    });
    fill_zeros(scratch.steps.s, hidden_map);
    fill_zeros(scratch.output, map);
    const int64_t K = p.save_every;
    const SavedMaps<T, const T*> states = {static_cast<const T*>(p.states), p, maps};
    for (int64_t n = (p.depth - 1) / K; n >= 0; n--) {
      const int64_t bottom = n * K, top = smaller(bottom + K, p.depth);
      sweep_chain<T>(
          states.state(n), bottom, top, p.slots, [&](int64_t j) { return shared.slots + j * states.size(); },
          [&](const T* state, int64_t k, T* next) { advance(state, k, next); },
          [&](const T* state, int64_t k, const T*) { descend(state, k); });
    }
    shared.barrier->wait(threads);
    if (thread == threads - 1) finish_hidden(0);
    for_groups([&](int64_t g, const NormalisedSteps<T>& steps) {
      store_maps(shared.a + g * map, p.dim * p.height * p.width, p.dim, maps, steps.group, maps.map,
                 static_cast<S*>(p.dh));
    });
  }

 private:
  template <class F>
  void for_groups(F f) const {
    for (int64_t g = mine.begin; g < mine.end; g++)
      f(g, NormalisedSteps<T>{p, maps, shared.groups.group(p.batch, g), scratch.steps});
  }

  ImageLayer<T> begin_layer(int64_t k) const {
    for (int i : {0, 1}) {
      const int64_t channels = i == 0 ? p.hidden : p.dim;
      make_scalings(p.norm, i, k, channels, static_cast<const T*>(p.norm.mean[i]) + k * channels,
                    static_cast<const T*>(p.norm.variance[i]) + k * channels, scratch.steps.of[i]);
    }
    return image_layer<S>(p, maps, k, scratch.steps.layer);
  }

  // h of a group, of a saved state.
  T* load_state(const T* state, int64_t g, const NormalisedSteps<T>& steps) const {
    SavedMaps<T, const T*>{state, p, maps}.load(0, steps.group, shared.h + g * map);
    return shared.h + g * map;
  }

  // The state of layer k to the next one, by the operations of the forward.
  void advance(const T* state, int64_t k, T* next) const {
    if (stopped(p, k)) return;
    const ImageLayer<T> weights = begin_layer(k);
    for_groups([&](int64_t g, const NormalisedSteps<T>& steps) {
      T *z = shared.groups.hidden_values(g), *o = shared.groups.outputs(g), *h = load_state(state, g, steps);
      steps.hidden_values(weights, h, z);
      steps.activate(z, scratch.steps.s, [&](int64_t, int64_t count, T* row) { sigma(row, count, row); });
      steps.outputs(weights, scratch.steps.s, o);
      steps.advance(o, h, h);
      SavedMaps<T, T*>{next, p, maps}.store(0, steps.group, h, false);
    });
  }

  // a and the gradients of layer k, from its state.
  void descend(const T* state, int64_t k) const {
    const bool skip = stopped(p, k);  // threads may disagree, and go on to meet
    const double count = static_cast<double>(p.batch) * static_cast<double>(p.height * p.width);
    Pull<T>* pulls = scratch.pulls;
    ImageLayer<T> weights{};
    if (!skip) {
      weights = begin_layer(k);
      for_groups([&](int64_t g, const NormalisedSteps<T>& steps) {
        T *z = shared.groups.hidden_values(g), *o = shared.groups.outputs(g), *s = shared.s + g * hidden_map,
          *slope = slope_of(g);
        steps.hidden_values(weights, load_state(state, g, steps), z);
        steps.activate(z, s, [&](int64_t at, int64_t size, T* row) { sigma_slope(row, size, row, slope + at); });
        steps.outputs(weights, s, o);
        sum_gradients(maps, steps.group, p.dim, shared.a + g * map, o, scratch.steps.of[1], shared.sums[1] + g * p.dim);
      });
    }
    shared.barrier->wait(threads);
    if (thread == threads - 1 && k + 1 < p.depth) finish_hidden(k + 1);
    if (!skip) {
      make_pulls(shared.sums[1], maps.groups, p.dim, count, p.scale, scratch.steps.of[1], pulls,
                 part_of(p.dweight[1], k, p.dim), part_of(p.dshift[1], k, p.dim));
      const Points<T> Vt = weights.V.transposed();
      for_groups([&](int64_t g, const NormalisedSteps<T>& steps) {
        T* dn = shared.g + g * hidden_map;
        pull_normalisation(maps, steps.group, p.dim, pulls, shared.groups.outputs(g), shared.a + g * map,
                           scratch.output);
        if (p.doutput_bias) channel_sums(maps, scratch.output, p.dim, biases(g));
        through(Vt, scratch.output, shared.s + g * hidden_map, p.hidden, 0, g,
                {dn, maps.map, T(1), nullptr, nullptr, slope_of(g), steps.group.valid});
        sum_gradients(maps, steps.group, p.hidden, dn, shared.groups.hidden_values(g), scratch.steps.of[0],
                      shared.sums[0] + g * p.hidden);
      });
    }
    shared.barrier->wait(threads);
    if (skip) return;
    if (thread == 0) finish_output(k);
    make_pulls(shared.sums[0], maps.groups, p.hidden, count, 1.0, scratch.steps.of[0], pulls,
               part_of(p.dweight[0], k, p.hidden), part_of(p.dshift[0], k, p.hidden));
    const Points<T> Wt = weights.W.transposed();
    for_groups([&](int64_t g, const NormalisedSteps<T>& steps) {
      T *dz = shared.g + g * hidden_map, *a = shared.a + g * map;
      pull_normalisation(maps, steps.group, p.hidden, pulls, shared.groups.hidden_values(g), dz, dz);
      if (p.dhidden_bias) channel_sums(maps, dz, p.hidden, biases(g) + p.dim);
      through(Wt, dz, shared.h + g * map, p.dim, 1, g, {a, maps.map, T(1), nullptr, a, nullptr, steps.group.valid});
    });
  }

  // A * x to its result, and where gradients are asked for <x, y> to product i of group g.
  void through(const Points<T>& A, const T* x, const T* y, int64_t cols, int i, int64_t g,
               const Result<T>& result) const {
    if (p.dV)
      convolve_and_correlate(A, maps, x, y, cols, scratch.steps.tiles, product(i, g), result);
    else
      convolve(A, maps, x, scratch.steps.tiles, result);
  }

  T* slope_of(int64_t g) const { return shared.slope + g * compact_size<T>(maps, p.hidden); }
  T* product(int i, int64_t g) const { return shared.products[i] + g * points_size(maps, p.dim, p.hidden); }
  T* biases(int64_t g) const { return shared.biases + g * (p.dim + p.hidden); }
  // Of layer k, on the thread that writes it.
  T* part_of(void* array, int64_t k, int64_t channels) const {
    return array && thread == 0 ? static_cast<T*>(array) + k * channels : nullptr;
  }

  void finish_output(int64_t k) const {
    finish(k, 0, p.dim, p.hidden, p.dV);
    finish_bias(k, 0, p.dim, p.doutput_bias);
  }
  void finish_hidden(int64_t k) const {
    if (stopped(p, k)) return;
    finish(k, 1, p.hidden, p.dim, p.dW);
    finish_bias(k, p.dim, p.hidden, p.dhidden_bias);
  }
  // The gradient of layer k, from the products i of all groups in their order.
  void finish(int64_t k, int i, int64_t rows, int64_t cols, void* array) const {
    if (!array) return;
    T* sums = product(i, 0);
    add_groups(points_size(maps, p.dim, p.hidden), points_size(maps, p.dim, p.hidden), sums);
    S* stored = static_cast<S*>(array) + k * matrix_size(p);
    if constexpr (kWidened<S>) {
      add_correlation(maps, rows, cols, T(1), false, sums, scratch.gradient);
      narrow(scratch.gradient, matrix_size(p), stored);
    } else {
      add_correlation(maps, rows, cols, T(1), false, sums, stored);
    }
  }
  void finish_bias(int64_t k, int64_t at, int64_t channels, void* array) const {
    if (!array) return;
    T* sums = biases(0) + at;
    add_groups(p.dim + p.hidden, channels, sums);
    S* stored = static_cast<S*>(array) + k * channels;
    if constexpr (kWidened<S>)
      narrow(sums, channels, stored);
    else
      for (int64_t c = 0; c < channels; c++) stored[c] = sums[c];
  }
  // To `size` numbers those of the other groups, `step` apart.
  void add_groups(int64_t step, int64_t size, T* sums) const {
    for (int64_t g = 1; g < maps.groups; g++)
      for (int64_t j = 0; j < size; j++) sums[j] += sums[g * step + j];
  }

  const NormalisedBackwardProblem& p;
  const Maps& maps;
  const NormalisedBackwardShared<T>& shared;
  const NormalisedBackwardScratch<T>& scratch;
  const int thread, threads;
  const int64_t map = map_size<T>(maps, p.dim), hidden_map = map_size<T>(maps, p.hidden);
  Range mine;
  Activate<T> sigma;
  ActivateSlope<T> sigma_slope;
};

template <class S, class T = Compute<S>>
void normalised_backward(const NormalisedBackwardProblem& p) {
  const Maps maps = choose_maps<T>(p);
  Arena arena(p.workspace);
  const NormalisedBackwardShared<T> shared = normalised_backward_shared<T>(p, maps, arena);
  new (shared.barrier) Barrier();
  on_threads(image_threads<T>(p, maps), [&](int thread, int threads) {
    Arena own = arena;
    NormalisedBackwardScratch<T> scratch{};
    for (int i = 0; i <= thread; i++) scratch = normalised_backward_scratch<S>(p, maps, own);
    NormalisedBackward<S>(p, maps, shared, scratch, thread, threads).run();
  });
  shared.barrier->~Barrier();
}

}  // namespace
}  // namespace odeblock
