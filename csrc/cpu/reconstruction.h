// The adjoint's states: h_k from h_{k+1} by solving h_k = h_{k+1} - Δ_k, Δ_k = scale f_k(h_k), a fixed point of a
// contraction when the depth is large. docs/adjoint.md derives what is done here; (n) is its equation n.
//
// Each row is solved by itself, by decisions that only its own numbers enter, so that it does not depend on its
// neighbours: predict Δ_k from the increments above, evaluate f_k, and stop as soon as the change says that the
// error left is at the level of rounding; or correct z = W h for the last change; or evaluate once more.
#pragma once

#include "forward.h"

namespace odeblock {
namespace {

// odeblock/reconstruction.py has the same numbers.
constexpr int kMaxOrder = 6;             // of the prediction (2)
constexpr int kHistory = kMaxOrder + 1;  // increments that are kept: one more than predict, to measure them all
constexpr int kMeasureEvery = 4;         // steps between two measurements of the orders
constexpr double kOrderSlack = 1.5;      // (3): an order whose error is within this factor of the least is as good
constexpr double kRateMemory = 0.95;     // (7): what is left of a rate ρ after the next measurement
constexpr int kProbeEvery = 64;          // steps after which ρ is measured anew, before z is corrected again
constexpr int kMaxEvaluations = 64;      // a row that these did not settle is given up, and reported
constexpr double kFirstLimit = 0.15;     // (9): first change at which z may stay as it is, in √L units of rounding
constexpr double kChangeLimit = 0.25;    // (9): the same for later changes
constexpr double kStateLimit = 0.5;      // (10): error of a state per step, in units of rounding, ..
constexpr double kDriftLimit = 4;        // .. and at most this over √L, so that even a sum of L stays small
constexpr double kPeakShare = 0.036;     // (14): share, times √L, of the largest state that an error is compared with

struct ReconstructionReport {
  double estimate = 0;     // (13), the largest of a row
  double drift = 0;        // (14), the largest of a row
  double evaluations = 0;  // summed over rows and layers; a correction of z counts one half
  double order = 0;        // summed over rows and layers

  static void keep_largest(double& value, double other) {
    if (!(value >= other) && value == value) value = other;  // NaN stays
  }
  void merge(const ReconstructionReport& other) {
    keep_largest(estimate, other.estimate);
    keep_largest(drift, other.drift);
    evaluations += other.evaluations;
    order += other.order;
  }
};

template <class T>
constexpr T kEpsilon = sizeof(T) == 4 ? T(1.1920928955078125e-7) : T(2.220446049250313e-16);

// The unit of rounding that a state is solved to: of the type computed in, but no finer than 1/256 of what the
// gradients are rounded to in the end.
template <class S>
constexpr Compute<S> kUnit = kEpsilon<Compute<S>>;
template <>
constexpr float kUnit<Bfloat16> = 0x1p-15f;
template <>
constexpr float kUnit<Float16> = 0x1p-18f;

// (9): in these units, which grow with what the rounding errors of L steps pile up to.
template <class T>
T change_unit(T unit, int64_t depth) {
  return static_cast<T>(std::sqrt(static_cast<double>(depth))) * unit;
}

// (10)
template <class T>
T state_limit(T unit, int64_t depth) {
  const double limit = kDriftLimit / std::sqrt(static_cast<double>(depth));
  return static_cast<T>(limit < kStateLimit ? limit : kStateLimit) * unit;
}

template <class T>
ODEBLOCK_INLINE Vec<T> largest(Vec<T> a, Vec<T> b) {
  return select(a > b, a, b);
}

template <class T>
ODEBLOCK_INLINE bool any(Mask<T> mask) {
  bool found = false;
  for (int lane = 0; lane < kLanes<T>; lane++) found |= mask[lane] != 0;
  return found;
}

// For each row of a block x [q, W] its norm (5) with the visibilities c [q]; NaN if any entry is not finite.
template <class T, class Entry>
ODEBLOCK_INLINE Vec<T> row_norm(const T* c, int64_t dim, Entry entry) {
  Vec<T> norm{}, finite{};
  for (int64_t i = 0; i < dim; i++) {
    const Vec<T> x = entry(i);
    norm = largest<T>(norm, broadcast(c[i]) * abs(x));
    finite += x - x;  // 0, or NaN where x is NaN or infinite
  }
  return norm + finite;
}

// What the rows of a block carry from step to step, each one vector.
template <class T>
struct RowMemory {
  Vec<T> rate;                    // ρ, (7)
  Vec<T> seen, doubt;             // what it is the larger of
  Vec<T> age;                     // steps since it was measured
  Vec<T> order;                   // p of the next prediction
  Vec<T> spread[kHistory];        // error of order 0, 1, .. kMaxOrder, (4); negative: not yet measured
  Vec<T> coefficient[kMaxOrder];  // of the increments above, newest first, (2)
  Vec<T> squares;                 // Σ over steps of the squared error left, (13)
  Vec<T> unsettled;               // largest error of a step that was given up
  Vec<T> peak;                    // largest norm of a state since the last comparison (14), (15)
  Vec<T> evaluations, orders;     // summed over steps

  void reset() {
    *this = RowMemory{};
    rate = doubt = broadcast(T(1));
    for (Vec<T>& s : spread) s = broadcast(T(-1));
  }
};

constexpr double kBinomial[kMaxOrder + 1][kMaxOrder] = {
    {0, 0, 0, 0, 0, 0},   {1, 0, 0, 0, 0, 0},     {2, -1, 0, 0, 0, 0},      {3, -3, 1, 0, 0, 0},
    {4, -6, 4, -1, 0, 0}, {5, -10, 10, -5, 1, 0}, {6, -15, 20, -15, 6, -1},
};

// Blocks of rows of one tile, and where a thread keeps what it works with.
template <class T>
struct Reconstruction {
  RowMemory<T>* rows;          // [blocks]
  T* increments;               // [kHistory][blocks, q, W], a ring: step n writes number n % kHistory
  int64_t ring_stride;         // between two of them
  T *x, *f;                    // a slab's [N, q, W]
  T *visible, *visible_here;   // visibility [q]: to this layer and those above it, and to this layer alone
  T change_unit, state_limit;  // (9) and (10) at this depth, relative
  ReconstructionReport report;

  // Before the first layer of a tile.
  void reset(int64_t begin, int64_t end, int64_t dim) {
    for (int64_t b = begin; b < end; b++) rows[b].reset();
    for (int64_t i = 0; i < dim; i++) visible[i] = T(0);
  }

  // Before the rows of the next layer.
  void enter(int64_t dim) {
    for (int64_t i = 0; i < dim; i++) visible[i] = visible[i] >= visible_here[i] ? visible[i] : visible_here[i];
  }

  // h, N blocks of a tile from the b-th on: h_{k+1} on entry, h_k on return, of which the first `real` rows are
  // not padding. `step` counts from 0 at the top. The layer is behind `field`: field.evaluate(x, f), f = Δ_k at x, and
  // field.correct(d), which adds W d to the z of the last evaluation; both leave σ(z) and σ'(z) where the caller finds
  // them, those at h_k in the end.
  template <int N, class Field>
  void solve(Field& field, bool smooth, int64_t dim, int64_t real, int64_t step, int64_t b, T* h) {
    constexpr int W = kLanes<T>;
    const int64_t size = dim * W;
    T* delta = increments + step % kHistory * ring_stride + b * size;
    RowMemory<T>* memory = rows + b;
    Vec<T> norm[N], change[N], error[N];
    Mask<T> active[N], correct[N];
    for (int j = 0; j < N; j++) {
      predict(memory[j], dim, step, b + j, delta + j * size);
      norm[j] = largest<T>(row_norm<T>(visible, dim, [&](int64_t i) { return load(h + j * size + i * W); }),
                           broadcast(kTiny<T>));
      memory[j].peak = largest<T>(memory[j].peak, norm[j]);
      change[j] = error[j] = Vec<T>{};
      correct[j] = Mask<T>{};
      for (int lane = 0; lane < W; lane++) active[j][lane] = j * W + lane < real ? -1 : 0;
      memory[j].orders += memory[j].order;
    }

    bool unsettled = true, corrections = false;
    for (int evaluation = 0; unsettled; evaluation++) {
      // z of the rows that are settled stays.
      for (int j = 0; j < N; j++)
        for (int64_t i = j * size; i < (j + 1) * size; i += W) {
          const Vec<T> next = load(h + i) - load(delta + i);
          store(x + i, evaluation == 0 ? next : select(active[j], next, load(x + i)));
        }
      field.evaluate(x, f);
      unsettled = false;
      for (int j = 0; j < N; j++) {
        memory[j].evaluations += select(active[j], broadcast(T(1)), Vec<T>{});
        const Mask<T> open = judge(memory[j], norm[j], dim, evaluation, smooth, f + j * size, delta + j * size,
                                   active[j], change[j], error[j], correct[j]);
        corrections |= any<T>(correct[j]);
        unsettled |= any<T>(open);
        active[j] = open;
      }
    }

    for (int j = 0; j < N; j++)
      for (int64_t i = j * size; i < (j + 1) * size; i += W) {
        const Vec<T> state = load(h + i) - load(delta + i);
        store(f + i, select(correct[j], state - load(x + i), Vec<T>{}));
        store(h + i, state);
      }
    if (corrections) field.correct(f);  // (8): z + W (h_k - x); rows that are not corrected add zero
    for (int j = 0; j < N; j++) {
      memory[j].squares += error[j] * error[j];
      memory[j].age += broadcast(T(1));
      memory[j].evaluations += select(correct[j], broadcast(T(0.5)), Vec<T>{});
      if (step < 2 * kHistory || step % kMeasureEvery == 0) measure(memory[j], dim, step, b + j);
    }
  }

  // Adds up what the rows of block b saw in `depth` steps; the first `real` rows are not padding.
  void finish(int64_t b, int64_t real, int64_t depth) {
    const RowMemory<T>& memory = rows[b];
    for (int lane = 0; lane < kLanes<T> && lane < real; lane++) {
      const double mean = static_cast<double>(memory.squares[lane]) / static_cast<double>(depth);
      ReconstructionReport::keep_largest(report.estimate, std::sqrt(mean));
      ReconstructionReport::keep_largest(report.estimate, memory.unsettled[lane]);
      report.evaluations += memory.evaluations[lane];
      report.order += memory.orders[lane];
    }
  }

 private:
  const T* increment(int64_t step, int64_t b, int64_t dim) const {
    return increments + step % kHistory * ring_stride + b * dim * kLanes<T>;
  }

  // (2): Δ ≈ Σ_j c_j Δ_{k+j}, every row with its own order.
  void predict(const RowMemory<T>& memory, int64_t dim, int64_t step, int64_t b, T* delta) const {
    constexpr int W = kLanes<T>;
    int terms = 0;
    for (int lane = 0; lane < W; lane++)
      if (static_cast<int>(memory.order[lane]) > terms) terms = static_cast<int>(memory.order[lane]);
    const T* above[kMaxOrder];
    Vec<T> c[kMaxOrder];
    for (int j = 0; j < terms; j++) {
      above[j] = increment(step - 1 - j, b, dim);
      c[j] = memory.coefficient[j];
    }
    for (int64_t i = 0; i < dim * W; i += W) {
      Vec<T> sum{};
      for (int j = 0; j < terms; j++) sum = fma(c[j], load(above[j] + i), sum);
      store(delta + i, sum);
    }
  }

  // After an evaluation f at h_{k+1} - delta: take f for the new delta of the active rows, and decide for each
  // whether it is settled, settled once z is corrected, or still open.
  Mask<T> judge(RowMemory<T>& memory, Vec<T> norm, int64_t dim, int evaluation, bool smooth, const T* f, T* delta,
                Mask<T> active, Vec<T>& change, Vec<T>& error, Mask<T>& correct) const {
    constexpr int W = kLanes<T>;
    const Vec<T> one = broadcast(T(1)), zero{};
    const Vec<T> moved = row_norm<T>(visible, dim, [&](int64_t i) { return load(f + i * W) - load(delta + i * W); });
    for (int64_t i = 0; i < dim * W; i += W) store(delta + i, select(active, load(f + i), load(delta + i)));
    const Vec<T> delta_norm = row_norm<T>(visible, dim, [&](int64_t i) { return load(delta + i * W); });

    // Rounding of f, by Δ or by what its input moves it: below it changes are noise, which shows no rate near 1.
    const Vec<T> floor = broadcast(kEpsilon<T>) * delta_norm,
                 noise = largest<T>(floor, broadcast(kEpsilon<T>) * memory.seen * norm);
    const Vec<T> ratio = moved / largest<T>(change, broadcast(kTiny<T>));
    const Mask<T> at_floor = moved <= (evaluation > 0 ? noise : floor);
    if (evaluation > 0) {
      const Mask<T> measured =
          active & (change > zero) & ((moved > noise) | (ratio < largest<T>(memory.seen, broadcast(T(0.5)))));
      const Vec<T> kept = broadcast(T(kRateMemory)) * memory.seen, doubt = broadcast(T(0.5)) * memory.doubt;
      memory.seen = select(measured, largest<T>(ratio, kept), memory.seen);
      memory.doubt = select(measured, doubt, memory.doubt);
      const Vec<T> rate = largest<T>(memory.seen, memory.doubt);
      memory.rate = select(rate < one, rate, one);
      memory.age = select(measured, zero, memory.age);
    }
    const bool first = evaluation == 0;
    const Vec<T> left = one - memory.rate;  // (6): the error before the evaluation is at most change / (1 - ρ)
    const T limit = static_cast<T>(first ? kFirstLimit : kChangeLimit) * change_unit;
    const Mask<T> good = moved <= left * broadcast(limit) * norm;
    const Mask<T> stale = memory.age >= broadcast(T(kProbeEvery));
    const Mask<T> near = memory.rate * moved <= left * broadcast(state_limit) * norm;
    const Mask<T> settled = active & (smooth ? at_floor | (good & near) : at_floor);
    const Mask<T> corrected = active & ~settled & near & (first ? ~stale : ~Mask<T>{});
    Mask<T> open = active & ~settled & ~corrected;

    // Given up: not finite, or no longer contracting.
    const Mask<T> finite = moved - moved == zero;
    Mask<T> hopeless = ~finite;
    if (evaluation + 1 >= 8) hopeless |= moved > broadcast(T(0.95)) * change;
    if (evaluation + 1 >= kMaxEvaluations) hopeless |= ~Mask<T>{};
    const Mask<T> lost = open & hopeless;
    open &= ~hopeless;

    const Vec<T> relative = moved / largest<T>(norm, delta_norm);
    const Vec<T> least = broadcast(T(0.01));
    const Vec<T> remainder = largest<T>(left, least);
    error = select(settled, relative, select(corrected, memory.rate * relative / remainder, error));
    const Vec<T> given_up = relative / remainder;
    const Vec<T> kept = select(given_up <= memory.unsettled, memory.unsettled, given_up);  // NaN is kept
    memory.unsettled = select(lost & (memory.unsettled == memory.unsettled), kept, memory.unsettled);
    change = select(active, moved, change);
    correct |= corrected | lost;
    return open;
  }

  // (4): how well each order would have predicted the newest increment; then the highest of the best, (3).
  void measure(RowMemory<T>& memory, int64_t dim, int64_t step, int64_t b) const {
    constexpr int W = kLanes<T>;
    const int known = step + 1 < kHistory ? static_cast<int>(step + 1) : kHistory;  // increments
    const T* above[kHistory];
    for (int j = 0; j < kHistory; j++) above[j] = increment(step - (j < known ? j : 0), b, dim);
    Vec<T> worst[kHistory] = {};
    for (int64_t i = 0; i < dim; i++) {
      const Vec<T> c = broadcast(visible[i]);
      Vec<T> difference[kHistory];
#pragma GCC unroll 7
      for (int j = 0; j < kHistory; j++) difference[j] = c * load(above[j] + i * W);
#pragma GCC unroll 7
      for (int p = 0; p < kHistory; p++) {
        worst[p] = largest<T>(worst[p], abs(difference[0]));
#pragma GCC unroll 7
        for (int j = 0; j + p + 1 < kHistory; j++) difference[j] -= difference[j + 1];
      }
    }
    Vec<T> best{}, order{};
    for (int p = 0; p < known; p++) {
      const Vec<T> old = broadcast(T(0.25)) * memory.spread[p];
      memory.spread[p] = largest<T>(worst[p], old);
      const Mask<T> better = p == 0 ? ~Mask<T>{} : memory.spread[p] < best;
      best = select(better, memory.spread[p], best);
      order = select(better, broadcast(T(p)), order);
    }
    for (int p = 2; p < known; p++) {
      const Mask<T> as_good = (memory.spread[p] <= broadcast(T(kOrderSlack)) * best) & (order < broadcast(T(p)));
      order = select(as_good, broadcast(T(p)), order);
    }
    // While the history grows, the order that could not be measured yet.
    if (known <= kMaxOrder) order = select(order == broadcast(T(known - 1)), broadcast(T(known)), order);
    memory.order = order;
    for (int j = 0; j < kMaxOrder; j++)
      for (int lane = 0; lane < W; lane++)
        memory.coefficient[j][lane] = static_cast<T>(kBinomial[static_cast<int>(order[lane])][j]);
  }
};

// Element i of a row of rows [B, q] as the user has them, and of blocks [count, q, W].
template <class S>
struct Rows {
  const S* data;
  int64_t dim;
  double operator()(int64_t b, int lane, int64_t i) const {
    return widen(data[(b * kLanes<Compute<S>> + lane) * dim + i]);
  }
};
template <class T>
struct Blocks {
  const T* data;
  int64_t dim;
  double operator()(int64_t b, int lane, int64_t i) const { return data[(b * dim + i) * kLanes<T> + lane]; }
};

// (14) at a state that is known in full, `truth`, for the first `real` rows of the reconstructed h, blocks
// [count, q, W]. For the size of a row also `top`, the block's result, and what `rows` saw since the last comparison.
template <class T, class Truth>
void measure_drift(int64_t real, int64_t dim, int64_t count, int64_t depth, const T* c, Truth truth, const T* h,
                   const T* top, RowMemory<T>* rows, ReconstructionReport& report) {
  const Blocks<T> found{h, dim}, result{top, dim};
  const double share = kPeakShare * std::sqrt(static_cast<double>(depth));
  for (int64_t b = 0; b < count; b++)
    for (int lane = 0; lane < kLanes<T> && b * kLanes<T> + lane < real; lane++) {
      double error = 0, norm = kTiny<T>, seen_error = 0, seen_norm = kTiny<T>;
      for (int64_t i = 0; i < dim; i++) {
        const double x = truth(b, lane, i), distance = std::fabs(x - found(b, lane, i));
        ReconstructionReport::keep_largest(error, distance);
        ReconstructionReport::keep_largest(norm, std::fabs(x));
        ReconstructionReport::keep_largest(norm, std::fabs(result(b, lane, i)));
        ReconstructionReport::keep_largest(seen_error, c[i] * distance);
        ReconstructionReport::keep_largest(seen_norm, c[i] * std::fabs(x));
      }
      ReconstructionReport::keep_largest(seen_norm, (share < 1 ? share : 1) * rows[b].peak[lane]);
      ReconstructionReport::keep_largest(report.drift, error / norm);
      ReconstructionReport::keep_largest(report.drift, seen_error / seen_norm);
      rows[b].peak[lane] = 0;
    }
}

// (15): |directionᵀh - what the forward saw| / |c ⊙ h|_2 for the first `rows` rows of the blocks h [count, q, W],
// whose projections are `found` [count, W], by the forward `seen` [count, W].
template <class T>
void measure_projection(const T* seen, const T* found, const T* c, int64_t rows, int64_t count, int64_t dim, const T* h,
                        ReconstructionReport& report) {
  for (int64_t b = 0; b < count; b++) {
    Vec<T> squares{};
    for (int64_t i = 0; i < dim; i++) {
      const Vec<T> x = broadcast(c[i]) * load(h + (b * dim + i) * kLanes<T>);
      squares = fma(x, x, squares);
    }
    for (int lane = 0; lane < kLanes<T> && b * kLanes<T> + lane < rows; lane++) {
      const double error = found[b * kLanes<T> + lane] - seen[b * kLanes<T> + lane];
      const double norm = std::sqrt(static_cast<double>(squares[lane]));
      ReconstructionReport::keep_largest(report.drift, error == 0 ? 0 : std::fabs(error) / norm);
    }
  }
}

}  // namespace
}  // namespace odeblock
