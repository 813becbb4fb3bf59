// Steps a few awkward tensors through the launcher itself and compares every bit with a loop over the elements. The
// program is small and has no torch, so that compute-sanitizer can watch it. The launcher is a GPU's, or the simulated
// one of the tests.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
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

struct Counted {
  float* device[kMaxStateScalars];
  StateScalar host[kMaxStateScalars];
};

// What a few steps do beside the rule.
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

// Takes a few steps of one rule over tensors of all sizes at all offsets. Returns how many tensors went wrong.
template <typename Rule, typename T, int N>
int run(const char* what, const std::vector<Dtype>& dtypes, const typename Rule::Hyperparameters& hyperparameters,
        const Way& way) {
  constexpr int state_scalar_count = sizeof(Rule::state_scalar_keys) / sizeof(char*) - 1;
  constexpr double max_norm = 0.5, scale = 8;
  constexpr uint64_t seed = 5;  // of random bits
  const int count = kFirstState + N + (way.master != Master::none);
  const int64_t sizes[] = {0, 1, 7, 100, cuda::kTile - 1, cuda::kTile, cuda::kTile + 1, 2 * cuda::kTile + 5, 0};
  const int offsets[][kMaxStreams] = {{}, {1, 1, 1, 1, 1, 1}, {0, 1}, {3, 2, 1, 0, 5, 2}, {4, 4}};
  const auto power = [](double base, double exponent) { return dracopt::power(base, static_cast<int64_t>(exponent)); };
  std::mt19937 random(1);
  std::vector<std::vector<Buffer>> tensors;
  std::vector<int64_t> numels;
  std::vector<Counted> counted;
  for (const auto& offset : offsets) {
    for (const int64_t numel : sizes) {
      std::vector<Buffer> buffers;
      for (int k = 0; k < count; ++k) {
        const int64_t held = way.strided && k == kGrad ? 2 * numel : numel;
        buffers.emplace_back(dtypes[static_cast<size_t>(k)], held, offset[k], random, k > kFirstState);
      }
      tensors.push_back(std::move(buffers));
      numels.push_back(numel);
      Counted count{};
      for (int c = 0; c < state_scalar_count; ++c) {
        const float start = c == 0 ? 0.0f : 1.0f;  // the step count; mu_product
        count.host[c] = {start, true};
        if (!way.counts_on_device) continue;
        count.device[c] = static_cast<float*>(memory::allocate(sizeof(float)));
        memory::copy(count.device[c], &start, sizeof(start));
      }
      counted.push_back(count);
    }
  }
  // Layouts of all streams, each before that of the gradient alone.
  std::vector<Layout> layouts(2 * tensors.size());
  for (size_t t = 0; t < tensors.size(); ++t) {
    Layout& layout = layouts[2 * t];
    layout.dims = 1;
    layout.sizes[0] = numels[t];
    for (int k = 0; k < kMaxStreams; ++k) layout.strides[k][0] = k == kGrad ? 2 : 1;
    layouts[2 * t + 1] = layout;
  }
  const size_t layout_bytes = layouts.size() * sizeof(Layout);
  auto* const layouts_on_device = static_cast<Layout*>(memory::allocate(layout_bytes));
  memory::copy(layouts_on_device, layouts.data(), layout_bytes);
  struct {
    cuda::Norm norm{};
    double norm_out = 0;
  } measured;
  auto* const measured_on_device = static_cast<decltype(measured)*>(memory::allocate(sizeof(measured)));
  memory::copy(measured_on_device, &measured, sizeof(measured));
  const float numbers[] = {0.0f, scale, 1.0f};  // found_inf, grad_scale, found_inf
  auto* const on_device = static_cast<float*>(memory::allocate(sizeof(numbers)));
  memory::copy(on_device, numbers, sizeof(numbers));
  int wrong = 0;
  for (int step = 1; step <= 3; ++step) {
    const bool overflows = way.scaled && step == 2;
    const double divisor = way.scaled ? scale : 1;
    Problem problem;
    typename Rule::template Scalars<T> scalars{};
    for (size_t t = 0; t < tensors.size(); ++t) {
      Counted count = counted[t];
      scalars = Rule::template prepare<T>(count.host, step == 1, hyperparameters, power);
      if (!overflows) counted[t] = count;
    }
    uint32_t slot;
    if (way.counts_on_device) {
      cuda::Recipe recipe{};
      recipe.first = step == 1;
      std::memcpy(recipe.words, &hyperparameters, sizeof(hyperparameters));
      slot = problem.add_slot(&recipe, sizeof(recipe));
    } else {
      slot = problem.add_slot(&scalars, sizeof(scalars));
    }
    // The step by which numbers are rounded is the word before the slot, and slots are added backwards.
    const uint64_t step_word = static_cast<uint64_t>(step);
    problem.add_slot(&step_word, sizeof(step_word));
    std::vector<OnHost> on_host(tensors.size());
    std::vector<Rounding> roundings(tensors.size());
    ExactSum squares{};
    for (size_t t = 0; t < tensors.size(); ++t) {
      cuda::Row row;
      std::memset(static_cast<void*>(&row), 0, sizeof(row));
      OnHost& streams = on_host[t];
      const bool strided = way.strided && numels[t] > 0;
      for (int k = 0; k < count; ++k) {
        Buffer& buffer = tensors[t][static_cast<size_t>(k)];
        streams.dtypes[k] = dtypes[static_cast<size_t>(k)];
        streams.data[k] = reinterpret_cast<char*>(buffer.host.data()) + buffer.begin;
        row.describe(k, buffer.device + buffer.begin, streams.dtypes[k], !(strided && k == kGrad));
      }
      for (int c = 0; c < state_scalar_count; ++c) row.state_scalars[c] = counted[t].device[c];
      row.state_scalar_fp32 = static_cast<uint8_t>((1 << state_scalar_count) - 1);
      row.numel = numels[t];
      row.slot = slot;
      row.layout = strided ? static_cast<int32_t>(2 * t) : cuda::kDense;
      row.numbers = cuda::kDense;
      row.states = N;
      row.has_recipe = way.counts_on_device;
      row.master = streams.master = way.master;
      row.param = static_cast<uint32_t>(t);
      if (strided) streams.layout = &layouts[2 * t];
      if (way.at_random) {
        for (int k = 0; k < kFirstState + N; ++k) {
          if (k != kGrad && itemsize(streams.dtypes[k]) == 2) row.at_random |= static_cast<uint8_t>(1 << k);
        }
        roundings[t] = {seed, static_cast<uint32_t>(step), row.param, row.at_random, 0, nullptr};
        streams.rounding = &roundings[t];
      }
      streams.divisor = divisor;
      problem.add(row, tensors[t][kGrad].device + tensors[t][kGrad].begin);
      add_squares(streams, numels[t], squares);
    }
    problem.upload(cuda::kTile, way.counts_on_device);
    cuda::Arguments& arguments = problem.arguments;
    arguments.layouts = layouts_on_device;
    arguments.seed = seed;
    arguments.zeroes = way.zeroes;
    if (way.scaled) {
      arguments.found_inf = on_device + (overflows ? 2 : 0);
      arguments.grad_scale = on_device + 1;
    }
    const char* error = nullptr;
    Clip clip{0, 1};
    if (way.clips) {
      clip = Clip::of(squares.rounded(), divisor, max_norm);
      arguments.norm = &measured_on_device->norm;
      arguments.norm_out = &measured_on_device->norm_out;
      arguments.multiplier = &measured_on_device->norm.coefficient;
      arguments.max_norm = max_norm;
      arguments.blocks_in_all = arguments.blocks;
      error = cuda::measure(arguments, nullptr);
    }
    for (size_t t = 0; t < tensors.size(); ++t) {
      on_host[t].coefficient = clip.coefficient;
      if (!overflows) update_each<Rule, T, N>(scalars, on_host[t], numels[t]);
      for (int64_t i = 0; way.zeroes && i < numels[t]; ++i) on_host[t].store(kGrad, i, T(0));
    }
    const auto arithmetic = sizeof(T) == 4 ? Arithmetic::fp32 : Arithmetic::fp64;
    if (error == nullptr) error = cuda::launch(rule_index<Rule>(), arithmetic, arguments, nullptr);
    if (error != nullptr) {
      std::printf("%s: %s\n", what, error);
      return 1;
    }
    memory::copy(&measured, measured_on_device, sizeof(measured));
    if (measured.norm_out != clip.norm) {
      std::printf("%s: step %d, the norm is %.17g, not %.17g\n", what, step, measured.norm_out, clip.norm);
      ++wrong;
    }
    for (size_t t = 0; t < tensors.size(); ++t) {
      bool right = true;
      for (const Buffer& buffer : tensors[t]) right &= buffer.is_as_on_the_host();
      for (int c = 0; way.counts_on_device && c < state_scalar_count; ++c) {
        float found;
        memory::copy(&found, counted[t].device[c], sizeof(found));
        right &= found == static_cast<float>(counted[t].host[c].value);
      }
      if (right) continue;
      std::printf("%s: step %d, tensor %zu (%lld elements) differs\n", what, step, t,
                  static_cast<long long>(numels[t]));
      ++wrong;
    }
  }
  for (const Counted& count : counted) {
    for (float* number : count.device) {
      if (number != nullptr) memory::release(number);
    }
  }
  memory::release(on_device);
  memory::release(layouts_on_device);
  memory::release(measured_on_device);
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
