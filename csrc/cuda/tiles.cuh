// What a warp does with tiles of rows that is no product: reads and writes them, adds biases, applies activations.
#pragma once

#include <type_traits>

#include "evaluate.cuh"
#include "products.cuh"

namespace odeblock {
namespace {

// f(tile, i, column) for each number that a lane has of tiles [kRows, N]. kRolled: where tiles are in memory.
template <class P, int N, bool kRolled = false, class F>
ODEBLOCK_DEVICE void for_each_number(F f) {
  const int first = simt::thread_again() % 4 * 2;  // or what follows from it would fill registers between layers
#pragma unroll(kRolled ? 1 : N / 8)
  for (int n = 0; n < N / 8; n++)
#pragma unroll
    for (int i = 0; i < P::kNumbers; i++) f(n, i, 8 * n + first + i % 2);
}

// f(tile, i, bias of the column), likewise; bias [N] in shared memory.
template <class P, int N, class F>
ODEBLOCK_DEVICE void for_each_biased(const typename P::Stored* bias, F f) {
  bias += simt::thread_again() % 4 * 2;  // as above
#pragma unroll
  for (int n = 0; n < N / 8; n++) {
    const simt::Pair<typename P::Stored> pair = simt::load_pair(bias + 8 * n);
#pragma unroll
    for (int i = 0; i < P::kNumbers; i++) f(n, i, P::widen(i % 2 ? pair.y : pair.x));
  }
}

// f(tile, i, entry of the column), likewise; entries [kSightWidth] in global memory.
template <class P, int N, bool kRolled, class F>
ODEBLOCK_DEVICE void for_each_seen(const typename P::Number* entries, F f) {
  entries += simt::thread_again() % 4 * 2;
#pragma unroll(kRolled ? 1 : N / 8)
  for (int n = 0; n < N / 8; n++) {
    const simt::Pair<typename P::Number> pair = simt::read_pair(entries + 8 * n);
#pragma unroll
    for (int i = 0; i < P::kNumbers; i++) f(n, i, i % 2 ? pair.y : pair.x);
  }
}

// Of a row, from what each of its lanes has; the same bits in all.
template <class T>
ODEBLOCK_DEVICE T sum_of_row(T x) {
  x += simt::shuffle_xor(x, 1);
  return x + simt::shuffle_xor(x, 2);
}

// The projection of each row that a lane has numbers of (docs/adjoint.md, 15); h: `step` from tile to tile;
// direction(n): its entries for the columns of tile n that are this lane's.
template <class P, int N, bool kRolled, class Direction>
ODEBLOCK_DEVICE void project(Direction direction, const typename P::Tile* h, int step,
                             typename P::Number (&projection)[P::kNumbers / 2]) {
#pragma unroll
  for (int r = 0; r < P::kNumbers / 2; r++) projection[r] = 0;
#pragma unroll(kRolled ? 1 : N / 8)
  for (int n = 0; n < N / 8; n++) {
    const simt::Pair<typename P::Number> pair = direction(n);
#pragma unroll
    for (int i = 0; i < P::kNumbers; i++)
      projection[i / 2] = fma(i % 2 ? pair.y : pair.x, h[n * step].x[i], projection[i / 2]);
  }
#pragma unroll
  for (int r = 0; r < P::kNumbers / 2; r++) projection[r] = sum_of_row(projection[r]);
}

// The row of the batch that number i of a tile is of; worked out where it is needed, while registers are full.
template <class P>
ODEBLOCK_DEVICE int64_t row_of(int i) {
  const int thread = simt::thread_again(), warp = simt::block() * (simt::threads() / 32) + thread / 32;
  return static_cast<int64_t>(warp * P::kRows + thread % 32 / 4 + i / 2 * 8);
}

// Whether a warp has no rows, and only copies what others read.
template <class P>
ODEBLOCK_DEVICE bool idle(int64_t batch) {
  const int warp = simt::block() * (simt::threads() / 32) + simt::thread_again() / 32;
  return P::kWarps == 1 && static_cast<int64_t>(warp) * P::kRows >= batch;
}

// x[k] of lane kCount l + t becomes what x[t] of lane kCount l + k was, kCount 2 or 4.
template <int kCount>
ODEBLOCK_DEVICE void transpose(uint32_t (&x)[kCount]) {
  const int t = simt::thread_again() % kCount;
#pragma unroll
  for (int bit = 1; bit < kCount; bit *= 2)
#pragma unroll
    for (int k = 0; k < kCount; k++)
      if (!(k & bit)) {
        const bool upper = t & bit;
        uint32_t &low = x[k], &high = x[k | bit];
        const uint32_t received = simt::shuffle_xor(upper ? low : high, bit);
        (upper ? low : high) = received;
      }
}

// Rows of `columns` numbers, `width` apart, in global memory: of the batch, some columns of an array of T (as products
// store or as they sum). Tiles of them read as zero and write nothing where there is no row or column.
template <class P, class T>
class Rows {
  typedef typename P::Number Number;

 public:
  ODEBLOCK_DEVICE Rows(T* first, int64_t width, int columns, int64_t batch)
      : first_(first),
        width_(width),
        batch_(batch),
        columns_(columns),
        pairs_((reinterpret_cast<uintptr_t>(first) | width * sizeof(T)) % (2 * sizeof(T)) == 0) {}

  // Of tile n the numbers i and i + 1, i even.
  ODEBLOCK_DEVICE simt::Pair<Number> read(int n, int i) const {
    const int column = column_of(n);
    if (row_of<P>(i) >= batch_ || column >= columns_) return {0, 0};
    T* const from = first_ + row_of<P>(i) * width_ + column;
    if (pairs_ && column + 1 < columns_) {
      const auto pair = simt::read_pair(from);
      return {widen(pair.x), widen(pair.y)};
    }
    return {widen(from[0]), column + 1 < columns_ ? widen(from[1]) : Number(0)};
  }
  // The tiles n .. n + kTiles - 1: all are asked for before the first is waited for.
  template <int kTiles>
  ODEBLOCK_DEVICE void read_tiles(int n, typename P::Tile (&to)[kTiles]) const {
    if (pairs_ && columns_ % 2 == 0) {
#pragma unroll
      for (int i = 0; i < P::kNumbers; i += 2) {
        const int64_t row = row_of<P>(i);
        T* const from = first_ + row * width_ + column_of(n);
        const int left = row < batch_ ? columns_ - column_of(n) : 0;
#pragma unroll
        for (int k = 0; k < kTiles; k++) {
          simt::Pair<std::remove_const_t<T>> pair = {0, 0};
          if (8 * k < left) pair = simt::read_pair(from + 8 * k);
          to[k].x[i] = widen(pair.x), to[k].x[i + 1] = widen(pair.y);
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < kTiles; k++)
#pragma unroll
        for (int i = 0; i < P::kNumbers; i += 2) {
          const simt::Pair<Number> pair = read(n + k, i);
          to[k].x[i] = pair.x, to[k].x[i + 1] = pair.y;
        }
    }
  }
  // Likewise written, with value(k, i) for tile n + k. By the whole warp.
  template <int kTiles, class Value>
  ODEBLOCK_DEVICE void write_tiles(int n, Value value) const {
    if constexpr (P::kRounds && !std::is_same_v<T, Number>) {
      // Of 16 bits a lane has 4 bytes of each tile's row; by 16, or 8, there are fewer accesses, of whole sectors.
      if ((reinterpret_cast<uintptr_t>(first_) | width_ * sizeof(T) | columns_ * sizeof(T)) % (4 * kTiles) == 0) {
        const int t = simt::thread_again() % 4, column = 8 * (n + t % kTiles) + t / kTiles * (2 * kTiles);
#pragma unroll
        for (int i = 0; i < P::kNumbers; i += 2) {
          simt::Words<kTiles> words;
#pragma unroll
          for (int k = 0; k < kTiles; k++) {
            const simt::Pair<Number> pair = value(k, i);
            words.x[k] = P::pair(pair.x, pair.y);
          }
          transpose(words.x);
          if (row_of<P>(i) < batch_ && column < columns_)
            simt::write_words(first_ + row_of<P>(i) * width_ + column, words);
        }
        return;
      }
    }
#pragma unroll
    for (int k = 0; k < kTiles; k++)
#pragma unroll
      for (int i = 0; i < P::kNumbers; i += 2) {
        const simt::Pair<Number> pair = value(k, i);
        write(n + k, i, pair.x, pair.y);
      }
  }
  ODEBLOCK_DEVICE void write(int n, int i, Number x, Number y) const {
    const int column = column_of(n);
    if (row_of<P>(i) >= batch_ || column >= columns_) return;
    T* const to = first_ + row_of<P>(i) * width_ + column;
    simt::Pair<T> pair;
    if constexpr (std::is_same_v<T, Number>)
      pair = {x, y};
    else
      pair = P::narrow(x, y);
    if (pairs_ && column + 1 < columns_) return simt::write_pair(to, pair);
    to[0] = pair.x;
    if (column + 1 < columns_) to[1] = pair.y;
  }

 private:
  ODEBLOCK_DEVICE static Number widen(T x) {
    if constexpr (std::is_same_v<std::remove_const_t<T>, Number>)
      return x;
    else
      return P::widen(x);
  }
  ODEBLOCK_DEVICE static int column_of(int n) { return 8 * n + simt::thread_again() % 4 * 2; }

  T* const first_;
  const int64_t width_, batch_;
  const int columns_;
  const bool pairs_;
};

// f(tile, i) for the first number of each pair of neighbours that a lane has of tiles [kRows, N].
template <class P, int N, bool kRolled = false, class F>
ODEBLOCK_DEVICE void for_each_pair(F f) {
#pragma unroll(kRolled ? 1 : N / 8)
  for (int n = 0; n < N / 8; n++)
#pragma unroll
    for (int i = 0; i < P::kNumbers; i += 2) f(n, i);
}

}  // namespace
}  // namespace odeblock
