// The most multiply-adds that `threads` cores do: independent chains of them in registers, VECTOR_BYTES wide.
// The threads are OpenMP's, which are PyTorch's too: others would have to share the cores with them while they spin.
// Returns the number of floating-point operations done.
typedef float Vec __attribute__((vector_size(VECTOR_BYTES)));
enum { kLanes = VECTOR_BYTES / 4, kChains = 12 };  // enough to hide a latency of 4 to 6 cycles at 2 a cycle

static void chains(long rounds) {
  Vec sum[kChains];
  const Vec one = {};
  const Vec a = one + 0.999f, b = one + 0.001f;
  for (int i = 0; i < kChains; i++) sum[i] = one + (float)i;
  for (long n = 0; n < rounds; n++)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; i++) sum[i] = sum[i] * a + b;
  Vec total = {};
  for (int i = 0; i < kChains; i++) total += sum[i];
  volatile Vec keep = total;
  (void)keep;
}

double fma_peak(long rounds, int threads) {
#pragma omp parallel num_threads(threads)
  chains(rounds);
  return 2.0 * rounds * kChains * kLanes * threads;
}
