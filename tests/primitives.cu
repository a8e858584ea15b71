// One warp and each primitive of csrc/cuda: full matrices in, full matrices out, placed by the documentation
// of PTX and not by the kernels' own code. Prints a line a result; tests/test_emulation.py knows what must come. Built
// by nvcc it runs on a GPU, with ODEBLOCK_EMULATED on the CPU.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "cuda/bulk.cuh"
#include "cuda/warpgroup.cuh"

using namespace odeblock::simt;

namespace {

#ifdef ODEBLOCK_EMULATED
template <class T>
T* allocate(int count) {
  return static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
}
void check(const char*) {}
void finish() {}
#else
void check(const char* error) {
  if (!error) return;
  std::fprintf(stderr, "%s\n", error);
  std::exit(1);
}
template <class T>
T* allocate(int count) {
  void* memory = nullptr;
  check(text(cudaMallocManaged(&memory, count * sizeof(T))));
  return static_cast<T*>(memory);
}
void finish() { check(text(cudaDeviceSynchronize())); }
#endif
template <class... Parameters, class... Arguments>
void run_cluster(void (*kernel)(Parameters...), int blocks, int threads, size_t shared_bytes, Arguments... arguments) {
  check(launch(kernel, blocks, blocks, threads, shared_bytes, nullptr, arguments...));
  finish();
}
template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), int threads, size_t shared_bytes, Arguments... arguments) {
  run_cluster(kernel, 1, threads, shared_bytes, arguments...);
}

// Matrices A [16, 16], B [16, 8] of 16-bit numbers, D [16, 8].
template <bool kBfloat16>
ODEBLOCK_KERNEL(32)
mma_16(const uint16_t* A, const uint16_t* B, float* D) {
  const int g = lane() / 4, t = lane() % 4;
  const auto a2 = [&](int r, int c) { return A[16 * r + c] | static_cast<uint32_t>(A[16 * r + c + 1]) << 16; };
  const auto b2 = [&](int r, int c) { return B[8 * r + c] | static_cast<uint32_t>(B[8 * r + 8 + c]) << 16; };
  const uint32_t a[4] = {a2(g, 2 * t), a2(g + 8, 2 * t), a2(g, 2 * t + 8), a2(g + 8, 2 * t + 8)};
  const uint32_t b[2] = {b2(2 * t, g), b2(2 * t + 8, g)};
  float d[4] = {D[8 * g + 2 * t], D[8 * g + 2 * t + 1], D[8 * g + 64 + 2 * t], D[8 * g + 64 + 2 * t + 1]};
  kBfloat16 ? mma_bfloat16(d, a, b[0], b[1]) : mma_float16(d, a, b[0], b[1]);
  for (int i = 0; i < 4; i++) D[8 * (g + 8 * (i / 2)) + 2 * t + i % 2] = d[i];
}

// A [16, 8], B [8, 8], D [16, 8].
ODEBLOCK_KERNEL(32) mma_32(const float* A, const float* B, float* D) {
  const int g = lane() / 4, t = lane() % 4;
  const uint32_t a[4] = {to_tf32(A[8 * g + t]), to_tf32(A[8 * (g + 8) + t]), to_tf32(A[8 * g + t + 4]),
                         to_tf32(A[8 * (g + 8) + t + 4])};
  float d[4] = {D[8 * g + 2 * t], D[8 * g + 2 * t + 1], D[8 * g + 64 + 2 * t], D[8 * g + 64 + 2 * t + 1]};
  mma_tf32(d, a, to_tf32(B[8 * t + g]), to_tf32(B[8 * (t + 4) + g]));
  for (int i = 0; i < 4; i++) D[8 * (g + 8 * (i / 2)) + 2 * t + i % 2] = d[i];
}

// A [8, 4], B [4, 8], D [8, 8].
ODEBLOCK_KERNEL(32) mma_64(const double* A, const double* B, double* D) {
  const int g = lane() / 4, t = lane() % 4;
  double d[2] = {D[8 * g + 2 * t], D[8 * g + 2 * t + 1]};
  mma_float64(d, A[4 * g + t], B[8 * t + g]);
  D[8 * g + 2 * t] = d[0], D[8 * g + 2 * t + 1] = d[1];
}

// Entry i of shared memory is i; out [32, 4].
ODEBLOCK_KERNEL(32) matrices(uint32_t* out, bool transposed) {
  uint16_t* entries = reinterpret_cast<uint16_t*>(shared());
  for (int i = lane(); i < 256; i += 32) entries[i] = static_cast<uint16_t>(i);
  sync_warp();
  uint32_t registers[4];
  transposed ? load_matrices_transposed(registers, entries + 8 * lane())
             : load_matrices(registers, entries + 8 * lane());
  for (int i = 0; i < 4; i++) out[4 * lane() + i] = registers[i];
}

// Lane l copies 16 bytes, of which the last l % 17 are zeros, in two groups; out [2, 128] after the first and the
// second.
ODEBLOCK_KERNEL(32) copies(const uint32_t* in, uint32_t* out) {
  uint32_t* memory = reinterpret_cast<uint32_t*>(shared());
  copy_async(memory + 4 * lane(), in + 4 * lane(), 16 - lane() % 17);
  commit_copies();
  copy_async(memory + 128 + 4 * lane(), in + 128 + 4 * lane(), 16);
  commit_copies();
  wait_copies<1>();
  sync_warp();
  for (int i = 0; i < 4; i++) out[4 * lane() + i] = memory[4 * (31 - lane()) + i];
  wait_copies<0>();
  sync_warp();
  for (int i = 0; i < 4; i++) out[128 + 4 * lane() + i] = memory[128 + 4 * (31 - lane()) + i];
}

// Two warps hand a number on through shared memory; out [64].
ODEBLOCK_KERNEL(64) barriers(int* out) {
  int* memory = reinterpret_cast<int*>(shared());
  int x = thread();
  for (int round = 0; round < 5; round++) {
    memory[thread()] = x;
    sync_block();
    x = memory[(thread() + 33) % 64];
    sync_block();
  }
  out[thread()] = shuffle_xor(x, 5) + 100 * warp();
}

// out [3, 32].
ODEBLOCK_KERNEL(32) approximations(const float* in, float* out) {
  out[lane()] = tanh_approximate(in[lane()]);
  out[32 + lane()] = exp2_approximate(in[lane()]);
  out[64 + lane()] = reciprocal_approximate(in[lane()]);
}

ODEBLOCK_KERNEL(32) conversions(const float* in, uint32_t* out) {
  const float x = in[lane()], y = in[31 - lane()];
  out[4 * lane()] = pack_bfloat16(x, y);
  out[4 * lane() + 1] = pack_float16(x, y);
  out[4 * lane() + 2] = to_tf32(x) & 0xffffe000u;  // the lower bits are anything
  out[4 * lane() + 3] = from_bfloat16(static_cast<uint16_t>(pack_bfloat16(x, y))) ==
                        from_float16(static_cast<uint16_t>(pack_float16(x, y)));
}

struct Tile {
  float x[4];
};

// D [64, 8 kTiles] += 2 A [64, 16] times columns 16 j and on of M [8 kTiles, kRowBytes / 2], transposed; or
// kTransposed: times rows 16 j and on of M [rows, 8 kTiles], which lies in blocks of kRowBytes / 2 columns.
template <bool kBfloat16, bool kTransposed, int kTiles, int kRowBytes>
ODEBLOCK_KERNEL(128)
mma_warpgroup(const uint16_t* A, const uint16_t* M, float* D, int rows, int j) {
  if constexpr (kWarpgroups) {
    constexpr int kBlock = kRowBytes / 2;
    const int columns = kTransposed ? 8 * kTiles : kBlock;
    for (int i = thread(); i < rows * columns; i += 128) {
      const int row = i / columns, column = i % columns;
      const int byte = 2 * ((column / kBlock * rows + row) * kBlock + column % kBlock);
      const int place = byte ^ byte / 128 % (kRowBytes / 16) * 16;  // pieces of 16 bytes trade places
      store(reinterpret_cast<uint16_t*>(shared() + place), M[i]);
    }
    fence_async();
    sync_block();
    const int g = 16 * warp() + lane() / 4, t = lane() % 4;
    const auto a2 = [&](int r, int c) { return A[16 * r + c] | static_cast<uint32_t>(A[16 * r + c + 1]) << 16; };
    uint32_t a[1][4] = {{a2(g, 2 * t), a2(g + 8, 2 * t), a2(g, 2 * t + 8), a2(g + 8, 2 * t + 8)}};
    Tile d[kTiles], fresh[kTiles];
    const auto entry = [&](int n, int i) { return (g + i / 2 * 8) * 8 * kTiles + 8 * n + 2 * t + i % 2; };
    for (int n = 0; n < kTiles; n++)
      for (int i = 0; i < 4; i++) d[n].x[i] = D[entry(n, i)];
    const uint64_t matrix = kTransposed ? matrix_descriptor<kRowBytes>(shared() + 16 * j * kRowBytes, rows * kRowBytes)
                                        : matrix_descriptor<kRowBytes>(shared() + 32 * j);
    before_products<false>(d, a);
    multiply_warpgroup<kBfloat16, kTransposed>(false, d, a[0], matrix);
    commit_products();
    after_products(d);
    before_products<true>(fresh, a);
    multiply_warpgroup<kBfloat16, kTransposed>(true, fresh, a[0], matrix);
    commit_products();
    after_products(fresh);
    for (int n = 0; n < kTiles; n++)
      for (int i = 0; i < 4; i++) D[entry(n, i)] = d[n].x[i] + fresh[n].x[i];
  }
}

// Two rounds, each of a box of 16 rows in shares that go to all blocks of the cluster, of layers 1 and 2 of `map`, from
// column 32 and rows 12 and 4 on, and of 16 of the `numbers`, another 16 for each block; out [blocks, 2, 1024 + 16].
ODEBLOCK_KERNEL(32)
boxes(const ODEBLOCK_PARAMETER Boxes map, const uint16_t* numbers, int columns, uint16_t* out) {
  if constexpr (kWarpgroups) {
    uint16_t* const box = reinterpret_cast<uint16_t*>(shared());
    uint64_t *const full = reinterpret_cast<uint64_t*>(shared() + 2048 + 32), *const empty = full + 1;
    const int blocks = cluster_blocks(), rank = cluster_rank();
    if (thread() == 0) {
      init_barrier(full, 1);
      init_barrier(empty, blocks);
      fence_barriers();
    }
    for (int i = thread(); i < 1024; i += 32) box[i] = 0;
    fence_async();
    sync_cluster();
    for (int round = 0; round < 2; round++) {
      if (thread() == 0) {
        if (round > 0) wait_phase(empty, 0);
        arrive_expecting(full, 16 * columns * 2 + 32);
        const int first = rank * (16 / blocks), row = (round == 0 ? 12 : 4) + first;
        if (blocks > 1)
          copy_box_to((1u << blocks) - 1, box + first * columns, map, 32, row, 1 + round, full);
        else
          copy_box(box, map, 32, row, 1 + round, full);
        copy_bulk(box + 1024, numbers + 16 * (rank + round), 32, full);
      }
      sync_warp();
      wait_phase(full, round);
      for (int i = thread(); i < 1024 + 16; i += 32) out[((rank * 2) + round) * (1024 + 16) + i] = box[i];
      sync_warp();
      if (thread() == 0)
        for (int other = 0; other < blocks; other++) arrive(empty, other);
    }
    sync_cluster();
  }
}

template <class T>
void print(const char* name, const T* values, int count) {
  std::printf("%s", name);
  for (int i = 0; i < count; i++) std::printf(" %.17g", static_cast<double>(values[i]));
  std::printf("\n");
}

unsigned state = 1;
int digit() {  // -8 .. 7
  state = state * 1664525u + 1013904223u;
  return static_cast<int>(state >> 28) - 8;
}

// What shows how sums are rounded: A [16, K], B [K, 8], D [16, 8]. Row r of D begins as a number, to which `count`
// products of a sign are added; in column c they are 2^-(22 + c), but 3/2 2^-24 and 3 2^-22 in the last two.
void fill_rounding(float* A, float* B, float* D, int K) {
  const float last = 2 - 0x1p-23f;
  const struct {
    float first, sign;
    int count, apart;  // from one product to the next
  } rows[16] = {{1, 1, 1, 1},  {1, 1, 2, 1},      {1, 1, 4, 1},    {1, 1, 8, 1},     {1, 1, 2, K / 2}, {1, 1, 3, 1},
                {1, -1, 1, 1}, {1, -1, 4, 1},     {1, -1, 8, 1},   {-1, 1, 1, 1},    {-1, 1, 3, 1},    {-1, -1, 3, 1},
                {0, 1, 8, 1},  {0, -1, 3, K / 4}, {last, 1, 4, 1}, {-last, -1, 3, 1}};
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < K; k++)
      A[r * K + k] = k % rows[r].apart == 0 && k / rows[r].apart < rows[r].count ? 0x1p-13f * rows[r].sign : 0.f;
  for (int c = 0; c < 8; c++)
    for (int k = 0; k < K; k++)
      B[8 * k + c] = c < 6 ? 0x1p-9f / static_cast<float>(1 << c) : c == 6 ? 0x1.8p-11f : 0x1.8p-8f;
  for (int i = 0; i < 128; i++) D[i] = rows[i / 8].first;
}

}  // namespace

int main(int count, char** arguments) {
#ifdef ODEBLOCK_EMULATED
  if (count > 1) odeblock::emulation::capability() = std::atoi(arguments[1]);
#else
  static_cast<void>(count), static_cast<void>(arguments);
#endif
  // Eighths are exact in every type, so that any order of summation gives the same.
  uint16_t* A16 = allocate<uint16_t>(256);
  uint16_t* B16 = allocate<uint16_t>(128);
  float *A = allocate<float>(256), *B = allocate<float>(128), *D = allocate<float>(128);
  double *A64 = allocate<double>(32), *B64 = allocate<double>(32), *D64 = allocate<double>(64);
  uint32_t *bits = allocate<uint32_t>(256), *words = allocate<uint32_t>(256);
  int* numbers = allocate<int>(64);
  float *A_rounding = allocate<float>(256), *B_rounding = allocate<float>(128);
  const auto fill = [](auto* to, int count) {
    for (int i = 0; i < count; i++) to[i] = digit() / 8.f;
  };
  fill(A, 256), fill(B, 128);
  print("A", A, 256), print("B", B, 128);
  for (int kind = 0; kind < 2; kind++) {
    // bfloat16 is the upper half of a float; of float16 the exponent has another bias: 127 - 15 = 112.
    const auto narrow = [&](float x) -> uint16_t {
      uint32_t word;
      __builtin_memcpy(&word, &x, 4);
      if (kind == 0) return static_cast<uint16_t>(word >> 16);
      const uint32_t magnitude = word & 0x7fffffffu;
      return static_cast<uint16_t>(word >> 16 & 0x8000u) |
             static_cast<uint16_t>(magnitude ? (magnitude >> 13) - (112 << 10) : 0);
    };
    for (int i = 0; i < 256; i++) A16[i] = narrow(A[i]);
    for (int i = 0; i < 128; i++) B16[i] = narrow(B[i]);
    for (int i = 0; i < 128; i++) D[i] = i;
    kind == 0 ? run(mma_16<true>, 32, 0, A16, B16, D) : run(mma_16<false>, 32, 0, A16, B16, D);
    print(kind == 0 ? "mma_bfloat16" : "mma_float16", D, 128);
    fill_rounding(A_rounding, B_rounding, D, 16);
    print("rounding_16_D", D, 128);
    for (int i = 0; i < 256; i++) A16[i] = narrow(A_rounding[i]);
    for (int i = 0; i < 128; i++) B16[i] = narrow(B_rounding[i]);
    kind == 0 ? run(mma_16<true>, 32, 0, A16, B16, D) : run(mma_16<false>, 32, 0, A16, B16, D);
    print(kind == 0 ? "rounding_bfloat16" : "rounding_float16", D, 128);
  }
  print("rounding_16_A", A_rounding, 256), print("rounding_16_B", B_rounding, 128);
#ifdef ODEBLOCK_EMULATED
  const bool warpgroups = true;
#else
  const bool warpgroups = capability(0) == 90;
#endif
  if (warpgroups) {
    uint16_t *A_rows = allocate<uint16_t>(64 * 16), *M = allocate<uint16_t>(256 * 64);
    float* sums = allocate<float>(64 * 256);
    const auto bfloat16 = [&](int) { return static_cast<uint16_t>(__builtin_bit_cast(uint32_t, digit() / 8.f) >> 16); };
    for (int i = 0; i < 64 * 16; i++) A_rows[i] = bfloat16(i);
    for (int i = 0; i < 256 * 64; i++) M[i] = bfloat16(i);
    const auto number = [](uint16_t x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16); };
    float* widened = allocate<float>(256 * 64);
    for (int i = 0; i < 64 * 16; i++) widened[i] = number(A_rows[i]);
    print("A_rows", widened, 64 * 16);
    for (int i = 0; i < 256 * 64; i++) widened[i] = number(M[i]);
    print("M", widened, 256 * 64);
    const auto warpgroup = [&](const char* name, auto kernel, int tiles, int rows, int columns, int j) {
      for (int i = 0; i < 64 * 8 * tiles; i++) sums[i] = i % 1000;
      run(kernel, 128, 2 * rows * columns, A_rows, M, sums, rows, j);
      print(name, sums, 64 * 8 * tiles);
    };
    warpgroup("warpgroup_32_128_3", mma_warpgroup<true, false, 4, 128>, 4, 32, 64, 3);
    warpgroup("warpgroup_64_128_2", mma_warpgroup<true, false, 8, 128>, 8, 64, 64, 2);
    warpgroup("warpgroup_128_128_0", mma_warpgroup<true, false, 16, 128>, 16, 128, 64, 0);
    warpgroup("warpgroup_256_128_1", mma_warpgroup<true, false, 32, 128>, 32, 256, 64, 1);
    warpgroup("warpgroup_256_64_1", mma_warpgroup<true, false, 32, 64>, 32, 256, 32, 1);
    warpgroup("transposed_32_64", mma_warpgroup<true, true, 4, 64>, 4, 64, 32, 1);
    warpgroup("transposed_64_128", mma_warpgroup<true, true, 8, 128>, 8, 64, 64, 3);
    warpgroup("transposed_128_128", mma_warpgroup<true, true, 16, 128>, 16, 64, 128, 2);

    constexpr int kLayers = 3, kRows = 20, kColumns = 72, kOut = 2 * (1024 + 16);  // of a block
    uint16_t *layers = allocate<uint16_t>(kLayers * kRows * kColumns), *out = allocate<uint16_t>(2 * kOut);
    for (int i = 0; i < kLayers * kRows * kColumns; i++) layers[i] = static_cast<uint16_t>(i);
    for (const int blocks : {1, 2})
      for (const int columns : {32, 64}) {
        Boxes map;
        check(describe(map, layers, kLayers, kRows, kColumns, 16 / blocks, columns));
        run_cluster(boxes, blocks, 32, 2048 + 48, map, layers, columns, out);
        const std::string name = "boxes_" + std::to_string(blocks) + "_" + std::to_string(columns);
        print(name.c_str(), out, blocks * kOut);
      }
  }
  for (int i = 0; i < 128; i++) D[i] = i;
  run(mma_32, 32, 0, A, B, D);
  print("mma_tf32", D, 128);
  fill_rounding(A_rounding, B_rounding, D, 8);
  print("rounding_8_A", A_rounding, 128), print("rounding_8_B", B_rounding, 64), print("rounding_8_D", D, 128);
  run(mma_32, 32, 0, A_rounding, B_rounding, D);
  print("rounding_tf32", D, 128);
  for (int i = 0; i < 32; i++) A64[i] = A[i], B64[i] = B[i];
  for (int i = 0; i < 64; i++) D64[i] = i;
  run(mma_64, 32, 0, A64, B64, D64);
  print("mma_float64", D64, 64);
  for (const bool transposed : {false, true}) {
    run(matrices, 32, 512, bits, transposed);
    print(transposed ? "matrices_transposed" : "matrices", bits, 128);
  }
  for (int i = 0; i < 256; i++) words[i] = 0x01010101u * static_cast<uint32_t>(i % 255 + 1);
  run(copies, 32, 1024, words, bits);
  print("copies", bits, 256);
  run(barriers, 64, 256, numbers);
  print("barriers", numbers, 64);
  for (int i = 0; i < 32; i++) A[i] = (i - 16) * 1.2345678f;
  print("numbers", A, 32);
  run(conversions, 32, 0, A, bits);
  print("conversions", bits, 128);
  for (int i = 0; i < 8; i++) A[i] = (i % 2 ? 1 : -1) * (i < 2 ? 126.f : i < 4 ? 200.f : i < 6 ? 9.5f : 60.f);
  print("approximated", A, 32);
  run(approximations, 32, 0, A, D);
  print("approximations", D, 96);
  return 0;
}
