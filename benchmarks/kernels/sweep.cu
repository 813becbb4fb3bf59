// Times launches by the size of their arguments, and AdamW over 256M parameters in 300 tensors by each variant of the
// kernel, beside a stream of the same dtypes and a plain copy. Each measurement prints its row of CSV at once.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "problem.h"
#include "rules/adam.h"
#include "variants.h"

std::vector<Variant>& variants() {
  static std::vector<Variant> list;
  return list;
}

namespace dracopt {
namespace {

using memory::require;

constexpr int kStreams = 4;  // AdamW's parameter, gradient and two moments
constexpr int64_t kNumel = 4096 * 208;

struct Mix {
  const char* name;
  Dtype dtypes[kStreams];
  bool zero_gradients;

  size_t bytes(int64_t numel) const {
    int all = 0;
    for (int k = 0; k < kStreams; ++k) all += itemsize(dtypes[k]) * (k == kGrad ? 1 : 2);
    return static_cast<size_t>(numel * all);
  }
};
constexpr Mix kMixes[] = {
    {"fp32", {Dtype::fp32, Dtype::fp32, Dtype::fp32, Dtype::fp32}, false},
    {"bf16, fp32 states", {Dtype::bf16, Dtype::bf16, Dtype::fp32, Dtype::fp32}, false},
    {"bf16", {Dtype::bf16, Dtype::bf16, Dtype::bf16, Dtype::bf16}, false},
    {"fp32, zero gradients", {Dtype::fp32, Dtype::fp32, Dtype::fp32, Dtype::fp32}, true},
};

// Fills a stream with random numbers of a realistic size: of a parameter, a gradient or a first moment, or of a second
// moment.
template <typename Stored>
__global__ void fill(Stored* to, int64_t numel, uint32_t seed, bool squares, bool zero) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < numel; i += stride) {
    uint32_t bits = static_cast<uint32_t>(i) * 2654435761u + seed * 0x9e3779b9u;
    bits = (bits ^ bits >> 15) * 0x85ebca6bu;
    bits = (bits ^ bits >> 13) * 0xc2b2ae35u;
    const float x = static_cast<float>(static_cast<int32_t>(bits ^ bits >> 16)) * 0x1p-31f * 0.02f;
    to[i] = narrow<Stored>(zero ? 0.0f : squares ? x * x : x);
  }
}

// Loads eight elements of each stream per thread, in vectors, then stores all except the gradient's.
template <bool kParam16, bool kState16>
__global__ void __launch_bounds__(512) stream(char* p, const char* g, char* m, char* v, int64_t numel) {
  constexpr int elements = 8;
  constexpr int param_vectors = elements * (kParam16 ? 2 : 4) / 16, state_vectors = elements * (kState16 ? 2 : 4) / 16;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x);
  if (at * elements >= numel) return;
  // The vectors of a warp lie one after the other.
  const auto place = [&](int64_t vectors, int64_t u) { return at / 32 * 32 * vectors + u * 32 + at % 32; };
  uint4 x[3][2], gradient[2];
  for (int u = 0; u < param_vectors; ++u) {
    gradient[u] = reinterpret_cast<const uint4*>(g)[place(param_vectors, u)];
    x[0][u] = reinterpret_cast<const uint4*>(p)[place(param_vectors, u)];
  }
  for (int u = 0; u < state_vectors; ++u) {
    x[1][u] = reinterpret_cast<const uint4*>(m)[place(state_vectors, u)];
    x[2][u] = reinterpret_cast<const uint4*>(v)[place(state_vectors, u)];
  }
  const auto mixed = [&](uint4 a, int u) {
    const uint4 b = gradient[u % param_vectors];
    return uint4{a.x ^ b.x, a.y ^ b.y, a.z ^ b.z, a.w ^ b.w};
  };
  for (int u = 0; u < param_vectors; ++u) reinterpret_cast<uint4*>(p)[place(param_vectors, u)] = mixed(x[0][u], u);
  for (int u = 0; u < state_vectors; ++u) {
    reinterpret_cast<uint4*>(m)[place(state_vectors, u)] = mixed(x[1][u], u);
    reinterpret_cast<uint4*>(v)[place(state_vectors, u)] = mixed(x[2][u], u);
  }
}

template <size_t kBytes>
struct Sized {
  char bytes[kBytes];
};

template <size_t kBytes>
__global__ void nothing(const __grid_constant__ Sized<kBytes>) {}

class Sweep {
 public:
  Sweep(int tensors, int rounds) : tensors_(tensors), rounds_(rounds) {
    for (char*& stream : streams_) stream = static_cast<char*>(memory::allocate(static_cast<size_t>(numel()) * 4));
    require(cudaEventCreate(&begin_), "cudaEventCreate");
    require(cudaEventCreate(&end_), "cudaEventCreate");
    cudaDeviceProp device;
    require(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
    std::printf("# %s, %d multiprocessors, %d tensors of %lld\n", device.name, device.multiProcessorCount, tensors,
                static_cast<long long>(kNumel));
    std::printf(
        "mix,variant,about,threads,tile,registers,blocks_per_sm,us_median,us_min,gb_per_s,share_of_stream,bits\n");
  }

  // Times one of many launches that follow each other, by the size of its arguments.
  template <size_t kBytes>
  void run_launches(const char* name) {
    static Sized<kBytes> argument;
    void* arguments[] = {&argument};
    constexpr int launches = 200;
    const Times all = time([&] {
      for (int i = 0; i < launches; ++i) launch(reinterpret_cast<const void*>(nothing<kBytes>), 1, 128, arguments);
    });
    std::printf("launch,%s,%zu bytes of arguments,128,0,0,0,%.2f,%.2f,0,0,\n", name, kBytes,
                static_cast<double>(all.median) / launches, static_cast<double>(all.least) / launches);
    std::fflush(stdout);
  }

  void begin(const Mix& mix) {
    mix_ = &mix;
    best_stream_ = 0;
  }

  void run_stream() {
    reset();
    const auto* const kernel = mix_->dtypes[kParam] == Dtype::fp32 ? reinterpret_cast<const void*>(stream<false, false>)
                               : mix_->dtypes[kFirstState] == Dtype::fp32
                                   ? reinterpret_cast<const void*>(stream<true, false>)
                                   : reinterpret_cast<const void*>(stream<true, true>);
    std::vector<std::pair<int, Times>> found;
    for (const int threads : {128, 256, 512}) {
      int64_t count = numel();
      void* arguments[] = {&streams_[0], &streams_[1], &streams_[2], &streams_[3], &count};
      const auto blocks = static_cast<uint32_t>((count / 8 + threads - 1) / threads);
      found.emplace_back(threads, time([&] { launch(kernel, blocks, threads, arguments); }));
      best_stream_ = std::max(best_stream_, gb_per_s(found.back().second));
    }
    for (const auto& [threads, times] : found) row({"stream", "", threads, 8 * threads, kernel}, times, "");
    const size_t bytes = mix_->bytes(numel()) / 2;  // each byte is read and written
    if (mix_ != &kMixes[0]) return;
    // A stream is smaller than `bytes`, so the copy has parts.
    const Times times = time([&] {
      for (size_t done = 0; done < bytes; done += static_cast<size_t>(numel()) * 4) {
        const size_t part = std::min(bytes - done, static_cast<size_t>(numel()) * 4);
        const int from = done == 0 ? 0 : 2;
        require(cudaMemcpyAsync(streams_[from + 1], streams_[from], part, cudaMemcpyDeviceToDevice, nullptr), "copy");
      }
    });
    row({"copy", "cudaMemcpyAsync", 0, 0, nullptr}, times, "");
  }

  void run(const Variant& variant) {
    reset();
    Problem problem;
    const Adam::Hyperparameters h{1e-3, 0.9, 0.999, 1e-8, 1e-2, 0, 1};
    StateScalar count[kMaxStateScalars] = {{9, true}, {}};
    const auto power = [](double base, double exponent) {
      return dracopt::power(base, static_cast<int64_t>(exponent));
    };
    const auto scalars = Adam::prepare<float>(count, false, h, power);
    const uint32_t slot = problem.add_slot(&scalars, sizeof(scalars));
    for (int t = 0; t < tensors_; ++t) {
      cuda::Row row;
      std::memset(static_cast<void*>(&row), 0, sizeof(row));
      for (int k = 0; k < kStreams; ++k) {
        row.describe(k, streams_[k] + t * kNumel * itemsize(mix_->dtypes[k]), mix_->dtypes[k], true);
      }
      row.numel = kNumel;
      row.slot = slot;
      row.layout = row.numbers = cuda::kDense;
      row.states = 2;
      problem.add(row, streams_[kGrad] + t * kNumel * itemsize(mix_->dtypes[kGrad]));
    }
    problem.upload(variant.tile, false);
    void* arguments[] = {&problem.arguments};
    const auto step = [&] { launch(variant.kernel, problem.arguments.blocks, variant.threads, arguments); };
    // Copies more than a tile of the first tensor, before and after a step.
    const int64_t checked = variant.tile + 1000;
    std::vector<char> before[kStreams], after[kStreams];
    for (auto* copies : {before, after}) {
      if (copies == after) step();
      for (int k = 0; k < kStreams; ++k) {
        copies[k].resize(static_cast<size_t>(checked * itemsize(mix_->dtypes[k])));
        memory::copy(copies[k].data(), streams_[k], copies[k].size());
      }
    }
    OnHost expected;
    for (int k = 0; k < kStreams; ++k) {
      expected.data[k] = before[k].data();
      expected.dtypes[k] = mix_->dtypes[k];
    }
    update_each<Adam, float, 2>(scalars, expected, checked);
    bool same = true;
    for (int k = 0; k < kStreams; ++k) same &= before[k] == after[k];
    row(variant, time(step), same ? "same" : "differ");
  }

 private:
  struct Times {
    float median, least;  // microseconds
  };

  int64_t numel() const { return tensors_ * kNumel; }
  double gb_per_s(const Times& times) const { return static_cast<double>(mix_->bytes(numel())) / times.median / 1e3; }

  void reset() {
    for (int k = 0; k < kStreams; ++k) {
      const bool squares = k == kStreams - 1, zero = mix_->zero_gradients && k != kParam;
      const auto seed = static_cast<uint32_t>(k + 1);
      if (mix_->dtypes[k] == Dtype::fp32) {
        fill<<<4096, 256>>>(reinterpret_cast<float*>(streams_[k]), numel(), seed, squares, zero);
      } else {
        fill<<<4096, 256>>>(reinterpret_cast<Bf16*>(streams_[k]), numel(), seed, squares, zero);
      }
    }
    require(cudaGetLastError(), "fill");
  }

  void launch(const void* kernel, uint32_t blocks, int threads, void** arguments) {
    require(cudaLaunchKernel(kernel, dim3(blocks), dim3(static_cast<uint32_t>(threads)), arguments, 0, nullptr),
            "launch");
  }

  template <typename Step>
  Times time(const Step& step) {
    std::vector<float> found;
    step();
    for (int i = 0; i < rounds_; ++i) {
      float milliseconds;
      require(cudaEventRecord(begin_), "cudaEventRecord");
      step();
      require(cudaEventRecord(end_), "cudaEventRecord");
      require(cudaEventSynchronize(end_), "step");
      require(cudaEventElapsedTime(&milliseconds, begin_, end_), "cudaEventElapsedTime");
      found.push_back(1e3f * milliseconds);
    }
    std::sort(found.begin(), found.end());
    return {found[found.size() / 2], found[0]};
  }

  void row(const Variant& variant, const Times& times, const char* bits) {
    int registers = 0, blocks = 0;
    if (variant.kernel != nullptr) {
      cudaFuncAttributes attributes;
      require(cudaFuncGetAttributes(&attributes, variant.kernel), "cudaFuncGetAttributes");
      registers = attributes.numRegs;
      require(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, variant.kernel, variant.threads, 0), "occupancy");
    }
    std::printf("\"%s\",%s,%s,%d,%lld,%d,%d,%.1f,%.1f,%.0f,%.3f,%s\n", mix_->name, variant.name, variant.about,
                variant.threads, static_cast<long long>(variant.tile), registers, blocks,
                static_cast<double>(times.median), static_cast<double>(times.least), gb_per_s(times),
                gb_per_s(times) / best_stream_, bits);
    std::fflush(stdout);
  }

  int tensors_, rounds_;
  char* streams_[kStreams];
  cudaEvent_t begin_, end_;
  const Mix* mix_ = nullptr;
  double best_stream_ = 0;
};

}  // namespace
}  // namespace dracopt

// sweep [--only VARIANT] [--tensors 300] [--rounds 9]
int main(int argc, char** argv) {
  std::string only;
  int tensors = 300, rounds = 9;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i];
    if (option == "--only") only = argv[i + 1];
    if (option == "--tensors") tensors = std::atoi(argv[i + 1]);
    if (option == "--rounds") rounds = std::atoi(argv[i + 1]);
  }
  if (const char* reason = memory::unavailable()) {
    std::fprintf(stderr, "no GPU: %s\n", reason);
    return 2;
  }
  dracopt::Sweep sweep(tensors, rounds);
  if (only.empty()) {
    sweep.run_launches<4096>("arguments_4k");
    sweep.run_launches<dracopt::cuda::kArgumentBytes>("arguments_32k");
  }
  for (const dracopt::Mix& mix : dracopt::kMixes) {
    sweep.begin(mix);
    if (only.empty()) sweep.run_stream();
    for (const Variant& variant : variants()) {
      if (only.empty() || only == variant.name) sweep.run(variant);
    }
  }
  return 0;
}
