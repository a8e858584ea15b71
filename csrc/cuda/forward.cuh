// The forward on a GPU: one launch, all L steps, for q up to most_features<P>().
//
// A block takes its rows through all layers. Their states stay in registers, in the lanes that sum them; each warp has
// rows of its own, so that states and hidden units never leave it. Weights stream through shared memory in chunks of
// hidden units, some rows of W and columns of V, several chunks ahead; all warps of a block read them. A chunk's
//
//   z = W h + hidden_bias,  s = sigma(z),  h <- h + scale (V s + output_bias)
//
// needs h of the layer's beginning for z. So h is packed once a layer as an operand. What V s adds up goes on in
// registers: for float and double in registers of its own, so that h is rounded once a layer; where products are
// rounded to 16 bits, it is added to h / scale.
//
// What does not fill a tile or a chunk is zero in shared memory: V of a unit beyond m, W of a feature beyond q.
#pragma once

#include "math.cuh"
// math.cuh before activations.h, which is written on its functions
#include "../activations.h"
#include "products.cuh"

namespace odeblock {
namespace {

// Features whose states, and operands made of them, the registers hold.
template <class P>
constexpr int most_features() {
  return sizeof(typename P::Stored) == 2 ? 256 : 128;
}

template <class T>
struct ForwardArguments {
  const T *h, *V, *W, *hidden_bias, *output_bias;  // as in problem.h
  T* y;
  void* states;  // [n, padded_rows(B), q] Number, or null: h_0, h_K, .., K = save_every
  int64_t batch, padded_batch;
  int dim, hidden, depth, save_every, activation;
  // h = state_scale x; x <- x + step (V s + output_bias).
  double state_scale, step;
};

// The shape of a block for products P and up to Q features (a multiple of 16). kUnits: hidden units of a chunk.
template <class P, int Q>
struct ForwardShape {
  static constexpr int kSize = sizeof(typename P::Stored);
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  // Tiles of rows of a warp: two share what they read of the weights, where registers hold them.
  static constexpr int kTiles = kSize == 2 && Q <= 128 ? 2 : 1;
  static constexpr int kRows = kWarps * kTiles * P::kRows;
  static constexpr bool kSeparate = kSize > 2;  // sums of a layer, from states
  static constexpr int kUnits = kSize == 8 || Q > 128 ? 16 : 32;
  static constexpr int kStages = 3;
  static constexpr int kStrideW = P::stride(Q), kStrideV = P::stride(kUnits);
  static constexpr int kChunk = kUnits * kStrideW + Q * kStrideV;  // elements
  static constexpr size_t kSharedBytes = static_cast<size_t>(kStages) * kChunk * kSize;
  static_assert(kSharedBytes <= 163 << 10, "shared memory of a multiprocessor of sm_80");
};

// `rows` x `columns` elements from `from` on, `step` apart, to shared memory, `stride` apart; zero beyond `rows_there`
// and `columns_there`. By all threads of the block. aligned: whether every row begins at a multiple of 16 bytes.
template <class T, int kRows, int kColumns, int kStride, int kThreads>
ODEBLOCK_DEVICE void fetch(const T* from, int64_t step, int64_t rows_there, int64_t columns_there, bool aligned,
                           T* to) {
  constexpr int kPiece = 16 / sizeof(T), kPieces = kColumns / kPiece;
  for (int i = simt::thread(); i < kRows * kPieces; i += kThreads) {
    const int row = i / kPieces, column = i % kPieces * kPiece;
    T* piece = to + row * kStride + column;
    const int64_t left = row < rows_there ? columns_there - column : 0;
    const int count = left >= kPiece ? kPiece : left > 0 ? static_cast<int>(left) : 0;
    const T* source = from + row * step + column;
    if (aligned) {
      simt::copy_async(piece, count > 0 ? source : from, count * static_cast<int>(sizeof(T)));
    } else {
      for (int j = 0; j < kPiece; j++) piece[j] = j < count ? source[j] : T(0);
    }
  }
}

template <class P, int Q>
ODEBLOCK_KERNEL((ForwardShape<P, Q>::kThreads))
forward_kernel(const ForwardArguments<typename P::Stored> p) {
  typedef typename P::Stored Stored;
  typedef typename P::Number Number;
  typedef ForwardShape<P, Q> Shape;
  constexpr int kTiles = Shape::kTiles, kUnits = Shape::kUnits, kStages = Shape::kStages, kNumbers = P::kNumbers;
  constexpr int kOperands = Q / P::kColumns, kOfUnits = 16 / P::kColumns;

  Stored* chunks = reinterpret_cast<Stored*>(simt::shared());
  const int per_layer = (p.hidden + kUnits - 1) / kUnits, total = p.depth * per_layer;
  const bool aligned_W = p.dim * sizeof(Stored) % 16 == 0 && reinterpret_cast<uintptr_t>(p.W) % 16 == 0;
  const bool aligned_V = p.hidden * sizeof(Stored) % 16 == 0 && reinterpret_cast<uintptr_t>(p.V) % 16 == 0;
  const auto fetch_chunk = [&](int chunk) {
    if (chunk < total) {
      const int64_t k = chunk / per_layer, unit = chunk % per_layer * kUnits;
      Stored* W = chunks + chunk % kStages * Shape::kChunk;
      fetch<Stored, kUnits, Q, Shape::kStrideW, Shape::kThreads>(p.W + (k * p.hidden + unit) * p.dim, p.dim,
                                                                 p.hidden - unit, p.dim, aligned_W, W);
      fetch<Stored, Q, kUnits, Shape::kStrideV, Shape::kThreads>(
          p.V + k * p.dim * p.hidden + unit, p.hidden, p.dim, p.hidden - unit, aligned_V, W + kUnits * Shape::kStrideW);
    }
    simt::commit_copies();  // also where there is nothing, for groups are counted
  };

  // What a lane has of a tile: number i is of row row_of(i), column column_of(i).
  const int64_t first = (static_cast<int64_t>(simt::block()) * Shape::kWarps + simt::warp()) * kTiles * P::kRows;
  const auto row_of = [&](int tile, int i) { return first + tile * P::kRows + simt::lane() / 4 + i / 2 * 8; };
  const auto column_of = [&](int i) { return simt::lane() % 4 * 2 + i % 2; };
  const Number state_scale = static_cast<Number>(p.state_scale), step = static_cast<Number>(p.step);

  for (int chunk = 0; chunk < kStages - 1; chunk++) fetch_chunk(chunk);

  Number h[kTiles][Q / 8][kNumbers];
#pragma unroll
  for (int t = 0; t < kTiles; t++)
#pragma unroll
    for (int n = 0; n < Q / 8; n++)
#pragma unroll
      for (int i = 0; i < kNumbers; i++) {
        const int64_t row = row_of(t, i);
        const int column = 8 * n + column_of(i);
        const bool there = row < p.batch && column < p.dim;
        h[t][n][i] = there ? P::widen(p.h[row * p.dim + column]) / state_scale : Number(0);
      }

  typename P::A operands[kTiles][kOperands];
  Number own[Shape::kSeparate ? kTiles : 1][Q / 8][kNumbers];
  Number(*sums)[Q / 8][kNumbers] = Shape::kSeparate ? own : h;
  const Number factor = Shape::kSeparate ? Number(1) : step;  // of what is summed
  for (int chunk = 0; chunk < total; chunk++) {
    const int k = chunk / per_layer, unit = chunk % per_layer * kUnits;
    simt::wait_copies<kStages - 2>();
    simt::sync_block();  // this chunk is there for all, and all are done with the one before
    fetch_chunk(chunk + kStages - 1);

    if (unit == 0) {
      const bool save = p.save_every && k % p.save_every == 0;
      Number* saved = static_cast<Number*>(p.states) + (save ? k / p.save_every * p.padded_batch * p.dim : 0);
#pragma unroll
      for (int t = 0; t < kTiles; t++) {
#pragma unroll
        for (int j = 0; j < kOperands; j++) operands[t][j] = P::pack(&h[t][j * (P::kColumns / 8)], state_scale);
#pragma unroll
        for (int n = 0; n < Q / 8; n++)
#pragma unroll
          for (int i = 0; i < kNumbers; i++) {
            const int64_t row = row_of(t, i);
            const int column = 8 * n + column_of(i);
            if (save && row < p.batch && column < p.dim) saved[row * p.dim + column] = state_scale * h[t][n][i];
            if (Shape::kSeparate) sums[t][n][i] = Number(0);
            if (p.output_bias && column < p.dim)
              sums[t][n][i] += factor * P::widen(p.output_bias[static_cast<int64_t>(k) * p.dim + column]);
          }
      }
    }

    const Stored *W = chunks + chunk % kStages * Shape::kChunk, *V = W + kUnits * Shape::kStrideW;
#pragma unroll 1
    for (int u = 0; u < kUnits; u += 16) {
      Number z[kTiles][2][kNumbers] = {};
#pragma unroll
      for (int j = 0; j < kOperands; j++) {
        const typename P::B b = P::load(W + u * Shape::kStrideW + j * P::kColumns, Shape::kStrideW);
#pragma unroll
        for (int t = 0; t < kTiles; t++) {
          P::template multiply<0>(z[t][0], operands[t][j], b);
          P::template multiply<1>(z[t][1], operands[t][j], b);
        }
      }
      if (p.hidden_bias) {
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
          for (int i = 0; i < kNumbers; i++) {
            const int column = unit + u + 8 * n + column_of(i);
            if (column >= p.hidden) continue;
            const Number bias = P::widen(p.hidden_bias[static_cast<int64_t>(k) * p.hidden + column]);
#pragma unroll
            for (int t = 0; t < kTiles; t++) z[t][n][i] += bias;
          }
      }
      with_activation(p.activation, [&](auto sigma) {
#pragma unroll
        for (int t = 0; t < kTiles; t++)
#pragma unroll
          for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < kNumbers; i++) z[t][n][i] = decltype(sigma)::at(z[t][n][i]).s;
      });
#pragma unroll
      for (int j = 0; j < kOfUnits; j++) {
        typename P::A s[kTiles];
#pragma unroll
        for (int t = 0; t < kTiles; t++) s[t] = P::pack(&z[t][j * (P::kColumns / 8)], factor);
#pragma unroll
        for (int n = 0; n < Q / 16; n++) {
          const typename P::B b = P::load(V + 16 * n * Shape::kStrideV + u + j * P::kColumns, Shape::kStrideV);
#pragma unroll
          for (int t = 0; t < kTiles; t++) {
            P::template multiply<0>(sums[t][2 * n], s[t], b);
            P::template multiply<1>(sums[t][2 * n + 1], s[t], b);
          }
        }
      }
    }
    if (Shape::kSeparate && unit + kUnits >= p.hidden) {
#pragma unroll
      for (int t = 0; t < kTiles; t++)
#pragma unroll
        for (int n = 0; n < Q / 8; n++)
#pragma unroll
          for (int i = 0; i < kNumbers; i++) h[t][n][i] += step * sums[t][n][i];
    }
  }
  simt::wait_copies<0>();
#pragma unroll
  for (int t = 0; t < kTiles; t++)
#pragma unroll
    for (int n = 0; n < Q / 8; n++)
#pragma unroll
      for (int i = 0; i < kNumbers; i++) {
        const int64_t row = row_of(t, i);
        const int column = 8 * n + column_of(i);
        if (row < p.batch && column < p.dim) p.y[row * p.dim + column] = P::narrow(state_scale * h[t][n][i]);
      }
}

// Calls f(Features<Q>) for the smallest shape that holds q features.
template <int Q>
struct Features {
  static constexpr int value = Q;
};
template <class P, class F>
void with_features(int q, F f) {
  if (q <= 32) return f(Features<32>());
  if (q <= 64) return f(Features<64>());
  if (q <= 128) return f(Features<128>());
  if constexpr (most_features<P>() >= 256) return f(Features<256>());
}

// With a scale between 2^-64 and 2^64, 16-bit products are added to h / scale.
template <class P>
void set_scale(double scale, ForwardArguments<typename P::Stored>& p) {
  const double size = scale < 0 ? -scale : scale;
  const bool divide = sizeof(typename P::Stored) == 2 && size > 0x1p-64 && size < 0x1p64;
  p.state_scale = divide ? scale : 1;
  p.step = divide ? 1 : scale;
}

}  // namespace
}  // namespace odeblock
