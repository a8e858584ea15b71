// The CUDA forward, emulated: reads one problem from standard input, writes y and the saved states.
#include "cuda/forward.cuh"

#include <cstdio>
#include <cstdlib>
#include <memory>

using namespace odeblock;

namespace {

struct Header {
  int64_t products, activation, batch, dim, hidden, depth, save_every, biases, seed;
  double scale;
};

template <class T>
std::unique_ptr<T[]> read(size_t count) {
  std::unique_ptr<T[]> values(new T[count]);
  if (std::fread(values.get(), sizeof(T), count, stdin) != count) std::exit(2);
  return values;
}

template <class P>
void run(const Header& x) {
  typedef typename P::Stored Stored;
  typedef typename P::Number Number;
  const size_t rows = x.batch * x.dim, weights = x.depth * x.dim * x.hidden;
  const auto h = read<Stored>(rows), V = read<Stored>(weights), W = read<Stored>(weights);
  const auto b = read<Stored>(x.biases ? x.depth * x.hidden : 0), c = read<Stored>(x.biases ? x.depth * x.dim : 0);
  const size_t saved = x.save_every ? ((x.depth - 1) / x.save_every + 1) * rows : 0;
  std::unique_ptr<Stored[]> y(new Stored[rows]);
  std::unique_ptr<Number[]> states(new Number[saved]);
  ForwardArguments<Stored> p = {};
  p.h = h.get(), p.V = V.get(), p.W = W.get(), p.y = y.get(), p.states = states.get();
  if (x.biases) p.hidden_bias = b.get(), p.output_bias = c.get();
  p.batch = p.padded_batch = x.batch;
  p.dim = static_cast<int>(x.dim), p.hidden = static_cast<int>(x.hidden), p.depth = static_cast<int>(x.depth);
  p.save_every = static_cast<int>(x.save_every), p.activation = static_cast<int>(x.activation);
  set_scale<P>(x.scale, p);
  emulation::seed() = x.seed;
  with_features<P>(p.dim, [&](auto features) {
    typedef ForwardShape<P, decltype(features)::value> Shape;
    const int blocks = static_cast<int>((x.batch + Shape::kRows - 1) / Shape::kRows);
    simt::launch(forward_kernel<P, decltype(features)::value>, blocks, Shape::kThreads, Shape::kSharedBytes, nullptr,
                 p);
  });
  std::fwrite(y.get(), sizeof(Stored), rows, stdout);
  std::fwrite(states.get(), sizeof(Number), saved, stdout);
  std::fprintf(stderr, "bank conflicts %lld\n", static_cast<long long>(emulation::counts().bank_conflicts));
}

}  // namespace

int main() {
  Header x;
  if (std::fread(&x, sizeof x, 1, stdin) != 1) return 2;
  try {
    switch (x.products) {
      case 0: run<FloatProducts<true>>(x); break;
      case 1: run<FloatProducts<false>>(x); break;
      case 2: run<DoubleProducts>(x); break;
      case 3: run<HalfProducts<true>>(x); break;
      default: run<HalfProducts<false>>(x); break;
    }
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
