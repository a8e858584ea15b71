// Chooses how a GPU takes convolutions, and launches it on the caller's stream, as launch.cu does for rows.
#include "../api.h"
#include "map_kernels.h"
#include "simt.cuh"

namespace odeblock {
namespace {

MapKernels kernels_for(const Problem& p, bool tf32) {
  const bool usual = p.kernel == 3 && p.dim <= kChannels && p.hidden <= kChannels;
  switch (p.dtype) {
    case Dtype::float64: return cuda_map_kernels_float64(usual);
    case Dtype::bfloat16: return cuda_map_kernels_bfloat16(usual);
    case Dtype::float16: return cuda_map_kernels_float16(usual);
    default: return tf32 ? cuda_map_kernels_tf32(usual) : cuda_map_kernels_float32(usual);
  }
}

struct Grid {
  MapPlan plan;
  int blocks, threads;  // no blocks: shared memory has no room for a sample
  size_t shared_bytes;
};

// As many samples a block as give each multiprocessor two of them, so that one computes while the other meets; one
// where maps are so large that there is no room for two.
template <class SomeProblem>
Grid grid_of(const MapKernel<SomeProblem>& kernel, const Problem& p, int device) {
  const size_t there = simt::most_shared_bytes(device);
  const int64_t all = simt::multiprocessors(device), each = (p.batch + all - 1) / all;
  constexpr int kKept = 512;  // half of what a block takes besides
  const struct {
    int blocks, stages;
    size_t room;
  } ways[] = {{2, 4, there / 2 - kKept}, {1, 4, there}, {1, 2, there}};
  for (const auto& way : ways) {
    const int64_t wanted = (each + way.blocks - 1) / way.blocks;
    for (int samples = wanted < 64 ? static_cast<int>(wanted) : 64; samples > 0; samples--) {
      const MapPlan plan = {samples, way.stages};
      const size_t bytes = kernel.shared_bytes(p, plan);
      if (bytes > way.room) continue;
      // As few warps as take as many turns at the positions, or at other tasks in one.
      const int groups = MapShape(p, samples).groups, most = kernel.most_warps / way.blocks;
      const int turns = (groups + most - 1) / most, of_groups = (groups + turns - 1) / turns;
      const int tasks = kernel.tasks(p), of_tasks = tasks < most ? tasks : most;
      const int warps = of_groups > of_tasks ? of_groups : of_tasks;
      return {plan, static_cast<int>((p.batch + samples - 1) / samples), 32 * warps, bytes};
    }
  }
  return {};
}

template <class SomeProblem>
const char* launch(const MapKernel<SomeProblem>& kernel, const SomeProblem& p, int device, void* stream) {
  const Grid grid = grid_of(kernel, p, device);
  const char* error = simt::prepare(kernel.run, simt::most_shared_bytes(device));
  return error ? error
               : simt::launch(kernel.run, grid.blocks, 1, grid.threads, grid.shared_bytes, stream,
                              MapArguments<SomeProblem>{p, grid.plan});
}

}  // namespace

bool cuda_fuses_maps(const Problem& p, bool backward, bool tf32, int device) {
  constexpr int64_t kMost = 1 << 12;  // of any size: beyond, no shared memory has room, and ints none for the rest
  if (p.dim > kMost || p.hidden > kMost || p.height > kMost || p.width > kMost || p.kernel > kMost / 64) return false;
  const MapKernels kernels = kernels_for(p, tf32);
  return !p.reconstruct && grid_of(kernels.forward, p, device).blocks > 0 &&
         (!backward || grid_of(kernels.sweep, p, device).blocks > 0);
}

const char* cuda_forward_maps(const ForwardProblem& p, bool tf32, int device, void* stream) {
  return launch(kernels_for(p, tf32).forward, p, device, stream);
}

const char* cuda_sweep_maps(const SweepProblem& p, bool tf32, int device, void* stream) {
  return launch(kernels_for(p, tf32).sweep, p, device, stream);
}

int cuda_map_blocks(const Problem& p, bool tf32, int device) {
  return p.batch == 0 ? 0 : grid_of(kernels_for(p, tf32).sweep, p, device).blocks;
}

}  // namespace odeblock
