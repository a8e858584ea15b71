// The Python module odeblock._core: addresses and sizes in, the GIL released while it computes, but for a question ten
// times a second whether a signal has come. Nothing is kept
// but memory for large arrays (Memory).
// Its caller, odeblock/ops.py, has checked everything; _core.pyi has the signatures with names.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __linux__
#include <sys/mman.h>
#include <sys/syscall.h>
#endif
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <memory>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "api.h"
#include "cpu/threads.h"

namespace py = pybind11;
using odeblock::BackwardProblem;
using odeblock::Dtype;
using odeblock::ForwardProblem;
using odeblock::Problem;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void set_sizes(Problem& p, int dtype, int activation, int64_t batch, int64_t dim, int64_t hidden, int64_t depth,
               int threads) {
  p.dtype = static_cast<Dtype>(dtype);
  p.activation = activation;
  p.batch = batch;
  p.dim = dim;
  p.hidden = hidden;
  p.depth = depth;
  p.threads = threads;
}

// Of images; 0, 0, 0 of rows.
void set_maps(Problem& p, int64_t height, int64_t width, int64_t kernel) {
  p.height = height;
  p.width = width;
  p.kernel = kernel;
}

void set_weights(Problem& p, uintptr_t V, uintptr_t W, uintptr_t hidden_bias, uintptr_t output_bias) {
  p.V = pointer<const void>(V);
  p.W = pointer<const void>(W);
  p.hidden_bias = pointer<const void>(hidden_bias);
  p.output_bias = pointer<const void>(output_bias);
}

// Python's signal handlers run on this thread alone.
bool is_main_thread() {
#if defined(__linux__)
  return syscall(SYS_gettid) == getpid();
#elif defined(__APPLE__)
  return pthread_main_np();
#else
  return true;
#endif
}

// Whether the user wants the call to end (Ctrl-C), or another of Python's signal handlers raised: the error stays set.
bool is_interrupted() {
  if (!is_main_thread()) return false;
  const PyGILState_STATE state = PyGILState_Ensure();
  const bool raised = PyErr_CheckSignals() != 0;
  PyGILState_Release(state);
  return raised;
}

// Runs a kernel without the GIL; raises what a signal handler did.
template <class P>
void run_interruptibly(void (*kernel)(const P&), P& p) {
  const int64_t samples = std::min<int64_t>(p.batch, 1024);
  const int64_t work = samples * p.dim * p.hidden * (p.kernel ? p.kernel * p.kernel * p.height * p.width : 1);
  odeblock::Stop stop(is_interrupted, work, std::chrono::milliseconds(100));
  p.stop = &stop;
  {
    py::gil_scoped_release release;
    kernel(p);
  }
  if (PyErr_Occurred()) throw py::error_already_set();
}

size_t forward_workspace(int dtype, int activation, int64_t batch, int64_t dim, int64_t hidden, int64_t depth,
                         int64_t height, int64_t width, int64_t kernel, bool reconstruct, int threads) {
  Problem p{};
  set_sizes(p, dtype, activation, batch, dim, hidden, depth, threads);
  set_maps(p, height, width, kernel);
  p.reconstruct = reconstruct;
  return odeblock::cpu_kernels().forward_workspace(p);
}

void forward(int dtype, int activation, int64_t batch, int64_t dim, int64_t hidden, int64_t depth, int64_t height,
             int64_t width, int64_t kernel, double scale, uintptr_t h, uintptr_t V, uintptr_t W, uintptr_t hidden_bias,
             uintptr_t output_bias, uintptr_t y, uintptr_t states, uintptr_t probe, uintptr_t checks,
             int64_t save_every, bool reconstruct, bool keep_hidden, uintptr_t workspace, int threads) {
  ForwardProblem p{};
  set_sizes(p, dtype, activation, batch, dim, hidden, depth, threads);
  set_maps(p, height, width, kernel);
  set_weights(p, V, W, hidden_bias, output_bias);
  p.scale = scale;
  p.save_every = save_every;
  p.reconstruct = reconstruct;
  p.keep_hidden = keep_hidden;
  p.probe = pointer<const void>(probe);
  p.checks = pointer<void>(checks);
  p.h = pointer<const void>(h);
  p.y = pointer<void>(y);
  p.states = pointer<void>(states);
  p.workspace = pointer<void>(workspace);
  run_interruptibly(odeblock::cpu_kernels().forward, p);
}

size_t backward_workspace(int dtype, int activation, int64_t batch, int64_t dim, int64_t hidden, int64_t depth,
                          int64_t height, int64_t width, int64_t kernel, int64_t save_every, bool reconstruct,
                          int64_t slots, bool keep_hidden, int threads) {
  Problem p{};
  set_sizes(p, dtype, activation, batch, dim, hidden, depth, threads);
  set_maps(p, height, width, kernel);
  p.save_every = save_every;
  p.reconstruct = reconstruct;
  p.slots = slots;
  p.keep_hidden = keep_hidden;
  return odeblock::cpu_kernels().backward_workspace(p);
}

void backward(int dtype, int activation, int64_t batch, int64_t dim, int64_t hidden, int64_t depth, int64_t height,
              int64_t width, int64_t kernel, double scale, uintptr_t grad, uintptr_t h, uintptr_t V, uintptr_t W,
              uintptr_t hidden_bias, uintptr_t output_bias, uintptr_t states, uintptr_t probe, uintptr_t checks,
              uintptr_t dh, uintptr_t dV, uintptr_t dW, uintptr_t dhidden_bias, uintptr_t doutput_bias,
              uintptr_t report, int64_t save_every, bool reconstruct, int64_t slots, bool keep_hidden,
              uintptr_t workspace, int threads) {
  BackwardProblem p{};
  set_sizes(p, dtype, activation, batch, dim, hidden, depth, threads);
  set_maps(p, height, width, kernel);
  set_weights(p, V, W, hidden_bias, output_bias);
  p.scale = scale;
  p.save_every = save_every;
  p.reconstruct = reconstruct;
  p.slots = slots;
  p.keep_hidden = keep_hidden;
  p.probe = pointer<const void>(probe);
  p.checks = pointer<const void>(checks);
  p.grad = pointer<const void>(grad);
  p.h = pointer<const void>(h);
  p.states = pointer<const void>(states);
  p.dh = pointer<void>(dh);
  p.dV = pointer<void>(dV);
  p.dW = pointer<void>(dW);
  p.dhidden_bias = pointer<void>(dhidden_bias);
  p.doutput_bias = pointer<void>(doutput_bias);
  p.report = pointer<double>(report);
  p.workspace = pointer<void>(workspace);
  run_interruptibly(odeblock::cpu_kernels().backward, p);
}

// Of batch normalisation: addresses of what comes first of z, then of V * sigma(BN(z)).
typedef std::array<uintptr_t, 2> Two;

void set_norm(odeblock::Normalisation& norm, double epsilon, Two weight, Two shift, Two mean, Two variance) {
  norm.epsilon = epsilon;
  for (int i : {0, 1}) {
    norm.weight[i] = pointer<const void>(weight[i]);
    norm.shift[i] = pointer<const void>(shift[i]);
    norm.mean[i] = pointer<void>(mean[i]);
    norm.variance[i] = pointer<void>(variance[i]);
  }
}

size_t normalised_forward_workspace(int dtype, int activation, int64_t batch, int64_t dim, int64_t hidden,
                                    int64_t depth, int64_t height, int64_t width, int64_t kernel, int threads) {
  Problem p{};
  set_sizes(p, dtype, activation, batch, dim, hidden, depth, threads);
  set_maps(p, height, width, kernel);
  return odeblock::cpu_kernels().normalised_forward_workspace(p);
}

void normalised_forward(int dtype, int activation, int64_t batch, int64_t dim, int64_t hidden, int64_t depth,
                        int64_t height, int64_t width, int64_t kernel, double scale, uintptr_t h, uintptr_t V,
                        uintptr_t W, uintptr_t hidden_bias, uintptr_t output_bias, double epsilon, Two weight,
                        Two shift, Two mean, Two variance, uintptr_t y, uintptr_t states, int64_t save_every,
                        uintptr_t workspace, int threads) {
  odeblock::NormalisedForwardProblem p{};
  set_sizes(p, dtype, activation, batch, dim, hidden, depth, threads);
  set_maps(p, height, width, kernel);
  set_weights(p, V, W, hidden_bias, output_bias);
  set_norm(p.norm, epsilon, weight, shift, mean, variance);
  p.scale = scale;
  p.save_every = save_every;
  p.h = pointer<const void>(h);
  p.y = pointer<void>(y);
  p.states = pointer<void>(states);
  p.workspace = pointer<void>(workspace);
  run_interruptibly(odeblock::cpu_kernels().normalised_forward, p);
}

size_t normalised_backward_workspace(int dtype, int activation, int64_t batch, int64_t dim, int64_t hidden,
                                     int64_t depth, int64_t height, int64_t width, int64_t kernel, int64_t save_every,
                                     int64_t slots, int threads) {
  Problem p{};
  set_sizes(p, dtype, activation, batch, dim, hidden, depth, threads);
  set_maps(p, height, width, kernel);
  p.save_every = save_every;
  p.slots = slots;
  return odeblock::cpu_kernels().normalised_backward_workspace(p);
}

void normalised_backward(int dtype, int activation, int64_t batch, int64_t dim, int64_t hidden, int64_t depth,
                         int64_t height, int64_t width, int64_t kernel, double scale, uintptr_t grad, uintptr_t V,
                         uintptr_t W, uintptr_t hidden_bias, uintptr_t output_bias, double epsilon, Two weight,
                         Two shift, Two mean, Two variance, uintptr_t states, uintptr_t dh, uintptr_t dV, uintptr_t dW,
                         uintptr_t dhidden_bias, uintptr_t doutput_bias, Two dweight, Two dshift, int64_t save_every,
                         int64_t slots, uintptr_t workspace, int threads) {
  odeblock::NormalisedBackwardProblem p{};
  set_sizes(p, dtype, activation, batch, dim, hidden, depth, threads);
  set_maps(p, height, width, kernel);
  set_weights(p, V, W, hidden_bias, output_bias);
  set_norm(p.norm, epsilon, weight, shift, mean, variance);
  p.scale = scale;
  p.save_every = save_every;
  p.slots = slots;
  p.grad = pointer<const void>(grad);
  p.states = pointer<const void>(states);
  p.dh = pointer<void>(dh);
  p.dV = pointer<void>(dV);
  p.dW = pointer<void>(dW);
  p.dhidden_bias = pointer<void>(dhidden_bias);
  p.doutput_bias = pointer<void>(doutput_bias);
  for (int i : {0, 1}) {
    p.dweight[i] = pointer<void>(dweight[i]);
    p.dshift[i] = pointer<void>(dshift[i]);
  }
  p.workspace = pointer<void>(workspace);
  run_interruptibly(odeblock::cpu_kernels().normalised_backward, p);
}

// Memory of large arrays, kept for the next ones: from the system it comes as pages of zeros, one by one, and goes back
// there (a sixth of a step that stores its states). Python holds it by the buffer protocol; when the last array in it
// is gone, it is kept, of what has come back lately at most kMostBytes in kMostBlocks. All under the GIL.
class Memory {
 public:
  explicit Memory(size_t size) : block_{nullptr, size} {
    std::vector<Block>& kept = kept_blocks();
    auto best = kept.end();
    for (auto block = kept.begin(); block != kept.end(); ++block)
      if (block->size >= size && block->size / 2 <= size && (best == kept.end() || block->size < best->size))
        best = block;
    if (best != kept.end()) {
      block_ = *best;
      kept.erase(best);
      return;
    }
    block_.data = allocate(size);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (size >= kHugePage) madvise(block_.data, size, MADV_HUGEPAGE);
#endif
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    std::vector<Block>& kept = kept_blocks();
    kept.push_back(block_);
    size_t bytes = 0;
    for (const Block& block : kept) bytes += block.size;
    while (bytes > kMostBytes || kept.size() > kMostBlocks) bytes -= release_oldest();
  }
  // Gives back all that is kept.
  static void release() {
    while (!kept_blocks().empty()) release_oldest();
  }
  void* data() const { return block_.data; }
  size_t size() const { return block_.size; }

 private:
  struct Block {
    void* data;
    size_t size;
  };
  static constexpr size_t kHugePage = 2 << 20, kLine = 64, kMostBytes = 512 << 20, kMostBlocks = 32;
  static std::align_val_t alignment(size_t size) { return std::align_val_t(size < kHugePage ? kLine : kHugePage); }
  static void* allocate(size_t size) {
    try {
      return ::operator new(size, alignment(size));
    } catch (const std::bad_alloc&) {  // what is kept may be what is missing
      release();
      return ::operator new(size, alignment(size));
    }
  }
  static size_t release_oldest() {
    const Block oldest = kept_blocks().front();
    ::operator delete(oldest.data, alignment(oldest.size));
    kept_blocks().erase(kept_blocks().begin());
    return oldest.size;
  }
  // Never destroyed: tensors may outlive the module.
  static std::vector<Block>& kept_blocks() {
    static auto* blocks = [] {
      auto* made = new std::vector<Block>();
      made->reserve(kMostBlocks + 1);  // so that keeping a block never allocates
      return made;
    }();
    return *blocks;
  }
  Block block_;
};

py::object text_or_none(const char* text) { return text ? py::object(py::str(text)) : py::none(); }

py::object cuda_unsupported(int device) { return text_or_none(odeblock::cuda_unsupported(device)); }

bool cuda_fuses(int dtype, int activation, int64_t batch, int64_t dim, int64_t hidden, int64_t depth, int64_t height,
                int64_t width, int64_t kernel, bool backward, bool reconstruct, bool tf32, int device) {
  Problem p{};
  set_sizes(p, dtype, activation, batch, dim, hidden, depth, 0);
  set_maps(p, height, width, kernel);
  p.reconstruct = reconstruct;
  return odeblock::cuda_fuses(p, backward, tf32, device);
}

int cuda_map_blocks(int dtype, int activation, int64_t batch, int64_t dim, int64_t hidden, int64_t depth,
                    int64_t height, int64_t width, int64_t kernel, bool tf32, int device) {
  Problem p{};
  set_sizes(p, dtype, activation, batch, dim, hidden, depth, 0);
  set_maps(p, height, width, kernel);
  return odeblock::cuda_map_blocks(p, tf32, device);
}

void cuda_forward(int dtype, int activation, int64_t batch, int64_t dim, int64_t hidden, int64_t depth, int64_t height,
                  int64_t width, int64_t kernel, double scale, uintptr_t V, uintptr_t W, uintptr_t hidden_bias,
                  uintptr_t output_bias, uintptr_t h, uintptr_t start, uintptr_t y, uintptr_t end, uintptr_t states,
                  uintptr_t directions, uintptr_t checks, int64_t save_every, bool reconstruct, bool tf32, int device,
                  uintptr_t stream) {
  ForwardProblem p{};
  set_sizes(p, dtype, activation, batch, dim, hidden, depth, 0);
  set_maps(p, height, width, kernel);
  set_weights(p, V, W, hidden_bias, output_bias);
  p.scale = scale;
  p.save_every = save_every;
  p.h = pointer<const void>(h);
  p.start = pointer<const void>(start);
  p.y = pointer<void>(y);
  p.end = pointer<void>(end);
  p.states = pointer<void>(states);
  p.directions = pointer<const void>(directions);
  p.checks = pointer<void>(checks);
  p.reconstruct = reconstruct;
  const char* error;
  {
    py::gil_scoped_release release;
    error = odeblock::cuda_forward(p, tf32, device, pointer<void>(stream));
  }
  if (error) throw std::runtime_error("odeblock: forward on GPU " + std::to_string(device) + ": " + error);
}

void cuda_sweep(int dtype, int activation, int64_t batch, int64_t dim, int64_t hidden, int64_t depth, int64_t height,
                int64_t width, int64_t kernel, double scale, uintptr_t V, uintptr_t W, uintptr_t hidden_bias,
                uintptr_t output_bias, uintptr_t states, uintptr_t a, uintptr_t sums, uintptr_t layer_a,
                uintptr_t layer_h, uintptr_t layer_s, uintptr_t layer_g, bool tf32, int device, uintptr_t stream) {
  odeblock::SweepProblem p{};
  set_sizes(p, dtype, activation, batch, dim, hidden, depth, 0);
  set_maps(p, height, width, kernel);
  set_weights(p, V, W, hidden_bias, output_bias);
  p.scale = scale;
  p.states = pointer<const void>(states);
  p.a = pointer<void>(a);
  p.sums = pointer<void>(sums);
  p.layer_a = pointer<void>(layer_a);
  p.layer_h = pointer<void>(layer_h);
  p.layer_s = pointer<void>(layer_s);
  p.layer_g = pointer<void>(layer_g);
  const char* error;
  {
    py::gil_scoped_release release;
    error = odeblock::cuda_sweep(p, tf32, device, pointer<void>(stream));
  }
  if (error) throw std::runtime_error("odeblock: backward on GPU " + std::to_string(device) + ": " + error);
}

void cuda_reconstruct(int dtype, int activation, int64_t batch, int64_t dim, int64_t hidden, int64_t depth,
                      int64_t height, int64_t width, int64_t kernel, double scale, uintptr_t V, uintptr_t W,
                      uintptr_t hidden_bias, uintptr_t output_bias, uintptr_t states, uintptr_t visible,
                      uintptr_t sight, uintptr_t probe, uintptr_t checks, uintptr_t rows, int64_t ring, int64_t first,
                      int64_t block_depth, double limit, bool tf32, int device, uintptr_t stream) {
  odeblock::ReconstructionProblem p{};
  set_sizes(p, dtype, activation, batch, dim, hidden, depth, 0);
  set_maps(p, height, width, kernel);
  set_weights(p, V, W, hidden_bias, output_bias);
  p.scale = scale;
  p.states = pointer<void>(states);
  p.visible = pointer<const void>(visible);
  p.sight = pointer<const void>(sight);
  p.probe = pointer<const void>(probe);
  p.checks = pointer<const void>(checks);
  p.rows = pointer<void>(rows);
  p.ring = ring;
  p.first = first;
  p.block_depth = block_depth;
  p.limit = limit;
  const char* error;
  {
    py::gil_scoped_release release;
    error = odeblock::cuda_reconstruct(p, tf32, device, pointer<void>(stream));
  }
  if (error) throw std::runtime_error("odeblock: adjoint on GPU " + std::to_string(device) + ": " + error);
}

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> items;
  std::stringstream stream(list);
  for (std::string item; std::getline(stream, item, ',');) items.push_back(item);
  return items;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = ODEBLOCK_COMPILER;
  info["openmp"] = odeblock::has_openmp();
  const odeblock::CpuKernels* builds[odeblock::kMaxCpuBuilds];
  std::vector<std::string> names;
  for (int i = 0, count = odeblock::cpu_builds(builds); i < count; i++) names.push_back(builds[i]->name);
  info["cpu_builds"] = names;
  info["cpu_features"] = odeblock::cpu_kernels().name;
  const odeblock::CudaDevices devices = odeblock::cuda_devices();
  info["cuda_version"] = text_or_none(ODEBLOCK_CUDA_VERSION);
  info["cuda_architectures"] = split(ODEBLOCK_CUDA_ARCHITECTURES);
  info["cuda_devices"] = devices.count;
  info["cuda_error"] = text_or_none(devices.error);
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.def("forward_workspace", &forward_workspace);
  module.def("forward", &forward);
  module.def("backward_workspace", &backward_workspace);
  module.def("backward", &backward);
  module.def("normalised_forward_workspace", &normalised_forward_workspace);
  module.def("normalised_forward", &normalised_forward);
  module.def("normalised_backward_workspace", &normalised_backward_workspace);
  module.def("normalised_backward", &normalised_backward);
  py::class_<Memory>(module, "_Memory", py::buffer_protocol()).def_buffer([](Memory& memory) {
    return py::buffer_info(memory.data(), 1, "B", 1, {memory.size()}, {static_cast<size_t>(1)});
  });
  module.def("memory", [](size_t size) { return std::make_unique<Memory>(size); });
  module.def("release_memory", &Memory::release);
  module.def("cuda_unsupported", &cuda_unsupported);
  module.def("cuda_fuses", &cuda_fuses);
  module.def("cuda_map_blocks", &cuda_map_blocks);
  module.def("cuda_forward", &cuda_forward);
  module.def("cuda_sweep", &cuda_sweep);
  module.def("cuda_reconstruct", &cuda_reconstruct);
  module.def("build_info", &build_info);
}
