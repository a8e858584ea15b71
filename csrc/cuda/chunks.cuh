// Weights on their way through shared memory: chunks of hidden units, of each layer in turn (from the first on, or from
// the last), some rows of W and columns of V with their biases, several of them ahead of the products that read them.
//
// Two ways, for products P: all threads of a block copy, piece by piece, and meet once a chunk (CopiedChunks); or, on
// Hopper, one asks an engine for whole boxes, which come to all blocks of a cluster, and warps go on at their own pace,
// as barriers in shared memory let them (BulkChunks).
//
//   wait()          the next chunk is there, until its successor has been released
//   W(), V()        of it: [kUnits, Q] and [Q, kUnits], laid out as P has them; zero beyond the layer
//   hidden_bias(), output_bias()  of it: [kUnits], of which those beyond m are anything; [Q], likewise beyond q
//   release()       this warp has read what came before the chunk that it waited for last
//   more(), layer() whether there is a next chunk, and of which layer (kept nowhere else, while registers are full)
//   again()         after a layer's last chunk: its first is the next once more. By all threads of a block that is no
//                   part of a cluster, which have met after that chunk
#pragma once

#include <type_traits>

#include "bulk.cuh"
#include "kernels.h"
#include "products.cuh"

namespace odeblock {
namespace {

// A chunk of `Units` hidden units: elements of W and V, and apart their biases.
template <class P, int Q, int Units>
struct ChunkShape {
  typedef P Products;
  typedef typename P::Stored Stored;
  static constexpr int kFeatures = Q, kUnits = Units, kSize = sizeof(Stored);
  static constexpr int kV = P::template elements<kUnits, Q>(), kMatrices = kV + P::template elements<Q, kUnits>();
  static constexpr int kBiases = kUnits + Q;
  static constexpr bool kBulk = P::kWarps > 1;
  static_assert(kMatrices * kSize % P::kAlignment == 0 && kBiases * kSize % 16 == 0);

  // And two barriers, for those that come in bulk.
  static constexpr int kBytes = kSize * (kMatrices + kBiases) + (kBulk ? 2 * sizeof(uint64_t) : 0);
  static constexpr size_t bytes(int stages) { return static_cast<size_t>(stages) * kBytes + (kBulk ? 16 : 0); }
};

// Where the chunks of one block are in shared memory, `Stages` of them.
template <class Shape, int Stages, bool kFromLast>
class Chunks {
 public:
  typedef typename Shape::Stored Stored;

  ODEBLOCK_DEVICE const Stored* W() const { return matrices(chunk_); }
  ODEBLOCK_DEVICE const Stored* V() const { return matrices(chunk_) + Shape::kV; }
  ODEBLOCK_DEVICE const Stored* hidden_bias() const { return biases(chunk_); }
  ODEBLOCK_DEVICE const Stored* output_bias() const { return biases(chunk_) + Shape::kUnits; }
  ODEBLOCK_DEVICE bool more() const { return chunk_ + 1 < all(); }
  ODEBLOCK_DEVICE int layer() const { return layer_of(chunk_ + 1); }

 protected:
  ODEBLOCK_DEVICE explicit Chunks(const Problem& p) : p_(p) {}

  // Worked out where they are asked for, while registers are full.
  ODEBLOCK_DEVICE int in_layer() const { return (static_cast<int>(p_.hidden) + Shape::kUnits - 1) / Shape::kUnits; }
  ODEBLOCK_DEVICE int all() const { return static_cast<int>(p_.depth) * in_layer() + besides_; }
  ODEBLOCK_DEVICE int layer_of(int chunk) const {
    const int layer = (chunk - besides_) / in_layer();
    return kFromLast ? static_cast<int>(p_.depth) - 1 - layer : layer;
  }
  ODEBLOCK_DEVICE int unit_of(int chunk) const { return (chunk - besides_) % in_layer() * Shape::kUnits; }

  // Numbers of a row of weights or a bias (problem.h).
  ODEBLOCK_DEVICE static int padded(int64_t size) {
    constexpr int kPiece = 16 / sizeof(Stored);
    return (static_cast<int>(size) + kPiece - 1) / kPiece * kPiece;
  }

  ODEBLOCK_DEVICE static Stored* memory() { return reinterpret_cast<Stored*>(simt::shared()); }
  ODEBLOCK_DEVICE static Stored* matrices(int chunk) { return memory() + chunk % Stages * Shape::kMatrices; }
  ODEBLOCK_DEVICE static Stored* biases(int chunk) {
    return memory() + Stages * Shape::kMatrices + chunk % Stages * Shape::kBiases;
  }

  const Problem& p_;
  int chunk_ = -1;
  int besides_ = 0;  // chunks that came again, and those that came for nothing before them
};

// A matrix of one row, in shared memory as it is.
template <class P>
struct Row {
  typedef typename P::Stored Stored;
  template <int, int>
  ODEBLOCK_DEVICE static int offset(int, int column) {
    return column;
  }
};

// To shared memory, laid out as Layout has it, M [kRows, kColumns], rows `first` and on of a matrix at `from` with rows
// of `step` elements; zero beyond `rows_there` and `columns_there`. By the threads of the block from `copier` on, in
// pieces of 16 bytes, at multiples of which every row begins and ends.
template <class Layout, int kRows, int kColumns>
ODEBLOCK_DEVICE void fetch(int copier, const typename Layout::Stored* from, int64_t first, int step, int rows_there,
                           int columns_there, typename Layout::Stored* to) {
  typedef typename Layout::Stored Stored;
  constexpr int kPiece = 16 / sizeof(Stored), kPieces = kColumns / kPiece;
#pragma unroll 1  // while registers are full
  for (int i = simt::thread() - copier; i < kRows * kPieces; i += simt::threads() - copier) {
    const int row = i / kPieces, column = i % kPieces * kPiece;
    const bool there = row < rows_there && column < columns_there;
    const Stored* source = there ? from + (first + row) * step + column : from;
    simt::copy_async(to + Layout::template offset<kRows, kColumns>(row, column), source, there ? 16 : 0);
  }
}

template <class Shape, int Stages, bool kFromLast>
class CopiedChunks : public Chunks<Shape, Stages, kFromLast> {
  typedef Chunks<Shape, Stages, kFromLast> Base;
  typedef typename Shape::Products P;
  static constexpr int kUnits = Shape::kUnits, Q = Shape::kFeatures, kAhead = Stages - 1;
  static_assert(Stages >= 2);

 public:
  typedef typename Shape::Stored Stored;

  ODEBLOCK_DEVICE CopiedChunks(const Problem& p, const simt::Boxes&, const simt::Boxes&) : Base(p) {
    for (int chunk = 0; chunk < kAhead; chunk++) fetch_chunk(chunk);
  }

  ODEBLOCK_DEVICE void wait() {
    this->chunk_++;
    simt::wait_copies<kAhead - 1>();
    simt::sync_block();  // this chunk is there for all, and all are done with the one that the next will replace
    fetch_chunk(this->chunk_ + kAhead);
  }
  ODEBLOCK_DEVICE void release() {}
  ODEBLOCK_DEVICE void again() {
    this->besides_ += this->in_layer() + kAhead;
    for (int chunk = 0; chunk < kAhead; chunk++) wait();  // for what had been asked for
  }
  ODEBLOCK_DEVICE void end() {}

 private:
  ODEBLOCK_DEVICE void fetch_chunk(int chunk) {
    const int copier = first_copier();
    if (chunk < this->all() && simt::thread_again() >= copier) {
      const Problem& p = this->p_;
      const int dim = this->padded(p.dim), hidden = this->padded(p.hidden);
      const int unit = this->unit_of(chunk);
      const int64_t k = this->layer_of(chunk);
      Stored *to = this->matrices(chunk), *biases = this->biases(chunk);
      fetch<P, kUnits, Q>(copier, of(p.W), k * hidden + unit, dim, hidden - unit, dim, to);
      fetch<P, Q, kUnits>(copier, of(p.V) + unit, k * dim, hidden, dim, hidden - unit, to + Shape::kV);
      fetch_bias<kUnits>(copier, p.hidden_bias, k, hidden, unit, biases);
      fetch_bias<Q>(copier, p.output_bias, k, dim, 0, biases + kUnits);
    }
    simt::commit_copies();  // also where there is nothing, for groups are counted
  }
  // The first of the threads that copy: all, or those of warps without rows (while registers are not full).
  ODEBLOCK_DEVICE int first_copier() const {
    if constexpr (Q * Shape::kSize > 256) return 0;
    const int rows = simt::threads() / 32 * P::kRows;
    const int64_t left = this->p_.batch - static_cast<int64_t>(simt::block()) * rows;
    return left > rows - P::kRows ? 0 : left > 0 ? (static_cast<int>(left) + P::kRows - 1) / P::kRows * 32 : 0;
  }
  // Entries `from` and on of layer k's bias of `size` entries; zeros for null.
  template <int kCount>
  ODEBLOCK_DEVICE void fetch_bias(int copier, const void* bias, int64_t k, int size, int from, Stored* to) {
    if (bias)
      fetch<Row<P>, 1, kCount>(copier, of(bias) + from, k, size, 1, size - from, to);
    else
      fetch<Row<P>, 1, kCount>(copier, of(this->p_.W), 0, 0, 0, 0, to);
  }
  ODEBLOCK_DEVICE static const Stored* of(const void* p) { return static_cast<const Stored*>(p); }
};

// Each of the two blocks of a cluster asks for half of a chunk's rows, which come to both; its first thread does. A
// stage is `full` when a chunk has come, `empty` when all warps of the cluster have read it: W and V by products that
// have ended, biases into numbers that have been used, so that nothing is left to fence.
template <class Shape, int Stages, bool kFromLast>
class BulkChunks : public Chunks<Shape, Stages, kFromLast> {
  typedef Chunks<Shape, Stages, kFromLast> Base;
  static constexpr int kUnits = Shape::kUnits, Q = Shape::kFeatures;
  static_assert(Stages >= 3 && Shape::kSize == 2 && Q % 64 == 0 && kUnits <= 64);
  // A stage is filled again so many chunks after the one that it held: the first thread waits for the slowest warp.
  static constexpr int kLag = Stages > 3 ? 2 : 1;

 public:
  typedef typename Shape::Stored Stored;

  ODEBLOCK_DEVICE BulkChunks(const Problem& p, const simt::Boxes& W, const simt::Boxes& V)
      : Base(p), boxes_of_W_(W), boxes_of_V_(V) {
    if (simt::thread() == 0) {
      for (int stage = 0; stage < Stages; stage++) {
        simt::init_barrier(full(stage), 1);
        simt::init_barrier(empty(stage), simt::threads() / 32 * simt::cluster_blocks());
      }
      simt::fence_barriers();
    }
    // What never comes; written before the engine writes.
    for (int i = simt::thread(); i < Stages * Shape::kBiases; i += simt::threads())
      simt::store(this->biases(0) + i, Stored(0));
    simt::fence_async();
    simt::sync_cluster();  // barriers are made
    if (simt::thread() == 0) {
      *next() = {this->layer_of(0), 0};
      for (int chunk = 0; chunk < Stages && chunk < this->all(); chunk++) fetch_chunk(chunk);
    }
    simt::sync_warp();
  }

  ODEBLOCK_DEVICE void wait() {
    this->chunk_++;
    simt::wait_phase(full(this->chunk_), this->chunk_ / Stages % 2);
  }
  ODEBLOCK_DEVICE void release() {
    simt::sync_warp();  // all lanes have read
    if (simt::lane() == 0) {
      const int read = this->chunk_ - 1, again = this->chunk_ - kLag;
      if (read >= 0)
        for (int rank = 0; rank < simt::cluster_blocks(); rank++) simt::arrive(empty(read), rank);
      if (simt::warp() == 0 && again >= 0 && again + Stages < this->all()) {
        simt::wait_phase(empty(again), again / Stages % 2);
        fetch_chunk(again + Stages);
      }
    }
    simt::sync_warp();  // together again
  }
  ODEBLOCK_DEVICE void again() {
    // Of what would be there by now, some had been asked for, if there was so much.
    const int next_chunk = this->chunk_ + 1, ahead = (next_chunk > kLag ? next_chunk - kLag : 0) + Stages;
    const int asked = ahead < this->all() ? ahead : this->all(), layer = this->layer_of(this->chunk_);
    this->besides_ += this->in_layer() + asked - next_chunk;
    if (simt::thread() == 0) {
      *next() = {layer, 0};
      for (int chunk = asked; chunk < ahead && chunk < this->all(); chunk++) fetch_chunk(chunk);  // all have read
    }
    simt::sync_warp();
    while (this->chunk_ + 1 < asked) wait(), release();
  }
  // No block leaves while others may arrive at its barriers.
  ODEBLOCK_DEVICE void end() { simt::sync_cluster(); }

 private:
  ODEBLOCK_DEVICE static uint64_t* full(int chunk) {
    return reinterpret_cast<uint64_t*>(Base::memory() + Stages * (Shape::kMatrices + Shape::kBiases)) + chunk % Stages;
  }
  ODEBLOCK_DEVICE static uint64_t* empty(int chunk) { return full(chunk) + Stages; }
  // Layer and first unit of the chunk that the first thread asks for next.
  ODEBLOCK_DEVICE static simt::Pair<int>* next() { return reinterpret_cast<simt::Pair<int>*>(full(0) + 2 * Stages); }

  ODEBLOCK_DEVICE void fetch_chunk(int chunk) {
    const Problem& p = this->p_;
    const int k = next()->x, unit = next()->y;
    *next() =
        unit + kUnits < p.hidden ? simt::Pair<int>{k, unit + kUnits} : simt::Pair<int>{k + (kFromLast ? -1 : 1), 0};
    const int dim = this->padded(p.dim), hidden = this->padded(p.hidden);
    const int units = hidden - unit < kUnits ? hidden - unit : kUnits;
    const int hidden_bytes = p.hidden_bias ? 2 * units : 0, output_bytes = p.output_bias ? 2 * dim : 0;
    Stored *to = this->matrices(chunk), *biases = this->biases(chunk);
    simt::arrive_expecting(full(chunk), 2 * Shape::kMatrices + hidden_bytes + output_bytes);
    const bool shares = simt::cluster_blocks() > 1;  // with one other block
    const int rank = simt::cluster_rank(), first_unit = shares ? rank * (kUnits / 2) : 0,
              first = shares ? rank * (Q / 2) : 0;
#pragma unroll 1  // while registers are full
    for (int column = 0; column < Q; column += 64)
      copy(shares, to + column * kUnits + first_unit * 64, boxes_of_W_, column, unit + first_unit, k, full(chunk));
    copy(shares, to + Shape::kV + first * kUnits, boxes_of_V_, unit, first, k, full(chunk));
    if (hidden_bytes)
      simt::copy_bulk(biases, static_cast<const Stored*>(p.hidden_bias) + static_cast<int64_t>(k) * hidden + unit,
                      hidden_bytes, full(chunk));
    if (output_bytes)
      simt::copy_bulk(biases + kUnits, static_cast<const Stored*>(p.output_bias) + static_cast<int64_t>(k) * dim,
                      output_bytes, full(chunk));
  }
  ODEBLOCK_DEVICE static void copy(bool shares, Stored* to, const simt::Boxes& from, int column, int row, int layer,
                                   uint64_t* barrier) {
    if (shares)
      simt::copy_box_to(3, to, from, column, row, layer, barrier);
    else
      simt::copy_box(to, from, column, row, layer, barrier);
  }

  const simt::Boxes &boxes_of_W_, &boxes_of_V_;
};

template <class Shape, int Stages, bool kFromLast>
using StreamOf =
    std::conditional_t<Shape::kBulk, BulkChunks<Shape, Stages, kFromLast>, CopiedChunks<Shape, Stages, kFromLast>>;

// A kernel on them, as launch.cu chooses and starts it; Shape: of its blocks; cluster: of those that share bulk chunks.
template <class Shape, class SomeProblem>
CudaKernel<SomeProblem> kernel_of(void (*run)(CudaArguments<SomeProblem>), int cluster = 2) {
  typedef typename Shape::Chunk Chunk;
  typedef typename Chunk::Products P;
  return {Chunk::kFeatures,
          P::kRows,
          P::kWarps,
          Shape::kMostWarps,
          Chunk::kBulk ? Chunk::kUnits : 0,
          Chunk::kBulk ? cluster : 1,
          Shape::shared_bytes,
          run};
}

}  // namespace
}  // namespace odeblock
