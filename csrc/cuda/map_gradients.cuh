// The gradients of a layer's weights, of the maps that a block has on chip: products of matrices with positions as the
// summed dimension,
//
//   dV[c, m, tap] = Σ over positions  a[position, c] s[position + step of the tap, m],   doutput_bias = Σ a
//   dW[m, c, tap] = Σ over positions  g[position, m] h[position + step of the tap, c],   dhidden_bias = Σ g
//
// Both operands lie in the maps as they are, a position a row, and are read transposed. What is of no map is zero in a
// and g: sums go over all positions. The tasks of a layer, kTaps<P> taps of a block of 16 channels with one of 16, or
// one block's bias, are dealt to the warps, each of which sums over all positions: nothing is added up between them.
//
// A block leaves its sums, before they are scaled, as numbers_of_sums (map_kernels.h) numbers that follow each other:
// dV [blocks of C, blocks of M, k², 16, 16], dW with C and M exchanged, then the sums of a and g.
#pragma once

#include "maps.cuh"

namespace odeblock {
namespace {

// That a task has, which read the first operand once.
template <class P>
constexpr int kTaps = P::kRounds ? 3 : 2;

// Of kChannels channels at P::kColumns positions what a lane has of operand A; map: where its part begins.
template <class P>
struct FirstOperand {
  static constexpr int kTiles = kChannels / P::kRows;
  typename P::A x[kTiles];

  // A lane's part of a map whose positions are `width` apart. In 16 bits lanes bring the addresses of rows of matrices;
  // else a lane reads positions l % 4 and l % 4 + 4, in both operands the same, so that all lanes meet other banks.
  ODEBLOCK_DEVICE static int offset(int width) {
    const int lane = simt::lane();
    if constexpr (P::kRounds)
      return (lane % 8 + lane / 16 * 8) * width + lane / 8 % 2 * 8;
    else
      return lane % 4 * width + lane / 4;
  }
  ODEBLOCK_DEVICE void load(const typename P::Stored* map, int width) {
    if constexpr (P::kRounds) {
      simt::load_matrices_transposed(x[0].x, map);
    } else {
      constexpr int kPairs = P::kColumns / 8;
#pragma unroll
      for (int m = 0; m < kTiles; m++) {
        typename P::Tile tiles[kPairs];
#pragma unroll
        for (int j = 0; j < kPairs; j++)
#pragma unroll
          for (int i = 0; i < P::kNumbers; i += 2) {
            const typename P::Stored* const at = map + 8 * j * width + P::kRows * m + 4 * i;
            tiles[j].x[i] = at[0], tiles[j].x[i + 1] = at[4 * width];
          }
        x[m] = P::pack(tiles, 1);
      }
    }
  }
};

// Likewise of operand B.
template <class P>
struct SecondOperand {
  typename P::B x[2];

  ODEBLOCK_DEVICE static int offset(int width) {
    const int lane = simt::lane();
    if constexpr (P::kRounds)
      return lane % 16 * width + lane / 16 * 8;
    else
      return lane % 4 * width + lane / 4;
  }
  ODEBLOCK_DEVICE void load(const typename P::Stored* map, int width) {
    if constexpr (P::kRounds) {
      uint32_t b[4];
      simt::load_matrices_transposed(b, map);
      x[0] = {{b[0], b[1]}}, x[1] = {{b[2], b[3]}};
    } else {
      constexpr int kPairs = P::kColumns / 8;
#pragma unroll
      for (int n = 0; n < 2; n++) {
        simt::Pair<typename P::Stored> pairs[kPairs];
#pragma unroll
        for (int j = 0; j < kPairs; j++) pairs[j] = {map[8 * j * width + 8 * n], map[(8 * j + 4) * width + 8 * n]};
        x[n] = P::second(pairs);
      }
    }
  }
};
template <class P>
ODEBLOCK_DEVICE typename P::B ones() {
  if constexpr (P::kRounds) {
    const uint32_t both = P::pair(1, 1);
    return {{both, both}};
  } else {
    simt::Pair<typename P::Stored> pairs[P::kColumns / 8];
#pragma unroll
    for (auto& pair : pairs) pair = {1, 1};
    return P::second(pairs);
  }
}

// Leaves kCount taps' sums, of the tap `tap` and on, at `to`. first, second: 16 channels of maps.
template <class P, int kCount>
ODEBLOCK_DEVICE void correlate(Map<typename P::Stored> first, Map<typename P::Stored> second, const MapShape& shape,
                               int tap, typename P::Number* to) {
  typedef typename P::Stored Stored;
  typename P::Tile sums[kCount][FirstOperand<P>::kTiles][2];
  int step[kCount];
#pragma unroll
  for (int t = 0; t < kCount; t++) {
    const int kernel = 2 * shape.radius + 1, y = (tap + t) / kernel, x = (tap + t) % kernel;
    step[t] = (y * shape.pitch + x - shape.margin()) * second.width;
#pragma unroll
    for (auto& row : sums[t]) P::clear(row);
  }
  const Stored* a_at = first.first + FirstOperand<P>::offset(first.width);
  const Stored* b_at = second.first + SecondOperand<P>::offset(second.width);
#pragma unroll 1
  for (int left = shape.groups * kGroup; left > 0; left -= P::kColumns) {
    FirstOperand<P> a;
    a.load(a_at, first.width);
#pragma unroll
    for (int t = 0; t < kCount; t++) {
      SecondOperand<P> b;
      b.load(b_at + step[t], second.width);
#pragma unroll
      for (int m = 0; m < FirstOperand<P>::kTiles; m++)
#pragma unroll
        for (int n = 0; n < 2; n++) P::step(sums[t][m][n], a.x[m], b.x[n]);
    }
    a_at += P::kColumns * first.width, b_at += P::kColumns * second.width;
  }
  to += tap * kChannels * kChannels + simt::lane() / 4 * kChannels + simt::lane() % 4 * 2;
#pragma unroll
  for (int t = 0; t < kCount; t++)
#pragma unroll
    for (int m = 0; m < FirstOperand<P>::kTiles; m++)
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int i = 0; i < P::kNumbers; i += 2)
          simt::write_pair<typename P::Number>(to + (t * kChannels + P::kRows * m + 4 * i) * kChannels + 8 * n,
                                               {sums[t][m][n].x[i], sums[t][m][n].x[i + 1]});
}

// Leaves at `to` the sums of 16 channels: products with ones.
template <class P>
ODEBLOCK_DEVICE void sum_positions(Map<typename P::Stored> map, const MapShape& shape, typename P::Number* to) {
  typename P::Tile sums[FirstOperand<P>::kTiles];
  P::clear(sums);
  const typename P::B one = ones<P>();
  const typename P::Stored* at = map.first + FirstOperand<P>::offset(map.width);
#pragma unroll 1
  for (int left = shape.groups * kGroup; left > 0; left -= P::kColumns, at += P::kColumns * map.width) {
    FirstOperand<P> a;
    a.load(at, map.width);
#pragma unroll
    for (int m = 0; m < FirstOperand<P>::kTiles; m++) P::step(sums[m], a.x[m], one);
  }
  if (simt::lane() % 4 > 0) return;  // all columns are the same
#pragma unroll
  for (int m = 0; m < FirstOperand<P>::kTiles; m++)
#pragma unroll
    for (int i = 0; i < P::kNumbers; i += 2) to[P::kRows * m + simt::lane() / 4 + 4 * i] = sums[m].x[i];
}

template <class P>
ODEBLOCK_INLINE int parts_of_taps(int taps) {
  return (taps + kTaps<P> - 1) / kTaps<P>;
}
template <class P>
ODEBLOCK_INLINE int tasks_of_gradients(int blocks, int hidden_blocks, int taps) {
  return 2 * blocks * hidden_blocks * parts_of_taps<P>(taps) + blocks + hidden_blocks;
}

// The sums of a layer, to `to`; what other warps wrote to the maps is there.
template <class P>
ODEBLOCK_DEVICE void leave_gradients(Map<typename P::Stored> a, Map<typename P::Stored> s, Map<typename P::Stored> g,
                                     Map<typename P::Stored> h, const MapShape& shape, typename P::Number* to) {
  const int blocks = (a.width - 8) / kChannels, hidden_blocks = (g.width - 8) / kChannels;
  const int taps = (2 * shape.radius + 1) * (2 * shape.radius + 1), parts = parts_of_taps<P>(taps);
  const int of_weights = blocks * hidden_blocks * parts, sums = taps * kChannels * kChannels;
  const auto at = [](Map<typename P::Stored> map, int block) {
    return Map<typename P::Stored>{map.first + block * kChannels, map.width};
  };
#pragma unroll 1
  for (int task = simt::warp(); task < tasks_of_gradients<P>(blocks, hidden_blocks, taps);
       task += simt::threads() / 32) {
    if (task < 2 * of_weights) {
      const bool of_V = task < of_weights;
      const int pair = task / parts, tap = task % parts * kTaps<P>, seconds = of_V ? hidden_blocks : blocks;
      const int in_matrix = of_V ? pair : pair - blocks * hidden_blocks;
      const Map<typename P::Stored> first = at(of_V ? a : g, in_matrix / seconds),
                                    second = at(of_V ? s : h, in_matrix % seconds);
      if (tap + kTaps<P> <= taps)
        correlate<P, kTaps<P>>(first, second, shape, tap, to + pair * sums);
      else
#pragma unroll 1
        for (int i = tap; i < taps; i++) correlate<P, 1>(first, second, shape, i, to + pair * sums);
    } else {
      const int block = task - 2 * of_weights;
      sum_positions<P>(block < blocks ? at(a, block) : at(g, block - blocks), shape,
                       to + 2 * blocks * hidden_blocks * sums + block * kChannels);
    }
  }
}

}  // namespace
}  // namespace odeblock
