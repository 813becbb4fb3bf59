// The functions of cuda/kernels.h on the host: loops replace the blocks and threads of kernels.cu.
#include "cuda/kernels.h"

#include <cstring>
#include <vector>

#include "cuda/squares.h"
#include "cuda/update.h"
#include "device.h"
#include "rules/all.h"

int simulated_capturing = 0, simulated_unavailable = 0, simulated_launches = 0, simulated_tables = 0,
    simulated_last_stream = 0;
char simulated_failure[64] = "";
const void* simulated_table = nullptr;

namespace dracopt {
namespace cuda {
namespace {

const char* fails(const char* function) {
  return std::strcmp(simulated_failure, function) == 0 ? "cudaErrorLaunchFailure" : nullptr;
}

Tile tile_for(const Arguments& arguments, uint32_t block) {
  return tile_of(arguments, block, [](const auto& holds) {
    uint32_t count = 0;
    for (uint32_t thread = 0; thread < kThreads; ++thread) count += holds(thread);
    return count;
  });
}

template <typename Rule, typename T>
void step_kernel(const Arguments& arguments) {
  using RuleScalars = typename Rule::template Scalars<T>;
  const bool skips = arguments.found_inf != nullptr && *arguments.found_inf != 0;
  if (skips && arguments.zeroes == 0) return;
  for (uint32_t block = arguments.blocks; block-- > 0;) {  // a GPU runs them in any order
    const Tile tile = tile_for(arguments, block);
    const Row& row = arguments.rows[tile.row];
    const RuleScalars scalars = row.has_recipe ? scalars_from_recipe<Rule, T>(arguments, row)
                                               : *reinterpret_cast<const RuleScalars*>(arguments.words + row.slot);
    for (int thread = 0; thread < kThreads && !skips; ++thread) update<Rule, T>(arguments, tile, scalars, thread);
    for (int thread = 0; thread < kThreads && arguments.zeroes != 0; ++thread) zero_gradient(arguments, tile, thread);
  }
  if (skips || arguments.finished == nullptr) return;
  for (uint32_t i = 0; i < arguments.count; ++i) advance<Rule>(arguments, arguments.rows[i]);
}

#define DRACOPT_STEPS(Rule) {step_kernel<Rule, float>, step_kernel<Rule, double>},
void (*const kSteps[][2])(const Arguments&) = {DRACOPT_FOR_EACH_RULE(DRACOPT_STEPS)};

}  // namespace

const char* unavailable(int) { return simulated_unavailable != 0 ? "switched off" : nullptr; }

const std::vector<int>& architectures() {
  static const std::vector<int> none;
  return none;
}

const char* launch(int rule, Arithmetic arithmetic, const Arguments& arguments, void* stream) {
  if (const char* error = fails("launch")) return error;
  if (arguments.blocks == 0) return "cudaErrorInvalidConfiguration";
  ++simulated_launches;
  simulated_table = arguments.rows;
  simulated_last_stream = static_cast<int>(reinterpret_cast<intptr_t>(stream));
  kSteps[rule][static_cast<int>(arithmetic)](arguments);
  return nullptr;
}

const char* measure(const Arguments& arguments, void* stream) {
  if (const char* error = fails("measure")) return error;
  ++simulated_launches;
  simulated_last_stream = static_cast<int>(reinterpret_cast<intptr_t>(stream));
  Norm& norm = *arguments.norm;
  for (uint32_t block = 0; block < arguments.blocks; ++block) {
    const Tile tile = tile_for(arguments, block);
    double sums[kThreads];
    bool finite = true;
    for (int thread = 0; thread < kThreads; ++thread) {
      const Part part = squares_of_thread(arguments, tile, thread);
      sums[thread] = part.sum;
      finite &= part.finite;
    }
    ExactSum& sum = norm.sums[block % Norm::kSums];
    sum.add(sum_of_pairs(sums, kThreads));
    sum.words[ExactSum::kOther] += !finite;
    if (++norm.finished < arguments.blocks_in_all) continue;
    norm.finished = 0;
    ExactSum total{};
    for (ExactSum& part : norm.sums) {
      for (int k = 0; k < ExactSum::kWords; ++k) total.words[k] += part.words[k];
      part = {};
    }
    finish(arguments, total);
  }
  return nullptr;
}

const char* write_table(void* to, const void* from, size_t bytes, void*) {
  if (const char* error = fails("write_table")) return error;
  ++simulated_tables;
  std::memcpy(to, from, bytes);
  return nullptr;
}

const char* is_capturing(void*, bool& answer) {
  answer = simulated_capturing != 0;
  return fails("is_capturing");
}

}  // namespace cuda
}  // namespace dracopt
