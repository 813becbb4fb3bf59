// What the driver knows of a rule: its names, the number of its states and its compiled functions. No rule is named
// here.
#pragma once

#include <cstddef>

#include "core/segment.h"

namespace dracopt {

constexpr size_t kScalarBytes = 96;
constexpr int kMaxHyperparameters = 12;

enum class Arithmetic : int { fp32 = 0, fp64 = 1 };

struct alignas(16) Scalars {
  unsigned char bytes[kScalarBytes];
};

// The powers computed last. Groups that differ only in their learning rate share them.
struct PowerMemo {
  static constexpr int kEntries = 4;
  double base[kEntries], value[kEntries];
  int64_t exponent[kEntries];
  int next;
};

struct RuleEntry {
  const char* name;
  const char* const* group_keys;  // of the parameter group, null-terminated; a tuple counts as its items
  const char* const* state_keys;  // of the parameter's state, null-terminated
  int hyperparameters;            // doubles that `group_keys` yield
  bool counts_steps;              // the state carries `step`
  int (*states)(const double* hyperparameters);
  // The per-tensor scalars of step number `step` (1 is the first), by arithmetic.
  void (*prepare[2])(double step, const double* hyperparameters, PowerMemo& powers, Scalars* out);
  UpdateFn update[2][kMaxStates + 1];  // by arithmetic and number of states; null where the rule has no such form
};

}  // namespace dracopt
