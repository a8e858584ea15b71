// Batches of at most kFewRows rows, which would fill so little of a vector of rows: everything vectorises over
// features, rows lie as the user has them, [R, q], and a weight is read once. Memory bounds it: 2qm weights a layer
// serve few multiply-adds.
//
// Threads share the hidden units, in chunks that do not depend on their number. Each takes its rows of W and columns of
// V through z, sigma and all that belongs to them; what is summed over hidden units, V s in the forward and Wᵀg in the
// backward, every thread adds up from the chunks' sums in the same order. So threads wait for each other once a layer
// (once an evaluation, for the adjoint), and no bit depends on their number. Against batches of more rows results agree
// to rounding.
#pragma once

#include <new>

#include "backward.h"
#include "few_products.h"

namespace odeblock {
namespace {

template <class S>
bool is_few(const Problem& p) {
  return p.batch > 0 && p.batch <= kFewRows<Compute<S>>;
}

// A sum over lanes costs as much as some columns do: chunks have at least 32 units. And every thread adds up the
// sums of all chunks: there are at most 16.
constexpr int64_t kChunkUnits = 32, kChunks = 16, kUnitMultiple = 16;

ODEBLOCK_INLINE int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

ODEBLOCK_INLINE int64_t chunk_units(const Problem& p) {
  const int64_t units = round_up((p.hidden + kChunks - 1) / kChunks, kUnitMultiple);
  return units < kChunkUnits ? kChunkUnits : units;
}
ODEBLOCK_INLINE int64_t chunk_count(const Problem& p) { return (p.hidden + chunk_units(p) - 1) / chunk_units(p); }

// Weights of one matrix that are worth a thread, between two meetings.
constexpr int64_t kFewWork = 2048;

ODEBLOCK_INLINE int few_threads(const Problem& p) {
  int64_t n = p.dim * p.hidden / kFewWork;
  const double work = 2.0 * p.batch * p.dim * p.hidden * p.depth / kWorkPerThread;
  if (n > work) n = static_cast<int64_t>(work);
  if (n > p.threads) n = p.threads;
  if (n > chunk_count(p)) n = chunk_count(p);
  return n < 1 ? 1 : static_cast<int>(n);
}

// What the threads of a batch of few rows share.
template <class T>
struct FewShared {
  Progress* progress;  // [threads] sums that a thread has left
  T* sums[2];          // [chunks][R][q padded], in turn
  T* seen;             // [threads][q padded]  adjoint: what see_rows leaves of a thread's rows of W
  bool* ended;         // [2] whether the first thread has found the call stopped, in turn
};

// And what each has for itself. R = batch; q, m, u are padded sizes, u of its hidden units.
template <class T>
struct FewScratch {
  T *h, *f, *a;            // [R, q]
  T *z, *s, *slope, *g;    // [R, u]
  T* row;                  // [q or u] a row of a gradient
  T* weights;              // a layer's, where they are widened
  T* slots;                // [slots, R, q + u]  checkpoint, K > 1: a state and z of the layer below it
  T *x, *delta;            // [q, W]             adjoint: as a block, like the three below
  T *state, *top, *found;  // [q, W], [q, W], [W]
  T* increments;           // [kHistory, q, W]
  RowMemory<T>* memory;    // [1]
  T *visible[2], *probe;   // [q]
};

// In the forward `slots` and `reconstruct` of the problem are not known when the workspace is sized: `backward` says
// whether they count.
template <class S, class T = Compute<S>>
FewShared<T> few_shared(const Problem& p, bool backward, Arena& arena) {
  const int64_t q = round_up(p.dim, kLanes<T>), sums = chunk_count(p) * p.batch * q;
  return {arena.take<Progress>(few_threads(p)),
          {arena.take<T>(sums), arena.take<T>(sums)},
          arena.take<T>(backward && p.reconstruct ? few_threads(p) * q : 0),
          arena.take<bool>(2)};
}

template <class S, class T = Compute<S>>
FewScratch<T> few_scratch(const Problem& p, bool backward, Arena& arena) {
  constexpr int W = kLanes<T>;
  const int64_t q = p.batch * round_up(p.dim, W), u = p.batch * round_up(p.hidden, W);
  const int64_t widest = p.dim > p.hidden ? p.dim : p.hidden;
  FewScratch<T> scratch{};
  for (T** array : {&scratch.h, &scratch.f, &scratch.a}) *array = arena.take<T>(q);
  for (T** array : {&scratch.z, &scratch.s, &scratch.slope, &scratch.g}) *array = arena.take<T>(u);
  scratch.row = arena.take<T>(kWidened<S> ? round_up(widest, W) : 0);
  scratch.weights = arena.take<T>(kWidened<S> ? layer_size(p) : 0);
  for (T** array : {&scratch.visible[0], &scratch.visible[1], &scratch.probe}) *array = arena.take<T>(p.dim);
  scratch.slots = arena.take<T>(backward && !p.reconstruct && p.save_every > 1 ? p.slots * (q + u) : 0);
  const bool reconstruct = backward && p.reconstruct;
  const int64_t block = reconstruct ? p.dim * W : 0;
  for (T** array : {&scratch.x, &scratch.delta, &scratch.state, &scratch.top}) *array = arena.take<T>(block);
  scratch.found = arena.take<T>(reconstruct ? W : 0);
  scratch.increments = arena.take<T>(kHistory * block);
  scratch.memory = arena.take<RowMemory<T>>(reconstruct ? 1 : 0);
  return scratch;
}

template <class S>
size_t few_workspace(const Problem& p, bool backward) {
  Arena arena(nullptr);
  few_shared<S>(p, backward, arena);
  for (int t = 0; t < few_threads(p); t++) few_scratch<S>(p, backward, arena);
  return arena.bytes();
}

// Thread t of n. Of what it does only the products are compiled for each number R of rows.
template <class S>
class Few {
  typedef Compute<S> T;
  static constexpr int W = kLanes<T>;

 public:
  Few(const Problem& problem, bool backward, const FewShared<T>& common, Arena arena, int thread, int threads)
      : p(problem),
        shared(common),
        products(few_products<S>(problem.batch)),
        R(problem.batch),
        t(thread),
        n(threads),
        scale(static_cast<T>(problem.scale)),
        q(round_up(problem.dim, W)),
        size(chunk_units(problem)),
        chunks(part(chunk_count(problem), thread, threads)),
        first(chunks.begin * size),
        units((chunks.end * size < problem.hidden ? chunks.end * size : problem.hidden) - first),
        u(round_up(units, W)) {
    sigma = with_activation(p.activation, [](auto a) -> Activate<T> { return activate<T, decltype(a)>; });
    sigma_slope =
        with_activation(p.activation, [](auto a) -> ActivateSlope<T> { return activate_slope<T, decltype(a)>; });
    for (int i = 0; i <= t; i++) scratch = few_scratch<S>(p, backward, arena);
    // The vectors' ends, which stay zero.
    for (T* array : {scratch.h, scratch.f, scratch.a}) fill_zeros(array, R * q);
    fill_zeros(scratch.z, R * u);
  }

  void forward(const ForwardProblem& f) {
    T *states = static_cast<T*>(f.states), *checks = static_cast<T*>(f.checks), *h = scratch.h;
    load_rows(static_cast<const S*>(f.h), h);
    int64_t saved = 0, checked = 0;
    for (int64_t k = 0; k < p.depth && !ended; k++) {
      const Layer<T> weights = layer_part(k);
      if (t == 0 && p.save_every && k % p.save_every == 0 && (k > 0 || !p.reconstruct))
        store_rows(h, saved_state<T>(states, p, saved++, 0));
      if (t == 0 && p.reconstruct && k > 0 && k % check_every(p.depth) == 0) {
        see_rows(static_cast<const S*>(p.W) + k * p.hidden * p.dim, p.hidden, p.dim, scratch.visible[1]);
        over_largest(p.dim, scratch.visible[1]);
        check_direction(static_cast<const T*>(f.probe), scratch.visible[1], p.dim, scratch.probe);
        T* found = saved_check<T>(checks, p, checked++, 0);
        for (int r = 0; r < W; r++) found[r] = T(0);
        for (int64_t r = 0; r < R; r++) found[r] = project(h + r * q);
      }
      run_forward(weights, h, k, h, scratch.z);
      if (saves_hidden(p))
        for (int64_t r = 0; r < R; r++)
          narrow(scratch.z + r * u, units, saved_hidden<T>(states, p, k, 0) + r * p.hidden + first);
    }
    if (t != 0) return;
    if (p.reconstruct) store_rows(h, saved_state<T>(states, p, saved, 0));
    store_rows(h, static_cast<S*>(f.y));
  }

  void backward(const BackwardProblem& b) {
    load_rows(static_cast<const S*>(b.grad), scratch.a);
    if (p.reconstruct)
      sweep_reconstructed(b);
    else
      sweep_saved(b);
    finish_streams();
    if (t == 0) store_rows(scratch.a, static_cast<S*>(b.dh));
  }

  // A layer as the reconstruction sees it: blocks in and out, rows between.
  struct Field {
    Few& few;
    const Layer<T>& weights;
    int64_t k;

    void evaluate(const T* x, T* f) {
      few.load_block(x, few.scratch.h);
      few.hidden(weights, few.scratch.h, k, -1, few.scratch.z);
      few.sigma_slope(few.scratch.z, few.R * few.u, few.scratch.s, few.scratch.slope);
      few.increment(weights, few.scratch.s, k, -1, few.scratch.f);
      few.store_block(few.scratch.f, f);
    }
    void correct(const T* change) {
      few.load_block(change, few.scratch.f);
      few.products.dots(weights.W.data + few.first * few.p.dim, few.p.dim, few.units, few.p.dim, 0, few.scratch.f,
                        few.q, nullptr, few.scratch.g, few.u);
      for (int64_t i = 0; i < few.R * few.u; i += W)
        store(few.scratch.z + i, load(few.scratch.z + i) + load(few.scratch.g + i));
      few.sigma_slope(few.scratch.z, few.R * few.u, few.scratch.s, few.scratch.slope);
    }
  };

 private:
  // Rows as they lie with the user or where states are saved, [R, q]; entries beyond q stay as they are.
  template <class From>
  void load_rows(const From* rows, T* to) const {
    for (int64_t r = 0; r < R; r++) widen(rows + r * p.dim, p.dim, to + r * q);
  }
  template <class To>
  void store_rows(const T* from, To* rows) const {
    for (int64_t r = 0; r < R; r++) narrow(from + r * q, p.dim, rows + r * p.dim);
  }
  void load_block(const T* block, T* to) const {
    for (int64_t r = 0; r < R; r++)
      for (int64_t i = 0; i < p.dim; i++) to[r * q + i] = block[i * W + r];
  }
  void store_block(const T* from, T* block) const {
    for (int64_t i = 0; i < p.dim; i++) {
      Vec<T> v{};
#pragma GCC unroll 4
      for (int r = 0; r < kFewRows<T>; r++)
        if (r < R) v[r] = from[r * q + i];
      store(block + i * W, v);
    }
  }
  T project(const T* row) const {
    T sum = 0;
    for (int64_t i = 0; i < p.dim; i++) sum += scratch.probe[i] * row[i];
    return sum;
  }

  // What is fetched while layer k is read: the next layer in this direction; where layers are too large for that, what
  // is read `later` from where a product is.
  int64_t ahead(int64_t k, int64_t direction, int64_t later) const {
    if (kWidened<S> || 2 * p.dim * p.hidden * static_cast<int64_t>(sizeof(T)) > kFetchedBytes * n) return later;
    return k + direction >= 0 && k + direction < p.depth ? direction * p.dim * p.hidden : 0;
  }

  // The weights of layer k; of the hidden units only this thread's, where they are widened.
  Layer<T> layer_part(int64_t k) const {
    if constexpr (!kWidened<S>) {
      return layer<S>(p, k, scratch.weights);
    } else {
      T *V = scratch.weights, *W = V + p.dim * p.hidden, *b = W + p.hidden * p.dim, *c = b + p.hidden;
      const S* stored = static_cast<const S*>(p.V) + k * p.dim * p.hidden + first;
      for (int64_t i = 0; i < p.dim; i++) widen(stored + i * p.hidden, units, V + i * p.hidden + first);
      widen(static_cast<const S*>(p.W) + (k * p.hidden + first) * p.dim, units * p.dim, W + first * p.dim);
      if (p.hidden_bias) widen(static_cast<const S*>(p.hidden_bias) + k * p.hidden + first, units, b + first);
      if (p.output_bias) widen(static_cast<const S*>(p.output_bias) + k * p.dim, p.dim, c);
      return {{V, p.dim, p.hidden}, {W, p.hidden, p.dim}, p.hidden_bias ? b : nullptr, p.output_bias ? c : nullptr};
    }
  }

  // z of this thread's units at h.
  void hidden(const Layer<T>& weights, const T* h, int64_t k, int64_t direction, T* z) {
    products.dots(weights.W.data + first * p.dim, p.dim, units, p.dim, ahead(k, direction, W * p.dim), h, q,
                  weights.hidden_bias ? weights.hidden_bias + first : nullptr, z, u);
  }

  // f = scale (V s + output_bias), s of this thread's units. The bias goes with the first chunk: one thread reads it,
  // so that all see the same.
  void increment(const Layer<T>& weights, const T* s, int64_t k, int64_t direction, T* f) {
    const int64_t fetch = ahead(k, direction, W * p.hidden);
    for (int64_t c = chunks.begin; c < chunks.end; c++)
      products.dots(weights.V.data + c * size, p.hidden, p.dim, units_of(c), fetch, s + c * size - first, u,
                    c == 0 ? weights.output_bias : nullptr, sums(c), q);
    meet();
    for (int64_t r = 0; r < R; r++)
      for (int64_t i = 0; i < q; i += W) store(f + r * q + i, broadcast(scale) * total(r, i));
  }

  // Leaves z of this thread's units too.
  void run_forward(const Layer<T>& weights, const T* h, int64_t k, T* next, T* z) {
    hidden(weights, h, k, 1, z);
    sigma(z, R * u, scratch.s);
    increment(weights, scratch.s, k, 1, scratch.f);
    for (int64_t i = 0; i < R * q; i += W) store(next + i, load(h + i) + load(scratch.f + i));
  }

  void sweep_saved(const BackwardProblem& b) {
    const int64_t K = p.save_every;
    const T* states = static_cast<const T*>(b.states);
    for (int64_t i = (p.depth - 1) / K; i >= 0; i--) {
      const int64_t bottom = i * K, top = bottom + K < p.depth ? bottom + K : p.depth;
      load_rows(saved_state<T>(states, p, i, 0), scratch.h);
      if (saves_hidden(p))
        for (int64_t r = 0; r < R; r++)
          widen(saved_hidden<T>(states, p, i, 0) + r * p.hidden + first, units, scratch.z + r * u);
      sweep_chain<T>(
          scratch.h, bottom, top, p.slots, [&](int64_t j) { return scratch.slots + j * R * (q + u); },
          [&](const T* h, int64_t k, T* slot) {
            if (ended) return;
            run_forward(layer_part(k), h, k, slot, p.keep_hidden ? slot + R * q : scratch.z);
          },
          [&](const T* h, int64_t k, const T* slot) {
            if (ended) return;
            const Layer<T> weights = layer_part(k);
            const bool held = slot && p.keep_hidden, kept = held || saves_hidden(p);
            if (!kept) hidden(weights, h, k, -1, scratch.z);
            sigma_slope(held ? slot + R * q : scratch.z, R * u, scratch.s, scratch.slope);
            adjoint_step(b, weights, k, h, kept);
          });
    }
  }

  // Every thread does the same for the one block, from the same bits.
  void sweep_reconstructed(const BackwardProblem& b) {
    const T *states = static_cast<const T*>(b.states), *checks = static_cast<const T*>(b.checks);
    T *h = scratch.state, *top = scratch.top;
    load_rows(saved_state<T>(states, p, saved_count(p) - 1, 0), scratch.h);
    store_block(scratch.h, h);
    store_block(scratch.h, top);
    Reconstruction<T> reconstruction = {scratch.memory,
                                        scratch.increments,
                                        p.dim * W,
                                        scratch.x,
                                        scratch.delta,
                                        scratch.visible[0],
                                        scratch.visible[1],
                                        change_unit<T>(kUnit<S>, p.depth),
                                        state_limit<T>(kUnit<S>, p.depth),
                                        {}};
    reconstruction.reset(0, 1, p.dim);
    see_part(p.depth - 1);
    meet();
    for (int64_t k = p.depth - 1; k >= 0 && !ended; k--) {
      const Layer<T> weights = layer_part(k);
      see_all();
      reconstruction.enter(p.dim);
      Field field = {*this, weights, k};
      reconstruction.template solve<1>(field, is_smooth(p), p.dim, R, p.depth - 1 - k, 0, h);
      load_block(h, scratch.h);
      if (k > 0 && k % check_every(p.depth) == 0) {
        check_direction(static_cast<const T*>(b.probe), scratch.visible[1], p.dim, scratch.probe);
        for (int64_t r = 0; r < R; r++) scratch.found[r] = project(scratch.h + r * q);
        const T* seen = saved_check<T>(checks, p, k / check_every(p.depth) - 1, 0);
        measure_projection(seen, scratch.found, scratch.visible[1], R, 1, p.dim, h, reconstruction.report);
        scratch.memory->peak = Vec<T>{};
      }
      if (k > 0) see_part(k - 1);
      adjoint_step(b, weights, k, scratch.h, false);
      if (p.save_every && k > 0 && k % p.save_every == 0) {
        const T* anchor = saved_state<T>(states, p, k / p.save_every - 1, 0);
        measure_drift(R, p.dim, 1, p.depth, scratch.visible[0], Rows<T>{anchor, p.dim}, h, top, scratch.memory,
                      reconstruction.report);
        load_rows(anchor, scratch.h);
        store_block(scratch.h, h);
      }
    }
    reconstruction.finish(0, R, p.depth);
    measure_drift(R, p.dim, 1, p.depth, scratch.visible[0], Rows<S>{static_cast<const S*>(b.h), p.dim}, h, top,
                  scratch.memory, reconstruction.report);
    if (t == 0) write_report(b, reconstruction.report);
  }

  // How well layer k sees each feature: first every thread by its own rows of W, then, once they have met, all.
  void see_part(int64_t k) const {
    see_rows(static_cast<const S*>(p.W) + (k * p.hidden + first) * p.dim, units, p.dim, shared.seen + t * q);
  }
  void see_all() const {
    T* c = scratch.visible[1];
    for (int64_t i = 0; i < p.dim; i++) {
      c[i] = shared.seen[i];
      for (int other = 1; other < n; other++) {
        const T entry = shared.seen[other * q + i];
        c[i] = c[i] >= entry ? c[i] : entry;
      }
    }
    over_largest(p.dim, c);
  }

  // The equations of backward.h for this thread's units, at the state h, with s and sigma'(z) in the scratch. fetch:
  // whether to ask for W of the next layer, which nobody has done for this one.
  void adjoint_step(const BackwardProblem& b, const Layer<T>& weights, int64_t k, const T* h, bool fetch) {
    T *a = scratch.a, *g = scratch.g;
    products.combine(weights.V.data + first, p.hidden, p.dim, units, ahead(k, -1, 8 * p.hidden), a, q, g, u);
    for (int64_t r = 0; r < R; r++)
      for (int64_t i = 0; i < units; i += W) {
        const int64_t at = r * u + i;
        store(g + at, broadcast(scale) * load(g + at) * load(scratch.slope + at));
      }
    if (b.dV) {
      const int64_t matrix = k * p.dim * p.hidden;
      const bool past = gradients_pass_caches<S>(b);
      S *dV = static_cast<S*>(b.dV) + matrix + first, *dW = static_cast<S*>(b.dW) + matrix + first * p.dim;
      products.outer(a, q, p.dim, scale, scratch.s, u, units, past, scratch.row, dV, p.hidden);
      products.outer(g, u, units, T(1), h, q, p.dim, past, scratch.row, dW, p.dim);
      T ones[kFewRows<T>];
      for (T& one : ones) one = T(1);
      const auto bias = [&](void* array, int64_t at, T by, const T* y, int64_t stride, int64_t count) {
        if (array) products.outer(ones, 1, 1, by, y, stride, count, false, scratch.row, static_cast<S*>(array) + at, 0);
      };
      bias(b.dhidden_bias, k * p.hidden + first, T(1), g, u, units);
      if (t == 0) bias(b.doutput_bias, k * p.dim, scale, a, q, p.dim);
    }
    for (int64_t c = chunks.begin; c < chunks.end; c++)
      products.combine(weights.W.data + c * size * p.dim, p.dim, units_of(c), p.dim,
                       fetch ? ahead(k, -1, 8 * p.dim) : 0, g + c * size - first, u, sums(c), q);
    meet();
    for (int64_t r = 0; r < R; r++)
      for (int64_t i = 0; i < q; i += W) store(a + r * q + i, load(a + r * q + i) + total(r, i));
  }

  int64_t units_of(int64_t chunk) const {
    const int64_t end = (chunk + 1) * size;
    return (end < p.hidden ? end : p.hidden) - chunk * size;
  }
  T* sums(int64_t chunk) const { return shared.sums[meetings % 2] + chunk * R * q; }

  // Returns once every thread has left the sums of its chunks. The other array of sums is free then: what it held,
  // every thread has added up before it came here.
  // The threads meet a different number of times in each layer: the first one says whether all leave after it.
  void meet() {
    bool& leave = shared.ended[meetings % 2];
    if (t == 0) leave = stopped(p, meetings);
    meetings++;
    if (n > 1) shared.progress[t].advance();
    for (int i = 0; i < n; i++)
      if (i != t) shared.progress[i].wait(meetings);
    ended = leave;
  }
  Vec<T> total(int64_t r, int64_t i) const {
    const T* sum = shared.sums[(meetings - 1) % 2] + r * q + i;
    Vec<T> y = load(sum);
    for (int64_t c = 1; c < chunk_count(p); c++) y += load(sum + c * R * q);
    return y;
  }

  const Problem& p;
  const FewShared<T>& shared;
  const FewProducts<S> products;
  const int64_t R;  // rows
  const int t, n;
  const T scale;
  const int64_t q;             // features of a row, padded
  const int64_t size;          // units of a chunk
  const Range chunks;          // this thread's
  const int64_t first, units;  // their units
  const int64_t u;             // padded
  int64_t meetings = 0;
  bool ended = false;
  Activate<T> sigma;
  ActivateSlope<T> sigma_slope;
  FewScratch<T> scratch{};
};

// Calls run(Few<S>&) on each thread.
template <class S, class Run>
void with_few(const Problem& p, bool backward, Run run) {
  typedef Compute<S> T;
  const int threads = few_threads(p);
  Arena arena(p.workspace);
  const FewShared<T> shared = few_shared<S>(p, backward, arena);
  for (int i = 0; i < threads; i++) new (&shared.progress[i]) Progress();
  on_threads(threads, [&](int thread, int count) {
    Few<S> few(p, backward, shared, arena, thread, count);
    run(few);
  });
  for (int i = 0; i < threads; i++) shared.progress[i].~Progress();
}

template <class S>
void forward_few(const ForwardProblem& p) {
  typedef Compute<S> T;
  T* states = static_cast<T*>(p.states);
  for (int64_t i = 0; i < saved_count(p); i++) {
    fill_zeros(saved_state<T>(states, p, i, 0) + p.batch * p.dim, (padded_rows(p.batch) - p.batch) * p.dim);
    if (saves_hidden(p))
      fill_zeros(saved_hidden<T>(states, p, i, 0) + p.batch * p.hidden, (padded_rows(p.batch) - p.batch) * p.hidden);
  }
  clear_checks<T>(p);
  with_few<S>(p, false, [&](Few<S>& few) { few.forward(p); });
}

template <class S>
void backward_few(const BackwardProblem& p) {
  with_few<S>(p, true, [&](Few<S>& few) { few.backward(p); });
}

}  // namespace
}  // namespace odeblock
