// What the kernels of convolutions are made of. A block keeps the maps of some samples in shared memory and takes them
// through all layers; MapShape (map_kernels.h) says how positions are numbered. What is left of a row is right of the
// one above it, and zero, so that a tap of a convolution is one step for all positions, at borders too:
//
//   sums [kGroup positions, kChannels] = Σ over taps and channels  map[position + step of the tap] weightsᵀ
//
// is a product of matrices, whose first operand lies in the map as it is, a position a row, for each tap elsewhere.
// A position has its channels, zeros up to a multiple of kChannels, and 8 numbers more, so that lanes meet other banks.
//
// Weights come as the host has laid them out (odeblock/gpu_maps.py), kChannels rows at a time, a row for each channel
// that is computed: [kernel, kernel, channels up to a multiple of kChannels], then its bias and 7 zeros.
#pragma once

#include "map_kernels.h"
#include "tiles.cuh"

namespace odeblock {
namespace {

// A matrix of rows of weights for each layer, of which `chunks` make up the layer.
template <class T>
struct Weights {
  const T* first;
  int chunks, elements;  // of a chunk
};

// The chunks of two matrices, layer by layer (from the first on, or from the last), on their way through shared memory.
template <class T, bool kFromLast>
class WeightStream {
 public:
  ODEBLOCK_DEVICE WeightStream(Weights<T> first, Weights<T> second, int64_t depth, const MapPlan& plan)
      : first_(first),
        second_(second),
        depth_(static_cast<int>(depth)),
        stages_(plan.stages),
        elements_(first.elements > second.elements ? first.elements : second.elements) {
    for (int i = 1; i < stages_; i++) fetch();
  }
  // The next chunk, which stays until the one after it is asked for. All threads of the block meet: what they wrote to
  // shared memory before is there for all.
  ODEBLOCK_DEVICE const T* next() {
    if (stages_ == 2)
      simt::wait_copies<0>();
    else
      simt::wait_copies<2>();
    simt::sync_block();
    const T* const chunk = stage(used_);
    used_ = used_ + 1 == stages_ ? 0 : used_ + 1;
    fetch();
    return chunk;
  }

 private:
  ODEBLOCK_DEVICE T* stage(int i) const { return reinterpret_cast<T*>(simt::shared()) + i * elements_; }
  ODEBLOCK_DEVICE void fetch() {
    if (layer_ < depth_) {
      const int64_t k = kFromLast ? depth_ - 1 - layer_ : layer_;
      const bool of_first = chunk_ < first_.chunks;
      const int64_t before = of_first ? k * first_.chunks + chunk_ : k * second_.chunks + chunk_ - first_.chunks;
      const int elements = of_first ? first_.elements : second_.elements;
      const T* const from = (of_first ? first_.first : second_.first) + before * elements;
      constexpr int kPiece = 16 / sizeof(T);
      for (int i = kPiece * simt::thread(); i < elements; i += kPiece * simt::threads())
        simt::copy_async(stage(filled_) + i, from + i, 16);
      if (++chunk_ == first_.chunks + second_.chunks) chunk_ = 0, layer_++;
    }
    simt::commit_copies();  // also where there is nothing, for groups are counted
    filled_ = filled_ + 1 == stages_ ? 0 : filled_ + 1;
  }

  const Weights<T> first_, second_;
  const int depth_, stages_, elements_;
  int layer_ = 0, chunk_ = 0, filled_ = 0, used_ = 0;
};

template <class T>
ODEBLOCK_DEVICE void store_pair(T* to, simt::Pair<T> pair) {  // to shared memory
  simt::store(reinterpret_cast<simt::Pair<T>*>(to), pair);
}

// Maps in shared memory.
template <class T>
struct Map {
  T* first;   // channels of position 0
  int width;  // numbers from a position to the next
};
template <class T>
ODEBLOCK_INLINE size_t map_bytes(const MapShape& shape, int channels) {
  return static_cast<size_t>(shape.positions()) * (channels + 8) * sizeof(T);
}
// A state that is not its map: each lane's own numbers, pair by pair.
template <class P>
ODEBLOCK_INLINE size_t state_bytes(const MapShape& shape, int channels) {
  return P::kRounds ? static_cast<size_t>(shape.groups) * kGroup * channels * sizeof(typename P::Number) : 0;
}
// Of shared memory: stages of weights, places of positions, maps and states.
ODEBLOCK_INLINE size_t block_bytes(const MapShape& shape, size_t stage_bytes, size_t bytes_of_maps) {
  return stage_bytes + static_cast<size_t>(shape.groups) * kGroup * sizeof(int) + bytes_of_maps;
}

// Tiles of kGroup positions and kChannels channels.
template <class P>
struct Sums {
  static constexpr int kTiles = kGroup / P::kRows;
  typename P::Tile x[kTiles][kChannels / 8];
};

// f(tile, tile, i, position, channel) for the first number of each pair that a lane has of them.
template <class P, class F>
ODEBLOCK_DEVICE void for_each_pair_of_sums(F f) {
  const int lane = simt::lane();
#pragma unroll
  for (int m = 0; m < Sums<P>::kTiles; m++)
#pragma unroll
    for (int i = 0; i < P::kNumbers; i += 2)
#pragma unroll
      for (int n = 0; n < kChannels / 8; n++) f(m, n, i, P::kRows * m + lane / 4 + 4 * i, 8 * n + lane % 4 * 2);
}

// What kChannels channels of one tap add; map, weights: where this lane's part begins; row: of weights.
template <class P>
ODEBLOCK_DEVICE void add_channels(Sums<P>& sums, const typename P::Stored* map, int width,
                                  const typename P::Stored* weights, int row) {
  typedef typename P::Stored Stored;
  if constexpr (P::kRounds) {
    uint32_t b[4];
    simt::load_matrices(b, weights);
#pragma unroll
    for (int m = 0; m < Sums<P>::kTiles; m++) {
      typename P::A a;
      simt::load_matrices(a.x, map + P::kRows * m * width);
#pragma unroll
      for (int n = 0; n < 2; n++) P::step(sums.x[m][n], a, {{b[2 * n], b[2 * n + 1]}});
    }
  } else {
    constexpr int kPairs = P::kColumns / 8;
#pragma unroll
    for (int k = 0; k < kChannels; k += P::kColumns) {
      typename P::B b[2];
#pragma unroll
      for (int n = 0; n < 2; n++) {
        simt::Pair<Stored> pairs[kPairs];
#pragma unroll
        for (int j = 0; j < kPairs; j++) pairs[j] = simt::load_pair(weights + 8 * n * row + k + 8 * j);
        b[n] = P::second(pairs);
      }
#pragma unroll
      for (int m = 0; m < Sums<P>::kTiles; m++) {
        typename P::Tile tiles[kPairs];
#pragma unroll
        for (int j = 0; j < kPairs; j++)
#pragma unroll
          for (int i = 0; i < P::kNumbers; i += 2) {
            const auto pair = simt::load_pair(map + (P::kRows * m + 4 * i) * width + k + 8 * j);
            tiles[j].x[i] = pair.x, tiles[j].x[i + 1] = pair.y;
          }
        const typename P::A a = P::pack(tiles, 1);
#pragma unroll
        for (int n = 0; n < 2; n++) P::step(sums.x[m][n], a, b[n]);
      }
    }
  }
}

// The convolution at a group's positions, of the channels that `weights` is for, without its bias. kUsual: of 3 x 3
// taps and kChannels channels, where taps are constants apart.
template <class P, bool kUsual>
ODEBLOCK_DEVICE void convolve(Sums<P>& sums, Map<typename P::Stored> map, const MapShape& shape, int group,
                              const typename P::Stored* weights, int row_of_weights) {
  typedef typename P::Stored Stored;
#pragma unroll
  for (int m = 0; m < Sums<P>::kTiles; m++) P::clear(sums.x[m]);
  const int width = kUsual ? kChannels + 8 : map.width, kernel = kUsual ? 3 : 2 * shape.radius + 1;
  const int channels = width - 8, row = kUsual ? 9 * kChannels + 8 : row_of_weights, lane = simt::lane();
  const Stored* line = map.first + (group * kGroup - shape.margin()) * width;
  if constexpr (P::kRounds) {
    line += lane % 16 * width + lane / 16 * 8;
    weights += (lane % 8 + lane / 16 * 8) * row + lane / 8 % 2 * 8;
  } else {
    line += lane / 4 * width + lane % 4 * 2;
    weights += lane / 4 * row + lane % 4 * 2;
  }
#pragma unroll(kUsual&& P::kRounds ? 3 : 1)
  for (int y = 0; y < kernel; y++, line += shape.pitch * width, weights += kernel * channels)
#pragma unroll 1
    for (int channel = 0; channel < channels; channel += kChannels)
#pragma unroll(kUsual || P::kRounds ? 3 : 1)
      for (int x = 0; x < kernel; x++)
        add_channels<P>(sums, line + x * width + channel, width, weights + x * channels + channel, row);
}

// The biases of a pair of channels, which end their rows.
template <class P>
ODEBLOCK_DEVICE simt::Pair<typename P::Number> biases(const typename P::Stored* weights, int row, int channel) {
  const typename P::Stored* const end = weights + channel * row + row - 8;
  return {P::widen(end[0]), P::widen(end[row])};
}

// The maps of one block: where its positions are in arrays [B, C, H, W], and what it knows of its memory.
template <class P>
class MapBlock {
  typedef typename P::Stored Stored;
  typedef typename P::Number Number;

 public:
  ODEBLOCK_DEVICE MapBlock(const Problem& p, const MapShape& shape, size_t stage_bytes, size_t bytes_of_maps)
      : shape_(shape), area_(static_cast<int>(p.height * p.width)), channels_(static_cast<int>(p.dim)) {
    places_ = reinterpret_cast<int*>(simt::shared() + stage_bytes);
    next_ = reinterpret_cast<unsigned char*>(places_ + shape.groups * kGroup);
    const int height = static_cast<int>(p.height), width = static_cast<int>(p.width);
    const int64_t left = p.batch - first_sample();
    for (int i = simt::thread(); i < shape.groups * kGroup; i += simt::threads()) {
      const int sample = i / shape.of_sample, y = i % shape.of_sample / shape.pitch, x = i % shape.pitch;
      const bool there = sample < shape.samples && sample < left && y < height && x < width;
      simt::store(places_ + i, there ? sample * channels_ * area_ + y * width + x : -1);
    }
    for (size_t i = 16 * simt::thread(); i < bytes_of_maps; i += 16 * simt::threads())
      simt::store(reinterpret_cast<simt::Words<4>*>(next_ + i), simt::Words<4>{});
    simt::sync_block();
  }

  ODEBLOCK_DEVICE int64_t first_sample() const { return static_cast<int64_t>(simt::block()) * shape_.samples; }

  ODEBLOCK_DEVICE Map<Stored> take_map(int channels) {
    const Map<Stored> map = {reinterpret_cast<Stored*>(next_) + shape_.margin() * (channels + 8), channels + 8};
    next_ += map_bytes<Stored>(shape_, channels);
    return map;
  }
  // The state of a map: the map, unless that is rounded.
  ODEBLOCK_DEVICE Map<Number> take_state(Map<Stored> map) {
    if constexpr (P::kRounds) {
      const Map<Number> state = {reinterpret_cast<Number*>(next_), map.width - 8};
      next_ += state_bytes<P>(shape_, map.width - 8);
      return state;
    } else {
      return map;
    }
  }

  // Place of a position's first channel in what a block has of arrays [B, C, H, W]; -1: of no map.
  ODEBLOCK_DEVICE int place(int position) const { return places_[position]; }
  // Where a pair of a state is; group, block: of positions and channels; m, n, i, position, channel: in these.
  ODEBLOCK_DEVICE Number* of_state(Map<Number> state, int group, int block, int m, int n, int i, int position,
                                   int channel) const {
    if constexpr (P::kRounds) {
      constexpr int kPairs = P::kNumbers / 2;
      const int tile = ((group * (state.width / kChannels) + block) * Sums<P>::kTiles + m) * (kChannels / 8) + n;
      return state.first + ((tile * kPairs + i / 2) * 32 + simt::lane()) * 2;
    } else {
      return state.first + (group * kGroup + position) * state.width + block * kChannels + channel;
    }
  }

  // f(state's pair, position, channel, place in arrays [B, C, H, W] of them) for all of a state that are this lane's.
  template <class F>
  ODEBLOCK_DEVICE void for_each_of_state(Map<Number> state, F f) const {
#pragma unroll 1
    for (int group = simt::warp(); group < shape_.groups; group += simt::threads() / 32)
#pragma unroll 1
      for (int block = 0; block * kChannels < channels_; block++)
        for_each_pair_of_sums<P>([&](int m, int n, int i, int position, int in_block) {
          const int first = place(group * kGroup + position), channel = block * kChannels + in_block;
          if (first >= 0 && channel < channels_)
            f(of_state(state, group, block, m, n, i, position, in_block), group * kGroup + position, channel,
              first_sample() * channels_ * area_ + first + static_cast<int64_t>(channel) * area_);
        });
  }
  // What an array [B, C, H, W] has of a group and a block of channels, where they are of a map: all is asked for before
  // any of it is waited for.
  template <class T>
  ODEBLOCK_DEVICE void read_sums(Sums<P>& to, const T* from, int group, int block) const {
    from += first_sample() * channels_ * area_;
    for_each_pair_of_sums<P>([&](int m, int n, int i, int in_group, int in_block) {
      const int first = place(group * kGroup + in_group), channel = block * kChannels + in_block;
      if (first >= 0 && channel < channels_) {
        const simt::Pair<Number> pair = read(from, channel, first + static_cast<int64_t>(channel) * area_);
        to.x[m][n].x[i] = pair.x, to.x[m][n].x[i + 1] = pair.y;
      }
    });
  }
  // Of an array [B, C, H, W] the pair of channels at a place.
  template <class T>
  ODEBLOCK_DEVICE simt::Pair<Number> read(const T* from, int channel, int64_t place) const {
    return {widen(from[place]), channel + 1 < channels_ ? widen(from[place + area_]) : Number(0)};
  }
  template <class T>
  ODEBLOCK_DEVICE void write(T* to, int channel, int64_t place, simt::Pair<Number> pair) const {
    const simt::Pair<T> narrow = narrowed<T>(pair);
    to[place] = narrow.x;
    if (channel + 1 < channels_) to[place + area_] = narrow.y;
  }
  // To a map, rounded to what products read.
  ODEBLOCK_DEVICE static void write_map(Map<Stored> map, int position, int channel, simt::Pair<Number> pair) {
    store_pair(map.first + position * map.width + channel, narrowed<Stored>(pair));
  }

 private:
  template <class T>
  ODEBLOCK_DEVICE static simt::Pair<T> narrowed(simt::Pair<Number> pair) {
    if constexpr (std::is_same_v<T, Number>)
      return pair;
    else
      return P::narrow(pair.x, pair.y);
  }
  template <class T>
  ODEBLOCK_DEVICE static Number widen(T x) {
    if constexpr (std::is_same_v<T, Number>)
      return x;
    else
      return P::widen(x);
  }

  const MapShape shape_;
  const int area_, channels_;
  int* places_;
  unsigned char* next_;
};

}  // namespace
}  // namespace odeblock
