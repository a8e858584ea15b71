// Prints sigma(z) and sigma'(z), one line a point, as a GPU finds them: bits id z z z ...
// bits: 53, those of double; 24, of float; 11 or 8, of what a float is rounded to next.
#include <cstdio>
#include <cstdlib>

#include "cuda/evaluate.cuh"

using namespace odeblock;

template <int kBits, class T>
void print(int count, char** arguments) {
  for (int i = 1; i < count; i++) {
    const T z = static_cast<T>(std::atof(arguments[i]));
    const auto y = with_activation(std::atoi(arguments[0]), [&](auto sigma) { return evaluate<kBits>(sigma, z); });
    std::printf("%.17g %.17g\n", static_cast<double>(y.s), static_cast<double>(y.d));
  }
}

int main(int argc, char** argv) {
  switch (std::atoi(argv[1])) {
    case 53: print<53, double>(argc - 2, argv + 2); break;
    case 24: print<24, float>(argc - 2, argv + 2); break;
    case 11: print<11, float>(argc - 2, argv + 2); break;
    default: print<8, float>(argc - 2, argv + 2);
  }
}
