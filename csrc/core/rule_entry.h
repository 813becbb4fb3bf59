// Describes a rule to the driver: its names, its state scalars, the number of its states and its compiled functions.
// This header names no rule.
#pragma once

#include <cstddef>

#include "core/group_key.h"
#include "core/segment.h"
#include "core/state_scalar.h"

namespace dracopt {

constexpr size_t kScalarBytes = 96;
constexpr int kMaxHyperparameters = 12;
constexpr int kMaxStateKeys = 5;  // a rule's state scalars and states, and a master

enum class Arithmetic : uint8_t { fp32 = 0, fp64 = 1 };

struct alignas(16) Scalars {
  unsigned char bytes[kScalarBytes];
};

// Remembers the powers computed last, which groups that differ only in their learning rate share.
struct PowerMemo {
  static constexpr int kEntries = 4;
  double base[kEntries], value[kEntries];
  int64_t exponent[kEntries];
  int next;
};

struct RuleEntry {
  const char* name;
  int index;                             // in the list of rules/all.h
  const GroupKey* group_keys;            // keys of the parameter group, ended by one without a name
  const char* const* state_scalar_keys;  // null-terminated; the step count is the first
  const char* const* state_keys;         // streams of the parameter's state, null-terminated
  int hyperparameters;                   // doubles that `group_keys` yield
  int state_scalars;  // length of `state_scalar_keys`; if not zero, the state is created before the first step
  int (*states)(const double* hyperparameters);
  // Advances the state scalars to this step and computes the step's scalars. `first` tells a rule without state scalars
  // that the state's streams hold nothing yet. Returns whether the scalars are finite.
  bool (*prepare[2])(StateScalar* state_scalars, bool first, const double* hyperparameters, PowerMemo& powers,
                     Scalars* out);
  size_t scalar_bytes[2];              // the size of the step's scalars, by arithmetic
  UpdateFn update[2][kMaxStates + 1];  // by arithmetic and number of states; null if the rule has no such form
};

}  // namespace dracopt
