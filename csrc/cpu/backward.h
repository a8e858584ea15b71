// The backward on the CPU: the exact adjoint of the discrete network, layer by layer from the top,
//
//   u = scale Vᵀa,  g = u ⊙ sigma'(z)
//   dV = scale Σ_rows a sᵀ,  dW = Σ_rows g hᵀ,  dhidden_bias = Σ_rows g,  doutput_bias = scale Σ_rows a
//   a <- a + Wᵀg
//
// for the rows of a tile before the next tile. Within a layer each thread first takes its rows through the
// equations for u, g and a, and leaves a, s, g, h in panels; after a barrier it sums its share of dV and dW
// over all rows of the tile. No sum is ever split between threads: the result does not depend on their number.
//
// States h_k come from segments of K layers, run forward again from the saved h_0, h_K, .. (K = 1: every one
// was saved), or, for the adjoint (K = 0), from the reconstruction below.
#pragma once

#include "barrier.h"
#include "forward.h"
#include "reconstruction.h"

namespace odeblock {
namespace {

// Rows of a tile: enough to amortise a barrier per layer and to keep sums long, few enough for the L2 caches.
constexpr int64_t kBackwardTileBytes = 256 << 10;  // of states; the working set is about ten times that

template <class T>
int64_t backward_tile_blocks(const Problem& p) {
  int64_t blocks = kBackwardTileBytes / (p.dim * kLanes<T> * static_cast<int64_t>(sizeof(T)));
  blocks = blocks < 12 ? 12 : blocks / 3 * 3;
  const int64_t all = block_count<T>(p.batch);
  return blocks < all ? blocks : all;
}

template <class T>
int backward_threads(const Problem& p) {
  const double work = 6.0 * p.batch * p.dim * p.hidden / kWorkPerThread;  // between two barriers
  int n = p.threads;
  if (n > work) n = static_cast<int>(work);
  return n < 1 ? 1 : n;
}

// a, s, g, h of all rows of a tile at one layer, regrouped for the sums over rows.
template <class T>
struct Panels {
  T *a, *s, *g, *h;
};

// What a tile shares between threads. Two sets of panels: the next layer is packed while a slower thread
// still sums this one, so one barrier per layer is enough.
template <class T>
struct BackwardTile {
  T* a;                           // [blocks, q, W]
  T* h;                           // [blocks, q, W]        adjoint
  T* increments[2];               // [blocks, q, W]        adjoint: Δ_{k+1} and Δ_{k+2}
  T* segment;                     // [K, blocks, q, W]     checkpoint, K > 1
  Panels<T> panels[2];            //                       where weights need gradients
  T* sums;                        // [1 or L, layer_size]  gradients of narrower types before they are rounded
  ReconstructionReport* reports;  // [threads]
};

template <class S, class T = Compute<S>>
BackwardTile<T> backward_tile(const Problem& p, Arena& arena) {
  const int64_t blocks = backward_tile_blocks<T>(p), rows = blocks * p.dim * kLanes<T>;
  const bool adjoint = p.save_every == 0;
  BackwardTile<T> tile{};
  tile.a = arena.take<T>(rows);
  tile.h = arena.take<T>(adjoint ? rows : 0);
  for (T*& increment : tile.increments) increment = arena.take<T>(adjoint ? rows : 0);
  tile.segment = arena.take<T>(p.save_every > 1 ? rows * p.save_every : 0);
  for (Panels<T>& panels : tile.panels) {
    panels.a = arena.take<T>(packed_size<T, kPanelX>(p.dim, blocks));
    panels.s = arena.take<T>(packed_size<T, kPanelY>(p.hidden, blocks));
    panels.g = arena.take<T>(packed_size<T, kPanelX>(p.hidden, blocks));
    panels.h = arena.take<T>(packed_size<T, kPanelY>(p.dim, blocks));
  }
  const bool one_tile = blocks == block_count<T>(p.batch);
  tile.sums = arena.take<T>(kWidened<S> ? (one_tile ? 1 : p.depth) * layer_size(p) : 0);
  tile.reports = arena.take<ReconstructionReport>(backward_threads<T>(p));
  return tile;
}

// What a thread needs for one slab.
template <class T>
struct SlabScratch {
  T *z, *u, *x, *f;  // [3, m, W], [3, m, W], [3, q, W], [3, q, W]
  T* weights;        // a layer's, where they are widened
};

template <class S, class T = Compute<S>>
SlabScratch<T> slab_scratch(const Problem& p, Arena& arena) {
  const int64_t hidden = 3 * p.hidden * kLanes<T>, rows = 3 * p.dim * kLanes<T>;
  return {arena.take<T>(hidden), arena.take<T>(hidden), arena.take<T>(rows), arena.take<T>(rows),
          arena.take<T>(kWidened<S> ? layer_size(p) : 0)};
}

template <class S>
size_t backward_workspace(const Problem& p) {
  Arena arena(nullptr);
  backward_tile<S>(p, arena);
  for (int t = 0; t < backward_threads<Compute<S>>(p); t++) slab_scratch<S>(p, arena);
  return arena.bytes();
}

template <class S>
class Backward {
  typedef Compute<S> T;

 public:
  Backward(const BackwardProblem& problem, Barrier& meeting, int thread, int threads)
      : p(problem),
        barrier(meeting),
        t(thread),
        n(threads),
        scale(static_cast<T>(problem.scale)),
        block(p.dim * kLanes<T>) {
    sigma = with_activation(p.activation, [](auto a) -> Activate<T> { return activate<T, decltype(a)>; });
    sigma_backward =
        with_activation(p.activation, [](auto a) -> ActivateBackward<T> { return activate_backward<T, decltype(a)>; });
    Arena arena(p.workspace);
    tile = backward_tile<S>(p, arena);
    for (int i = 0; i <= t; i++) scratch = slab_scratch<S>(p, arena);
  }

  void run() {
    const int64_t all = block_count<T>(p.batch), size = backward_tile_blocks<T>(p);
    for (first = 0; first < all; first += size) {
      // Threads own other rows of the last, smaller tile, and the panels of its first layer may be in use.
      if (first > 0) barrier.wait(n);
      count = first + size < all ? size : all - first;
      mine = part(count, t, n);
      T* a = tile.a + mine.begin * block;
      load_blocks(static_cast<const S*>(p.grad), p.batch, p.dim, first + mine.begin, mine.end - mine.begin, a);
      if (p.save_every)
        sweep_segments();
      else
        sweep_reconstructed();
      store_blocks(a, p.batch, p.dim, first + mine.begin, mine.end - mine.begin, static_cast<S*>(p.dh));
    }
    if (p.save_every == 0) merge_reports();
  }

 private:
  // store and checkpoint: segment after segment, its states first forward from the saved one, then backward.
  void sweep_segments() {
    const int64_t K = p.save_every;
    const T* states = static_cast<const T*>(p.states);
    for (int64_t saved = (p.depth - 1) / K; saved >= 0; saved--) {
      const int64_t bottom = saved * K, top = bottom + K < p.depth ? bottom + K : p.depth;
      if (K > 1) rebuild(saved_state<T>(states, p, saved, first), bottom, top);
      for (int64_t k = top - 1; k >= bottom; k--) {
        const T* h = K > 1 ? segment_state(k - bottom) : saved_state<T>(states, p, saved, first);
        const Layer<T> weights = layer<S>(p, k, scratch.weights);
        for_slabs(mine.begin, mine.end,
                  [&](int64_t b, auto width) { adjoint_step<decltype(width)::value>(weights, k, b, h + b * block); });
        weight_gradients(k);
      }
    }
  }

  T* segment_state(int64_t i) { return tile.segment + i * backward_tile_blocks<T>(p) * block; }

  // The states of the layers bottom .. top-1, from the first of them; the same operations as the forward.
  void rebuild(const T* h, int64_t bottom, int64_t top) {
    copy(h + mine.begin * block, (mine.end - mine.begin) * block, segment_state(0) + mine.begin * block);
    for (int64_t k = bottom; k < top - 1; k++) {
      const Layer<T> weights = layer<S>(p, k, scratch.weights);
      for_slabs(mine.begin, mine.end, [&](int64_t b, auto width) {
        step<T, decltype(width)::value>(weights, sigma, scale, segment_state(k - bottom) + b * block, scratch.z,
                                        segment_state(k - bottom + 1) + b * block);
      });
    }
  }

  // adjoint: every state from the one above.
  void sweep_reconstructed() {
    const T* top = saved_state<T>(static_cast<const T*>(p.states), p, 0, first) + mine.begin * block;
    copy(top, (mine.end - mine.begin) * block, tile.h + mine.begin * block);
    for (int64_t k = p.depth - 1; k >= 0; k--) {
      const Layer<T> weights = layer<S>(p, k, scratch.weights);
      const int64_t history = p.depth - 1 - k;
      for_slabs(mine.begin, mine.end, [&](int64_t b, auto width) {
        constexpr int N = decltype(width)::value;
        const int64_t at = b * block, rows = p.batch - (first + b) * kLanes<T>;
        reconstruct<T, N>(weights, sigma, scale, rows, history, tile.increments[history % 2 ^ 1] + at,
                          tile.increments[history % 2] + at, scratch.x, scratch.z, scratch.f, tile.h + at, report);
        adjoint_step<N>(weights, k, b, tile.h + at);
      });
      weight_gradients(k);
    }
    measure_drift(static_cast<const S*>(p.h), p.batch, p.dim, first + mine.begin, mine.end - mine.begin,
                  tile.h + mine.begin * block, top, report);
  }

  // The equations above for one slab of N blocks, the b-th of the tile; leaves its panels.
  template <int N>
  void adjoint_step(const Layer<T>& weights, int64_t k, int64_t b, const T* h) {
    constexpr int W = kLanes<T>;
    T* a = tile.a + b * block;
    T *s = scratch.z, *g = scratch.u;
    product<T, false, N>(weights.W, h, weights.hidden_bias, T(1), nullptr, scratch.z);
    product<T, true, N>({weights.V.data, p.hidden, p.dim}, a, nullptr, scale, nullptr, scratch.u);
    sigma_backward(scratch.z, scratch.u, N * p.hidden * W, s, g);
    if (p.dV) {
      const Panels<T>& panels = tile.panels[k % 2];
      for (int j = 0; j < N; j++) {
        pack<T, kPanelX>(a + j * block, p.dim, b + j, count, panels.a);
        pack<T, kPanelY>(s + j * p.hidden * W, p.hidden, b + j, count, panels.s);
        pack<T, kPanelX>(g + j * p.hidden * W, p.hidden, b + j, count, panels.g);
        pack<T, kPanelY>(h + j * block, p.dim, b + j, count, panels.h);
      }
    }
    product<T, true, N>({weights.W.data, p.dim, p.hidden}, g, nullptr, T(1), a, a);
  }

  // This thread's share of the sums over the rows of the tile.
  void weight_gradients(int64_t k) {
    if (!p.dV) return;
    barrier.wait(n);
    const Panels<T>& panels = tile.panels[k % 2];
    const bool accumulate = first > 0, last = first + count == block_count<T>(p.batch);
    const Range output = part((p.dim + kPanelX - 1) / kPanelX, t, n);
    const Range hidden = part((p.hidden + kPanelX - 1) / kPanelX, t, n);
    T* sums = tile.sums + (first == 0 && last ? 0 : k * layer_size(p));  // dV, dW and the biases', if narrowed

    // Calls sum(where to) for this thread's rows of a gradient [rows, cols] of layer k, the `panels` of it.
    const auto gradient = [&](void* array, Range panels, int64_t rows, int64_t cols, auto sum) {
      if (!array) return;
      S* stored = static_cast<S*>(array) + k * rows * cols;
      if constexpr (kWidened<S>) {
        sum(sums);
        const int64_t begin = panels.begin * kPanelX, end = panels.end * kPanelX < rows ? panels.end * kPanelX : rows;
        if (last && begin < end) narrow(sums + begin * cols, (end - begin) * cols, stored + begin * cols);
        sums += rows * cols;
      } else {
        sum(stored);
      }
    };
    gradient(p.dV, output, p.dim, p.hidden, [&](T* out) {
      outer_product(panels.a, p.dim, output.begin, output.end, panels.s, p.hidden, count, scale, accumulate, out);
    });
    gradient(p.dW, hidden, p.hidden, p.dim, [&](T* out) {
      outer_product(panels.g, p.hidden, hidden.begin, hidden.end, panels.h, p.dim, count, T(1), accumulate, out);
    });
    gradient(p.dhidden_bias, hidden, p.hidden, 1,
             [&](T* out) { row_sum(panels.g, p.hidden, hidden.begin, hidden.end, count, T(1), accumulate, out); });
    gradient(p.doutput_bias, output, p.dim, 1,
             [&](T* out) { row_sum(panels.a, p.dim, output.begin, output.end, count, scale, accumulate, out); });
  }

  void merge_reports() {
    tile.reports[t] = report;
    barrier.wait(n);
    if (t != 0) return;
    for (int i = 1; i < n; i++) report.merge(tile.reports[i]);
    p.report[0] = report.change;
    p.report[1] = report.drift;
    p.report[2] = report.evaluations / (static_cast<double>(p.batch) * static_cast<double>(p.depth));
  }

  const BackwardProblem& p;
  Barrier& barrier;
  const int t, n;  // this thread, of how many
  const T scale;
  const int64_t block;  // elements of a block of states
  Activate<T> sigma;
  ActivateBackward<T> sigma_backward;
  BackwardTile<T> tile;
  SlabScratch<T> scratch;
  ReconstructionReport report;
  int64_t first, count;  // blocks of the current tile
  Range mine;            // those of them that this thread takes through the layers
};

// Gradients of no rows at all.
template <class S>
void clear(void* array, int64_t count) {
  for (int64_t i = 0; array && i < count; i++) static_cast<S*>(array)[i] = S{};
}

template <class S>
void backward(const BackwardProblem& p) {
  if (p.batch == 0) {
    clear<S>(p.dV, p.depth * p.dim * p.hidden);
    clear<S>(p.dW, p.depth * p.dim * p.hidden);
    clear<S>(p.dhidden_bias, p.depth * p.hidden);
    clear<S>(p.doutput_bias, p.depth * p.dim);
    return;
  }
  [[maybe_unused]] const int threads = backward_threads<Compute<S>>(p);
  Barrier barrier;
#pragma omp parallel num_threads(threads) if (threads > 1)
  Backward<S>(p, barrier, omp_get_thread_num(), omp_get_num_threads()).run();
}

}  // namespace
}  // namespace odeblock
