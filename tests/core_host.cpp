// The native CPU core without Python: reads one problem from standard input, runs it forward and backward, and
// writes the results, the batch's statistics and what the adjoint reports, to standard output. test_core.py builds it
// for other processors and under sanitizers, test_mutants.py with mistakes.
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "api.h"
#include "arrays.h"
#include "cpu/threads.h"

namespace {

struct Header {
  int64_t dtype, activation, batch, dim, hidden, depth, height, width, kernel;
  int64_t save_every, reconstruct, slots, keep_hidden, threads, hidden_bias, output_bias;
  int64_t weight_gradients;  // whether any is asked for
  int64_t stop_after;        // questions whether to stop; -1: never
  int64_t normalised;        // by the batch
  double scale;
};

int64_t questions;

bool asked() {
  if (questions-- != 0) return false;
  std::this_thread::sleep_for(std::chrono::milliseconds(5));  // the others come to where they wait for this thread
  return true;
}

// For the core to write. It holds NaN of every type: what is read before it is written shows.
Bytes unwritten(size_t size) {
  Bytes bytes = allocate(size);
  std::memset(bytes.get(), 0xff, size);
  return bytes;
}

}  // namespace

int main() {
  Header x;
  if (std::fread(&x, sizeof x, 1, stdin) != 1) return 2;
  const size_t stored = x.dtype == 1 ? 8 : x.dtype == 0 ? 4 : 2, computed = stored < 4 ? 4 : stored;
  const size_t pixels = x.kernel ? x.height * x.width : 1, taps = x.kernel ? x.kernel * x.kernel : 1;
  const size_t rows = x.batch * x.dim * pixels * stored, weights = x.depth * x.dim * x.hidden * taps * stored;
  const size_t hidden = x.hidden_bias ? x.depth * x.hidden * stored : 0;
  const size_t output = x.output_bias ? x.depth * x.dim * stored : 0;
  const int64_t padded = odeblock::padded_rows(x.batch),
                width = x.dim + (x.keep_hidden && x.save_every == 1 ? x.hidden : 0);
  const int64_t check_rows = (x.batch + odeblock::kRowPadding - 1) / odeblock::kRowPadding * odeblock::kRowPadding;
  int64_t saved = x.save_every ? (x.depth - 1) / x.save_every + 1 : 0;  // h_0, h_K, ..
  if (x.reconstruct) saved = x.save_every ? saved : 1;                  // h_K, .., h_L
  const int64_t checked = x.reconstruct ? (x.depth - 1) / odeblock::check_every(x.depth) : 0;
  const Bytes h = read(rows), V = read(weights), W = read(weights), b = read(hidden), c = read(output);
  const size_t channels[2] = {x.normalised ? x.depth * x.hidden * computed : 0,
                              x.normalised ? x.depth * x.dim * computed : 0};
  const Bytes affine[4] = {read(channels[0]), read(channels[0]), read(channels[1]), read(channels[1])};
  const Bytes grad = read(rows), probe = read(x.dim * pixels * computed);
  const Bytes states = unwritten(saved * padded * width * pixels * computed), y = unwritten(rows);
  const Bytes checks = unwritten(checked * check_rows * computed);
  const odeblock::CpuKernels& kernels = odeblock::cpu_kernels();

  odeblock::NormalisedForwardProblem f{};
  f.dtype = static_cast<odeblock::Dtype>(x.dtype);
  f.activation = static_cast<int>(x.activation);
  f.batch = x.batch, f.dim = x.dim, f.hidden = x.hidden, f.depth = x.depth;
  f.height = x.height, f.width = x.width, f.kernel = x.kernel;
  f.scale = x.scale;
  f.save_every = x.save_every, f.reconstruct = x.reconstruct != 0, f.slots = x.slots;
  f.keep_hidden = x.keep_hidden != 0;
  f.V = V.get(), f.W = W.get();
  f.hidden_bias = hidden ? b.get() : nullptr, f.output_bias = output ? c.get() : nullptr;
  f.threads = static_cast<int>(x.threads);
  f.h = h.get(), f.y = y.get(), f.states = states.get(), f.probe = probe.get(), f.checks = checks.get();
  questions = x.stop_after;
  odeblock::Stop stop(asked, 1 << 30, std::chrono::milliseconds(0));
  f.stop = x.stop_after < 0 ? nullptr : &stop;
  const Bytes statistics[4] = {unwritten(channels[0]), unwritten(channels[0]), unwritten(channels[1]),
                               unwritten(channels[1])};
  f.norm.epsilon = 1e-5;
  for (int i : {0, 1}) {
    f.norm.weight[i] = affine[2 * i].get(), f.norm.shift[i] = affine[2 * i + 1].get();
    f.norm.mean[i] = statistics[2 * i].get(), f.norm.variance[i] = statistics[2 * i + 1].get();
  }
  const Bytes forward_workspace =
      unwritten(x.normalised ? kernels.normalised_forward_workspace(f) : kernels.forward_workspace(f));
  f.workspace = forward_workspace.get();
  x.normalised ? kernels.normalised_forward(f) : kernels.forward(f);

  odeblock::NormalisedBackwardProblem g{};
  static_cast<odeblock::Problem&>(g) = f;
  g.norm = f.norm;
  const Bytes backward_workspace =
      unwritten(x.normalised ? kernels.normalised_backward_workspace(g) : kernels.backward_workspace(g));
  const Bytes daffine[4] = {unwritten(channels[0]), unwritten(channels[0]), unwritten(channels[1]),
                            unwritten(channels[1])};
  const Bytes dh = unwritten(rows), dV = unwritten(weights), dW = unwritten(weights);
  const Bytes db = unwritten(hidden), dc = unwritten(output), report = unwritten(4 * sizeof(double));
  g.workspace = backward_workspace.get();
  g.grad = grad.get(), g.h = h.get(), g.states = states.get(), g.probe = probe.get(), g.checks = checks.get();
  g.dh = dh.get();
  if (x.weight_gradients) {
    g.dV = dV.get(), g.dW = dW.get();
    g.dhidden_bias = hidden ? db.get() : nullptr, g.doutput_bias = output ? dc.get() : nullptr;
  }
  for (int i = 0; i < 2 && x.weight_gradients; i++)
    g.dweight[i] = daffine[2 * i].get(), g.dshift[i] = daffine[2 * i + 1].get();
  g.report = reinterpret_cast<double*>(report.get());
  x.normalised ? kernels.normalised_backward(g) : kernels.backward(g);

  write(y, rows), write(dh, rows);
  if (x.weight_gradients) write(dV, weights), write(dW, weights), write(db, hidden), write(dc, output);
  for (int i = 0; i < 4; i++) {
    if (x.weight_gradients) write(daffine[i], channels[i / 2]);
    write(statistics[i], channels[i / 2]);
  }
  if (x.reconstruct) write(report, 4 * sizeof(double));
  return 0;
}
