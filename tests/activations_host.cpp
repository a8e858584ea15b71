// Prints sigma(z) and sigma'(z), one line a point, from the table as the GPU sees it: id z z z ...
#include <cstdio>
#include <cstdlib>

#include "cuda/math.cuh"
// before the table, which is written on it
#include "activations.h"

int main(int argc, char** argv) {
  for (int i = 2; i < argc; i++) {
    const auto y =
        odeblock::with_activation(std::atoi(argv[1]), [&](auto sigma) { return sigma.at(std::atof(argv[i])); });
    std::printf("%.17g %.17g\n", y.s, y.d);
  }
}
