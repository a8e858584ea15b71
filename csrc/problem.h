// The plain structs that one call passes to the native core. No dependency: Python, torch and CUDA stay out.
//
//   h_{k+1} = h_k + scale (V_k sigma(W_k h_k + hidden_bias_k) + output_bias_k),   k = 0 .. L-1
//
// Every array is dense and row-major, of the type `dtype` unless it says otherwise, and belongs to the caller.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define ODEBLOCK_INLINE __host__ __device__ __forceinline__
#else
#define ODEBLOCK_INLINE inline __attribute__((always_inline))
#endif

namespace odeblock {

// What rows, weights and gradients are stored in. The 16-bit types are computed in float: states h_k and the
// adjoint never round to them, sums are taken in float.
enum class Dtype : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// Saved states hold the batch rounded up, so that whole vectors of any instruction set fit. (At most four rows are one
// vector of the narrower sets; the wider lay such states out row by row.)
constexpr int64_t kRowPadding = 16;
ODEBLOCK_INLINE int64_t padded_checks(int64_t batch) { return (batch + kRowPadding - 1) / kRowPadding * kRowPadding; }
ODEBLOCK_INLINE int64_t padded_rows(int64_t batch) {
  if (batch <= 4) return batch == 3 ? 4 : batch;
  return padded_checks(batch);
}

class Stop;

struct Problem {
  Dtype dtype;
  int activation;  // id in activations.h
  int64_t batch;   // B >= 0
  int64_t dim;     // q >= 1
  int64_t hidden;  // m >= 1
  int64_t depth;   // L >= 1
  // Of images: maps of height x width, convolutions kernel x kernel, odd; dim and hidden are channels. 0, 0, 0: rows.
  int64_t height, width, kernel;
  double scale;

  // What the forward saves for the backward. K = save_every; h_0, h_K, h_2K, .. below L where the states between
  // are to be run forward again (none for K = 0); for the adjoint, which reconstructs them, h_K, h_2K, .. below L
  // and h_L (for K = 0, h_L alone), and projections of some states (see `checks`).
  // Saved states are [n, rows / W, q, W]: blocks of W rows, one vector wide, feature by feature; float for the
  // 16-bit types. On a GPU they are [n, rows, q].
  int64_t save_every;
  bool reconstruct;
  int64_t slots;  // backward, not reconstructing, K > 1: states of a tile that it may hold besides, >= 1
  // On the CPU, where states are stored or held, and not reconstructed: whether z = W h + hidden_bias is too. For K = 1
  // it follows each saved state, [rows / W, m, W]; for K > 1 a slot holds it with a state.
  bool keep_hidden;

  // (On a GPU the weights of maps come with their biases, laid out as csrc/cuda/maps.cuh says.)
  const void* V;            // [L, q, m]  read
  const void* W;            // [L, m, q]  read
  const void* hidden_bias;  // [L, m]     read, or null
  const void* output_bias;  // [L, q]     read, or null
  void* workspace;          // bytes of forward_workspace / backward_workspace: scratch
  int threads;              // at most this many threads; the workspace was sized for them
  Stop* stop;               // what may end a call on the CPU early (cpu/threads.h), or null
};

// On a GPU V is [L, q', m'], W [L, m', q'] and biases likewise: rows fill pieces of 16 bytes, with zeros beyond q, m.
ODEBLOCK_INLINE int64_t padded_size(const Problem& p, int64_t size) {
  const int64_t piece = p.dtype == Dtype::float64 ? 2 : p.dtype == Dtype::float32 ? 4 : 8;
  return (size + piece - 1) / piece * piece;
}

// Where all states are stored and hidden values with them, a saved state has q + m numbers a row.
ODEBLOCK_INLINE bool saves_hidden(const Problem& p) { return p.keep_hidden && p.save_every == 1 && !p.reconstruct; }
ODEBLOCK_INLINE int64_t saved_width(const Problem& p) { return p.dim + (saves_hidden(p) ? p.hidden : 0); }

// The adjoint compares at most this many of its states with what the forward saw: the projections probeᵀh_k for
// k = c, 2c, .. below L, c = check_every(L).
constexpr int64_t kChecks = 16;
ODEBLOCK_INLINE int64_t check_every(int64_t depth) { return (depth + kChecks) / (kChecks + 1); }

struct ForwardProblem : Problem {
  const void* h;      // [B, q]  read
  void* y;            // [B, q]  written
  void* states;       // [n, padded_rows(B), q or q + m]  written, as computed
  const void* probe;  // [q]  read where reconstruct, as computed
  void* checks;       // [(L - 1) / c, B up to a multiple of 16]  written where reconstruct, as computed
  // On a GPU, where y may be null. Of the adjoint's states h_L is `end`, not among `states`.
  const void* start;  // [B, q]  read in the place of h, as computed; or null
  void* end;          // [B, q]  written: h_L as computed; or null
  // In the place of `probe` [(L - 1) / c, kSightWidth]: that of each layer that is checked, times how it sees each
  // feature (docs/adjoint.md, equation 5), zero from q on. Read where `checks` is not null, as computed.
  const void* directions;
};

// Of images, in training: BN(x) = weight (x - mean) / sqrt(var + epsilon) + shift of every channel of z, and of V *
// sigma(BN(z)) + output_bias. Mean and variance are of all samples and pixels. [0]: of z, [L, M]; [1]: [L, C]; all as
// computed.
struct Normalisation {
  double epsilon;
  const void *weight[2], *shift[2];  // read
  void *mean[2], *variance[2];       // written in the forward, read in the backward
};

struct NormalisedForwardProblem : ForwardProblem {
  Normalisation norm;
};

// On a GPU: the adjoint's states, from that of the last layer down to that of the first, each by solving a step for its
// input (docs/adjoint.md, section 8). The layers are a part of a block's.
struct ReconstructionProblem : Problem {
  int64_t first, block_depth;  // the number of the first of them in the block; layers of that
  // [ring, padded_rows(B), q], as computed: h_k at k % ring. Written: those of all layers; read: those above, as many
  // as predictions look back.
  void* states;
  int64_t ring;
  const void* visible;  // [L, kSightWidth]  read: how any layer of the block from this one up sees each feature
  const void* sight;    // [L, kSightWidth]  read: how this layer does
  const void* probe;    // [kSightWidth]     read
  const void* checks;   // [(block_depth - 1) / c, B up to a multiple of 16]  read: what the forward left
  void* rows;           // [numbers of a row, B]  read and written: what rows remember (csrc/cuda/reconstruction.cuh)
  double limit;         // (10), relative
};

// Features that a row of `sight` has room for.
constexpr int64_t kSightWidth = 256;

// On a GPU: the part of the backward that goes from row to row through the layers. What it leaves for each layer is
// what matrix products over the rows make the gradients of the weights from (of maps it sums them itself),
//
//   g = (Vᵀa) ⊙ sigma'(z):  dV = scale aᵀs,  dW = scale gᵀh,  dhidden_bias = scale Σ g,  doutput_bias = scale Σ a
//
struct SweepProblem : Problem {
  const void* states;  // [L, padded_rows(B), q]  read: h_k as computed
  void* a;             // [B, q]  read and written, as computed: d loss / d h_L, then d loss / d h_0
  // Written; null where no weight needs a gradient.
  void* layer_a;  // [L, B, q]  a of h_{k+1}
  void* layer_h;  // [L, B, q]  h_k; null for float32 and float64, which have it in `states`
  void* layer_s;  // [L, B, m]  sigma(z)
  void* layer_g;  // [L, B, m]
  // Of maps, in the place of these four: [L, blocks of threads, numbers of a layer], as computed, what each block has
  // summed of a layer's gradients (csrc/cuda/map_gradients.cuh).
  void* sums;
};

struct BackwardProblem : Problem {
  const void* grad;    // [B, q]  read: d loss / d y
  const void* h;       // [B, q]  read where reconstruct, to measure the drift; else null
  const void* states;  // [n, padded_rows(B), q or q + m]  read, as computed
  const void* probe;   // [q]  as in the forward
  const void* checks;  // [(L - 1) / c, B up to a multiple of 16]  read where reconstruct
  void* dh;            // [B, q]     written
  void* dV;            // [L, q, m]  written; null, with the three below, where no weight needs a gradient
  void* dW;            // [L, m, q]  written, or null
  void* dhidden_bias;  // [L, m]     written, or null
  void* doutput_bias;  // [L, q]     written, or null
  double* report;      // [4] written where reconstruct: estimate, drift, evaluations and order per step
};

struct NormalisedBackwardProblem : BackwardProblem {
  Normalisation norm;
  void *dweight[2], *dshift[2];  // written, as computed
};

}  // namespace odeblock
