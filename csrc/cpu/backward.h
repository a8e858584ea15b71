// The backward on the CPU: the exact adjoint of the discrete network, layer by layer from the top,
//
//   u = scale Vᵀa,  g = u ⊙ sigma'(z)
//   dV = scale Σ_rows a sᵀ,  dW = Σ_rows g hᵀ,  dhidden_bias = Σ_rows g,  doutput_bias = scale Σ_rows a
//   a <- a + Wᵀg
//
// for the rows of a tile before the next tile. Teams of threads, mostly of one thread, take the tiles in turn. At each
// layer a tile's share of dV and dW is summed over its rows, then added to what the tiles before it have left there: a
// team waits until the one before it has passed that layer. No sum depends on the number of threads.
//
// Within a team of several threads, where there are fewer tiles than threads, each thread first takes its rows through
// the equations for u, g and a, and leaves s and h in panels; after a barrier it sums its share of dV and dW over all
// rows of the tile.
//
// States h_k come from segments of K layers, run forward again from the saved h_0, h_K, .. (K = 1: every one
// was saved), or, for the adjoint, from the reconstruction in reconstruction.h.
#pragma once

#include <new>

#include "chain.h"
#include "forward.h"
#include "reconstruction.h"

namespace odeblock {
namespace {

// Rows of a tile: so few that a batch makes several tiles, for as many threads, and that a tile and its layer stay in
// the L2 cache; so many, 128 in wide layers, that reading and writing dV and dW once per tile costs little beside sums
// over its rows.
constexpr int64_t kTiles = 8, kTileRows = 64, kWideTileRows = 128;
constexpr int64_t kBackwardTileBytes = 128 << 10;  // of states

template <class T>
int64_t backward_tiles(const Problem& p) {
  int64_t most = kBackwardTileBytes / (p.dim * static_cast<int64_t>(sizeof(T)));
  if (most < kWideTileRows) most = kWideTileRows;
  int64_t rows = p.batch / kTiles < most ? p.batch / kTiles : most;
  if (rows < kTileRows) rows = (p.batch + 1) / 2 < kTileRows ? (p.batch + 1) / 2 : kTileRows;
  const int64_t fewest = 2 * kLanes<T> < 16 ? 16 : 2 * kLanes<T>;  // two blocks share what they load of the weights
  if (rows < fewest) rows = fewest;
  return (p.batch + rows - 1) / rows;
}

// Blocks of the largest tile.
template <class T>
int64_t backward_tile_blocks(const Problem& p) {
  const int64_t tiles = backward_tiles<T>(p);
  return (block_count<T>(p.batch) + tiles - 1) / tiles;
}

// Multiply-adds a thread of a team and layer, between two barriers, from which on another thread is worth it.
constexpr double kWorkPerLayer = 2.5e4;

// `teams` teams of `size` threads.
struct Teams {
  int teams, size;
};

ODEBLOCK_INLINE Teams make_teams(int threads, int64_t tiles) {
  const int teams = threads < tiles ? threads : static_cast<int>(tiles);
  return {teams, threads / teams};
}

template <class T>
int backward_threads(const Problem& p) {
  const double work = 6.0 * p.batch * p.dim * p.hidden;
  int n = p.threads;
  if (n > work * p.depth / kWorkPerThread) n = static_cast<int>(work * p.depth / kWorkPerThread);
  if (n <= 1) return 1;
  const Teams crew = make_teams(n, backward_tiles<T>(p));
  const double most = work / crew.teams / kWorkPerLayer;
  return crew.teams * (crew.size > most ? (most < 1 ? 1 : static_cast<int>(most)) : crew.size);
}

// Whether dV and dW are written past the caches where they are written once: they would not stay there anyway, and
// their rows are whole lines.
template <class S>
bool gradients_pass_caches(const BackwardProblem& p) {
  const int64_t bytes = 2 * p.depth * p.dim * p.hidden * static_cast<int64_t>(sizeof(S));
  const uintptr_t ends = reinterpret_cast<uintptr_t>(p.dV) | reinterpret_cast<uintptr_t>(p.dW) |
                         static_cast<uintptr_t>(p.dim) * sizeof(S) | static_cast<uintptr_t>(p.hidden) * sizeof(S);
  return !kWidened<S> && bytes > kCachedBytes && ends % 64 == 0;
}

// What a team shares. One barrier per layer is enough, because the next layer has other places for what a slower thread
// still sums: layer k reads a at k % 3 and leaves the next at (k - 1) % 3, the rest is at k % 2. A team of one thread
// does with k % 2 and one.
template <class T>
struct BackwardTile {
  T* a[3];             // [blocks, q, W]
  T* g[2];             // [blocks, m, W]
  T* s[2];             // panels [m / W, blocks W, W]  where weights need gradients
  T* h_panels[2];      // panels [q / W, blocks W, W]
  T* h;                // [blocks, q, W]            adjoint
  T* increments;       // [kHistory, blocks, q, W]  adjoint
  RowMemory<T>* rows;  // [blocks]                  adjoint
  T* slots;            // [slots] of [blocks, q, W] and, if kept, [blocks, m, W]: a state, z of the layer below it
                       // checkpoint, K > 1
};

template <class T>
BackwardTile<T> backward_tile(const Problem& p, int size, Arena& arena) {
  const int64_t blocks = backward_tile_blocks<T>(p), rows = blocks * p.dim * kLanes<T>;
  BackwardTile<T> tile{};
  for (int i = 0; i < (size > 1 ? 3 : 2); i++) tile.a[i] = arena.take<T>(rows);
  for (int i = 0; i < (size > 1 ? 2 : 1); i++) {
    tile.g[i] = arena.take<T>(blocks * p.hidden * kLanes<T>);
    tile.s[i] = arena.take<T>(packed_size<T>(p.hidden, blocks));
    tile.h_panels[i] = arena.take<T>(packed_size<T>(p.dim, blocks));
  }
  tile.h = arena.take<T>(p.reconstruct ? rows : 0);
  tile.increments = arena.take<T>(p.reconstruct ? kHistory * rows : 0);
  tile.rows = arena.take<RowMemory<T>>(p.reconstruct ? blocks : 0);
  const int64_t slot = blocks * slot_width(p) * kLanes<T>;
  tile.slots = arena.take<T>(!p.reconstruct && p.save_every > 1 ? p.slots * slot : 0);
  return tile;
}

// What a thread needs for one slab.
template <class T>
struct SlabScratch {
  T *z, *s, *slope;  // [3, m, W]
  T *x, *f;          // [3, q, W]  adjoint
  T* visible[2];     // [q]        adjoint: visibility to the layers so far, and to one
  T* probe;          // [q]        adjoint: direction of a check (15)
  T* weights;        // a layer's, where they are widened
};

template <class S, class T = Compute<S>>
SlabScratch<T> slab_scratch(const Problem& p, Arena& arena) {
  const int64_t hidden = 3 * p.hidden * kLanes<T>, rows = p.reconstruct ? 3 * p.dim * kLanes<T> : 0;
  SlabScratch<T> scratch{};
  for (T** array : {&scratch.z, &scratch.s, &scratch.slope}) *array = arena.take<T>(hidden);
  for (T** array : {&scratch.x, &scratch.f}) *array = arena.take<T>(rows);
  for (T** array : {&scratch.visible[0], &scratch.visible[1], &scratch.probe})
    *array = arena.take<T>(p.reconstruct ? p.dim : 0);
  scratch.weights = arena.take<T>(kWidened<S> ? layer_size(p) : 0);
  return scratch;
}

// What all threads share: the way they wait for each other, what each has seen, and the sums of gradients that are
// stored in a narrower type.
template <class T>
struct BackwardShared {
  Progress* progress;             // [threads] layers whose sums a thread has left
  Barrier* barriers;              // [threads], one a team
  ReconstructionReport* reports;  // [threads]
  T* sums;                        // [1 or L, layer_size]
};

template <class S, class T = Compute<S>>
BackwardShared<T> backward_shared(const Problem& p, Arena& arena) {
  const int threads = backward_threads<T>(p);
  const bool one_tile = backward_tiles<T>(p) == 1;
  return {arena.take<Progress>(threads), arena.take<Barrier>(threads), arena.take<ReconstructionReport>(threads),
          arena.take<T>(kWidened<S> ? (one_tile ? 1 : p.depth) * layer_size(p) : 0)};
}

template <class S, class T = Compute<S>>
size_t backward_workspace(const Problem& p) {
  if (p.batch == 0) return 0;
  Arena arena(nullptr);
  backward_shared<S>(p, arena);
  const int threads = backward_threads<T>(p);
  const Teams crew = make_teams(threads, backward_tiles<T>(p));
  for (int i = 0; i < crew.teams; i++) backward_tile<T>(p, crew.size, arena);
  for (int t = 0; t < threads; t++) slab_scratch<S>(p, arena);
  return arena.bytes();
}

inline void write_report(const BackwardProblem& p, const ReconstructionReport& report) {
  const double steps = static_cast<double>(p.batch) * static_cast<double>(p.depth);
  p.report[0] = report.estimate;
  p.report[1] = report.drift;
  p.report[2] = report.evaluations / steps;
  p.report[3] = report.order / steps;
}

// Of the table in activations.h relu (1) and leaky_relu (2) have kinks.
ODEBLOCK_INLINE bool is_smooth(const Problem& p) { return p.activation != 1 && p.activation != 2; }

// A layer as the reconstruction of a slab of N blocks sees it; z, s, slope: [N, m, W].
template <class T, int N>
struct SlabField {
  const Layer<T>& weights;
  ActivateSlope<T> sigma;
  T scale;
  T *z, *s, *slope;

  void evaluate(const T* x, T* f) {
    product<T, false, N>(weights.W, x, weights.hidden_bias, T(1), nullptr, z);
    sigma(z, N * weights.W.rows * kLanes<T>, s, slope);
    product<T, false, N>(weights.V, s, weights.output_bias, scale, nullptr, f);
  }
  void correct(const T* change) {
    product<T, false, N>(weights.W, change, nullptr, T(1), z, z);
    sigma(z, N * weights.W.rows * kLanes<T>, s, slope);
  }
};

template <class S>
class Backward {
  typedef Compute<S> T;

 public:
  // Thread t of those that form the teams.
  Backward(const BackwardProblem& problem, const BackwardShared<T>& common, Arena arena, Teams crew, int thread)
      : p(problem),
        shared(common),
        teams(crew.teams),
        n(crew.size),
        team(thread / crew.size),
        t(thread % crew.size),
        scale(static_cast<T>(problem.scale)),
        block(p.dim * kLanes<T>) {
    sigma = with_activation(p.activation, [](auto a) -> Activate<T> { return activate<T, decltype(a)>; });
    sigma_slope =
        with_activation(p.activation, [](auto a) -> ActivateSlope<T> { return activate_slope<T, decltype(a)>; });
    for (int i = 0; i < teams; i++) {
      const BackwardTile<T> next = backward_tile<T>(p, n, arena);
      if (i == team) tile = next;
    }
    for (int i = 0; i <= thread; i++) scratch = slab_scratch<S>(p, arena);
  }

  void run() {
    const int64_t all = block_count<T>(p.batch);
    tiles = backward_tiles<T>(p);
    past_caches = tiles == 1 && gradients_pass_caches<S>(p);
    for (number = team; number < tiles; number += teams) {
      // Threads own other rows of a smaller tile, and the panels of its first layer may be in use.
      if (number > team) shared.barriers[team].wait(n);
      const Range blocks = part(all, number, tiles);
      first = blocks.begin;
      count = blocks.end - blocks.begin;
      mine = part(count, t, n);
      const int64_t begin = first + mine.begin, mine_count = mine.end - mine.begin, at = mine.begin * block;
      load_blocks(static_cast<const S*>(p.grad), p.batch, p.dim, begin, mine_count, adjoint(p.depth - 1) + at);
      if (p.reconstruct)
        sweep_reconstructed();
      else
        sweep_saved();
      store_blocks(adjoint(-1) + at, p.batch, p.dim, begin, mine_count, static_cast<S*>(p.dh));
    }
    finish_streams();
    shared.reports[team * n + t] = report;
  }

 private:
  // Where layer k finds a, and leaves it for the layer k - 1; k >= -1.
  T* adjoint(int64_t k) const { return tile.a[n > 1 ? (k + 3) % 3 : (k + 2) % 2]; }
  // Where layer k has the rest.
  int64_t place(int64_t k) const { return n > 1 ? k % 2 : 0; }

  // store and checkpoint: segment after segment from the top.
  void sweep_saved() {
    const int64_t K = p.save_every, blocks = backward_tile_blocks<T>(p), slot_size = blocks * slot_width(p) * kLanes<T>;
    const T* states = static_cast<const T*>(p.states);
    for (int64_t i = (p.depth - 1) / K; i >= 0; i--) {
      const int64_t bottom = i * K, top = bottom + K < p.depth ? bottom + K : p.depth;
      sweep_chain(
          saved_state<T>(states, p, i, first), bottom, top, p.slots,
          [&](int64_t j) { return tile.slots + j * slot_size; },
          [&](const T* h, int64_t k, T* slot) {
            run_forward(h, k, slot, p.keep_hidden ? slot + blocks * block : nullptr);
          },
          [&](const T* h, int64_t k, const T* slot) {
            const T* z = nullptr;
            if (p.keep_hidden && slot) z = slot + blocks * block;
            if (saves_hidden(p)) z = saved_hidden<T>(states, p, i, first);
            run_backward(h, k, z);
          });
    }
  }

  // Layer k at h; z [blocks, m, W] as it was kept, or null.
  void run_backward(const T* h, int64_t k, const T* z) {
    if (stopped(p, k)) return weight_gradients(k);
    const int64_t hidden = p.hidden * kLanes<T>;
    Layer<T> weights = layer<S>(p, k, -1, scratch.weights);
    for_slabs(mine.begin, mine.end, [&](int64_t b, auto width) {
      constexpr int N = decltype(width)::value;
      if (!z) {
        product<T, false, N>(weights.W, h + b * block, weights.hidden_bias, T(1), nullptr, scratch.z);
        weights.W.next = nullptr;
      }
      sigma_slope(z ? z + b * hidden : scratch.z, N * hidden, scratch.s, scratch.slope);
      adjoint_step<N>(weights, k, b, h + b * block);
      weights.V.next = weights.W.next = nullptr;
    });
    weight_gradients(k);
  }

  // Layer k of this thread's rows; leaves z too, if it has a place.
  void run_forward(const T* h, int64_t k, T* next, T* z) {
    if (stopped(p, k)) return;
    const int64_t hidden = p.hidden * kLanes<T>;
    Layer<T> weights = layer<S>(p, k, 1, scratch.weights);
    for_slabs(mine.begin, mine.end, [&](int64_t b, auto width) {
      constexpr int N = decltype(width)::value;
      const auto keep = [&](const T* slab) {
        if (z) copy(slab, N * hidden, z + b * hidden);
      };
      step<T, N>(weights, sigma, scale, h + b * block, scratch.z, keep, next + b * block);
      weights.V.next = weights.W.next = nullptr;
    });
  }

  // adjoint: every state from the one above; at an anchor from what the forward saved.
  void sweep_reconstructed() {
    const T *states = static_cast<const T*>(p.states), *checks = static_cast<const T*>(p.checks);
    const int64_t blocks = mine.end - mine.begin, at = mine.begin * block;
    const int64_t rows = p.batch - (first + mine.begin) * kLanes<T>;
    const T* top = saved_state<T>(states, p, saved_count(p) - 1, first) + at;
    T* h = tile.h + at;
    copy(top, blocks * block, h);

    Reconstruction<T> reconstruction = {tile.rows,
                                        tile.increments,
                                        backward_tile_blocks<T>(p) * block,
                                        scratch.x,
                                        scratch.f,
                                        scratch.visible[0],
                                        scratch.visible[1],
                                        change_unit<T>(kUnit<S>, p.depth),
                                        state_limit<T>(kUnit<S>, p.depth),
                                        report};
    reconstruction.reset(mine.begin, mine.end, p.dim);
    const Matrix<T> direction = {scratch.probe, 1, p.dim};
    for (int64_t k = p.depth - 1; k >= 0; k--) {
      if (stopped(p, k)) {
        weight_gradients(k);
        continue;
      }
      Layer<T> weights = layer<S>(p, k, -1, scratch.weights);
      const bool check = k > 0 && k % check_every(p.depth) == 0;
      see(weights.W, scratch.visible[1]);
      reconstruction.enter(p.dim);
      if (check) check_direction(static_cast<const T*>(p.probe), scratch.visible[1], p.dim, scratch.probe);
      for_slabs(mine.begin, mine.end, [&](int64_t b, auto width) {
        constexpr int N = decltype(width)::value;
        T* state = tile.h + b * block;
        SlabField<T, N> field = {weights, sigma_slope, scale, scratch.z, scratch.s, scratch.slope};
        reconstruction.template solve<N>(field, is_smooth(p), p.dim, p.batch - (first + b) * kLanes<T>, p.depth - 1 - k,
                                         b, state);
        weights.V.next = weights.W.next = nullptr;
        if (check) {
          product<T, false, N>(direction, state, nullptr, T(1), nullptr, scratch.x);
          const T* seen = saved_check<T>(checks, p, k / check_every(p.depth) - 1, first + b);
          measure_projection(seen, scratch.x, scratch.visible[1], p.batch - (first + b) * kLanes<T>, N, p.dim, state,
                             reconstruction.report);
          for (int j = 0; j < N; j++) tile.rows[b + j].peak = Vec<T>{};
        }
        adjoint_step<N>(weights, k, b, state);
      });
      weight_gradients(k);
      if (p.save_every && k > 0 && k % p.save_every == 0) {
        const T* anchor = saved_state<T>(states, p, k / p.save_every - 1, first) + at;
        measure_drift(rows, p.dim, blocks, p.depth, scratch.visible[0], Blocks<T>{anchor, p.dim}, h, top,
                      tile.rows + mine.begin, reconstruction.report);
        copy(anchor, blocks * block, h);
      }
    }
    for (int64_t b = mine.begin; b < mine.end; b++)
      reconstruction.finish(b, p.batch - (first + b) * kLanes<T>, p.depth);
    const S* input = static_cast<const S*>(p.h) + (first + mine.begin) * kLanes<T> * p.dim;
    measure_drift(rows, p.dim, blocks, p.depth, scratch.visible[0], Rows<S>{input, p.dim}, h, top,
                  tile.rows + mine.begin, reconstruction.report);
    report = reconstruction.report;
  }

  // The equations above for one slab of N blocks, the b-th of the tile, at the state h, with s and sigma'(z) in
  // the scratch; leaves g and its panels.
  template <int N>
  void adjoint_step(const Layer<T>& weights, int64_t k, int64_t b, const T* h) {
    constexpr int W = kLanes<T>;
    const T *a = adjoint(k) + b * block, *s = scratch.s;
    T *g = tile.g[place(k)] + b * p.hidden * W, *next = adjoint(k - 1) + b * block;
    product<T, true, N>(weights.V.transposed(), a, nullptr, scale, nullptr, g);
    for (int64_t i = 0; i < N * p.hidden * W; i += W) store(g + i, load(g + i) * load(scratch.slope + i));
    for (int j = 0; p.dV && j < N; j++) {
      pack(s + j * p.hidden * W, p.hidden, b + j, count, tile.s[place(k)]);
      pack(h + j * block, p.dim, b + j, count, tile.h_panels[place(k)]);
    }
    product<T, true, N>(weights.W.transposed(), g, nullptr, T(1), a, next);
  }

  // This thread's share of the sums over the rows of the tile.
  void weight_gradients(int64_t k) {
    if (!p.dV) return;
    shared.barriers[team].wait(n);
    if (number > 0) {
      const int64_t before = number - 1, rounds = before / teams;
      shared.progress[before % teams * n + t].wait(rounds * p.depth + p.depth - k);
    }
    if (!stopped(p, k)) add_weight_gradients(k);
    shared.progress[team * n + t].advance();
  }

  void add_weight_gradients(int64_t k) {
    const T *a = adjoint(k), *g = tile.g[place(k)], *s = tile.s[place(k)], *h = tile.h_panels[place(k)];
    const bool accumulate = number > 0, last = number == tiles - 1;
    const int64_t rows = last ? p.batch - first * kLanes<T> : count * kLanes<T>;
    const Range output = part(p.dim, t, n), hidden = part(p.hidden, t, n);
    T* sums = shared.sums + (tiles == 1 ? 0 : k * layer_size(p));  // dV, dW and the biases', if narrowed

    // Calls sum(where to) for this thread's `range` of a gradient [size, cols] of layer k.
    const auto gradient = [&](void* array, Range range, int64_t size, int64_t cols, auto sum) {
      if (!array) return;
      S* stored = static_cast<S*>(array) + k * size * cols;
      if constexpr (kWidened<S>) {
        sum(sums);
        if (last && range.begin < range.end)
          narrow(sums + range.begin * cols, (range.end - range.begin) * cols, stored + range.begin * cols);
        sums += size * cols;
      } else {
        sum(stored);
      }
    };
    const Write how = accumulate ? Write::add : (past_caches && rows <= kRowRun ? Write::past_caches : Write::store);
    gradient(p.dV, output, p.dim, p.hidden,
             [&](T* out) { outer_product(a, p.dim, output, s, p.hidden, count, rows, scale, how, out); });
    gradient(p.dW, hidden, p.hidden, p.dim,
             [&](T* out) { outer_product(g, p.hidden, hidden, h, p.dim, count, rows, T(1), how, out); });
    gradient(p.dhidden_bias, hidden, p.hidden, 1,
             [&](T* out) { row_sum(g, p.hidden, hidden, rows, T(1), accumulate, out); });
    gradient(p.doutput_bias, output, p.dim, 1,
             [&](T* out) { row_sum(a, p.dim, output, rows, scale, accumulate, out); });
  }

  const BackwardProblem& p;
  const BackwardShared<T>& shared;
  const int teams, n;  // teams, and threads of each
  const int team, t;   // this thread's, and its number in it
  const T scale;
  const int64_t block;  // elements of a block of states
  Activate<T> sigma;
  ActivateSlope<T> sigma_slope;
  BackwardTile<T> tile;
  SlabScratch<T> scratch;
  ReconstructionReport report;
  bool past_caches;       // gradients of weights are written past the caches
  int64_t tiles, number;  // of all tiles, the current one's
  int64_t first, count;   // its blocks
  Range mine;             // those of them that this thread takes through the layers
};

// Gradients of no rows at all.
template <class S>
void clear(void* array, int64_t count) {
  for (int64_t i = 0; array && i < count; i++) static_cast<S*>(array)[i] = S{};
}

// What there is to write of no samples. matrix: entries of V or W in a layer.
template <class S>
void backward_of_none(const BackwardProblem& p, int64_t matrix) {
  clear<S>(p.dV, p.depth * matrix);
  clear<S>(p.dW, p.depth * matrix);
  clear<S>(p.dhidden_bias, p.depth * p.hidden);
  clear<S>(p.doutput_bias, p.depth * p.dim);
  if (p.reconstruct) clear<double>(p.report, 4);
}

template <class S>
void backward(const BackwardProblem& p) {
  if (p.batch == 0) return backward_of_none<S>(p, p.dim * p.hidden);
  typedef Compute<S> T;
  const int threads = backward_threads<T>(p);
  Arena arena(p.workspace);
  const BackwardShared<T> shared = backward_shared<S>(p, arena);
  for (int i = 0; i < threads; i++) {
    new (&shared.progress[i]) Progress();
    new (&shared.barriers[i]) Barrier();
    shared.reports[i] = {};
  }
  on_threads(threads, [&](int thread, int count) {  // there may be fewer than asked for
    const Teams crew = make_teams(count, backward_tiles<T>(p));
    if (thread < crew.teams * crew.size) Backward<S>(p, shared, arena, crew, thread).run();
  });
  for (int i = 0; i < threads; i++) {
    if (i > 0) shared.reports[0].merge(shared.reports[i]);
    shared.progress[i].~Progress();
    shared.barriers[i].~Barrier();
  }
  if (p.reconstruct) write_report(p, shared.reports[0]);
}

}  // namespace
}  // namespace odeblock
