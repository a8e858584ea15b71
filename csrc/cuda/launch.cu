// Chooses a kernel for a problem on a GPU, and launches it on the caller's stream. Nothing is allocated, kept or waited
// for.
#include "../api.h"
#include "kernels.h"
#include "map_kernels.h"
#include "simt.cuh"

namespace odeblock {
namespace {

// A warpgroup's products are for wide layers and many rows: it takes 64 rows at once, and on chip rows of 64 numbers.
// (ODEBLOCK_SM90A: their kernels are in this build; one for sm_90 as such has no instructions for them.)
#if defined(ODEBLOCK_SM90A) || defined(ODEBLOCK_EMULATED)
constexpr bool kHasWarpgroupKernels = true;
#else
constexpr bool kHasWarpgroupKernels = false;
#endif

// Those that products of warpgroups are chosen for, where there are some.
CudaKernels kernels_for(const Problem& p, bool tf32, int device) {
  const bool warpgroup = kHasWarpgroupKernels && simt::capability(device) == 90 && p.dim > 32 && p.batch >= 64;
  const auto either = [&](CudaKernels (*of_warpgroups)(int64_t), CudaKernels (*of_warps)(int64_t)) -> CudaKernels {
    if (!warpgroup) return of_warps(p.dim);
    if (p.dim <= kMostFeaturesOfWarpgroupSweeps) return of_warpgroups(p.dim);
    const CudaKernels of_one_warp = of_warps(p.dim);
    return {of_warpgroups(p.dim).forward, of_one_warp.sweep, of_one_warp.reconstruction};
  };
  switch (p.dtype) {
    case Dtype::float64: return cuda_kernels_float64(p.dim);
    case Dtype::bfloat16: return either(cuda_kernels_bfloat16_warpgroup, cuda_kernels_bfloat16);
    case Dtype::float16: return either(cuda_kernels_float16_warpgroup, cuda_kernels_float16);
    default: return tf32 ? cuda_kernels_tf32(p.dim) : cuda_kernels_float32(p.dim);
  }
}

struct Grid {
  int blocks, cluster, threads;
  size_t shared_bytes, most_shared_bytes;
};

// The warps of a block share the copying of weights and what they read of them, as two blocks of a cluster do what
// comes in bulk: as many as fit, but for those that would leave multiprocessors with less to do than others. Four warps
// with rows a multiprocessor computes side by side; warps without rows only copy.
template <class SomeProblem>
Grid grid_of(const CudaKernel<SomeProblem>& kernel, int64_t batch, int device) {
  const int64_t tiles = (batch + kernel.warp_rows - 1) / kernel.warp_rows, all = simt::multiprocessors(device);
  const size_t most = kernel.shared_bytes(kernel.most_warps), there = simt::most_shared_bytes(device);
  int warps = kernel.least_warps;
  int64_t fewest = INT64_MAX;
  for (int w = kernel.least_warps; w <= kernel.most_warps && kernel.shared_bytes(w) <= there; w += kernel.least_warps) {
    const int64_t with_rows = w < tiles ? w : tiles;
    // Of the multiprocessor with the most.
    const int64_t steps = ((tiles + w - 1) / w + all - 1) / all * ((with_rows + 3) / 4);
    if (steps <= fewest) fewest = steps, warps = w;
  }
  const int blocks = static_cast<int>((tiles + warps - 1) / warps), cluster = blocks > 1 ? kernel.cluster : 1;
  return {(blocks + cluster - 1) / cluster * cluster, cluster, 32 * warps, kernel.shared_bytes(warps),
          most < there ? most : there};
}

template <class SomeProblem>
const char* launch(const CudaKernel<SomeProblem>& kernel, const SomeProblem& p, int device, void* stream) {
  const Grid grid = grid_of(kernel, p.batch, device);
  CudaArguments<SomeProblem> arguments{p, {}, {}};
  const char* error = simt::prepare(kernel.run, grid.most_shared_bytes);
  if (error) return error;
  if (const int units = kernel.bulk_units) {
    const int64_t dim = padded_size(p, p.dim), hidden = padded_size(p, p.hidden);
    error = simt::describe(arguments.W, p.W, p.depth, hidden, dim, units / grid.cluster, 64);
    if (!error) error = simt::describe(arguments.V, p.V, p.depth, dim, hidden, kernel.features / grid.cluster, units);
    if (error) return error;
  }
  return simt::launch(kernel.run, grid.blocks, grid.cluster, grid.threads, grid.shared_bytes, stream, arguments);
}

// Bytes of a layer's weights from which on few rows are better served by a matrix product a step, which all
// multiprocessors share, than by one multiprocessor, which reads some 100 GB/s: 5 us, two launches.
constexpr int64_t kWideLayer = 512 << 10;

}  // namespace

const char* cuda_unsupported(int device) {
  const simt::OnDevice on(device);
  if (on.error()) return on.error();
  return simt::unsupported(cuda_kernels_float32(1).forward.run);
}

bool cuda_fuses(const Problem& p, bool backward, bool tf32, int device) {
  if (p.kernel == 0 && p.dim > kMostFeatures) return false;
  if (p.batch == 0) return true;
  // Kernels count in int; chunks of the adjoint's come many times.
  if (p.depth * p.hidden > INT32_MAX / 2 || p.batch > INT32_MAX / 2 || (p.reconstruct && p.hidden > 1 << 20))
    return false;
  const int64_t bytes = p.dtype == Dtype::float64 ? 8 : p.dtype == Dtype::float32 ? 4 : 2;
  const bool few = p.batch <= 16 * simt::multiprocessors(device) / 4;
  const int64_t taps = p.kernel == 0 ? 1 : p.kernel * p.kernel;
  if (few && 2 * p.dim * p.hidden * taps * bytes > kWideLayer) return false;
  if (p.kernel > 0) return cuda_fuses_maps(p, backward, tf32, device);
  const CudaKernels kernels = kernels_for(p, tf32, device);
  const size_t there = simt::most_shared_bytes(device);
  return grid_of(kernels.forward, p.batch, device).shared_bytes <= there &&
         (!backward || grid_of(kernels.sweep, p.batch, device).shared_bytes <= there) &&
         (!p.reconstruct || grid_of(kernels.reconstruction, p.batch, device).shared_bytes <= there);
}

const char* cuda_forward(const ForwardProblem& p, bool tf32, int device, void* stream) {
  if (p.batch == 0) return nullptr;
  const simt::OnDevice on(device);
  if (on.error()) return on.error();
  if (p.kernel > 0) return cuda_forward_maps(p, tf32, device, stream);
  return launch(kernels_for(p, tf32, device).forward, p, device, stream);
}

const char* cuda_sweep(const SweepProblem& p, bool tf32, int device, void* stream) {
  if (p.batch == 0) return nullptr;
  const simt::OnDevice on(device);
  if (on.error()) return on.error();
  if (p.kernel > 0) return cuda_sweep_maps(p, tf32, device, stream);
  return launch(kernels_for(p, tf32, device).sweep, p, device, stream);
}

const char* cuda_reconstruct(const ReconstructionProblem& p, bool tf32, int device, void* stream) {
  if (p.batch == 0) return nullptr;
  const simt::OnDevice on(device);
  return on.error() ? on.error() : launch(kernels_for(p, tf32, device).reconstruction, p, device, stream);
}

}  // namespace odeblock
