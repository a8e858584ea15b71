// The backward's way through the layers on a GPU: one launch, from the last layer to the first, for q up to
// kMostFeatures. As in forward.cuh a warp takes rows of its own, weights stream through shared memory, and a chunk's
//
//   z = W h + hidden_bias,  s = sigma(z),  g = (Vᵀa) ⊙ sigma'(z),  sums += Wᵀg;     once a layer  a += scale sums
//
// needs nothing but the chunk; both products with V and W read them where they lie. a waits in shared memory, in a
// place of its lane's own; so does h where it is not packed as the operand of 16-bit products once a layer.
//
// s, g, h and a go to global memory, as matrix products over the rows of all blocks read them: the gradients of the
// weights then are sums that no two blocks write to, the same each time. In 16 bits that is 4 (q + m) bytes a row and
// layer, written and read again (docs/performance.md).
#pragma once

#include "chunks.cuh"
#include "tiles.cuh"

namespace odeblock {
namespace {

// Whether registers hold states of up to Q features as operands of products P.
template <class P, int Q>
constexpr bool kPacksStates = P::kRounds && Q <= 128;

// A block for products P and up to Q features, of whose rows `Waiting` states wait in shared memory.
template <class P, int Q, int Waiting>
struct SweepShapeOf {
  static constexpr int kSize = sizeof(typename P::Stored);
  static constexpr bool kPacks = kPacksStates<P, Q>;
  static constexpr int units() {
    if (kSize == 2) return Q > 64 && P::kWarps == 1 ? 16 : 32;
    return Q <= 512 / kSize || P::kColumns == 16 ? 16 : 8;
  }
  typedef ChunkShape<P, Q, units()> Chunk;

  static constexpr size_t waiting_bytes(int warps) {
    return static_cast<size_t>(Waiting) * warps * 32 * (Q / 8) * sizeof(typename P::Tile);
  }
  // That registers allow; shared memory decides (launch.cu).
  static constexpr int kMostWarps = P::kWarps == 4 && Q == 64 && Waiting == 1 ? 12 : 8, kMostThreads = 32 * kMostWarps;
  static constexpr int stages() {
    const int warps = Chunk::kBulk ? kMostWarps : 2;
    const int fit = static_cast<int>((P::kSharedBytes - Chunk::bytes(0) - waiting_bytes(warps)) / Chunk::kBytes);
    const int most = Chunk::kBulk ? 8 : 4;
    return fit < most ? fit : most;
  }
  static constexpr int kStages = stages();
  static constexpr size_t kStageBytes = Chunk::bytes(kStages);
  static constexpr size_t shared_bytes(int warps) { return kStageBytes + waiting_bytes(warps); }
};
template <class P, int Q>
using SweepShape = SweepShapeOf<P, Q, kPacksStates<P, Q> ? 1 : 2>;

template <class P, int Q>
ODEBLOCK_DEVICE void sweep_of_block(const SweepArguments& arguments) {
  typedef typename P::Stored Stored;
  typedef typename P::Number Number;
  typedef typename P::Tile Tile;
  typedef typename P::A A;
  typedef SweepShape<P, Q> Shape;
  constexpr int kUnits = Shape::Chunk::kUnits, kTiles = P::kColumns / 8;  // of an operand
  constexpr bool kPacks = Shape::kPacks;

  const SweepProblem& p = arguments.problem;
  const int dim = static_cast<int>(p.dim), hidden = static_cast<int>(p.hidden);
  StreamOf<typename Shape::Chunk, Shape::kStages, true> chunks(p, arguments.W, arguments.V);

  const int step = simt::threads();  // from one tile to the next
  Tile* const a = reinterpret_cast<Tile*>(simt::shared() + Shape::kStageBytes) + simt::thread();
  Tile* const h = a + Q / 8 * step;  // unless packed
  const Rows<P, Number> of_a(static_cast<Number*>(p.a), dim, dim, p.batch);
  for_each_pair<P, Q, true>([&](int n, int i) {
    const simt::Pair<Number> pair = of_a.read(n, i);
    a[n * step].x[i] = pair.x, a[n * step].x[i + 1] = pair.y;
  });

  A packed_h[kPacks ? Q / P::kColumns : 1], packed_a[kPacks ? Q / P::kColumns : 1];
  const auto operand = [&](const A* packed, const Tile* tiles) {
    return [=](int j) {
      if constexpr (kPacks)
        return packed[j];
      else
        return P::pack(&tiles[j * kTiles * step], step);
    };
  };
  while (chunks.more()) {
    const int layer = chunks.layer();
    const Rows<P, const Number> state(static_cast<const Number*>(p.states) + layer * padded_rows(p.batch) * dim, dim,
                                      dim, p.batch);
    const auto of_layer = [&](void* array, int64_t width, int from) {
      Stored* first = static_cast<Stored*>(array);
      if (first) first += layer * p.batch * width + from;
      return Rows<P, Stored>(first, width, static_cast<int>(width) - from, p.batch);
    };
    const Rows<P, Stored> layer_a = of_layer(p.layer_a, dim, 0), layer_h = of_layer(p.layer_h, dim, 0);
    // As many states as registers hold are asked for before the first is used.
    constexpr int kGroup = Q % 32 == 0 ? 4 : 2, kRead = !kPacks ? kGroup : Q == 128 ? 8 : Q / 8;  // tiles
#pragma unroll(kPacks ? Q / 8 / kRead : 1)
    for (int first = 0; first < Q / 8; first += kRead) {
      Tile read[kRead];
      state.template read_tiles<kRead>(first, read);
#pragma unroll
      for (int n = 0; n < kRead; n += kGroup) {
        Tile* const own = &a[(first + n) * step];
        if (p.layer_h)
          layer_h.template write_tiles<kGroup>(
              first + n, [&](int k, int i) { return simt::Pair<Number>{read[n + k].x[i], read[n + k].x[i + 1]}; });
        if (p.layer_a)
          layer_a.template write_tiles<kGroup>(
              first + n, [&](int k, int i) { return simt::Pair<Number>{own[k * step].x[i], own[k * step].x[i + 1]}; });
        if constexpr (kPacks) {
#pragma unroll
          for (int k = 0; k < kGroup; k += kTiles) {
            packed_h[(first + n + k) / kTiles] = P::pack(&read[n + k], 1);
            packed_a[(first + n + k) / kTiles] = P::pack(&own[k * step], step);
          }
        } else {
#pragma unroll
          for (int k = 0; k < kGroup; k++) h[(first + n + k) * step] = read[n + k];
        }
      }
    }
    Tile sums[Q / 8];
    P::clear(sums);
    for (int unit = 0; unit < hidden; unit += kUnits) {
      chunks.wait();
      if (idle<P>(p.batch)) continue;
      Tile s[kUnits / 8], g[kUnits / 8];
      multiply<P, kUnits, Q>(s, operand(packed_h, h), chunks.W());
      multiply_transposed<P, kUnits, Q>(g, operand(packed_a, a), chunks.V());
      P::end(s);
      P::end(g);
      for_each_biased<P, kUnits>(chunks.hidden_bias(), [&](int n, int i, Number bias) { s[n].x[i] += bias; });
      with_activation(p.activation, [&](auto sigma) {
        for_each_number<P, kUnits>([&](int n, int i, int) {
          const activation::Value<Number> value = evaluate<P::kBits>(sigma, s[n].x[i]);
          s[n].x[i] = value.s;
          g[n].x[i] *= value.d;
        });
      });
      const auto write_factors = [&] {
        if (!p.layer_s) return;
        const Rows<P, Stored> layer_s = of_layer(p.layer_s, hidden, unit), layer_g = of_layer(p.layer_g, hidden, unit);
        constexpr int kGroup = kUnits % 32 == 0 ? 4 : kUnits / 8;
#pragma unroll
        for (int n = 0; n < kUnits / 8; n += kGroup) {
          layer_s.template write_tiles<kGroup>(
              n, [&](int k, int i) { return simt::Pair<Number>{s[n + k].x[i], s[n + k].x[i + 1]}; });
          layer_g.template write_tiles<kGroup>(
              n, [&](int k, int i) { return simt::Pair<Number>{g[n + k].x[i], g[n + k].x[i + 1]}; });
        }
      };
      if constexpr (!Shape::Chunk::kBulk) write_factors();
      if (unit + kUnits > hidden)  // what is not there is 0, also where an infinite row makes something else of it
        for_each_number<P, kUnits>([&](int n, int i, int column) {
          if (unit + column >= hidden) g[n].x[i] = 0;
        });
      add_transposed<P, Q, kUnits>(unit == 0, sums, [&](int j) { return P::pack(&g[j * kTiles], 1); }, chunks.W());
      if constexpr (Shape::Chunk::kBulk) write_factors();  // while the product is under way
      chunks.release();
    }
    P::end(sums);
    for_each_number<P, Q>([&](int n, int i, int column) {
      a[n * step].x[i] = column < dim ? a[n * step].x[i] + static_cast<Number>(p.scale) * sums[n].x[i] : Number(0);
    });
  }
  for_each_pair<P, Q, true>([&](int n, int i) { of_a.write(n, i, a[n * step].x[i], a[n * step].x[i + 1]); });
  chunks.end();
}

template <class P, int Q>
ODEBLOCK_KERNEL(SweepShape<P, Q>::kMostThreads, 1)
sweep_kernel(const ODEBLOCK_PARAMETER SweepArguments arguments) {
  if constexpr (P::kWarps == 1 || simt::kWarpgroups)
    sweep_of_block<P, Q>(arguments);
  else
    simt::trap();
}

}  // namespace
}  // namespace odeblock
