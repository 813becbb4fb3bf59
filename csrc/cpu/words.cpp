// A step from words, for callers that have no binding to their torch. dracopt_ext/portable/words.py makes them and says
// what they are.
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace dracopt {
namespace cpu {
namespace {

struct Row {
  int64_t numel, first_tile, layout, flags, carried[kMaxCarried];
  void* streams[1 + kMaxStates];  // the parameter, then its states; null where there is none
};
enum Flag : int64_t { kMaximize = 1, kCarriedFp32 = 2 };  // the second is of the first carried scalar

struct Arguments {
  int64_t found_inf, grad_scale;
  double divisor;
  int64_t finished, count, programs;
  struct {
    void* grad;
    int64_t recipe;
  } tensors[];
};

// A recipe: flags, the hyperparameters, the carried scalars.
constexpr int64_t kFirst = int64_t(1) << 32;

double number(int64_t word) { return __builtin_bit_cast(double, word); }

const double* hyperparameters(const int64_t* recipe) { return reinterpret_cast<const double*>(recipe + 1); }

// Prepares the scalars of a tensor from a recipe that holds all numbers itself. The flags are the tensor's. Returns
// whether the scalars are finite.
bool prepare(const RuleEntry& rule, Arithmetic arithmetic, const int64_t* recipe, int64_t flags, PowerMemo& powers,
             Scalars* to) {
  Carried carried[kMaxCarried];
  for (int k = 0; k < rule.carried; ++k) {
    carried[k] = {number(recipe[1 + rule.hyperparameters + k]), (flags & kCarriedFp32 << k) != 0};
  }
  const bool first = (recipe[0] & kFirst) != 0;
  return rule.prepare[static_cast<int>(arithmetic)](carried, first, hyperparameters(recipe), powers, to);
}

Layout layout_of(const int64_t* words, int streams) {
  Layout layout;
  layout.dims = static_cast<int>(*words++);
  for (int d = 0; d < layout.dims; ++d) layout.sizes[d] = *words++;
  for (int k = 0; k < streams; ++k) {
    for (int d = 0; d < layout.dims; ++d) layout.strides[k][d] = *words++;
  }
  return layout;
}

// The tensors that one launch updates.
class Launch {
 public:
  Launch(const RuleEntry& rule, const uint8_t* dtypes, const int64_t* table, const int64_t* arguments)
      : rule_(rule), dtypes_(dtypes), table_(table), words_(arguments) {
    const Arguments& header = *reinterpret_cast<const Arguments*>(arguments);
    const Row* const rows = reinterpret_cast<const Row*>(table);
    for (int k = 0; k < kMaxStreams; ++k) {
      if (dtype(k) == Dtype::fp64) arithmetic_ = Arithmetic::fp64;
    }
    segments_.reserve(static_cast<size_t>(header.count));
    for (int64_t i = 0; i < header.count; ++i) {
      append(rows[i], header.tensors[i].grad, header.tensors[i].recipe, header.divisor);
    }
  }

  bool run(ParallelFor parallel_for) {
    Work work{segments_.data(), segments_.size(), number_units(segments_.data(), segments_.size())};
    return in_parallel(parallel_for, work.units, kGrainUnits, cpu::run, &work);
  }

 private:
  Dtype dtype(int stream) const { return static_cast<Dtype>(dtypes_[stream]); }

  void append(const Row& row, void* grad, int64_t recipe, double divisor) {
    const int states = rule_.states(hyperparameters(words_ + recipe));
    Segment segment{};
    segment.data[kParam] = row.streams[0];
    segment.data[kGrad] = grad;
    for (int k = 0; k < states; ++k) segment.data[kFirstState + k] = row.streams[1 + k];
    if (row.layout != 0) {
      segment.layout = &layouts_.emplace_back(layout_of(table_ + row.layout, kFirstState + states));
    }
    for (int k = 0; k < kFirstState + states; ++k) {
      segment.dtypes[k] = dtype(k);
      segment.dense[k] = segment.layout == nullptr || segment.layout->dense(k);
    }
    segment.update = &update_of(recipe, row.flags, states, divisor);
    segment.numel = row.numel;
    segment.unit_numel = kUnitBytes / itemsize(dtype(kParam));
    segments_.push_back(segment);
  }

  // Tensors with the same recipe have the same update, unless their flags differ.
  const Update& update_of(int64_t recipe, int64_t flags, int states, double divisor) {
    const auto [found, is_new] = updates_.try_emplace({recipe, flags});
    Prepared& prepared = found->second;
    if (is_new) {
      prepare(rule_, arithmetic_, words_ + recipe, flags, powers_, &prepared.scalars);
      prepared.update = {rule_.update[static_cast<int>(arithmetic_)][states], &prepared.scalars, divisor,
                         (flags & kMaximize) != 0};
    }
    return prepared.update;
  }

  struct Prepared {
    Scalars scalars;
    Update update;
  };

  const RuleEntry& rule_;
  const uint8_t* dtypes_;
  const int64_t *table_, *words_;
  Arithmetic arithmetic_ = Arithmetic::fp32;
  PowerMemo powers_{};
  std::vector<Segment> segments_;
  std::deque<Layout> layouts_;  // they do not move
  std::map<std::pair<int64_t, int64_t>, Prepared> updates_;
};

}  // namespace
}  // namespace cpu
}  // namespace dracopt

extern "C" {

// The instruction set of the kernels; null and why not, if DRACOPT_ISA names none that this machine runs.
DRACOPT_EXPORT const char* dracopt_isa(const char** why_not) {
  static std::string reason;
  try {
    return dracopt::cpu::kernels().isa;
  } catch (const std::exception& error) {
    reason = error.what();
    *why_not = reason.c_str();
    return nullptr;
  }
}

// Writes the scalars that a recipe leads to, if it holds all numbers itself, for a tensor with these flags. There is
// room for kScalarBytes. Returns the number of words; 0 if they are not finite, or no rule has this name.
DRACOPT_EXPORT size_t dracopt_prepare(const char* rule, bool is_fp64, const int64_t* recipe, int64_t flags, void* to) {
  const dracopt::RuleEntry* const entry = dracopt::cpu::find_rule(rule);
  if (entry == nullptr) return 0;
  const auto arithmetic = is_fp64 ? dracopt::Arithmetic::fp64 : dracopt::Arithmetic::fp32;
  dracopt::PowerMemo powers{};
  dracopt::Scalars scalars;
  if (!dracopt::cpu::prepare(*entry, arithmetic, recipe, flags, powers, &scalars)) return 0;
  const size_t bytes = entry->scalar_bytes[static_cast<int>(arithmetic)];
  std::memcpy(to, scalars.bytes, bytes);
  return (bytes + sizeof(int64_t) - 1) / sizeof(int64_t);
}

// Updates what the words describe, on the CPU. The dtypes are those of the parameter, the gradient and three states.
// Returns null, or what went wrong.
DRACOPT_EXPORT const char* dracopt_update(const char* rule, const uint8_t* dtypes, const int64_t* table,
                                          const int64_t* arguments, dracopt::cpu::ParallelFor parallel_for) {
  try {
    const dracopt::RuleEntry* const entry = dracopt::cpu::find_rule(rule);
    if (entry == nullptr) return "no compiled rule has this name";
    dracopt::cpu::Launch launch(*entry, dtypes, table, arguments);
    return launch.run(parallel_for) ? nullptr : "torch_parallel_for failed";
  } catch (const std::exception&) {
    return "out of memory";
  }
}
}
