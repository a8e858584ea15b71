// The CUDA entry points of the native core (odeblock/_core.pyi), emulated: a library that a test loads in the place of
// the core, so that the product's own Python runs on the kernels. Tensors on the CPU are the GPU's.
#include <exception>
#include <string>

#include "api.h"
#include "cuda/simt.cuh"

using namespace odeblock;

namespace {

void set(Problem& p, const int64_t* sizes, double scale) {
  p.dtype = static_cast<Dtype>(sizes[0]);
  p.activation = static_cast<int>(sizes[1]);
  p.batch = sizes[2], p.dim = sizes[3], p.hidden = sizes[4], p.depth = sizes[5];
  p.height = sizes[6], p.width = sizes[7], p.kernel = sizes[8];
  p.scale = scale;
}
void set_weights(Problem& p, void* const* weights) {
  p.V = weights[0], p.W = weights[1], p.hidden_bias = weights[2], p.output_bias = weights[3];
}

// What went wrong, for Python; else null.
template <class F>
const char* tell(F f) {
  static std::string text;
  try {
    return f();
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

}  // namespace

extern "C" {

void emulate(int capability, int multiprocessors, int64_t seed) {
  emulation::capability() = capability;
  emulation::multiprocessors() = multiprocessors;
  emulation::seed() = static_cast<uint64_t>(seed);
}

bool fuses(const int64_t* sizes, bool backward, bool reconstruct, bool tf32) {
  Problem p{};
  set(p, sizes, 0);
  p.reconstruct = reconstruct;
  return cuda_fuses(p, backward, tf32, 0);
}

int map_blocks(const int64_t* sizes, bool tf32) {
  Problem p{};
  set(p, sizes, 0);
  return cuda_map_blocks(p, tf32, 0);
}

const char* forward(const int64_t* sizes, double scale, void* const* weights, void* const* arrays, int64_t save_every,
                    bool reconstruct, bool tf32) {
  ForwardProblem p{};
  set(p, sizes, scale), set_weights(p, weights);
  p.save_every = save_every, p.reconstruct = reconstruct;
  p.h = arrays[0], p.start = arrays[1], p.y = arrays[2], p.end = arrays[3], p.states = arrays[4];
  p.directions = arrays[5], p.checks = arrays[6];
  return tell([&] { return cuda_forward(p, tf32, 0, nullptr); });
}

const char* sweep(const int64_t* sizes, double scale, void* const* weights, void* const* arrays, bool tf32) {
  SweepProblem p{};
  set(p, sizes, scale), set_weights(p, weights);
  p.states = arrays[0], p.a = arrays[1], p.sums = arrays[2];
  p.layer_a = arrays[3], p.layer_h = arrays[4], p.layer_s = arrays[5], p.layer_g = arrays[6];
  return tell([&] { return cuda_sweep(p, tf32, 0, nullptr); });
}

const char* reconstruct(const int64_t* sizes, double scale, void* const* weights, void* const* arrays, int64_t ring,
                        int64_t first, int64_t block_depth, double limit, bool tf32) {
  ReconstructionProblem p{};
  set(p, sizes, scale), set_weights(p, weights);
  p.states = arrays[0], p.visible = arrays[1], p.sight = arrays[2], p.probe = arrays[3];
  p.checks = arrays[4], p.rows = arrays[5];
  p.ring = ring, p.first = first, p.block_depth = block_depth, p.limit = limit;
  return tell([&] { return cuda_reconstruct(p, tf32, 0, nullptr); });
}
}
