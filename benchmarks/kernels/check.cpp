// Steps a few awkward tensors through the launcher itself and compares every bit with a loop over the elements. The
// program is small and has no torch, so that compute-sanitizer can watch it. The launcher is a GPU's, or the simulated
// one of the tests.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <utility>

#include "core/squares.h"
#include "cuda/fast_math.h"
#include "problem.h"
#include "rules/all.h"

namespace dracopt {
namespace {

constexpr size_t kGuard = 64;
constexpr unsigned char kUntouched = 0xa5;

// A stream on the device and its copy on the host, with guards before and behind it. Some begin within a vector.
struct Buffer {
  Buffer(Dtype dtype, int64_t numel, int offset, std::mt19937& random, bool squares) {
    const size_t shift = kGuard + static_cast<size_t>(offset * itemsize(dtype));
    host.assign(shift + static_cast<size_t>(numel * itemsize(dtype)) + kGuard, kUntouched);
    begin = shift;
    std::normal_distribution<double> normal;
    as_stored(static_cast<void*>(host.data() + begin), dtype, [&](auto* to) {
      for (int64_t i = 0; i < numel; ++i) {
        const double x = normal(random);
        to[i] = narrow<std::decay_t<decltype(*to)>>(squares ? x * x * 1e-4 : x);
      }
    });
    device = static_cast<unsigned char*>(memory::allocate(host.size()));
    memory::copy(device, host.data(), host.size());
  }
  Buffer(Buffer&& other) noexcept : host(std::move(other.host)), begin(other.begin), device(other.device) {
    other.device = nullptr;
  }
  ~Buffer() {
    if (device != nullptr) memory::release(device);
  }

  bool is_as_on_the_host() const {
    std::vector<unsigned char> found(host.size());
    memory::copy(found.data(), device, found.size());
    return found == host;
  }

  std::vector<unsigned char> host;
  size_t begin;
  unsigned char* device;
};

// A copy of an array on the device.
template <typename T>
struct OnDevice {
  explicit OnDevice(const std::vector<T>& values) : data(static_cast<T*>(memory::allocate(values.size() * sizeof(T)))) {
    memory::copy(data, values.data(), values.size() * sizeof(T));
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() { memory::release(data); }

  // Returns the first element.
  T read() const {
    T found;
    memory::copy(&found, data, sizeof(found));
    return found;
  }

  T* data;
};

// A Way says what a few steps do beside the rule.
struct Way {
  bool counts_on_device = false;
  bool scaled = false;     // divides the gradients, and the second step meets an overflow
  bool clips = false;      // measures the gradients first
  bool zeroes = false;     // sets the gradients to zero
  bool strided = false;    // every second element of its memory belongs to a gradient
  bool at_random = false;  // rounds all 16-bit streams at random
  Master master = Master::none;
};

// Adds the squares of a gradient, chunk by chunk.
void add_squares(const OnHost& streams, int64_t numel, ExactSum& sum) {
  for (int64_t chunk = 0; chunk < numel; chunk += kChunk) {
    double lanes[kRow] = {};
    for (int64_t i = chunk; i < std::min(chunk + kChunk, numel); ++i) {
      const auto x = streams.load<double>(kGrad, i);
      lanes[i % kRow] = fma(x, x, lanes[i % kRow]);
    }
    sum.add(sum_of_pairs(lanes, kRow));
  }
}

// Takes steps of one rule over tensors of all sizes at all offsets.
template <typename Rule, typename T, int N>
class Trial {
 public:
  using Hyperparameters = typename Rule::Hyperparameters;
  using RuleScalars = typename Rule::template Scalars<T>;

  Trial(const char* what, const std::vector<Dtype>& dtypes, const Hyperparameters& hyperparameters, const Way& way)
      : what_(what), dtypes_(dtypes), hyperparameters_(hyperparameters), way_(way) {
    constexpr int64_t tile = cuda::kTile;
    constexpr int offsets[][kMaxStreams] = {{}, {1, 1, 1, 1, 1, 1}, {0, 1}, {3, 2, 1, 0, 5, 2}, {4, 4}};
    std::mt19937 random(1);
    std::vector<float> counts;
    std::vector<Layout> layouts;
    for (const auto& offset : offsets) {
      for (const int64_t numel :
           {int64_t(0), int64_t(1), int64_t(7), int64_t(100), tile - 1, tile, tile + 1, 2 * tile + 5, int64_t(0)}) {
        Tensor& tensor = tensors_.emplace_back();
        tensor.numel = numel;
        for (int k = 0; k < stream_count(); ++k) {
          const int64_t held = way.strided && k == kGrad ? 2 * numel : numel;
          tensor.streams.emplace_back(dtypes[static_cast<size_t>(k)], held, offset[k], random, k > kFirstState);
        }
        for (int c = 0; c < kMaxStateScalars; ++c) {
          counts.push_back(c == 0 ? 0.0f : 1.0f);  // the step count; mu_product
          tensor.counts[c] = {counts.back(), true};
        }
        tensor.layout.dims = 1;
        tensor.layout.sizes[0] = numel;
        for (int k = 0; k < kMaxStreams; ++k) tensor.layout.strides[k][0] = k == kGrad ? 2 : 1;
        layouts.insert(layouts.end(), 2, tensor.layout);  // of all streams, and of the gradient alone
      }
    }
    counts_.emplace(counts);
    layouts_.emplace(layouts);
  }

  // Returns how much went wrong in a step.
  int step(int number) {
    const bool overflows = way_.scaled && number == 2;
    Problem problem;
    const RuleScalars scalars = count_step(number, overflows);
    const uint32_t slot = add_slot(problem, scalars, number);
    for (size_t t = 0; t < tensors_.size(); ++t) problem.add(row_of(t, number, slot), gradient_of(t));
    problem.upload(cuda::kTile, way_.counts_on_device);
    cuda::Arguments& arguments = problem.arguments;
    arguments.layouts = layouts_->data;
    arguments.seed = kSeed;
    arguments.zeroes = way_.zeroes;
    if (way_.scaled) {
      arguments.found_inf = numbers_.data + (overflows ? 2 : 0);
      arguments.grad_scale = numbers_.data + 1;
    }
    Clip clip{0, 1};
    const char* error = way_.clips ? measure(arguments, clip) : nullptr;
    for (Tensor& tensor : tensors_) {
      tensor.on_host.coefficient = clip.coefficient;
      if (!overflows) update_each<Rule, T, N>(scalars, tensor.on_host, tensor.numel);
      for (int64_t i = 0; way_.zeroes && i < tensor.numel; ++i) tensor.on_host.store(kGrad, i, T(0));
    }
    const auto arithmetic = sizeof(T) == 4 ? Arithmetic::fp32 : Arithmetic::fp64;
    if (error == nullptr) error = cuda::launch(rule_index<Rule>(), arithmetic, arguments, nullptr);
    if (error != nullptr) {
      std::printf("%s: %s\n", what_, error);
      return 1;
    }
    return compare(number, clip);
  }

 private:
  static constexpr int kStateScalars = sizeof(Rule::state_scalar_keys) / sizeof(char*) - 1;
  static constexpr double kScale = 8, kMaxNorm = 0.5;
  static constexpr uint64_t kSeed = 5;  // of random bits

  struct Tensor {
    std::vector<Buffer> streams;
    int64_t numel;
    StateScalar counts[kMaxStateScalars];
    Layout layout;
    Rounding rounding;
    OnHost on_host;
  };
  struct Measured {
    cuda::Norm norm;
    double norm_out;
  };

  int stream_count() const { return kFirstState + N + (way_.master != Master::none); }
  const void* gradient_of(size_t t) const {
    return tensors_[t].streams[kGrad].device + tensors_[t].streams[kGrad].begin;
  }

  // Prepares the scalars of a step, and counts it unless it meets an overflow.
  RuleScalars count_step(int number, bool overflows) {
    const auto power = [](double x, double n) { return dracopt::power(x, static_cast<int64_t>(n)); };
    RuleScalars scalars{};
    for (Tensor& tensor : tensors_) {
      StateScalar counts[kMaxStateScalars];
      std::copy(tensor.counts, tensor.counts + kMaxStateScalars, counts);
      scalars = Rule::template prepare<T>(counts, number == 1, hyperparameters_, power);
      if (!overflows) std::copy(counts, counts + kMaxStateScalars, tensor.counts);
    }
    return scalars;
  }

  // Adds the scalars, or the recipe for them, behind the number of the step, by which numbers are rounded at random.
  uint32_t add_slot(Problem& problem, const RuleScalars& scalars, int number) const {
    uint32_t slot;
    if (way_.counts_on_device) {
      cuda::Recipe recipe{};
      recipe.first = number == 1;
      std::memcpy(recipe.words, &hyperparameters_, sizeof(hyperparameters_));
      slot = problem.add_slot(&recipe, sizeof(recipe));
    } else {
      slot = problem.add_slot(&scalars, sizeof(scalars));
    }
    const auto step = static_cast<uint64_t>(number);
    problem.add_slot(&step, sizeof(step));  // each slot lies before those that were added earlier
    return slot;
  }

  // Describes a tensor for the kernel, and for the loop over its elements.
  cuda::Row row_of(size_t t, int number, uint32_t slot) {
    Tensor& tensor = tensors_[t];
    OnHost& streams = tensor.on_host = OnHost{};
    const bool strided = way_.strided && tensor.numel > 0;
    cuda::Row row;
    std::memset(static_cast<void*>(&row), 0, sizeof(row));
    for (int k = 0; k < stream_count(); ++k) {
      Buffer& buffer = tensor.streams[static_cast<size_t>(k)];
      streams.dtypes[k] = dtypes_[static_cast<size_t>(k)];
      streams.data[k] = reinterpret_cast<char*>(buffer.host.data()) + buffer.begin;
      row.describe(k, buffer.device + buffer.begin, streams.dtypes[k], !(strided && k == kGrad));
      const bool is_rounded = way_.at_random && k != kGrad && k < kFirstState + N && itemsize(streams.dtypes[k]) == 2;
      row.at_random |= static_cast<uint8_t>(is_rounded << k);
    }
    for (int c = 0; c < kStateScalars && way_.counts_on_device; ++c) row.state_scalars[c] = count_on_device(t, c);
    row.state_scalar_fp32 = static_cast<uint8_t>((1 << kStateScalars) - 1);
    row.numel = tensor.numel;
    row.slot = slot;
    row.layout = strided ? static_cast<int32_t>(2 * t) : cuda::kDense;
    row.numbers = cuda::kDense;
    row.states = N;
    row.has_recipe = way_.counts_on_device;
    row.master = streams.master = way_.master;
    row.param = static_cast<uint32_t>(t);
    tensor.rounding = {kSeed, static_cast<uint32_t>(number), row.param, row.at_random, 0, nullptr};
    if (strided) streams.layout = &tensor.layout;
    if (way_.at_random) streams.rounding = &tensor.rounding;
    if (way_.scaled) streams.divisor = kScale;
    return row;
  }

  float* count_on_device(size_t t, int c) const {
    return counts_->data + t * kMaxStateScalars + static_cast<size_t>(c);
  }

  // Measures the gradients on the device and on the host.
  const char* measure(cuda::Arguments& arguments, Clip& clip) {
    ExactSum squares{};
    for (const Tensor& tensor : tensors_) add_squares(tensor.on_host, tensor.numel, squares);
    clip = Clip::of(squares.rounded(), way_.scaled ? kScale : 1, kMaxNorm);
    arguments.norm = &measured_.data->norm;
    arguments.norm_out = &measured_.data->norm_out;
    arguments.multiplier = &measured_.data->norm.coefficient;
    arguments.max_norm = kMaxNorm;
    arguments.blocks_in_all = arguments.blocks;
    return cuda::measure(arguments, nullptr);
  }

  int compare(int number, const Clip& clip) const {
    int wrong = 0;
    const double norm = measured_.read().norm_out;
    if (norm != clip.norm) {
      std::printf("%s: step %d, the norm is %.17g, not %.17g\n", what_, number, norm, clip.norm);
      ++wrong;
    }
    for (size_t t = 0; t < tensors_.size(); ++t) {
      bool right = true;
      for (const Buffer& buffer : tensors_[t].streams) right &= buffer.is_as_on_the_host();
      for (int c = 0; way_.counts_on_device && c < kStateScalars; ++c) {
        float found;
        memory::copy(&found, count_on_device(t, c), sizeof(found));
        right &= found == static_cast<float>(tensors_[t].counts[c].value);
      }
      if (right) continue;
      std::printf("%s: step %d, tensor %zu (%lld elements) differs\n", what_, number, t,
                  static_cast<long long>(tensors_[t].numel));
      ++wrong;
    }
    return wrong;
  }

  const char* const what_;
  const std::vector<Dtype> dtypes_;
  const Hyperparameters hyperparameters_;
  const Way way_;
  std::vector<Tensor> tensors_;
  std::optional<OnDevice<float>> counts_;  // the state scalars of each tensor
  std::optional<OnDevice<Layout>> layouts_;
  OnDevice<float> numbers_{{0.0f, kScale, 1.0f}};  // found_inf, grad_scale, found_inf
  OnDevice<Measured> measured_{{Measured{}}};
};

// Takes a few steps. Returns how much went wrong.
template <typename Rule, typename T, int N>
int run(const char* what, const std::vector<Dtype>& dtypes, const typename Rule::Hyperparameters& hyperparameters,
        const Way& way) {
  Trial<Rule, T, N> trial(what, dtypes, hyperparameters, way);
  int wrong = 0;
  for (int number = 1; number <= 3; ++number) wrong += trial.step(number);
  std::printf("%-28s %s\n", what, wrong == 0 ? "right" : "WRONG");
  return wrong;
}

// Makes hyperparameters of any rule, by which each state and each flag matters.
template <typename Rule>
typename Rule::Hyperparameters ordinary() {
  std::vector<double> numbers;
  for (const GroupKey* key = Rule::group_keys; key->name != nullptr; ++key) {
    if (key->kind == KeyKind::decay_rates) numbers.push_back(0.9);
    numbers.push_back(key->kind == KeyKind::decay_rates ? 0.99 : key->kind == KeyKind::flag ? 1 : 1e-2);
  }
  typename Rule::Hyperparameters found;
  std::memcpy(&found, numbers.data(), sizeof(found));
  return found;
}

// Steps tensors by a rule with all of its states: in fp32, and all in bf16.
template <typename Rule>
int run_in_usual_dtypes(const Way& way) {
  int wrong = 0;
  for (const auto& [dtype, in] : {std::pair(Dtype::fp32, " in fp32"), std::pair(Dtype::bf16, " in bf16")}) {
    const std::vector<Dtype> dtypes(kFirstState + Rule::max_states, dtype);
    const std::string what = std::string(Rule::name) + in;
    wrong += run<Rule, float, Rule::max_states>(what.c_str(), dtypes, ordinary<Rule>(), way);
  }
  return wrong;
}

#if defined(__CUDACC__)
struct Counts {
  unsigned long long asked, exact, wrong;
};

// Compares two numbers bit by bit, except that all NaNs count as equal, because a GPU chooses their bits.
__device__ bool same(float a, float b) { return __float_as_uint(a) == __float_as_uint(b) || (a != a && b != b); }

__device__ void compare(const cuda::FastMath& math, float fast, float plain, Counts& counts) {
  ++counts.asked;
  if (!math.exact || fast != fast) return;  // an update that leads to a NaN is done again
  ++counts.exact;
  counts.wrong += !same(fast, plain);
}

__device__ uint32_t scrambled(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// Compares the root of every float, divided by one divisor.
__global__ void compare_roots(float d, Counts* counts) {
  Counts found{};
  for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < uint64_t(1) << 32;
       i += gridDim.x * blockDim.x) {
    cuda::FastMath math;
    const float x = __uint_as_float(static_cast<uint32_t>(i));
    const float fast = math.root_over(x, Divisor<float>::of(d));
    compare(math, fast, PlainMath().root_over(x, Divisor<float>::of(d)), found);
  }
  atomicAdd(&counts->asked, found.asked);
  atomicAdd(&counts->exact, found.exact);
  atomicAdd(&counts->wrong, found.wrong);
}

// Compares the reciprocal of every float whose reciprocal FastMath uses.
__global__ void compare_reciprocals(Counts* counts) {
  Counts found{};
  for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < uint64_t(1) << 32;
       i += gridDim.x * blockDim.x) {
    const float d = __uint_as_float(static_cast<uint32_t>(i));
    if (!(d >= 0x1p-126f && cuda::FastMath::divides_by(d))) continue;
    compare(cuda::FastMath(), cuda::FastMath::reciprocal(d), 1 / d, found);
  }
  atomicAdd(&counts->asked, found.asked);
  atomicAdd(&counts->exact, found.exact);
  atomicAdd(&counts->wrong, found.wrong);
}

// Compares quotients of many numerators for every significand of a divisor. Half of the pairs have any size; the others
// are not far from one.
__global__ void compare_quotients(int rounds, Counts* counts) {
  Counts found{};
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < 1u << 23; i += gridDim.x * blockDim.x) {
    for (int round = 0; round < rounds; ++round) {
      const uint32_t a = scrambled(i * 2 + 1 + static_cast<uint32_t>(round) * 0x9e3779b9u), b = scrambled(a + i);
      const uint32_t exponent = round % 2 == 0 ? b & 0x7f800000u : (b >> 29) + 120u << 23;
      const float d = __uint_as_float(i | exponent);
      const float x = __uint_as_float(round % 2 == 0 ? a : (a & 0x807fffffu) | (b & 0x70000000u) >> 5 | 0x3c000000u);
      cuda::FastMath math;
      compare(math, math.quotient(x, d), PlainMath().quotient(x, d), found);
      cuda::FastMath by_constant;
      const auto constant = Divisor<float>::of(d);
      compare(by_constant, by_constant.quotient(x, constant), PlainMath().quotient(x, constant), found);
    }
  }
  atomicAdd(&counts->asked, found.asked);
  atomicAdd(&counts->exact, found.exact);
  atomicAdd(&counts->wrong, found.wrong);
}

// Compares FastMath with IEEE's instructions. Returns how many of the comparisons went wrong.
int compare_math() {
  auto* const counts = static_cast<Counts*>(memory::allocate(sizeof(Counts)));
  int wrong = 0;
  const auto report = [&](const char* what, double least) {
    Counts found;
    memory::copy(&found, counts, sizeof(found));
    const double share = static_cast<double>(found.exact) / static_cast<double>(found.asked);
    const bool right = found.wrong == 0 && share >= least;
    std::printf("%-28s %s: %llu of %llu differ, %llu left to PlainMath\n", what, right ? "right" : "WRONG", found.wrong,
                found.exact, found.asked - found.exact);
    wrong += !right;
  };
  const auto clear = [&] {
    const Counts none{};
    memory::copy(counts, &none, sizeof(none));
  };
  for (const float d : {1.0f, 0.03162277f, 0.9999995f, 0.7071068f, 0.1414214f}) {
    clear();
    compare_roots<<<2048, 256>>>(d, counts);
    report("root_over", 0.4);
  }
  clear();
  compare_reciprocals<<<2048, 256>>>(counts);
  report("reciprocal", 1);
  clear();
  compare_quotients<<<2048, 256>>>(2048, counts);
  report("quotient", 0.3);
  memory::release(counts);
  return wrong;
}
#else
int compare_math() { return 0; }
#endif

}  // namespace
}  // namespace dracopt

// check [kernels]: any argument leaves out FastMath's comparisons, which take too long if a tool watches every access
int main(int argc, char**) {
  using namespace dracopt;
  if (const char* reason = memory::unavailable()) {
    std::fprintf(stderr, "no GPU: %s\n", reason);
    return 2;
  }
  constexpr Dtype fp32 = Dtype::fp32, fp64 = Dtype::fp64, bf16 = Dtype::bf16, fp16 = Dtype::fp16;
  const Adam::Hyperparameters adam{1e-3, 0.9, 0.999, 1e-8, 1e-2, 0, 1}, amsgrad{1e-3, 0.9, 0.999, 1e-8, 1e-2, 1, 0};
  const Sgd::Hyperparameters plain{1e-2, 0, 0, 1e-2, 0}, nesterov{1e-2, 0.9, 0, 1e-2, 1};
  int wrong = argc > 1 ? 0 : compare_math();
  for (const bool on_device : {false, true}) {
    const Way plainly{.counts_on_device = on_device}, scaled{.counts_on_device = on_device, .scaled = on_device};
    const Way clipped{.counts_on_device = on_device, .scaled = on_device, .clips = true, .zeroes = true};
    const Way strided{.counts_on_device = on_device, .clips = true, .zeroes = true, .strided = true};
    const Way at_random{.counts_on_device = on_device, .zeroes = on_device, .at_random = true};
    const Way fp32_masters{.counts_on_device = on_device, .zeroes = true, .master = Master::fp32};
    const Way halves{.counts_on_device = on_device, .clips = true, .zeroes = on_device, .master = Master::split16};
    wrong += run<Adam, float, 2>("AdamW fp32", {fp32, fp32, fp32, fp32}, adam, plainly);
    wrong += run<Adam, float, 2>("AdamW fp32, scaled", {fp32, fp32, fp32, fp32}, adam, scaled);
    wrong += run<Adam, float, 2>("AdamW bf16, fp32 states", {bf16, bf16, fp32, fp32}, adam, plainly);
    wrong += run<Adam, float, 2>("AdamW bf16", {bf16, bf16, bf16, bf16}, adam, plainly);
    wrong += run<Adam, float, 2>("AdamW fp16, fp32 states", {fp16, fp16, fp32, fp32}, adam, scaled);
    wrong += run<Adam, float, 2>("AdamW fp16", {fp16, fp16, fp16, fp16}, adam, plainly);
    wrong += run<Adam, float, 3>("Adam amsgrad, fp16 gradient", {fp32, fp16, fp32, bf16, fp32}, amsgrad, plainly);
    wrong += run<Adam, double, 2>("AdamW fp64", {fp64, fp64, fp64, fp64}, adam, scaled);
    wrong += run<Adam, double, 2>("AdamW fp64, bf16 gradient", {fp64, bf16, fp32, fp64}, adam, plainly);
#define DRACOPT_RUN(Rule) wrong += run_in_usual_dtypes<Rule>(plainly);
    DRACOPT_FOR_EACH_RULE(DRACOPT_RUN)
#undef DRACOPT_RUN
    wrong += run<Sgd, float, 0>("SGD fp32", {fp32, fp32}, plain, plainly);
    wrong += run<Sgd, float, 1>("SGD Nesterov bf16", {bf16, bf16, bf16}, nesterov, scaled);
    wrong += run<Adam, float, 2>("AdamW fp32, clipped", {fp32, fp32, fp32, fp32}, adam, clipped);
    wrong += run<Adam, double, 2>("AdamW fp64, clipped", {fp64, fp64, fp64, fp64}, adam, clipped);
    wrong += run<Adam, float, 2>("AdamW bf16, strided", {bf16, bf16, fp32, fp32}, adam, strided);
    wrong += run<Adam, float, 2>("AdamW bf16, at random", {bf16, bf16, fp32, fp32}, adam, at_random);
    wrong += run<Adam, float, 2>("AdamW fp16, at random", {fp16, fp16, fp16, fp16}, adam, at_random);
    wrong += run<Adam, float, 2>("AdamW bf16, masters", {bf16, bf16, fp32, fp32, fp32}, adam, fp32_masters);
    wrong += run<Adam, float, 2>("AdamW fp16, masters", {fp16, fp16, fp32, fp32, fp32}, adam, fp32_masters);
    wrong += run<Adam, float, 2>("AdamW bf16, split masters", {bf16, bf16, fp32, fp32, bf16}, adam, halves);
    wrong += run<Sgd, float, 1>("SGD Nesterov bf16, masters", {bf16, bf16, fp32, fp32}, nesterov, fp32_masters);
  }
  return wrong == 0 ? 0 : 1;
}
