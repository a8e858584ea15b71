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

#include <type_traits>

#include "math.cuh"
// math.cuh before activations.h, which is written on its functions
#include "../activations.h"
#include "chunks.cuh"

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
  static constexpr int kBlocks = kSize == 2 && Q <= (P::kApproximate ? 64 : 32) ? 2 : 1;
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
    const int fit = static_cast<int>(room / Chunk::kBytes);
    return fit < 8 ? fit : 8;
  }
  static constexpr int kStages = stages();
  static constexpr size_t kStageBytes = static_cast<size_t>(kStages) * Chunk::kBytes;
  typedef std::conditional_t<Chunk::kBulk, BulkChunks<Chunk, kStages>, CopiedChunks<Chunk, kStages>> Stream;
  static constexpr size_t shared_bytes(int warps) { return kStageBytes + waiting_bytes(warps); }
};

// sigma(z). Where it is rounded to 16 bits at once, bfloat16's 8 of them, with the tanh that the hardware has (an error
// of 2^-11): an operation where exp and a division are two, and many more.
template <bool kApproximate, class Sigma, class T>
ODEBLOCK_DEVICE T evaluate(Sigma, T z) {
  using namespace activation;
  if constexpr (kApproximate && std::is_same_v<Sigma, Tanh>) {
    return simt::tanh_approximate(z);
  } else if constexpr (kApproximate && std::is_same_v<Sigma, Sigmoid>) {
    return fma(0.5f, simt::tanh_approximate(0.5f * z), 0.5f);
  } else if constexpr (kApproximate && std::is_same_v<Sigma, Silu>) {
    const float half = 0.5f * z;
    return fma(half, simt::tanh_approximate(half), half);
  } else if constexpr (kApproximate && std::is_same_v<Sigma, GeluTanh>) {
    const float half = 0.5f * z;
    return fma(half, simt::tanh_approximate(z * fma(0.035677408f, z * z, 0.79788456f)), half);
  } else {
    return Sigma::at(z).s;
  }
}

// f(tile, i, column) for each number that a lane has of tiles [kRows, N]. kRolled: where tiles are in memory.
template <class P, int N, bool kRolled = false, class F>
ODEBLOCK_DEVICE void for_each_number(F f) {
  const int first = simt::opaque(simt::lane() % 4 * 2);  // or what follows from it would fill registers between layers
#pragma unroll(kRolled ? 1 : N / 8)
  for (int n = 0; n < N / 8; n++)
#pragma unroll
    for (int i = 0; i < P::kNumbers; i++) f(n, i, 8 * n + first + i % 2);
}

// f(tile, i, bias of the column), likewise; bias [N] in shared memory.
template <class P, int N, class F>
ODEBLOCK_DEVICE void for_each_biased(const typename P::Stored* bias, F f) {
  bias += simt::opaque(simt::lane() % 4 * 2);  // as above
#pragma unroll
  for (int n = 0; n < N / 8; n++) {
    const simt::Pair<typename P::Stored> pair = simt::load_pair(bias + 8 * n);
#pragma unroll
    for (int i = 0; i < P::kNumbers; i++) f(n, i, P::widen(i % 2 ? pair.y : pair.x));
  }
}

template <class P, int Q>
ODEBLOCK_DEVICE void forward_of_block(const ForwardArguments& arguments) {
  typedef typename P::Stored Stored;
  typedef typename P::Number Number;
  typedef typename P::Tile Tile;
  typedef ForwardShape<P, Q> Shape;
  constexpr int kUnits = Shape::Chunk::kUnits;

  const ForwardProblem& p = arguments.problem;
  const int dim = static_cast<int>(p.dim), hidden = static_cast<int>(p.hidden);
  typename Shape::Stream chunks(arguments);

  // Number i of a tile is of this row. (opaque: worked out where it is needed, while registers are full.)
  const auto row_of = [&](int i) {
    const int warp = simt::opaque(simt::block()) * (simt::threads() / 32) + simt::warp();
    return static_cast<int64_t>(warp * P::kRows + simt::lane() / 4 + i / 2 * 8);
  };

  Tile own[Shape::kWait ? 1 : Q / 8];
  Tile* const h = Shape::kWait ? reinterpret_cast<Tile*>(simt::shared() + Shape::kStageBytes) + simt::thread() : own;
  const int step = Shape::kWait ? simt::threads() : 1;  // from one tile of h to the next
  for_each_number<P, Q, Shape::kWait>([&](int n, int i, int column) {
    const bool there = row_of(i) < p.batch && column < dim;
    h[n * step].x[i] = there ? P::widen(static_cast<const Stored*>(p.h)[row_of(i) * dim + column]) : Number(0);
  });

  typename P::A packed[P::kRounds ? Q / P::kColumns : 1] = {};
  const auto operand = [&](int j) {
    if constexpr (P::kRounds)
      return packed[j];
    else
      return P::pack(&h[j * (P::kColumns / 8) * step], step);
  };
  const int save_every = static_cast<int>(p.save_every);
  // Where layer k is saved.
  const auto saved = [&](int k) {
    return static_cast<Number*>(p.states) + simt::opaque(k) / save_every * (padded_rows(p.batch) * saved_width(p));
  };
  for (int k = 0; k < p.depth; k++) {
    if (save_every && k % save_every == 0) {
      Number* const to = saved(k);
      for_each_number<P, Q, Shape::kWait>([&](int n, int i, int column) {
        if (row_of(i) < p.batch && column < dim) to[row_of(i) * saved_width(p) + column] = h[n * step].x[i];
      });
    }
    if constexpr (P::kRounds) {
#pragma unroll
      for (int j = 0; j < Q / P::kColumns; j++) packed[j] = P::pack(&h[j * (P::kColumns / 8) * step], step);
    }
    Tile sums[Q / 8];
    P::clear(sums);
    for (int unit = 0; unit < hidden; unit += kUnits) {
      chunks.wait();
      Tile z[kUnits / 8];
      P::template multiply<kUnits, Q>(z, operand, chunks.W());
      P::end(z);
      for_each_biased<P, kUnits>(chunks.hidden_bias(), [&](int n, int i, Number bias) { z[n].x[i] += bias; });
      if (saves_hidden(p)) {  // of every layer
        Number* const to = saved(k) + dim + unit;
        for_each_number<P, kUnits>([&](int n, int i, int column) {
          if (row_of(i) < p.batch && unit + column < hidden) to[row_of(i) * saved_width(p) + column] = z[n].x[i];
        });
      }
      with_activation(p.activation, [&](auto sigma) {
        for_each_number<P, kUnits>([&](int n, int i, int) { z[n].x[i] = evaluate<P::kApproximate>(sigma, z[n].x[i]); });
      });
      if (unit + kUnits > hidden)  // what is not there is 0, whatever sigma(0) is, or an infinite row makes of it
        for_each_number<P, kUnits>([&](int n, int i, int column) {
          if (unit + column >= hidden) z[n].x[i] = 0;
        });
      P::template add<Q, kUnits>(
          unit == 0, sums, [&](int j) { return P::pack(&z[j * (P::kColumns / 8)], 1); }, chunks.V());
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
  for_each_number<P, Q, Shape::kWait>([&](int n, int i, int column) {
    if (row_of(i) < p.batch && column < dim)
      static_cast<Stored*>(p.y)[row_of(i) * dim + column] = P::narrow(h[n * step].x[i]);
  });
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

template <class P, int Q>
CudaKernel kernel_of() {
  typedef ForwardShape<P, Q> Shape;
  return {Q,
          P::kRows,
          P::kWarps,
          Shape::kMostWarps,
          Shape::Chunk::kBulk ? Shape::Chunk::kUnits : 0,
          Shape::shared_bytes,
          forward_kernel<P, Q>};
}

}  // namespace
}  // namespace odeblock
