// The CUDA forward, emulated: reads one problem from standard input, writes y and the saved states. Linked with
// csrc/cuda/launch.cu and the kinds of kernels.cu that a test needs.
#include <cstdio>

#include "../arrays.h"
#include "api.h"
#include "cuda/simt.cuh"

using namespace odeblock;

namespace {

struct Header {
  int64_t dtype, tf32, activation, batch, dim, hidden, depth, save_every, keep_hidden, biases, capability,
      multiprocessors, seed;
  double scale;
};

}  // namespace

int main() {
  Header x;
  if (std::fread(&x, sizeof x, 1, stdin) != 1) return 2;
  const size_t stored = x.dtype == 1 ? 8 : x.dtype == 0 ? 4 : 2, computed = stored < 4 ? 4 : stored;
  const size_t rows = x.batch * x.dim * stored, weights = x.depth * x.dim * x.hidden * stored;
  const Bytes h = read(rows), V = read(weights), W = read(weights);
  const Bytes b = read(x.biases ? x.depth * x.hidden * stored : 0), c = read(x.biases ? x.depth * x.dim * stored : 0);
  ForwardProblem p{};
  p.dtype = static_cast<Dtype>(x.dtype);
  p.activation = static_cast<int>(x.activation);
  p.batch = x.batch, p.dim = x.dim, p.hidden = x.hidden, p.depth = x.depth;
  p.scale = x.scale;
  p.save_every = x.save_every, p.keep_hidden = x.keep_hidden != 0;
  const int64_t count = x.save_every ? (x.depth - 1) / x.save_every + 1 : 0;
  const size_t saved = count * padded_rows(x.batch) * saved_width(p) * computed;
  const Bytes y = allocate(rows), states = allocate(saved);
  p.V = V.get(), p.W = W.get(), p.h = h.get(), p.y = y.get(), p.states = states.get();
  if (x.biases) p.hidden_bias = b.get(), p.output_bias = c.get();
  emulation::seed() = x.seed;
  emulation::capability() = static_cast<int>(x.capability);
  emulation::multiprocessors() = static_cast<int>(x.multiprocessors);
  try {
    if (!cuda_fuses(p, x.tf32 != 0, 0)) throw std::runtime_error("the kernels do not take this problem");
    cuda_forward(p, x.tf32 != 0, 0, nullptr);
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  write(y, rows), write(states, saved);
  std::fprintf(stderr, "bank conflicts %lld\n", static_cast<long long>(emulation::counts().bank_conflicts));
  return 0;
}
