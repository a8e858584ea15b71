// The forward on a GPU: one launch, all L steps, for q up to kMostFeatures.
//
// A warp takes rows of its own through all layers: their states, what a layer adds to them, and hidden units stay in
// its lanes, in the layout that tensor cores sum in. Weights stream through shared memory in chunks of hidden units,
// some rows of W and columns of V with their biases, several chunks ahead; all warps of a block read them. A chunk's
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
#include "kernels.h"
#include "products.cuh"

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
  static constexpr int kUnits = units();

  // A chunk: elements of W [kUnits, Q] and V [Q, kUnits], and apart hidden_bias [kUnits] and output_bias [Q].
  static constexpr int kV = P::template elements<kUnits, Q>(), kMatrices = kV + P::template elements<Q, kUnits>();
  static constexpr int kBiases = kUnits + Q;
  static_assert(kMatrices * kSize % P::kAlignment == 0 && kBiases * kSize % 16 == 0);

  static constexpr size_t waiting_bytes(int warps) {
    return kWait ? static_cast<size_t>(warps) * 32 * (Q / 8) * sizeof(typename P::Tile) : 0;
  }
  static constexpr int stages() {
    // Narrow layers leave room for another block; up to 128 features fit what the smaller GPUs of a generation have.
    const size_t most = P::kSharedBytes, room = Q <= 64                   ? most / 2
                                                : kWait || P::kWarps == 4 ? most - waiting_bytes(kMostWarps)
                                                                          : 99 << 10;
    const int fit = static_cast<int>(room / (kSize * (kMatrices + kBiases)));
    return fit < 8 ? fit : 8;
  }
  static constexpr int kStages = stages();
  static_assert(kStages >= 2 + P::kReading);
  static constexpr size_t kStageBytes = static_cast<size_t>(kStages) * kSize * (kMatrices + kBiases);
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

// A matrix of one row, in shared memory as it is.
template <class P>
struct Row {
  typedef typename P::Stored Stored;
  template <int, int>
  ODEBLOCK_DEVICE static int offset(int, int column) {
    return column;
  }
};

// To shared memory, laid out as Layout has it, M [kRows, kColumns], rows `first` and on of a matrix at `from` with rows
// of `step` elements; zero beyond `rows_there` and `columns_there`. By all threads of the block, in pieces of kBytes.
template <class Layout, int kRows, int kColumns, int kBytes>
ODEBLOCK_DEVICE void fetch_pieces(const typename Layout::Stored* from, int64_t first, int step, int rows_there,
                                  int columns_there, typename Layout::Stored* to) {
  typedef typename Layout::Stored Stored;
  constexpr int kSize = sizeof(Stored), kPiece = kBytes / kSize, kPieces = kColumns / kPiece;
#pragma unroll 1  // while registers are full
  for (int i = simt::thread(); i < kRows * kPieces; i += simt::threads()) {
    const int row = i / kPieces, column = i % kPieces * kPiece;
    const int left = row < rows_there ? columns_there - column : 0;
    const int count = left >= kPiece ? kPiece : left > 0 ? left : 0;
    const Stored* source = from + (first + (count > 0 ? row : 0)) * step + (count > 0 ? column : 0);
    Stored* target = to + Layout::template offset<kRows, kColumns>(row, column);
    if constexpr (kBytes >= 4)
      simt::copy_async<kBytes>(target, source, count * kSize);
    else
      simt::store(target, count > 0 ? *source : Stored(0));
  }
}

// In the largest pieces that every row begins at a multiple of.
template <class Layout, int kRows, int kColumns>
ODEBLOCK_DEVICE void fetch(const typename Layout::Stored* from, int64_t first, int step, int rows_there,
                           int columns_there, typename Layout::Stored* to) {
  constexpr int kSize = sizeof(typename Layout::Stored);
  const uint64_t places = reinterpret_cast<uintptr_t>(from) | static_cast<uint64_t>(step) * kSize;
  if (places % 16 == 0)
    return fetch_pieces<Layout, kRows, kColumns, 16>(from, first, step, rows_there, columns_there, to);
  if constexpr (kSize == 2)
    if (places % 4 == 0)
      return fetch_pieces<Layout, kRows, kColumns, 4>(from, first, step, rows_there, columns_there, to);
  fetch_pieces<Layout, kRows, kColumns, kSize>(from, first, step, rows_there, columns_there, to);
}

// Entries `from` and on of layer k's bias of `size` entries; zeros for null. anything: an address that is valid.
template <class P, int kCount>
ODEBLOCK_DEVICE void fetch_bias(const typename P::Stored* bias, int64_t k, int size, int from,
                                const typename P::Stored* anything, typename P::Stored* to) {
  if (bias)
    fetch<Row<P>, 1, kCount>(bias + from, k, size, 1, size - from, to);
  else
    fetch<Row<P>, 1, kCount>(anything, 0, 0, 0, 0, to);
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

template <class P, int Q>
ODEBLOCK_DEVICE void forward_of_block(const ForwardProblem& p) {
  typedef typename P::Stored Stored;
  typedef typename P::Number Number;
  typedef typename P::Tile Tile;
  typedef ForwardShape<P, Q> Shape;
  constexpr int kUnits = Shape::kUnits, kStages = Shape::kStages;

  const int dim = static_cast<int>(p.dim), hidden = static_cast<int>(p.hidden);
  const int chunks = (hidden + kUnits - 1) / kUnits, total = static_cast<int>(p.depth) * chunks;  // of a layer, of all
  const Stored *all_W = static_cast<const Stored*>(p.W), *all_V = static_cast<const Stored*>(p.V);
  const Stored* hidden_bias = static_cast<const Stored*>(p.hidden_bias);
  const Stored* output_bias = static_cast<const Stored*>(p.output_bias);

  Stored* const matrices = reinterpret_cast<Stored*>(simt::shared());
  Stored* const biases = matrices + kStages * Shape::kMatrices;
  const auto fetch_chunk = [&](int chunk) {
    if (chunk < total) {
      const int64_t k = chunk / chunks, unit = chunk % chunks * kUnits;
      Stored* to = matrices + chunk % kStages * Shape::kMatrices;
      fetch<P, kUnits, Q>(all_W, k * hidden + unit, dim, hidden - unit, dim, to);
      fetch<P, Q, kUnits>(all_V + unit, k * dim, hidden, dim, hidden - unit, to + Shape::kV);
      to = biases + chunk % kStages * Shape::kBiases;
      fetch_bias<P, kUnits>(hidden_bias, k, hidden, static_cast<int>(unit), all_W, to);
      fetch_bias<P, Q>(output_bias, k, dim, 0, all_W, to + kUnits);
    }
    simt::commit_copies();  // also where there is nothing, for groups are counted
  };
  constexpr int kAhead = kStages - 1 - P::kReading;
  for (int chunk = 0; chunk < kAhead; chunk++) fetch_chunk(chunk);

  // Number i of a tile is of this row.
  const int first = (simt::block() * (simt::threads() / 32) + simt::warp()) * P::kRows;
  const auto row_of = [&](int i) { return static_cast<int64_t>(simt::opaque(first) + simt::lane() / 4 + i / 2 * 8); };

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
  // Where a row of this layer is saved.
  const auto saved = [&](int k, int64_t row) {
    return static_cast<Number*>(p.states) + (k / p.save_every * padded_rows(p.batch) + row) * saved_width(p);
  };
  int chunk = 0;
  for (int k = 0; k < p.depth; k++) {
    const bool saves = p.save_every && k % p.save_every == 0;
    if (saves)
      for_each_number<P, Q, Shape::kWait>([&](int n, int i, int column) {
        if (row_of(i) < p.batch && column < dim) saved(k, row_of(i))[column] = h[n * step].x[i];
      });
    if constexpr (P::kRounds) {
#pragma unroll
      for (int j = 0; j < Q / P::kColumns; j++) packed[j] = P::pack(&h[j * (P::kColumns / 8) * step], step);
    }
    Tile sums[Q / 8] = {};
    const Stored* bias = nullptr;
    for (int unit = 0; unit < hidden; unit += kUnits, chunk++) {
      simt::wait_copies<kAhead - 1>();
      P::before_barrier();
      simt::sync_block();  // this chunk is there for all, and all are done with the one that the next will replace
      fetch_chunk(chunk + kAhead);
      const Stored* W = matrices + chunk % kStages * Shape::kMatrices;
      bias = biases + chunk % kStages * Shape::kBiases;

      Tile z[kUnits / 8];
      P::template multiply<true, kUnits, Q>(z, operand, W);
      P::end(z);
      for_each_number<P, kUnits>([&](int n, int i, int column) { z[n].x[i] += P::widen(bias[column]); });
      if (saves && saves_hidden(p))
        for_each_number<P, kUnits>([&](int n, int i, int column) {
          if (row_of(i) < p.batch && unit + column < hidden) saved(k, row_of(i))[dim + unit + column] = z[n].x[i];
        });
      with_activation(p.activation, [&](auto sigma) {
        for_each_number<P, kUnits>([&](int n, int i, int) { z[n].x[i] = evaluate<P::kApproximate>(sigma, z[n].x[i]); });
      });
      if (unit + kUnits > hidden)  // what is not there is 0, whatever sigma(0) is, or an infinite row makes of it
        for_each_number<P, kUnits>([&](int n, int i, int column) {
          if (unit + column >= hidden) z[n].x[i] = 0;
        });
      P::template multiply<false, Q, kUnits>(
          sums, [&](int j) { return P::pack(&z[j * (P::kColumns / 8)], 1); }, W + Shape::kV);
    }
    P::end(sums);
    for_each_number<P, Q>([&](int n, int i, int column) {
      h[n * step].x[i] += static_cast<Number>(p.scale) * (sums[n].x[i] + P::widen(bias[kUnits + column]));
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
}

template <class P, int Q>
ODEBLOCK_KERNEL(ForwardShape<P, Q>::kMostThreads, ForwardShape<P, Q>::kBlocks)
forward_kernel(const ForwardProblem p) {
  if constexpr (P::kWarps == 1 || simt::kWarpgroups)
    forward_of_block<P, Q>(p);
  else
    simt::trap();
}

template <class P, int Q>
CudaKernel kernel_of() {
  typedef ForwardShape<P, Q> Shape;
  return {Q, P::kRows, P::kWarps, Shape::kMostWarps, Shape::shared_bytes, forward_kernel<P, Q>};
}

}  // namespace
}  // namespace odeblock
