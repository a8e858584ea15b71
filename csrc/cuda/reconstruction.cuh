// The adjoint's states on a GPU: one launch, from the last layer to the first, each state from the one above it by
// solving a step for its input. docs/adjoint.md derives what is done here, section 8 what is done otherwise than on the
// CPU; (n) is its equation n.
//
// Blocks and warps as in forward.cuh. A warp's rows decide each for itself, on numbers that the four lanes of a row
// share; but weights come for a whole block, which evaluates a layer again while a row of it is open. Rows that are
// settled stay as they are. h_{k+1} and the guess of the increment wait in shared memory; the increments above, which
// predictions are made of, are differences of the states there, in global memory, where each lane finds its own.
#pragma once

#include "sweep.cuh"

namespace odeblock {
namespace {

// As csrc/cpu/reconstruction.h has them, but for the orders: those that pay where states are differences of states.
template <class P>
constexpr int kMostOrder = P::kRounds ? 2 : 4;  // of the prediction (2)
constexpr int kMeasureEvery = 4;                // steps between two measurements of the orders
constexpr int kProbeEvery = 64;                 // steps of which one is evaluated twice, to measure the rate (7)
constexpr int kSlowEvaluations = 8, kMostEvaluations = 64;

// What a row remembers from layer to layer and from launch to launch: numbers [.., B] in global memory.
// odeblock/gpu_adjoint.py has the same.
enum RowNumber { kSeen, kDoubt, kOrder, kSquares, kUnsettled, kPeak, kEvaluations, kOrders, kDrift, kSpread };

template <class P>
class RowMemory {
  typedef typename P::Number Number;

 public:
  ODEBLOCK_DEVICE RowMemory(void* first, int64_t batch) : first_(static_cast<Number*>(first)), batch_(batch) {}
  // Of the row of number i of a tile; 0 where there is none.
  ODEBLOCK_DEVICE Number read(int which, int i) const {
    return row_of<P>(i) < batch_ ? first_[which * batch_ + row_of<P>(i)] : Number(0);
  }
  // By one lane of the row, f(what was there); the others see it after a barrier of the warp.
  template <class F>
  ODEBLOCK_DEVICE void update(int which, int i, F f) const {
    if (simt::lane() % 4 != 0 || row_of<P>(i) >= batch_) return;
    Number& number = first_[which * batch_ + row_of<P>(i)];
    number = f(number);
  }
  ODEBLOCK_DEVICE void write(int which, int i, Number value) const {
    update(which, i, [=](Number) { return value; });
  }

 private:
  Number* const first_;
  const int64_t batch_;
};

// The larger; NaN if one is.
template <class T>
ODEBLOCK_DEVICE T larger(T a, T b) {
  return a >= b || a != a ? a : b;
}
template <class T>
ODEBLOCK_DEVICE T smaller(T a, T b) {
  return a < b ? a : b;
}

// The norm (5) of a row, from what each of its lanes found; NaN if it is not finite.
template <class T>
ODEBLOCK_DEVICE T norm_of_row(T x) {
  x = larger(x, simt::shuffle_xor(x, 1));
  x = larger(x, simt::shuffle_xor(x, 2));
  return x + (x - x);
}

// The state of layer k of the block, of a ring of them.
template <class P, class T>
ODEBLOCK_DEVICE Rows<P, T> state_of(const ReconstructionProblem& p, int64_t k) {
  typename P::Number* const states = static_cast<typename P::Number*>(p.states);
  return Rows<P, T>(states + k % p.ring * padded_rows(p.batch) * p.dim, p.dim, static_cast<int>(p.dim), p.batch);
}

// (2): the increment of layer k, extrapolated from the `known` ones above it; h: h_{k+1}.
template <class P, int Q>
ODEBLOCK_DEVICE void predict(const ReconstructionProblem& p, int k, int known, const RowMemory<P>& memory,
                             const typename P::Tile* h, typename P::Tile* delta, int step) {
  typedef typename P::Number Number;
  constexpr int kGroup = Q / 8 < 8 ? Q / 8 : 8;  // tiles, whose numbers are asked for together
  Number order[P::kNumbers / 2];
  bool any = false;
#pragma unroll
  for (int r = 0; r < P::kNumbers / 2; r++) order[r] = memory.read(kOrder, 2 * r), any |= order[r] > 0;
#pragma unroll 1
  for (int first = 0; first < Q / 8; first += kGroup) {
    typename P::Tile above[kGroup], sum[kGroup];
#pragma unroll
    for (int n = 0; n < kGroup; n++) above[n] = h[(first + n) * step], sum[n] = {};
    if (any) {
      Number c[P::kNumbers / 2];  // (-1)^j C(order, j + 1): zero from j = order on
#pragma unroll
      for (int r = 0; r < P::kNumbers / 2; r++) c[r] = order[r];
#pragma unroll
      for (int j = 0; j < kMostOrder<P>; j++) {
        if (j >= known) break;
        typename P::Tile next[kGroup];
        state_of<P, const Number>(p, k + 2 + j).template read_tiles<kGroup>(first, next);
#pragma unroll
        for (int n = 0; n < kGroup; n++)
#pragma unroll
          for (int i = 0; i < P::kNumbers; i++)
            if (c[i / 2] != 0) sum[n].x[i] = fma(c[i / 2], next[n].x[i] - above[n].x[i], sum[n].x[i]);
#pragma unroll
        for (int n = 0; n < kGroup; n++) above[n] = next[n];
#pragma unroll
        for (int r = 0; r < P::kNumbers / 2; r++) c[r] *= (static_cast<Number>(j + 1) - order[r]) / (j + 2);
      }
    }
#pragma unroll
    for (int n = 0; n < kGroup; n++) delta[(first + n) * step] = sum[n];
  }
}

// (4): how well each order would have predicted the newest of the `known` increments, that of layer k, whose state is
// h; then the highest of the best, (3).
template <class P, int Q>
ODEBLOCK_DEVICE void measure(const ReconstructionProblem& p, int k, int known, const RowMemory<P>& memory,
                             const typename P::Number* visible, const typename P::Tile* h, int step) {
  typedef typename P::Number Number;
  typedef simt::Pair<Number> Pair;
  constexpr int kOrders = kMostOrder<P> + 1;
  Number worst[P::kNumbers / 2][kOrders] = {};
#pragma unroll 1
  for (int n = 0; n < Q / 8; n++) {
    const Pair c = simt::read_pair(visible + 8 * n + simt::lane() % 4 * 2);
#pragma unroll
    for (int i = 0; i < P::kNumbers; i += 2) {
      Pair states[kOrders + 1] = {{h[n * step].x[i], h[n * step].x[i + 1]}};
#pragma unroll
      for (int j = 1; j <= kOrders; j++)
        states[j] = j <= known ? state_of<P, const Number>(p, k + j).read(n, i) : Pair{};
#pragma unroll
      for (int q = 0; q < kOrders; q++) {  // differences of one more order each time
#pragma unroll
        for (int j = 0; j + q < kOrders; j++)
          states[j] = {states[j + 1].x - states[j].x, states[j + 1].y - states[j].y};
        worst[i / 2][q] = larger(worst[i / 2][q], larger(c.x * abs(states[0].x), c.y * abs(states[0].y)));
      }
    }
  }
#pragma unroll
  for (int r = 0; r < P::kNumbers / 2; r++)
#pragma unroll
    for (int q = 0; q < kOrders; q++)
      worst[r][q] = larger(norm_of_row(worst[r][q]), Number(0.25) * memory.read(kSpread + q, 2 * r));
  simt::sync_warp();  // all have read orders
#pragma unroll
  for (int r = 0; r < P::kNumbers / 2; r++) {
    Number best = worst[r][0];
    int order = 0;
#pragma unroll
    for (int q = 0; q < kOrders; q++)
      if (q < known) {
        memory.write(kSpread + q, 2 * r, worst[r][q]);
        if (worst[r][q] < best || best != best) best = worst[r][q], order = q;
      }
#pragma unroll
    for (int q = 2; q < kOrders; q++)
      if (q < known && q > order && worst[r][q] <= Number(1.5) * best) order = q;
    if (known < kOrders && order == known - 1) order = known;  // while the history grows, what was not measured yet
    memory.write(kOrder, 2 * r, static_cast<Number>(order));
  }
}

// How a row stands in the solution of a step.
template <class T>
struct OpenRow {
  T norm, change;
  bool open;
};

// What is to be thought of an evaluation that moved the increment of a row by `moved`, to one of norm `size`.
template <class T>
struct Verdict {
  bool settled, hopeless;
  T error;  // (6): what is left of a row that is settled, the bound of one that is given up
};
// evaluations: with this one; probes: settles after the second at the earliest; seen, doubt: of the rate (7); limit: of
// (10); floor: of what is multiplied, relative. Below it, of Δ or of what h moves f by, changes are noise: they need
// not shrink, and a rate near 1 is not learned from them.
template <class T>
ODEBLOCK_DEVICE Verdict<T> judge(const OpenRow<T>& row, int evaluations, bool probes, T moved, T size, T limit, T floor,
                                 T& seen, T& doubt) {
  const T noise = floor * larger(size, seen * row.norm);
  const bool at_floor = moved <= (evaluations > 1 ? noise : floor * size);
  if (evaluations > 1 && row.change > 0) {
    const T ratio = moved / row.change;
    if (moved > noise || ratio < larger(seen, T(0.5))) seen = larger(ratio, T(0.95) * seen), doubt *= T(0.5);
  }
  const T rate = smaller(larger(seen, doubt), T(1)), left = 1 - rate, rest = left > T(0.01) ? left : T(0.01);
  const bool near = rate * moved <= left * limit * row.norm;  // (10)
  const bool settled = at_floor || (near && (evaluations > 1 || !probes));
  const bool hopeless = !(moved - moved == 0) || (evaluations >= kSlowEvaluations && moved > T(0.95) * row.change) ||
                        evaluations >= kMostEvaluations;
  const T relative = moved / larger(row.norm, size);
  return {settled, hopeless, at_floor ? relative : settled ? rate * relative / rest : relative / rest};
}

// h_{k+1} and the increment wait.
template <class P, int Q>
using ReconstructionShape = SweepShapeOf<P, Q, 2>;

template <class P, int Q>
ODEBLOCK_DEVICE void reconstruct_of_block(const ReconstructionArguments& arguments) {
  typedef typename P::Number Number;
  typedef typename P::Tile Tile;
  typedef typename P::A A;
  typedef ReconstructionShape<P, Q> Shape;
  constexpr int kUnits = Shape::Chunk::kUnits, kTiles = P::kColumns / 8, kRows = P::kNumbers / 2;  // of a lane
  constexpr bool kPacks = Shape::kPacks;
  constexpr Number kTiny = sizeof(Number) == 4 ? Number(1.17549435e-38) : Number(2.2250738585072014e-308);

  const ReconstructionProblem& p = arguments.problem;
  const int dim = static_cast<int>(p.dim), hidden = static_cast<int>(p.hidden);
  StreamOf<typename Shape::Chunk, Shape::kStages, true> chunks(p, arguments.W, arguments.V);

  const int step = simt::threads();  // from one tile to the next
  Tile* const h = reinterpret_cast<Tile*>(simt::shared() + Shape::kStageBytes) + simt::thread();
  Tile* const delta = h + Q / 8 * step;
  {
    const Rows<P, const Number> top = state_of<P, const Number>(p, p.first + p.depth);
    for_each_pair<P, Q, true>([&](int n, int i) {
      const simt::Pair<Number> pair = top.read(n, i);
      h[n * step].x[i] = pair.x, h[n * step].x[i + 1] = pair.y;
    });
  }
  const RowMemory<P> memory(p.rows, p.batch);

  while (chunks.more()) {
    const int k = static_cast<int>(p.first) + chunks.layer(),
              above = static_cast<int>(p.block_depth) - 1 - k;  // layers
    const auto of_layer = [&](const void* sights) {  // worked out where it is needed, while registers are full
      return static_cast<const Number*>(sights) + (simt::opaque(k) - p.first) * kSightWidth;
    };
    predict<P, Q>(p, k, above < kMostOrder<P> ? above : kMostOrder<P>, memory, h, delta, step);

    OpenRow<Number> rows[kRows] = {};
    for_each_seen<P, Q, true>(of_layer(p.visible), [&](int n, int i, Number c) {
      rows[i / 2].norm = larger(rows[i / 2].norm, c * abs(h[n * step].x[i]));
    });
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      OpenRow<Number>& row = rows[r];
      row.norm = larger(norm_of_row(row.norm), kTiny);
      row.open = row_of<P>(2 * r) < p.batch;
      const Number order = memory.read(kOrder, 2 * r);
      memory.update(kPeak, 2 * r, [=](Number peak) { return larger(peak, row.norm); });
      memory.update(kOrders, 2 * r, [=](Number sum) { return sum + order; });
    }

    for (int evaluations = 1;; evaluations++) {
      const auto guess = [&](int j) {
        Tile tiles[kTiles];
#pragma unroll
        for (int n = 0; n < kTiles; n++)
#pragma unroll
          for (int i = 0; i < P::kNumbers; i++)
            tiles[n].x[i] = h[(j * kTiles + n) * step].x[i] - delta[(j * kTiles + n) * step].x[i];
        return P::pack(tiles, 1);
      };
      A packed[kPacks ? Q / P::kColumns : 1];
      if constexpr (kPacks) {
#pragma unroll
        for (int j = 0; j < Q / P::kColumns; j++) packed[j] = guess(j);
      }
      const auto operand = [&](int j) {
        if constexpr (kPacks)
          return packed[j];
        else
          return guess(j);
      };
      Tile sums[Q / 8];
      P::clear(sums);
      for (int unit = 0; unit < hidden; unit += kUnits) {
        chunks.wait();
        if (Q <= 128 && idle<P>(p.batch)) continue;  // while registers are not full
        Tile z[kUnits / 8];
        multiply<P, kUnits, Q>(z, operand, chunks.W());
        P::end(z);
        for_each_biased<P, kUnits>(chunks.hidden_bias(), [&](int n, int i, Number bias) { z[n].x[i] += bias; });
        with_activation(p.activation, [&](auto sigma) {
          for_each_number<P, kUnits>([&](int n, int i, int) { z[n].x[i] = evaluate<P::kBits>(sigma, z[n].x[i]).s; });
        });
        if (unit + kUnits > hidden)  // as in forward.cuh
          for_each_number<P, kUnits>([&](int n, int i, int column) {
            if (unit + column >= hidden) z[n].x[i] = 0;
          });
        add<P, Q, kUnits>(unit == 0, sums, [&](int j) { return P::pack(&z[j * kTiles], 1); }, chunks.V());
        chunks.release();
      }
      P::end(sums);
      for_each_biased<P, Q>(chunks.output_bias(), [&](int n, int i, Number bias) {
        sums[n].x[i] = static_cast<Number>(p.scale) * (sums[n].x[i] + bias);
      });
      if (dim < Q)
        for_each_number<P, Q>([&](int n, int i, int column) {
          if (column >= dim) sums[n].x[i] = 0;
        });

      Number moved[kRows] = {}, size[kRows] = {};
      const int apart = simt::opaque(step);  // or places of all tiles would be worked out before
      for_each_seen<P, Q, false>(of_layer(p.visible), [&](int n, int i, Number c) {
        Number& own = delta[n * apart].x[i];
        const Number found = sums[n].x[i];
        moved[i / 2] = larger(moved[i / 2], c * abs(found - own));
        if (rows[i / 2].open) own = found;
        size[i / 2] = larger(size[i / 2], c * abs(own));
      });
      Number seen[kRows], doubt[kRows];
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        moved[r] = norm_of_row(moved[r]), size[r] = norm_of_row(size[r]);
        seen[r] = memory.read(kSeen, 2 * r), doubt[r] = memory.read(kDoubt, 2 * r);
      }
      simt::sync_warp();  // all have read rates
      bool open = false;
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        OpenRow<Number>& row = rows[r];
        if (!row.open) continue;
        const Verdict<Number> verdict = judge(row, evaluations, above % kProbeEvery == 0, moved[r], size[r],
                                              static_cast<Number>(p.limit), P::kEpsilon, seen[r], doubt[r]);
        memory.write(kSeen, 2 * r, seen[r]), memory.write(kDoubt, 2 * r, doubt[r]);
        row.change = moved[r];
        row.open = !verdict.settled && !verdict.hopeless;
        open |= row.open;
        if (row.open) continue;
        memory.update(kEvaluations, 2 * r, [=](Number sum) { return sum + evaluations; });
        if (verdict.settled)
          memory.update(kSquares, 2 * r, [=](Number sum) { return fma(verdict.error, verdict.error, sum); });
        else
          memory.update(kUnsettled, 2 * r, [=](Number worst) { return larger(worst, verdict.error); });
      }
      if (!simt::any_of_block(open)) break;
      chunks.again();
    }

    const Rows<P, Number> state = state_of<P, Number>(p, k);
    for_each_pair<P, Q, true>([&](int n, int i) {
      h[n * step].x[i] -= delta[n * step].x[i], h[n * step].x[i + 1] -= delta[n * step].x[i + 1];
      state.write(n, i, h[n * step].x[i], h[n * step].x[i + 1]);
    });
    if (above < 2 * (kMostOrder<P> + 1) || above % kMeasureEvery == 0)
      measure<P, Q>(p, k, above < kMostOrder<P> ? above + 1 : kMostOrder<P> + 1, memory, of_layer(p.visible), h, step);

    const int every = static_cast<int>(check_every(p.block_depth));
    if (k > 0 && k % every == 0) {  // (15)
      const Number *const sight = of_layer(p.sight), *const probe = static_cast<const Number*>(p.probe);
      Number found[kRows], largest[kRows] = {}, square[kRows] = {};
      project<P, Q, true>(
          [&](int n) {
            const int column = 8 * n + simt::lane() % 4 * 2;
            const simt::Pair<Number> c = simt::read_pair(sight + column), r = simt::read_pair(probe + column);
            return simt::Pair<Number>{c.x * r.x, c.y * r.y};
          },
          h, step, found);
      for_each_seen<P, Q, true>(
          sight, [&](int n, int i, Number c) { largest[i / 2] = larger(largest[i / 2], c * abs(h[n * step].x[i])); });
#pragma unroll
      for (int r = 0; r < kRows; r++) largest[r] = larger(norm_of_row(largest[r]), kTiny);
      for_each_seen<P, Q, true>(sight, [&](int n, int i, Number c) {
        const Number x = c * h[n * step].x[i] / largest[i / 2];  // whose square is in range
        square[i / 2] = fma(x, x, square[i / 2]);
      });
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        const Number norm = largest[r] * static_cast<Number>(::sqrt(sum_of_row(square[r])));
        if (row_of<P>(2 * r) >= p.batch) continue;
        const Number seen =
            static_cast<const Number*>(p.checks)[(k / every - 1) * padded_checks(p.batch) + row_of<P>(2 * r)];
        const Number error = abs(found[r] - seen);
        if (error != 0) {
          const Number ratio = error / norm;
          memory.update(kDrift, 2 * r, [=](Number drift) { return larger(drift, ratio); });
        }
        memory.write(kPeak, 2 * r, 0);
      }
    }
    simt::sync_warp();  // rows remember
  }
  chunks.end();
}

template <class P, int Q>
ODEBLOCK_KERNEL(ReconstructionShape<P, Q>::kMostThreads, 1)
reconstruction_kernel(const ODEBLOCK_PARAMETER ReconstructionArguments arguments) {
  if constexpr (P::kWarps == 1 || simt::kWarpgroups)
    reconstruct_of_block<P, Q>(arguments);
  else
    simt::trap();
}

}  // namespace
}  // namespace odeblock
