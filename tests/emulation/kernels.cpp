// The CUDA kernels, emulated: reads one problem from standard input, writes what its kernel does. Linked with
// csrc/cuda/launch.cu and the kinds of kernels.cu that a test needs.
#include <cstdio>
#include <cstring>

#include "../arrays.h"
#include "api.h"
#include "cuda/simt.cuh"

using namespace odeblock;

namespace {

struct Header {
  int64_t sweep, dtype, tf32, activation, batch, dim, hidden, depth, save_every, resumes, biases, capability,
      multiprocessors, seed;
  double scale, limit;
};

void set(Problem& p, const Header& x) {
  p.dtype = static_cast<Dtype>(x.dtype);
  p.activation = static_cast<int>(x.activation);
  p.batch = x.batch, p.dim = x.dim, p.hidden = x.hidden, p.depth = x.depth;
  p.scale = x.scale;
}

}  // namespace

int main() {
  Header x;
  if (std::fread(&x, sizeof x, 1, stdin) != 1) return 2;
  const size_t stored = x.dtype == 1 ? 8 : x.dtype == 0 ? 4 : 2, computed = stored < 4 ? 4 : stored;
  Problem sizes{};
  set(sizes, x);
  const int64_t dim = padded_size(sizes, x.dim), hidden = padded_size(sizes, x.hidden);
  const size_t numbers = x.batch * x.dim, weights = x.depth * dim * hidden * stored;
  const Bytes V = read(weights), W = read(weights);
  const Bytes b = read(x.biases ? x.depth * hidden * stored : 0), c = read(x.biases ? x.depth * dim * stored : 0);
  const auto set_weights = [&](Problem& p) {
    p.V = V.get(), p.W = W.get();
    if (x.biases) p.hidden_bias = b.get(), p.output_bias = c.get();
  };
  emulation::seed() = x.seed;
  emulation::capability() = static_cast<int>(x.capability);
  emulation::multiprocessors() = static_cast<int>(x.multiprocessors);
  try {
    if (x.sweep == 3) {  // the adjoint's states from h_L, all features seen alike, none of them compared
      ReconstructionProblem p{};
      set(p, x), set_weights(p);
      p.reconstruct = true;
      const size_t state = padded_rows(x.batch) * x.dim * computed;
      const Bytes states = read((x.depth + 1) * state), sight = read(x.depth * kSightWidth * computed),
                  probe = read(kSightWidth * computed), rows = read(20 * x.batch * computed);
      const Bytes checks = allocate(padded_checks(x.batch) * kChecks * computed);
      std::memset(checks.get(), 0, padded_checks(x.batch) * kChecks * computed);
      p.block_depth = x.depth, p.ring = x.depth + 1, p.limit = x.limit;
      p.states = states.get(), p.visible = p.sight = sight.get(), p.probe = probe.get();
      p.checks = checks.get(), p.rows = rows.get();
      if (!cuda_fuses(p, true, x.tf32 != 0, 0)) throw std::runtime_error("the kernels do not take this problem");
      cuda_reconstruct(p, x.tf32 != 0, 0, nullptr);
      write(states, x.depth * state);
    } else if (x.sweep) {
      SweepProblem p{};
      set(p, x), set_weights(p);
      const size_t rows = x.depth * numbers * stored, units = x.depth * x.batch * x.hidden * stored;
      const Bytes states = read(x.depth * padded_rows(x.batch) * x.dim * computed), a = read(numbers * computed);
      const Bytes layer_a = allocate(rows), layer_h = allocate(rows), layer_s = allocate(units),
                  layer_g = allocate(units);
      p.states = states.get(), p.a = a.get();
      if (x.sweep > 1) {  // weights need gradients
        p.layer_a = layer_a.get(), p.layer_s = layer_s.get(), p.layer_g = layer_g.get();
        if (stored < 4) p.layer_h = layer_h.get();
      }
      if (!cuda_fuses(p, x.sweep != 0, x.tf32 != 0, 0))
        throw std::runtime_error("the kernels do not take this problem");
      cuda_sweep(p, x.tf32 != 0, 0, nullptr);
      write(a, numbers * computed);
      if (x.sweep > 1) {
        write(layer_a, rows), write(layer_s, units), write(layer_g, units);
        if (stored < 4) write(layer_h, rows);
      }
    } else {
      ForwardProblem p{};
      set(p, x), set_weights(p);
      p.save_every = x.save_every;
      const int64_t count = x.save_every ? (x.depth - 1) / x.save_every + 1 : 0;
      const size_t saved = count * padded_rows(x.batch) * x.dim * computed;
      const Bytes h = read(numbers * (x.resumes ? computed : stored)), y = allocate(numbers * stored),
                  states = allocate(saved), end = allocate(numbers * computed);
      p.states = states.get();
      if (x.resumes)
        p.start = h.get(), p.end = end.get();
      else
        p.h = h.get(), p.y = y.get();
      if (!cuda_fuses(p, x.sweep != 0, x.tf32 != 0, 0))
        throw std::runtime_error("the kernels do not take this problem");
      cuda_forward(p, x.tf32 != 0, 0, nullptr);
      x.resumes ? write(end, numbers * computed) : write(y, numbers * stored);
      write(states, saved);
    }
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  std::fprintf(stderr, "bank conflicts %lld\n", static_cast<long long>(emulation::counts().bank_conflicts));
  return 0;
}
