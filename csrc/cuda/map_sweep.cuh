// The backward's way through the layers of convolutions on a GPU, from the last to the first, as map_forward.cuh goes
// up:
//
//   z = conv(h, W) + hidden_bias,  s = sigma(z),  g = convᵀ(a, V) ⊙ sigma'(z),  a += scale convᵀ(g, W)
//
// A transposed convolution is one with channels exchanged and taps turned round, which is how the host lays its weights
// out: kChannels rows of W and as many of the transposed V by turns (p.W), then the transposed W (p.V). h comes from
// the states, rounded to what products read, and is asked for a convolution before it is needed; a stays on chip.
//
// Between the two halves of a layer, while the block has its h, a, s and g in shared memory, it sums the gradients of
// the weights (map_gradients.cuh): one meeting more a layer.
#pragma once

#include "map_gradients.cuh"

namespace odeblock {
namespace {

template <class P>
struct MapSweep {
  typedef typename P::Stored Stored;
  // As in the forward; operands of float32 take more registers.
  static constexpr int kMostWarps = P::kRounds ? 16 : sizeof(typename P::Number) == 8 ? 8 : 12;

  static int tasks(const Problem& p) {
    return tasks_of_gradients<P>(padded_channels(p.dim) / kChannels, padded_channels(p.hidden) / kChannels,
                                 static_cast<int>(p.kernel * p.kernel));
  }
  ODEBLOCK_INLINE static size_t stage_bytes(const Problem& p, int stages) {
    const int of_h = 2 * weight_row(p, p.dim), of_g = weight_row(p, p.hidden);
    return static_cast<size_t>(stages) * kChannels * (of_h > of_g ? of_h : of_g) * sizeof(Stored);
  }
  ODEBLOCK_INLINE static size_t bytes_of_maps(const Problem& p, const MapShape& shape) {
    const int channels = padded_channels(p.dim);
    return 2 * (map_bytes<Stored>(shape, channels) + map_bytes<Stored>(shape, padded_channels(p.hidden))) +
           state_bytes<P>(shape, channels);
  }
  static size_t shared_bytes(const Problem& p, const MapPlan& plan) {
    const MapShape shape(p, plan.samples);
    return block_bytes(shape, stage_bytes(p, plan.stages), bytes_of_maps(p, shape));
  }
};

template <class P, bool kUsual>
ODEBLOCK_KERNEL(32 * MapSweep<P>::kMostWarps, 1)
map_sweep_kernel(const ODEBLOCK_PARAMETER MapArguments<SweepProblem> arguments) {
  typedef typename P::Stored Stored;
  typedef typename P::Number Number;
  typedef simt::Pair<Number> Pair;

  const SweepProblem& p = arguments.problem;
  const MapShape shape(p, arguments.plan.samples);
  const int dim = static_cast<int>(p.dim), hidden = static_cast<int>(p.hidden);
  const int blocks = padded_channels(dim) / kChannels, hidden_blocks = padded_channels(hidden) / kChannels;
  const int row_of_h = weight_row(p, dim), row_of_g = weight_row(p, hidden);
  WeightStream<Stored, true> weights({static_cast<const Stored*>(p.W), hidden_blocks, 2 * kChannels * row_of_h},
                                     {static_cast<const Stored*>(p.V), blocks, kChannels * row_of_g}, p.depth,
                                     arguments.plan);
  MapBlock<P> block(p, shape, MapSweep<P>::stage_bytes(p, arguments.plan.stages), MapSweep<P>::bytes_of_maps(p, shape));
  const Map<Stored> h_map = block.take_map(blocks * kChannels), a_map = block.take_map(blocks * kChannels),
                    s_map = block.take_map(hidden_blocks * kChannels),
                    g_map = block.take_map(hidden_blocks * kChannels);
  const Map<Number> a = block.take_state(a_map);

  const int depth = static_cast<int>(p.depth);
  const auto states = [&](int k) {
    return static_cast<const Number*>(p.states) + k * padded_rows(p.batch) * dim * p.height * p.width;
  };
  block.for_each_of_state(a, [&](Number* own, int position, int channel, int64_t place) {
    const Pair pair = block.read(static_cast<const Number*>(p.a), channel, place);
    store_pair(own, pair);
    if constexpr (P::kRounds) block.write_map(a_map, position, channel, pair);
    block.write_map(h_map, position, channel, block.read(states(depth - 1), channel, place));
  });
  const int warps = simt::threads() / 32;
  for (int k = depth - 1; k >= 0; k--) {
    for (int unit = 0; unit < hidden; unit += kChannels) {
      const Stored* const W = weights.next();
#pragma unroll 1
      for (int group = simt::warp(); group < shape.groups; group += warps) {
        Sums<P> z, u;
        convolve<P, kUsual>(z, h_map, shape, group, W, row_of_h);
        // s to its map, sigma'(z) in the place of z.
        with_activation(p.activation, [&](auto sigma) {
          for_each_pair_of_sums<P>([&](int m, int n, int i, int in_group, int channel) {
            const Pair bias = biases<P>(W, row_of_h, channel);
            Number* const x = &z.x[m][n].x[i];
            const activation::Value<Number> first = evaluate<P::kBits>(sigma, x[0] + bias.x),
                                            second = evaluate<P::kBits>(sigma, x[1] + bias.y);
            x[0] = first.d, x[1] = second.d;
            const int position = group * kGroup + in_group, left = hidden - unit - channel;
            if (p.sums && block.place(position) >= 0 && left > 0)
              block.write_map(s_map, position, unit + channel, {first.s, left > 1 ? second.s : Number(0)});
          });
        });
        convolve<P, kUsual>(u, a_map, shape, group, W + kChannels * row_of_h, row_of_h);
        for_each_pair_of_sums<P>([&](int m, int n, int i, int in_group, int channel) {
          const int position = group * kGroup + in_group, left = hidden - unit - channel;
          if (block.place(position) < 0 || left <= 0) return;
          const Number *const x = &u.x[m][n].x[i], *const d = &z.x[m][n].x[i];
          const Pair g = {x[0] * d[0], left > 1 ? x[1] * d[1] : Number(0)};
          block.write_map(g_map, position, unit + channel, g);
        });
      }
    }
    if (p.sums) {
      simt::sync_block();
      const int64_t of_layer = (p.batch + shape.samples - 1) / shape.samples;
      leave_gradients<P>(a_map, s_map, g_map, h_map, shape,
                         static_cast<Number*>(p.sums) + (k * of_layer + simt::block()) * numbers_of_sums(p));
    }
    for (int first = 0; first < dim; first += kChannels) {
      const Stored* const W = weights.next();
#pragma unroll 1
      for (int group = simt::warp(); group < shape.groups; group += warps) {
        Sums<P> sums, below;
        if (k > 0) block.read_sums(below, states(k - 1), group, first / kChannels);
        convolve<P, kUsual>(sums, g_map, shape, group, W, row_of_g);
        for_each_pair_of_sums<P>([&](int m, int n, int i, int in_group, int channel) {
          const int position = group * kGroup + in_group, left = dim - first - channel;
          if (block.place(position) < 0 || left <= 0) return;
          Number* const own = block.of_state(a, group, first / kChannels, m, n, i, in_group, channel);
          const Pair before = simt::load_pair(own);
          const Number scale = static_cast<Number>(p.scale), *x = &sums.x[m][n].x[i];
          const Pair after = {before.x + scale * x[0], left > 1 ? before.y + scale * x[1] : Number(0)};
          store_pair(own, after);
          if constexpr (P::kRounds) block.write_map(a_map, position, first + channel, after);
          const Number* const h = &below.x[m][n].x[i];
          if (k > 0) block.write_map(h_map, position, first + channel, {h[0], h[1]});
        });
      }
    }
  }
  block.for_each_of_state(a, [&](const Number* own, int, int channel, int64_t place) {
    block.write(static_cast<Number*>(p.a), channel, place, simt::load_pair(own));
  });
}

}  // namespace
}  // namespace odeblock
