// The CUDA kernels of convolutions, emulated: reads one problem from standard input, writes what its kernel does.
// Linked with csrc/cuda/launch.cu, map_launch.cu and the kinds of map_kernels.cu that a test needs.
#include <cstdio>
#include <cstring>

#include "../arrays.h"
#include "api.h"
#include "cuda/map_kernels.h"
#include "cuda/simt.cuh"

using namespace odeblock;

namespace {

struct Header {
  int64_t sweep, dtype, tf32, activation, batch, dim, hidden, depth, height, width, kernel, save_every, resumes,
      capability, multiprocessors, seed;
  int64_t V_bytes, W_bytes, in_bytes, out_bytes, states_bytes;
  double scale;
};

void set(Problem& p, const Header& x) {
  p.dtype = static_cast<Dtype>(x.dtype);
  p.activation = static_cast<int>(x.activation);
  p.batch = x.batch, p.dim = x.dim, p.hidden = x.hidden, p.depth = x.depth;
  p.height = x.height, p.width = x.width, p.kernel = x.kernel;
  p.scale = x.scale;
}

}  // namespace

int main() {
  Header x;
  if (std::fread(&x, sizeof x, 1, stdin) != 1) return 2;
  const Bytes V = read(x.V_bytes), W = read(x.W_bytes), in = read(x.in_bytes);
  Bytes out = allocate(x.out_bytes);
  const Bytes states = x.sweep ? read(x.states_bytes) : allocate(x.states_bytes);
  emulation::seed() = x.seed;
  emulation::capability() = static_cast<int>(x.capability);
  emulation::multiprocessors() = static_cast<int>(x.multiprocessors);
  try {
    if (x.sweep) {
      SweepProblem p{};
      set(p, x);
      p.V = V.get(), p.W = W.get();
      if (!cuda_fuses(p, true, x.tf32 != 0, 0)) throw std::runtime_error("the kernels do not take this problem");
      x.out_bytes = x.depth * cuda_map_blocks(p, x.tf32 != 0, 0) * numbers_of_sums(p) * (x.dtype == 1 ? 8 : 4);
      out = allocate(x.out_bytes);
      p.states = states.get(), p.a = in.get(), p.sums = out.get();
      cuda_sweep(p, x.tf32 != 0, 0, nullptr);
    } else {
      ForwardProblem p{};
      set(p, x);
      p.V = V.get(), p.W = W.get();
      p.save_every = x.save_every, p.states = states.get();
      if (x.resumes)
        p.start = in.get(), p.end = out.get();
      else
        p.h = in.get(), p.y = out.get();
      if (!cuda_fuses(p, false, x.tf32 != 0, 0)) throw std::runtime_error("the kernels do not take this problem");
      cuda_forward(p, x.tf32 != 0, 0, nullptr);
    }
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  if (x.sweep) write(in, x.in_bytes);
  write(out, x.out_bytes);
  if (!x.sweep) write(states, x.states_bytes);
  std::fprintf(stderr, "bank conflicts %lld\n", static_cast<long long>(emulation::counts().bank_conflicts));
  return 0;
}
