// How a warp multiplies on tensor cores, for each kind of number: float32 (as products of its parts, or rounded to
// tf32), float64, and the 16-bit types.
//
// A tile is [kRows, 8]. Lane l has kNumbers of it: row l / 4, columns 2 (l % 4) and the next, and with kRows = 16 the
// same 8 rows below. Tiles that one product has summed are the operand A of the next in the lanes that have them: where
// an operand wants columns l % 4 and l % 4 + 4, it gets 2 (l % 4) and the next, for the terms of a sum have no order; B
// is read the same way.
//
//   multiply<P, N, K>(d, a, M): d = a Mᵀ; d [kRows, N], a [kRows, K], M [N, K] in shared memory as V and W are, row by
//   row, with element (n, k) at offset<N, K>(n, k): so far apart that the lanes of a warp meet other banks.
//   add<P, N, K>(first, d, a, M): d += a Mᵀ, for a d that went through clear(d); first: the first of its products.
//   multiply_transposed, add_transposed: a M in the place of a Mᵀ, for M [K, N], by offset<K, N>.
//
// a comes from operand(j), columns kColumns j and on. From multiply to end(d) products may be under way, which touch d,
// a and M.
//
// Of one warp each is made of steps: P::step(d, a, b) adds to a tile what kColumns columns of a and of eight rows of M
// give, a of type A, b of type B, which second() makes of the pairs that a lane has of these rows (16 bits come by
// load_matrices).
#pragma once

#include "simt.cuh"
#include "warpgroup.cuh"

namespace odeblock {
namespace {

// Of products of one warp. Rows of K elements end 8 elements later, but for those that fill banks as they are.
struct OneWarp {
  static constexpr int kWarps = 1, kAlignment = 16;
  static constexpr size_t kSharedBytes = 163 << 10;  // of a block, at most: sm_80 has no more

  template <int N, int K>
  static constexpr int elements() {
    return N * (K == 8 ? 8 : K + 8);
  }
  template <int N, int K>
  ODEBLOCK_DEVICE static int offset(int row, int column) {
    return row * (K == 8 ? 8 : K + 8) + column;
  }
  template <class Tile, int kTiles>
  ODEBLOCK_DEVICE static void clear(Tile (&d)[kTiles]) {
#pragma unroll
    for (int n = 0; n < kTiles; n++) d[n] = {};
  }
  template <class Tiles>
  ODEBLOCK_DEVICE static void end(Tiles&) {}

 protected:
  // Of the second operand [K, N] two neighbouring rows, k and on, in the columns n and on, as lanes have them.
  template <class T, bool kTransposed, int N, int K>
  class Pairs {
   public:
    ODEBLOCK_DEVICE explicit Pairs(const T* M) : first_(M + place(simt::lane() / 4, simt::lane() % 4 * 2)) {}
    ODEBLOCK_DEVICE simt::Pair<T> operator()(int n, int k) const {
      if constexpr (kTransposed)
        return {first_[place(n, k)], first_[place(n, k + 1)]};
      else
        return simt::load_pair(first_ + place(n, k));
    }

   private:
    ODEBLOCK_DEVICE static int place(int n, int k) { return kTransposed ? offset<K, N>(k, n) : offset<N, K>(n, k); }
    const T* const first_;
  };
};

// Sums in float, of 16 rows.
struct FloatSums : OneWarp {
  typedef float Number;
  static constexpr int kRows = 16, kNumbers = 4;
  struct alignas(16) Tile {
    float x[kNumbers];
  };
};

// bfloat16 or float16.
template <bool kBfloat16>
struct HalfProducts : FloatSums {
  typedef uint16_t Stored;
  static constexpr int kColumns = 16;                                // of A in one product
  static constexpr bool kRounds = true;                              // A is not what it is packed from
  static constexpr int kBits = kBfloat16 ? 8 : 11;                   // of what is multiplied
  static constexpr float kEpsilon = kBfloat16 ? 0x1p-7f : 0x1p-10f;  // of what is multiplied, from 1 to the next number
  struct A {
    uint32_t x[4];
  };
  struct B {
    uint32_t x[2];
  };

  ODEBLOCK_DEVICE static float widen(Stored x) { return kBfloat16 ? simt::from_bfloat16(x) : simt::from_float16(x); }
  ODEBLOCK_DEVICE static uint32_t pair(float low, float high) {
    return kBfloat16 ? simt::pack_bfloat16(low, high) : simt::pack_float16(low, high);
  }
  ODEBLOCK_DEVICE static simt::Pair<Stored> narrow(float x, float y) {
    const uint32_t both = pair(x, y);
    return {static_cast<Stored>(both), static_cast<Stored>(both >> 16)};
  }

  // Two neighbouring tiles, `step` apart.
  ODEBLOCK_DEVICE static A pack(const Tile* tiles, int step) {
    const Tile &left = tiles[0], &right = tiles[step];
    return {{pair(left.x[0], left.x[1]), pair(left.x[2], left.x[3]), pair(right.x[0], right.x[1]),
             pair(right.x[2], right.x[3])}};
  }
  ODEBLOCK_DEVICE static void step(Tile& d, const A& a, const B& b) {
    if (kBfloat16)
      simt::mma_bfloat16(d.x, a.x, b.x[0], b.x[1]);
    else
      simt::mma_float16(d.x, a.x, b.x[0], b.x[1]);
  }
  template <bool kTransposed, bool kFresh, int N, int K, class Operand>
  ODEBLOCK_DEVICE static void product(bool, Tile (&d)[N / 8], Operand operand, const Stored* M) {
    if constexpr (kFresh) clear(d);
    const int lane = simt::lane();
    const Stored* row = kTransposed ? M + offset<K, N>(lane % 16, lane / 16 * 8)
                                    : M + offset<N, K>(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
#pragma unroll
    for (int j = 0; j < K / 16; j++) {
      const A a = operand(j);
#pragma unroll
      for (int n = 0; n < N / 8; n += 2) {
        uint32_t b[4];
        if constexpr (kTransposed)
          simt::load_matrices_transposed(b, row + offset<K, N>(16 * j, 8 * n));
        else
          simt::load_matrices(b, row + offset<N, K>(8 * n, 16 * j));
#pragma unroll
        for (int i = 0; i < 2; i++) step(d[n + i], a, {{b[2 * i], b[2 * i + 1]}});
      }
    }
  }
};

// float32 is stored as it is summed.
struct OfFloat : FloatSums {
  typedef float Stored;
  static constexpr bool kRounds = false;

  ODEBLOCK_DEVICE static float widen(float x) { return x; }
};

// float32: x = x_0 + x_1 + x_2, each bfloat16, exactly, for 3 x 8 bits are 24. Of the nine products six are taken;
// those left out are 2^-24 of the whole, float32's own rounding. Tensor cores cut off what they sum, toward zero, so
// that the product of x_0 and y_0 is no sum with others there: what sixteen terms give of it, and what the five small
// ones give, is added in float, and rounded. (Kernels for more than 128 features have no registers for that: there only
// what all six give is added in float, of errors in one direction up to 2^-23 of it.) What float32 has as infinite, and
// what bfloat16 rounds to it, comes out as NaN.
struct FloatProducts : OfFloat {
  static constexpr int kColumns = 16, kBits = 24;
  static constexpr float kEpsilon = 0x1p-23f;
  struct A {
    uint32_t x[3][4];
  };
  struct B {
    uint32_t x[3][2];
  };

  ODEBLOCK_DEVICE static A pack(const Tile* tiles, int step) {
    const Tile &left = tiles[0], &right = tiles[step];
    A a;
    split(left.x[0], left.x[1], a.x[0][0], a.x[1][0], a.x[2][0]);
    split(left.x[2], left.x[3], a.x[0][1], a.x[1][1], a.x[2][1]);
    split(right.x[0], right.x[1], a.x[0][2], a.x[1][2], a.x[2][2]);
    split(right.x[2], right.x[3], a.x[0][3], a.x[1][3], a.x[2][3]);
    return a;
  }
  ODEBLOCK_DEVICE static B second(const simt::Pair<float> (&pairs)[2]) {
    B b;
#pragma unroll
    for (int i = 0; i < 2; i++) split(pairs[i].x, pairs[i].y, b.x[0][i], b.x[1][i], b.x[2][i]);
    return b;
  }
  template <bool kApart = true>
  ODEBLOCK_DEVICE static void step(Tile& d, const A& a, const B& b) {
    float sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int order = 2; order > 0; order--)  // the small ones first
#pragma unroll
      for (int i = 0; i <= order; i++) simt::mma_bfloat16(sum, a.x[i], b.x[order - i][0], b.x[order - i][1]);
    if constexpr (kApart) {
#pragma unroll
      for (int i = 0; i < 4; i++) d.x[i] += sum[i], sum[i] = 0;
    }
    simt::mma_bfloat16(sum, a.x[0], b.x[0][0], b.x[0][1]);
#pragma unroll
    for (int i = 0; i < 4; i++) d.x[i] += sum[i];
  }
  template <bool kTransposed, bool kFresh, int N, int K, class Operand>
  ODEBLOCK_DEVICE static void product(bool, Tile (&d)[N / 8], Operand operand, const Stored* M) {
    if constexpr (kFresh) clear(d);
    const Pairs<Stored, kTransposed, N, K> pairs(M);
    // Operands of 256 features come from shared memory: some at a time.
#pragma unroll(K > 128 ? 2 : 8)
    for (int j = 0; j < K / 16; j++) {
      const A a = operand(j);
#pragma unroll
      for (int n = 0; n < N / 8; n++)
        step<N <= 128 && K <= 128>(d[n], a, second({pairs(8 * n, 16 * j), pairs(8 * n, 16 * j + 8)}));
    }
  }

 private:
  ODEBLOCK_DEVICE static void split(float x, float y, uint32_t& first, uint32_t& second, uint32_t& third) {
    first = part(x, y), second = part(x, y), third = part(x, y);
  }
  // Takes what bfloat16 holds of x and of y away from them.
  ODEBLOCK_DEVICE static uint32_t part(float& x, float& y) {
    const uint32_t both = simt::pack_bfloat16(x, y);
    x -= simt::from_bfloat16(static_cast<uint16_t>(both));
    y -= simt::from_bfloat16(static_cast<uint16_t>(both >> 16));
    return both;
  }
};

// float32 rounded to the 11 bits of tf32.
struct Tf32Products : OfFloat {
  static constexpr int kColumns = 8, kBits = 11;
  static constexpr float kEpsilon = 0x1p-10f;
  struct A {
    uint32_t x[4];
  };
  struct B {
    uint32_t x[2];
  };

  ODEBLOCK_DEVICE static A pack(const Tile* tile, int) {
    return {
        {simt::to_tf32(tile->x[0]), simt::to_tf32(tile->x[2]), simt::to_tf32(tile->x[1]), simt::to_tf32(tile->x[3])}};
  }
  ODEBLOCK_DEVICE static B second(const simt::Pair<float> (&pair)[1]) {
    return {{simt::to_tf32(pair[0].x), simt::to_tf32(pair[0].y)}};
  }
  ODEBLOCK_DEVICE static void step(Tile& d, const A& a, const B& b) { simt::mma_tf32(d.x, a.x, b.x[0], b.x[1]); }
  template <bool kTransposed, bool kFresh, int N, int K, class Operand>
  ODEBLOCK_DEVICE static void product(bool, Tile (&d)[N / 8], Operand operand, const Stored* M) {
    if constexpr (kFresh) clear(d);
    const Pairs<Stored, kTransposed, N, K> pairs(M);
#pragma unroll(K > 128 ? 4 : 16)  // as above
    for (int j = 0; j < K / 8; j++) {
      const A a = operand(j);
#pragma unroll
      for (int n = 0; n < N / 8; n++) step(d[n], a, second({pairs(8 * n, 8 * j)}));
    }
  }
};

struct DoubleProducts : OneWarp {
  typedef double Stored;
  typedef double Number;
  static constexpr int kRows = 8, kNumbers = 2, kColumns = 8, kBits = 53;
  static constexpr double kEpsilon = 0x1p-52;
  static constexpr bool kRounds = false;
  struct alignas(16) Tile {
    double x[kNumbers];
  };
  typedef Tile A;
  typedef simt::Pair<double> B;

  ODEBLOCK_DEVICE static double widen(double x) { return x; }

  ODEBLOCK_DEVICE static A pack(const Tile* tile, int) { return *tile; }
  ODEBLOCK_DEVICE static B second(const simt::Pair<double> (&pair)[1]) { return pair[0]; }
  ODEBLOCK_DEVICE static void step(Tile& d, const A& a, const B& b) {
    simt::mma_float64(d.x, a.x[0], b.x);
    simt::mma_float64(d.x, a.x[1], b.y);
  }
  template <bool kTransposed, bool kFresh, int N, int K, class Operand>
  ODEBLOCK_DEVICE static void product(bool, Tile (&d)[N / 8], Operand operand, const Stored* M) {
    if constexpr (kFresh) clear(d);
    const Pairs<Stored, kTransposed, N, K> pairs(M);
#pragma unroll(K > 128 ? 4 : 16)  // as above
    for (int j = 0; j < K / 8; j++) {
      const A a = operand(j);
#pragma unroll
      for (int n = 0; n < N / 8; n++) step(d[n], a, second({pairs(8 * n, 8 * j)}));
    }
  }
};

// The same as HalfProducts for four warps together, on Hopper. M lies in blocks of 64 columns (or 32, if it has no
// more), a row 128 bytes (64), with pieces of 16 bytes exchanged as matrix_descriptor says.
template <bool kBfloat16>
struct WarpgroupProducts : HalfProducts<kBfloat16> {
  typedef HalfProducts<kBfloat16> Base;
  using typename Base::A;
  using typename Base::Stored;
  using typename Base::Tile;
  static constexpr int kWarps = 4, kAlignment = 1024;
  static constexpr size_t kSharedBytes = 227 << 10;

  // Columns of a block of a matrix.
  template <int kOfMatrix>
  static constexpr int kBlockOf = kOfMatrix < 64 ? kOfMatrix : 64;

  template <int N, int K>
  static constexpr int elements() {
    return N * K;
  }
  template <int N, int K>
  ODEBLOCK_DEVICE static int offset(int row, int column) {
    constexpr int kBlock = kBlockOf<K>;
    static_assert(K % kBlock == 0 && (kBlock == 32 || kBlock == 64) && N * kBlock % 512 == 0);
    const int element = (column / kBlock * N + row) * kBlock + column % kBlock;
    return element ^ (element >> 6 & (kBlock / 8 - 1)) << 3;
  }
  template <class Tiles>
  ODEBLOCK_DEVICE static void clear(Tiles&) {}  // its first product does not read it
  template <class Tiles>
  ODEBLOCK_DEVICE static void end(Tiles& d) {
    simt::after_products(d);
  }

  template <bool kTransposed, bool kFresh, int N, int K, class Operand>
  ODEBLOCK_DEVICE static void product(bool first, Tile (&d)[N / 8], Operand operand, const Stored* M) {
    uint32_t a[K / 16][4];
#pragma unroll
    for (int j = 0; j < K / 16; j++) {
      const A columns = operand(j);
#pragma unroll
      for (int i = 0; i < 4; i++) a[j][i] = columns.x[i];
    }
    simt::before_products<kFresh>(d, a);
#pragma unroll
    for (int j = 0; j < K / 16; j++) {
      uint64_t matrix;
      if constexpr (kTransposed) {
        constexpr int kBlock = kBlockOf<N>;
        matrix = simt::matrix_descriptor<2 * kBlock>(M + 16 * j * kBlock, 2 * K * kBlock);
      } else {
        constexpr int kBlock = kBlockOf<K>;
        matrix = simt::matrix_descriptor<2 * kBlock>(M + 16 * j / kBlock * N * kBlock + 16 * j % kBlock);
      }
      simt::multiply_warpgroup<kBfloat16, kTransposed>(first && j == 0, d, a[j], matrix);
    }
    simt::commit_products();
  }
};

template <class P, int N, int K, class Operand>
ODEBLOCK_DEVICE void multiply(typename P::Tile (&d)[N / 8], Operand a, const typename P::Stored* M) {
  P::template product<false, true, N, K>(true, d, a, M);
}
template <class P, int N, int K, class Operand>
ODEBLOCK_DEVICE void multiply_transposed(typename P::Tile (&d)[N / 8], Operand a, const typename P::Stored* M) {
  P::template product<true, true, N, K>(true, d, a, M);
}
template <class P, int N, int K, class Operand>
ODEBLOCK_DEVICE void add(bool first, typename P::Tile (&d)[N / 8], Operand a, const typename P::Stored* M) {
  P::template product<false, false, N, K>(first, d, a, M);
}
template <class P, int N, int K, class Operand>
ODEBLOCK_DEVICE void add_transposed(bool first, typename P::Tile (&d)[N / 8], Operand a, const typename P::Stored* M) {
  P::template product<true, false, N, K>(first, d, a, M);
}

}  // namespace
}  // namespace odeblock
