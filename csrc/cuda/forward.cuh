// The forward on a GPU: one launch, all L steps, for q up to kMostFeatures.
//
// A warp takes rows of its own through all layers: their states, what a layer adds to them, and hidden units stay in
// its lanes, in the layout that tensor cores sum in. Weights stream through shared memory in chunks of hidden units
// (chunks.cuh); all warps of a block read them. A chunk's
//
//   z = W h + hidden_bias,  s = sigma(z),  sums += V s;     once a layer  h += scale (sums + output_bias)
//
// needs nothing but the chunk. (Sums apart from h, so that h is rounded once a layer, and never by tensor cores.) Where
// products are of 16 bits, h is rounded to their operands once a layer.
//
// What does not fill a tile or a chunk is zero in shared memory: V of a unit beyond m, W of a feature beyond q.
#pragma once

#include "chunks.cuh"
#include "tiles.cuh"

namespace odeblock {
namespace {

// A block for products P and up to Q features.
template <class P, int Q>
struct ForwardShape {
  static constexpr int kSize = sizeof(typename P::Stored);
  // Registers do not hold the states and the sums of 256 features. Then states wait in shared memory from layer to
  // layer, each in a place of its lane's own.
  static constexpr bool kWait = Q > 128;
  static constexpr int kMostWarps = kWait && P::kWarps == 1 ? 4 : 8, kMostThreads = 32 * kMostWarps;
  // Blocks of a multiprocessor, for the compiler to leave registers to.
  static constexpr int kBlocks = kSize == 2 && Q <= (P::kBits <= 11 ? 64 : 32) ? 2 : 1;
  static constexpr int units() {
    if (P::kWarps == 4) return Q == 128 ? 64 : 32;
    if (kSize == 2) return Q == 64 || Q == 256 ? 16 : 32;
    return Q <= 512 / kSize || P::kColumns == 16 ? 16 : 8;
  }

  typedef ChunkShape<P, Q, units()> Chunk;

  static constexpr size_t waiting_bytes(int warps) {
    return kWait ? static_cast<size_t>(warps) * 32 * (Q / 8) * sizeof(typename P::Tile) : 0;
  }
  static constexpr int stages() {
    // Narrow layers leave room for another block; up to 128 features fit what the smaller GPUs of a generation have.
    const size_t most = P::kSharedBytes, room = Q <= 64                   ? most / 2
                                                : kWait || P::kWarps == 4 ? most - waiting_bytes(kMostWarps)
                                                                          : 99 << 10;
    const int fit = static_cast<int>((room - Chunk::bytes(0)) / Chunk::kBytes);
    return fit < 8 ? fit : 8;
  }
  static constexpr int kStages = stages();
  static constexpr size_t kStageBytes = Chunk::bytes(kStages);
  typedef StreamOf<Chunk, kStages, false> Stream;
  static constexpr size_t shared_bytes(int warps) { return kStageBytes + waiting_bytes(warps); }
};

template <class P, int Q>
ODEBLOCK_DEVICE void forward_of_block(const ForwardArguments& arguments) {
  typedef typename P::Stored Stored;
  typedef typename P::Number Number;
  typedef typename P::Tile Tile;
  typedef ForwardShape<P, Q> Shape;
  constexpr int kUnits = Shape::Chunk::kUnits;

  const ForwardProblem& p = arguments.problem;
  const int dim = static_cast<int>(p.dim), hidden = static_cast<int>(p.hidden);
  typename Shape::Stream chunks(p, arguments.W, arguments.V);

  Tile own[Shape::kWait ? 1 : Q / 8];
  Tile* const h = Shape::kWait ? reinterpret_cast<Tile*>(simt::shared() + Shape::kStageBytes) + simt::thread() : own;
  const int step = Shape::kWait ? simt::threads() : 1;  // from one tile of h to the next
  const auto read = [&](auto* from) {
    const Rows<P, std::remove_pointer_t<decltype(from)>> rows(from, dim, dim, p.batch);
    for_each_pair<P, Q, Shape::kWait>([&](int n, int i) {
      const simt::Pair<Number> pair = rows.read(n, i);
      h[n * step].x[i] = pair.x, h[n * step].x[i + 1] = pair.y;
    });
  };
  if (p.start)
    read(static_cast<const Number*>(p.start));
  else
    read(static_cast<const Stored*>(p.h));
  const auto write = [&](auto* to) {
    const int width = simt::opaque(dim);  // as in row_of
    const Rows<P, std::remove_pointer_t<decltype(to)>> rows(to, width, width, p.batch);
    for_each_pair<P, Q, Shape::kWait>([&](int n, int i) { rows.write(n, i, h[n * step].x[i], h[n * step].x[i + 1]); });
  };

  typename P::A packed[P::kRounds ? Q / P::kColumns : 1] = {};
  const auto operand = [&](int j) {
    if constexpr (P::kRounds)
      return packed[j];
    else
      return P::pack(&h[j * (P::kColumns / 8) * step], step);
  };
  while (chunks.more()) {
    if (const int save_every = static_cast<int>(p.save_every)) {
      const int k = chunks.layer();
      if (k % save_every == 0 && (k > 0 || !p.reconstruct))
        write(static_cast<Number*>(p.states) + (k / save_every - p.reconstruct) * padded_rows(p.batch) * dim);
    }
    if (p.checks && chunks.layer() > 0 && chunks.layer() % check_every(p.depth) == 0) {
      const int64_t which = chunks.layer() / check_every(p.depth) - 1;
      const auto direction = [&](int n) {
        return simt::read_pair(static_cast<const Number*>(p.directions) + which * kSightWidth + 8 * n +
                               simt::thread_again() % 4 * 2);
      };
      Number found[P::kNumbers / 2];
      project<P, Q, Shape::kWait>(direction, h, step, found);
#pragma unroll
      for (int r = 0; r < P::kNumbers / 2; r++)
        if (simt::thread_again() % 4 == 0 && row_of<P>(2 * r) < p.batch)
          static_cast<Number*>(p.checks)[which * padded_checks(p.batch) + row_of<P>(2 * r)] = found[r];
    }
    if constexpr (P::kRounds) {
#pragma unroll
      for (int j = 0; j < Q / P::kColumns; j++) packed[j] = P::pack(&h[j * (P::kColumns / 8) * step], step);
    }
    Tile sums[Q / 8];
    P::clear(sums);
    for (int unit = 0; unit < hidden; unit += kUnits) {
      chunks.wait();
      if (idle<P>(p.batch)) continue;
      Tile z[kUnits / 8];
      multiply<P, kUnits, Q>(z, operand, chunks.W());
      P::end(z);
      for_each_biased<P, kUnits>(chunks.hidden_bias(), [&](int n, int i, Number bias) { z[n].x[i] += bias; });
      with_activation(p.activation, [&](auto sigma) {
        for_each_number<P, kUnits>([&](int n, int i, int) { z[n].x[i] = evaluate<P::kBits>(sigma, z[n].x[i]).s; });
      });
      if (unit + kUnits > hidden)  // what is not there is 0, whatever sigma(0) is, or an infinite row makes of it
        for_each_number<P, kUnits>([&](int n, int i, int column) {
          if (unit + column >= hidden) z[n].x[i] = 0;
        });
      add<P, Q, kUnits>(unit == 0, sums, [&](int j) { return P::pack(&z[j * (P::kColumns / 8)], 1); }, chunks.V());
      chunks.release();
    }
    P::end(sums);
    for_each_biased<P, Q>(chunks.output_bias(), [&](int n, int i, Number bias) {
      h[n * step].x[i] += static_cast<Number>(p.scale) * (sums[n].x[i] + bias);
    });
    if (dim < Q)
      for_each_number<P, Q, Shape::kWait>([&](int n, int i, int column) {
        if (column >= dim) h[n * step].x[i] = 0;
      });
  }
  if (p.end) write(static_cast<Number*>(p.end));
  if (p.y) write(static_cast<Stored*>(p.y));
  chunks.end();
}

template <class P, int Q>
ODEBLOCK_KERNEL(ForwardShape<P, Q>::kMostThreads, ForwardShape<P, Q>::kBlocks)
forward_kernel(const ODEBLOCK_PARAMETER ForwardArguments arguments) {
  if constexpr (P::kWarps == 1 || simt::kWarpgroups)
    forward_of_block<P, Q>(arguments);
  else
    simt::trap();
}

}  // namespace
}  // namespace odeblock
