// The adjoint's states: h_k from h_{k+1} by solving h_k = h_{k+1} - Δ_k, Δ_k = scale f_k(h_k), a fixed point of
// a contraction when the depth is large. Each row is solved by itself, so that it does not depend on its
// neighbours: start from the linear extrapolation Δ_k ≈ 2Δ_{k+1} - Δ_{k+2} (weights that are smooth in depth
// make Δ smooth in depth) and evaluate Δ <- scale f_k(h_{k+1} - Δ) until the row's change is at rounding level.
#pragma once

#include "forward.h"

namespace odeblock {
namespace {

// A row that this many evaluations did not settle is given up, and reported. reference.py has the same.
constexpr int kMaxEvaluations = 100;

struct ReconstructionReport {
  double change = 0;       // largest last change of a row, relative to max(|h_{k+1}|, |Δ_k|), maximum norms
  double drift = 0;        // largest |h_0 reconstructed - h_0| / max(|h_0|, |h_L|) of a row
  double evaluations = 0;  // summed over rows and layers

  static void keep_largest(double& value, double other) {
    if (!(value >= other) && value == value) value = other;  // NaN stays
  }
  void merge(const ReconstructionReport& other) {
    keep_largest(change, other.change);
    keep_largest(drift, other.drift);
    evaluations += other.evaluations;
  }
};

template <class T>
constexpr T kEpsilon = sizeof(T) == 4 ? T(1.1920928955078125e-7) : T(2.220446049250313e-16);
template <class T>
constexpr T kTiny = sizeof(T) == 4 ? T(1.1754943508222875e-38) : T(2.2250738585072014e-308);

template <class T>
ODEBLOCK_INLINE Vec<T> largest(Vec<T> a, Vec<T> b) {
  return select(a > b, a, b);
}

// For each row of a block x [features, W] its maximum norm; NaN if any entry is not finite.
template <class T, class Entry>
ODEBLOCK_INLINE Vec<T> row_norm(int64_t features, Entry entry) {
  Vec<T> norm{}, finite{};
  for (int64_t i = 0; i < features; i++) {
    const Vec<T> x = entry(i);
    norm = largest<T>(norm, abs(x));
    finite += x - x;  // 0, or NaN where x is NaN or infinite
  }
  return norm + finite;
}

// h [N, q, W]: h_{k+1} on entry, h_k on return, of which the first `rows` are real. `history` states above were
// reconstructed before. newest: Δ_{k+1}. oldest: Δ_{k+2} on entry, Δ_k on return. x, f [N, q, W] and
// z [N, m, W]: scratch.
template <class T, int N>
void reconstruct(const Layer<T>& weights, Activate<T> sigma, T scale, int64_t rows, int64_t history, const T* newest,
                 T* oldest, T* x, T* z, T* f, T* h, ReconstructionReport& report) {
  constexpr int W = kLanes<T>;
  const int64_t dim = weights.V.rows, size = dim * W;
  T* delta = oldest;
  for (int64_t i = 0; i < N * size; i += W) {
    const Vec<T> guess = history == 0   ? Vec<T>{}
                         : history == 1 ? load(newest + i)
                                        : load(newest + i) + (load(newest + i) - load(oldest + i));
    store(delta + i, guess);
  }

  Vec<T> norm[N], change[N], delta_norm[N];
  Mask<T> active[N];
  for (int j = 0; j < N; j++) {
    norm[j] = row_norm<T>(dim, [&](int64_t i) { return load(h + j * size + i * W); });
    change[j] = delta_norm[j] = Vec<T>{};
    for (int lane = 0; lane < W; lane++) active[j][lane] = j * W + lane < rows ? -1 : 0;
  }

  bool any = true;
  for (int evaluation = 0; any && evaluation < kMaxEvaluations; evaluation++) {
    for (int64_t i = 0; i < N * size; i += W) store(x + i, load(h + i) - load(delta + i));
    product<T, false, N>(weights.W, x, weights.hidden_bias, T(1), nullptr, z);
    sigma(z, N * weights.W.rows * W, z);
    product<T, false, N>(weights.V, z, weights.output_bias, scale, nullptr, f);
    any = false;
    for (int j = 0; j < N; j++) {
      const T* fj = f + j * size;
      T* dj = delta + j * size;
      const Vec<T> moved = row_norm<T>(dim, [&](int64_t i) { return load(fj + i * W) - load(dj + i * W); });
      change[j] = select(active[j], moved, change[j]);
      for (int64_t i = 0; i < size; i += W) store(dj + i, select(active[j], load(fj + i), load(dj + i)));
      delta_norm[j] = row_norm<T>(dim, [&](int64_t i) { return load(dj + i * W); });
      const Vec<T> tolerance = broadcast(kEpsilon<T>) * (norm[j] + norm[j] + delta_norm[j]);
      for (int lane = 0; lane < W; lane++) report.evaluations += active[j][lane] ? 1 : 0;
      active[j] &= ~(change[j] <= tolerance);
      for (int lane = 0; lane < W; lane++) any |= active[j][lane] != 0;
    }
  }

  for (int64_t i = 0; i < N * size; i += W) store(h + i, load(h + i) - load(delta + i));
  for (int j = 0; j < N; j++) {
    const Vec<T> relative = change[j] / largest<T>(largest<T>(norm[j], delta_norm[j]), broadcast(kTiny<T>));
    for (int lane = 0; lane < W && j * W + lane < rows; lane++)
      ReconstructionReport::keep_largest(report.change, relative[lane]);
  }
}

// How far the reconstructed h_0 of `count` blocks is from the block's input h [B, q]; top: their h_L.
template <class S, class T = Compute<S>>
void measure_drift(const S* input, int64_t batch, int64_t dim, int64_t first, int64_t count, const T* bottom,
                   const T* top, ReconstructionReport& report) {
  constexpr int W = kLanes<T>;
  for (int64_t b = 0; b < count; b++)
    for (int lane = 0; lane < W && (first + b) * W + lane < batch; lane++) {
      const S* row = input + ((first + b) * W + lane) * dim;
      double error = 0, norm = kTiny<T>;
      for (int64_t i = 0; i < dim; i++) {
        const double x = widen(row[i]), at_bottom = bottom[(b * dim + i) * W + lane],
                     at_top = top[(b * dim + i) * W + lane];
        ReconstructionReport::keep_largest(error, x > at_bottom ? x - at_bottom : at_bottom - x);
        ReconstructionReport::keep_largest(norm, x > 0 ? x : -x);
        ReconstructionReport::keep_largest(norm, at_top > 0 ? at_top : -at_top);
      }
      ReconstructionReport::keep_largest(report.drift, error / norm);
    }
}

}  // namespace
}  // namespace odeblock
