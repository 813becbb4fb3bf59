// Takes a step that is packed into words, for callers without a binding to their torch. dracopt_ext/portable/packed.py
// packs the words and says what each one means.
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
  int64_t numel, first_tile, layout, flags, state_scalars[kMaxStateScalars];
  void* streams[1 + kMaxStates];  // the parameter, then its states; null for missing ones
};
enum Flag : int64_t { kMaximize = 1, kStateScalarFp32 = 2 };  // the second is for the first state scalar

struct Arguments {
  int64_t found_inf, grad_scale;
  double divisor;
  int64_t finished, count, programs;
  struct {
    void* grad;
    int64_t recipe;
  } tensors[];
};

// A recipe holds flags, the hyperparameters and the state scalars. This flag marks a first step.
constexpr int64_t kFirst = int64_t(1) << 32;

double number(int64_t word) { return __builtin_bit_cast(double, word); }

const double* hyperparameters(const int64_t* recipe) { return reinterpret_cast<const double*>(recipe + 1); }

// Prepares the scalars of a tensor with these flags from a recipe that holds all numbers itself. Returns whether the
// scalars are finite.
bool prepare_packed(const RuleEntry& rule, Arithmetic arithmetic, const int64_t* recipe, int64_t flags,
                    PowerMemo& powers, Scalars* to) {
  StateScalar state_scalars[kMaxStateScalars];
  for (int k = 0; k < rule.state_scalars; ++k) {
    state_scalars[k] = {number(recipe[1 + rule.hyperparameters + k]), (flags & kStateScalarFp32 << k) != 0};
  }
  const bool first = (recipe[0] & kFirst) != 0;
  return rule.prepare[static_cast<int>(arithmetic)](state_scalars, first, hyperparameters(recipe), powers, to);
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
class CpuLaunch {
 public:
  CpuLaunch(const RuleEntry& rule, const uint8_t* dtypes, const int64_t* table, const int64_t* arguments)
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
    return in_parallel(parallel_for, work.units, kGrainUnits, cpu::run_range, &work);
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

  // Tensors with the same recipe and the same flags share an update.
  const Update& update_of(int64_t recipe, int64_t flags, int states, double divisor) {
    const auto [found, is_new] = updates_.try_emplace({recipe, flags});
    Prepared& prepared = found->second;
    if (is_new) {
      prepare_packed(rule_, arithmetic_, words_ + recipe, flags, powers_, &prepared.scalars);
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
  std::deque<Layout> layouts_;  // a deque's elements do not move
  std::map<std::pair<int64_t, int64_t>, Prepared> updates_;
};

}  // namespace
}  // namespace cpu
}  // namespace dracopt

extern "C" {

// Returns the constants that Python shares with this library, a name and its values in each line. A rule's values are
// the keys of the group, the state scalars and the states, each list ended by a semicolon.
DRACOPT_EXPORT const char* dracopt_constants() {
  using dracopt::RuleEntry;
  static const std::string constants = [] {
    const auto line = [](const char* name, auto... values) {
      std::string text = name;
      ((text += ' ' + std::to_string(values)), ...);
      return text + '\n';
    };
    const auto keys = [](const char* const* names) {
      std::string text;
      for (; *names != nullptr; ++names) text += ' ' + std::string(*names);
      return text + " ;";
    };
    // The names stand in the order of the codes in core/dtype.h.
    static_assert(static_cast<int>(dracopt::Dtype::fp32) == 0 && static_cast<int>(dracopt::Dtype::fp64) == 1 &&
                  static_cast<int>(dracopt::Dtype::bf16) == 2 && static_cast<int>(dracopt::Dtype::fp16) == 3);
    std::string text = "dtypes fp32 fp64 bf16 fp16\n";
    text += line("scalar_bytes", dracopt::kScalarBytes);
    text += line("row_words", sizeof(dracopt::cpu::Row) / sizeof(int64_t));
    text += line("header_words", sizeof(dracopt::cpu::Arguments) / sizeof(int64_t));
    text += line("row_flags", +dracopt::cpu::kMaximize, +dracopt::cpu::kStateScalarFp32);
    text += line("recipe_first", dracopt::cpu::kFirst);
    const dracopt::cpu::Kernels& kernels = dracopt::cpu::kernels();
    for (const RuleEntry* rule = kernels.rules; rule != kernels.rules + kernels.rule_count; ++rule) {
      text += std::string("rule ") + rule->name;
      for (const dracopt::GroupKey* key = rule->group_keys; key->name != nullptr; ++key) {
        text += ' ' + std::string(key->name);
      }
      text += " ;" + keys(rule->state_scalar_keys) + keys(rule->state_keys) + '\n';
    }
    return text;
  }();
  return constants.c_str();
}

// Returns the instruction set of the kernels. If DRACOPT_ISA names none that this machine can run, returns null and
// sets `why_not`.
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

// Prepares the scalars of a tensor with these flags from a recipe that holds all numbers itself. `to` must have room
// for kScalarBytes. Returns the number of words; 0 if the scalars are not finite, or no rule has this name.
DRACOPT_EXPORT size_t dracopt_prepare(const char* rule, bool is_fp64, const int64_t* recipe, int64_t flags, void* to) {
  const dracopt::RuleEntry* const entry = dracopt::cpu::find_rule(rule);
  if (entry == nullptr) return 0;
  const auto arithmetic = is_fp64 ? dracopt::Arithmetic::fp64 : dracopt::Arithmetic::fp32;
  dracopt::PowerMemo powers{};
  dracopt::Scalars scalars;
  if (!dracopt::cpu::prepare_packed(*entry, arithmetic, recipe, flags, powers, &scalars)) return 0;
  const size_t bytes = entry->scalar_bytes[static_cast<int>(arithmetic)];
  std::memcpy(to, scalars.bytes, bytes);
  return (bytes + sizeof(int64_t) - 1) / sizeof(int64_t);
}

// Updates the tensors that the words describe, on the CPU. The dtypes are those of the parameter, the gradient and
// three states. Returns null, or says what went wrong.
DRACOPT_EXPORT const char* dracopt_update(const char* rule, const uint8_t* dtypes, const int64_t* table,
                                          const int64_t* arguments, dracopt::cpu::ParallelFor parallel_for) {
  try {
    const dracopt::RuleEntry* const entry = dracopt::cpu::find_rule(rule);
    if (entry == nullptr) return "no compiled rule has this name";
    dracopt::cpu::CpuLaunch launch(*entry, dtypes, table, arguments);
    return launch.run(parallel_for) ? nullptr : "torch_parallel_for failed";
  } catch (const std::exception&) {
    return "out of memory";
  }
}
}
