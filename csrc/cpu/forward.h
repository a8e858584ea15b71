// The forward on the CPU: all L steps for the rows of a tile before the next tile, so that their states stay
// in cache. Threads take ranges of rows and never meet.
#pragma once

#include <cmath>

#include "threads.h"
#include "tiles.h"

namespace odeblock {
namespace {

// Rows' states that a thread carries through all steps: at most half an L2 cache. Fewer would stream the weights of all
// layers through the cache more often.
constexpr int64_t kForwardTileBytes = 256 << 10;

// A parallel region costs some 5 microseconds; below this many multiply-adds a thread is not worth it.
constexpr double kWorkPerThread = 1e5;

template <class T>
int64_t forward_tile_blocks(int64_t dim) {
  const int64_t blocks = kForwardTileBytes / (dim * kLanes<T> * static_cast<int64_t>(sizeof(T)));
  return blocks < 3 ? 3 : blocks / 3 * 3;
}

template <class T>
int forward_threads(const Problem& p) {
  const double work = 2.0 * p.batch * p.dim * p.hidden * p.depth / kWorkPerThread;
  int64_t n = block_count<T>(p.batch);
  if (n > p.threads) n = p.threads;
  if (n > work) n = static_cast<int64_t>(work);
  return n < 1 ? 1 : static_cast<int>(n);
}

// The weights of one layer.
template <class T>
struct Layer {
  Matrix<T> V, W;
  const T *hidden_bias, *output_bias;  // or null
};

// Elements of V or W, and of all weights, of one layer.
ODEBLOCK_INLINE int64_t matrix_size(const Problem& p) {
  return p.dim * p.hidden * (p.kernel ? p.kernel * p.kernel : 1);
}
ODEBLOCK_INLINE int64_t layer_size(const Problem& p) { return 2 * matrix_size(p) + p.hidden + p.dim; }

// Whether layer k is to be skipped: the call was ended.
ODEBLOCK_INLINE bool stopped(const Problem& p, int64_t k) { return p.stop && p.stop->at(k); }

// The weights of layer k: in place, or widened to `scratch` [layer_size], which the next call overwrites.
template <class S, class T = Compute<S>>
Layer<T> layer(const Problem& p, int64_t k, T* scratch) {
  const auto at = [&](const void* array, int64_t size) -> const T* {
    if (!array) return nullptr;
    const S* stored = static_cast<const S*>(array) + k * size;
    if constexpr (kWidened<S>) {
      T* widened = scratch;
      scratch += size;
      widen(stored, size, widened);
      return widened;
    } else {
      return stored;
    }
  };
  const T* V = at(p.V, matrix_size(p));
  const T* W = at(p.W, matrix_size(p));
  const T* hidden_bias = at(p.hidden_bias, p.hidden);
  const T* output_bias = at(p.output_bias, p.dim);
  return {{V, p.dim, p.hidden}, {W, p.hidden, p.dim}, hidden_bias, output_bias};
}

// The most bytes of weights that are fetched ahead: a layer that fills the L2 cache would only evict itself.
constexpr int64_t kFetchedBytes = 512 << 10;

// The same, and the layer k + direction is fetched into the cache by its first products: those of the first slab,
// after which next is to be set to null.
template <class S, class T = Compute<S>>
Layer<T> layer(const Problem& p, int64_t k, int64_t direction, T* scratch) {
  Layer<T> weights = layer<S>(p, k, scratch);
  const bool fits = 2 * p.dim * p.hidden * static_cast<int64_t>(sizeof(T)) <= kFetchedBytes;
  if (!kWidened<S> && fits && k + direction >= 0 && k + direction < p.depth)
    for (Matrix<T>* A : {&weights.V, &weights.W}) A->next = A->data + direction * p.dim * p.hidden;
  return weights;
}

// What takes more bytes will not be found in a cache by who reads it next: saved states and gradients of this size are
// written past the caches, so that their lines are not read first.
constexpr int64_t kCachedBytes = 8 << 20;

// Elements a row of a slot.
ODEBLOCK_INLINE int64_t slot_width(const Problem& p) { return p.dim + (p.keep_hidden ? p.hidden : 0); }

// Saved state number n of block b: [q, W].
template <class T, class Pointer>
ODEBLOCK_INLINE Pointer saved_state(Pointer states, const Problem& p, int64_t n, int64_t b) {
  return states + n * padded_rows(p.batch) * saved_width(p) + b * kLanes<T> * p.dim;
}

// And z there: [m, W]; where it is saved.
template <class T, class Pointer>
ODEBLOCK_INLINE Pointer saved_hidden(Pointer states, const Problem& p, int64_t n, int64_t b) {
  return saved_state<T>(states, p, n, 0) + padded_rows(p.batch) * p.dim + b * kLanes<T> * p.hidden;
}

ODEBLOCK_INLINE int64_t saved_count(const Problem& p) {
  if (p.reconstruct) return (p.save_every ? (p.depth - 1) / p.save_every : 0) + 1;
  return p.save_every ? (p.depth - 1) / p.save_every + 1 : 0;
}

// Where the projections of check number n of block b are: [W].
template <class T, class Pointer>
ODEBLOCK_INLINE Pointer saved_check(Pointer checks, const Problem& p, int64_t n, int64_t b) {
  return checks + n * ((p.batch + kRowPadding - 1) / kRowPadding * kRowPadding) + b * kLanes<T>;
}

template <class T>
ODEBLOCK_INLINE void copy(const T* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store(to + i, load(from + i));
}

// The same, if asked past the caches where that is possible.
template <class T>
ODEBLOCK_INLINE void copy(const T* from, int64_t count, bool past_caches, T* to) {
  if (!past_caches || reinterpret_cast<uintptr_t>(to) % ODEBLOCK_VECTOR_BYTES) return copy(from, count, to);
  for (int64_t i = 0; i < count; i += kLanes<T>) stream(to + i, load(from + i));
}

// next = h + scale (V sigma(W h + hidden_bias) + output_bias) for a slab of N blocks; next may be h.
// z: scratch of N blocks of m features; keep(z) may copy it before it becomes sigma(z).
template <class T, int N, class Keep>
ODEBLOCK_INLINE void step(const Layer<T>& layer, Activate<T> sigma, T scale, const T* h, T* z, Keep keep, T* next) {
  product<T, false, N>(layer.W, h, layer.hidden_bias, T(1), nullptr, z);
  keep(z);
  sigma(z, N * layer.W.rows * kLanes<T>, z);
  product<T, false, N>(layer.V, z, layer.output_bias, scale, h, next);
}

template <class T>
constexpr T kTiny = sizeof(T) == 4 ? T(1.1754943508222875e-38) : T(2.2250738585072014e-308);

// c [q], how well a layer sees each feature: the largest entry of a column of its W [m, q] over the largest of all.
// In two steps, for whoever has only some of the rows.
template <class S, class T = Compute<S>>
void see_rows(const S* W, int64_t rows, int64_t cols, T* c) {
  for (int64_t i = 0; i < cols; i++) c[i] = T(0);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < cols; i++) {
      const T entry = std::fabs(widen(W[r * cols + i]));
      c[i] = c[i] >= entry ? c[i] : entry;
    }
}
template <class T>
void over_largest(int64_t count, T* c) {
  T most = kTiny<T>;
  for (int64_t i = 0; i < count; i++) most = most >= c[i] ? most : c[i];
  for (int64_t i = 0; i < count; i++) c[i] = c[i] < most ? c[i] / most : T(1);  // also where it is not finite
}
template <class T>
void see(const Matrix<T>& W, T* c) {
  see_rows(W.data, W.rows, W.cols, c);
  over_largest(W.cols, c);
}

// The direction of (15) at a layer: probe ⊙ c, both [q].
template <class T>
void check_direction(const T* probe, const T* c, int64_t dim, T* direction) {
  for (int64_t i = 0; i < dim; i++) direction[i] = probe[i] * c[i];
}

template <class T>
struct ForwardScratch {
  T* h;        // a tile's states
  T* z;        // a slab's hidden units
  T* weights;  // a layer's, where they are widened
  T* visible;  // [q] and
  T* probe;    // [q] direction of a check (15), where the adjoint will compare
};

template <class S, class T = Compute<S>>
ForwardScratch<T> forward_scratch(const Problem& p, Arena& arena) {
  return {arena.take<T>(forward_tile_blocks<T>(p.dim) * p.dim * kLanes<T>), arena.take<T>(3 * p.hidden * kLanes<T>),
          arena.take<T>(kWidened<S> ? layer_size(p) : 0), arena.take<T>(p.dim), arena.take<T>(p.dim)};
}

template <class S>
size_t forward_workspace(const Problem& p) {
  Arena arena(nullptr);
  for (int t = 0; t < forward_threads<Compute<S>>(p); t++) forward_scratch<S>(p, arena);
  return arena.bytes();
}

// All steps for the blocks [first, first + count), at most a tile.
template <class S, class T = Compute<S>>
void forward_tile(const ForwardProblem& p, Activate<T> sigma, const ForwardScratch<T>& scratch, int64_t first,
                  int64_t count) {
  const int64_t block = p.dim * kLanes<T>;
  T *states = static_cast<T*>(p.states), *checks = static_cast<T*>(p.checks);
  const bool past_caches = saved_count(p) * p.batch * saved_width(p) * static_cast<int64_t>(sizeof(T)) > kCachedBytes;
  const Matrix<T> direction = {scratch.probe, 1, p.dim};
  load_blocks(static_cast<const S*>(p.h), p.batch, p.dim, first, count, scratch.h);
  int64_t saved = 0, checked = 0;
  for (int64_t k = 0; k < p.depth && !stopped(p, k); k++) {
    Layer<T> weights = layer<S>(p, k, 1, scratch.weights);
    const bool save = p.save_every && k % p.save_every == 0 && (k > 0 || !p.reconstruct);
    const bool check = p.reconstruct && k > 0 && k % check_every(p.depth) == 0;
    if (check) {
      see(weights.W, scratch.visible);
      check_direction(static_cast<const T*>(p.probe), scratch.visible, p.dim, scratch.probe);
    }
    for_slabs(0, count, [&](int64_t b, auto width) {
      constexpr int N = decltype(width)::value;
      T* h = scratch.h + b * block;
      if (save) copy(h, N * block, past_caches, saved_state<T>(states, p, saved, first + b));
      if (check)
        product<T, false, N>(direction, h, nullptr, T(1), nullptr, saved_check<T>(checks, p, checked, first + b));
      const auto keep = [&](const T* z) {
        if (saves_hidden(p))
          copy(z, N * p.hidden * kLanes<T>, past_caches, saved_hidden<T>(states, p, saved, first + b));
      };
      step<T, N>(weights, sigma, static_cast<T>(p.scale), h, scratch.z, keep, h);
      weights.V.next = weights.W.next = nullptr;
    });
    saved += save;
    checked += check;
  }
  if (p.reconstruct) copy(scratch.h, count * block, saved_state<T>(states, p, saved, first));
  store_blocks(scratch.h, p.batch, p.dim, first, count, static_cast<S*>(p.y));
  finish_streams();
}

template <class T>
ODEBLOCK_INLINE void fill_zeros(T* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = T(0);
}

// What is saved has room for more rows: zeros where no block reaches.
template <class T>
void clear_checks(const ForwardProblem& p) {
  T* checks = static_cast<T*>(p.checks);
  for (int64_t n = 0; p.reconstruct && n < (p.depth - 1) / check_every(p.depth); n++) {
    T* end = saved_check<T>(checks, p, n + 1, 0);
    for (T* x = saved_check<T>(checks, p, n, block_count<T>(p.batch)); x < end; x++) *x = T(0);
  }
}

template <class T>
void clear_padding(const ForwardProblem& p) {
  T* states = static_cast<T*>(p.states);
  const int64_t blocks = block_count<T>(p.batch), rows = padded_rows(p.batch) - blocks * kLanes<T>;
  for (int64_t n = 0; n < saved_count(p); n++) {
    fill_zeros(saved_state<T>(states, p, n, blocks), rows * p.dim);
    if (saves_hidden(p)) fill_zeros(saved_hidden<T>(states, p, n, blocks), rows * p.hidden);
  }
  clear_checks<T>(p);
}

template <class S, class T = Compute<S>>
void forward(const ForwardProblem& p) {
  if (p.batch == 0) return;
  const Activate<T> sigma =
      with_activation(p.activation, [](auto a) -> Activate<T> { return activate<T, decltype(a)>; });
  clear_padding<T>(p);
  const int64_t tile = forward_tile_blocks<T>(p.dim);
  on_threads(forward_threads<T>(p), [&](int thread, int threads) {
    Arena arena(p.workspace);
    ForwardScratch<T> scratch{};
    for (int i = 0; i <= thread; i++) scratch = forward_scratch<S>(p, arena);
    const Range blocks = part(block_count<T>(p.batch), thread, threads);
    for (int64_t b = blocks.begin; b < blocks.end; b += tile)
      forward_tile<S>(p, sigma, scratch, b, b + tile < blocks.end ? tile : blocks.end - b);
  });
}

}  // namespace
}  // namespace odeblock
