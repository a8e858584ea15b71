// What map_kernels.cu compiles, and map_launch.cu chooses from: the kernels of convolutions.
#pragma once

#include "../problem.h"

namespace odeblock {

constexpr int kChannels = 16;  // that a product takes, and gives
constexpr int kGroup = 32;     // positions that a warp takes at once

// How a block lays out the maps of `samples` samples, one below the other, r = kernel / 2: rows of `pitch` positions,
// the last r of each of no map, like r rows below each map and what lies before the first and behind the last.
struct MapShape {
  ODEBLOCK_INLINE MapShape(const Problem& p, int samples_)
      : samples(samples_),
        radius(static_cast<int>(p.kernel) / 2),
        pitch(static_cast<int>(p.width) + radius),
        of_sample((static_cast<int>(p.height) + radius) * pitch),
        groups((samples * of_sample - radius * pitch + kGroup - 1) / kGroup) {}

  // Positions of no map on either side, which the first and the last see.
  ODEBLOCK_INLINE int margin() const { return radius * (pitch + 1); }
  ODEBLOCK_INLINE int positions() const { return groups * kGroup + 2 * margin(); }

  int samples, radius, pitch;
  int of_sample;  // positions from one sample to the next
  int groups;     // of kGroup positions
};

ODEBLOCK_INLINE int padded_channels(int64_t channels) {
  return static_cast<int>((channels + kChannels - 1) / kChannels * kChannels);
}
// Numbers of a row of weights that have come for convolutions of maps of so many channels (maps.cuh).
ODEBLOCK_INLINE int weight_row(const Problem& p, int64_t channels) {
  return static_cast<int>(p.kernel * p.kernel) * padded_channels(channels) + 8;
}

// Of what a block sums for a layer's gradients (map_gradients.cuh).
ODEBLOCK_INLINE int numbers_of_sums(const Problem& p) {
  const int dim = padded_channels(p.dim), hidden = padded_channels(p.hidden);
  return 2 * static_cast<int>(p.kernel * p.kernel) * dim * hidden + dim + hidden;
}

struct MapPlan {
  int samples;  // of a block
  int stages;   // of weights, 2 or 4
};

template <class SomeProblem>
struct MapArguments {
  SomeProblem problem;
  MapPlan plan;
};

template <class SomeProblem>
struct MapKernel {
  int most_warps;                // of a block
  int (*tasks)(const Problem&);  // for which it has use for as many warps, beside its positions
  size_t (*shared_bytes)(const Problem&, const MapPlan&);
  void (*run)(MapArguments<SomeProblem>);
};

struct MapKernels {
  MapKernel<ForwardProblem> forward;
  MapKernel<SweepProblem> sweep;
};

// By how products are taken; usual: of kernels 3 x 3 and at most kChannels channels.
MapKernels cuda_map_kernels_float32(bool usual);
MapKernels cuda_map_kernels_tf32(bool usual);
MapKernels cuda_map_kernels_float64(bool usual);
MapKernels cuda_map_kernels_bfloat16(bool usual);
MapKernels cuda_map_kernels_float16(bool usual);

// The entry points of api.h for convolutions, p.kernel > 0.
bool cuda_fuses_maps(const Problem&, bool backward, bool tf32, int device);
const char* cuda_forward_maps(const ForwardProblem&, bool tf32, int device, void* stream);
const char* cuda_sweep_maps(const SweepProblem&, bool tf32, int device, void* stream);

}  // namespace odeblock
