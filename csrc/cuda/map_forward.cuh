// The forward of convolutions on a GPU: one launch, all L steps, the maps and their surroundings on chip (maps.cuh).
//
//   z = conv(h, W) + hidden_bias,  s = sigma(z)    at all positions, kChannels hidden channels after the other
//   h += scale (conv(s, V) + output_bias)          likewise
//
// h stays in what products sum in; where they are of 16 bits its map is a copy, rounded once a layer. A warp computes
// the same positions of every layer, and reads those around them that others computed: the block meets at each chunk of
// weights, of which narrow layers have two, and has no other barriers.
#pragma once

#include "maps.cuh"

namespace odeblock {
namespace {

template <class P>
struct MapForward {
  typedef typename P::Stored Stored;
  // That registers allow, in one block or in two of half as many.
  static constexpr int kMostWarps = sizeof(typename P::Number) == 8 ? 8 : 16;

  static int tasks(const Problem&) { return 0; }
  ODEBLOCK_INLINE static size_t stage_bytes(const Problem& p, int stages) {
    const int of_h = weight_row(p, p.dim), of_s = weight_row(p, p.hidden);
    return static_cast<size_t>(stages) * kChannels * (of_h > of_s ? of_h : of_s) * sizeof(Stored);
  }
  ODEBLOCK_INLINE static size_t bytes_of_maps(const Problem& p, const MapShape& shape) {
    const int channels = padded_channels(p.dim);
    return map_bytes<Stored>(shape, channels) + map_bytes<Stored>(shape, padded_channels(p.hidden)) +
           state_bytes<P>(shape, channels);
  }
  static size_t shared_bytes(const Problem& p, const MapPlan& plan) {
    const MapShape shape(p, plan.samples);
    return block_bytes(shape, stage_bytes(p, plan.stages), bytes_of_maps(p, shape));
  }
};

template <class P, bool kUsual>
ODEBLOCK_KERNEL(32 * MapForward<P>::kMostWarps, 1)
map_forward_kernel(const ODEBLOCK_PARAMETER MapArguments<ForwardProblem> arguments) {
  typedef typename P::Stored Stored;
  typedef typename P::Number Number;
  typedef simt::Pair<Number> Pair;

  const ForwardProblem& p = arguments.problem;
  const MapShape shape(p, arguments.plan.samples);
  const int dim = static_cast<int>(p.dim), hidden = static_cast<int>(p.hidden);
  const int blocks = padded_channels(dim) / kChannels, hidden_blocks = padded_channels(hidden) / kChannels;
  const int row_of_h = weight_row(p, dim), row_of_s = weight_row(p, hidden);
  WeightStream<Stored, false> weights({static_cast<const Stored*>(p.W), hidden_blocks, kChannels * row_of_h},
                                      {static_cast<const Stored*>(p.V), blocks, kChannels * row_of_s}, p.depth,
                                      arguments.plan);
  MapBlock<P> block(p, shape, MapForward<P>::stage_bytes(p, arguments.plan.stages),
                    MapForward<P>::bytes_of_maps(p, shape));
  const Map<Stored> h_map = block.take_map(blocks * kChannels), s_map = block.take_map(hidden_blocks * kChannels);
  const Map<Number> h = block.take_state(h_map);

  const auto read = [&](auto* from) {
    block.for_each_of_state(h, [&](Number* own, int position, int channel, int64_t place) {
      const Pair pair = block.read(from, channel, place);
      store_pair(own, pair);
      if constexpr (P::kRounds) block.write_map(h_map, position, channel, pair);
    });
  };
  const auto write = [&](auto* to) {
    block.for_each_of_state(h, [&](const Number* own, int, int channel, int64_t place) {
      block.write(to, channel, place, simt::load_pair(own));
    });
  };
  if (p.start)
    read(static_cast<const Number*>(p.start));
  else
    read(static_cast<const Stored*>(p.h));

  const int warps = simt::threads() / 32;
  for (int k = 0; k < p.depth; k++) {
    if (const int save_every = static_cast<int>(p.save_every))
      if (k % save_every == 0)
        write(static_cast<Number*>(p.states) + k / save_every * padded_rows(p.batch) * dim * p.height * p.width);
    for (int unit = 0; unit < hidden; unit += kChannels) {
      const Stored* const W = weights.next();
#pragma unroll 1
      for (int group = simt::warp(); group < shape.groups; group += warps) {
        Sums<P> z;
        convolve<P, kUsual>(z, h_map, shape, group, W, row_of_h);
        with_activation(p.activation, [&](auto sigma) {
          for_each_pair_of_sums<P>([&](int m, int n, int i, int, int channel) {
            const Pair bias = biases<P>(W, row_of_h, channel);
            Number* const x = &z.x[m][n].x[i];
            x[0] = evaluate<P::kBits>(sigma, x[0] + bias.x).s;
            x[1] = evaluate<P::kBits>(sigma, x[1] + bias.y).s;
          });
        });
        // Nothing where there is no map or channel: that stays 0, whatever sigma(0) is, or an infinite number makes of
        // it.
        for_each_pair_of_sums<P>([&](int m, int n, int i, int in_group, int channel) {
          const int position = group * kGroup + in_group, left = hidden - unit - channel;
          if (block.place(position) < 0 || left <= 0) return;
          const Pair s = {z.x[m][n].x[i], left > 1 ? z.x[m][n].x[i + 1] : Number(0)};
          block.write_map(s_map, position, unit + channel, s);
        });
      }
    }
    for (int first = 0; first < dim; first += kChannels) {
      const Stored* const V = weights.next();
#pragma unroll 1
      for (int group = simt::warp(); group < shape.groups; group += warps) {
        Sums<P> sums;
        convolve<P, kUsual>(sums, s_map, shape, group, V, row_of_s);
        for_each_pair_of_sums<P>([&](int m, int n, int i, int in_group, int channel) {
          const int position = group * kGroup + in_group, left = dim - first - channel;
          if (block.place(position) < 0 || left <= 0) return;
          Number* const own = block.of_state(h, group, first / kChannels, m, n, i, in_group, channel);
          const Pair bias = biases<P>(V, row_of_s, channel), before = simt::load_pair(own);
          const Number scale = static_cast<Number>(p.scale), *x = &sums.x[m][n].x[i];
          const Pair after = {before.x + scale * (x[0] + bias.x),
                              left > 1 ? before.y + scale * (x[1] + bias.y) : Number(0)};
          store_pair(own, after);
          if constexpr (P::kRounds) block.write_map(h_map, position, first + channel, after);
        });
      }
    }
  }
  if (p.end) write(static_cast<Number*>(p.end));
  if (p.y) write(static_cast<Stored*>(p.y));
}

}  // namespace
}  // namespace odeblock
