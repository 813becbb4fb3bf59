// What the driver knows of a rule: its names, its carried scalars, the number of its states and its compiled functions.
// No rule is named here.
#pragma once

#include <cstddef>

#include "core/carried.h"
#include "core/group_key.h"
#include "core/segment.h"

namespace dracopt {

constexpr size_t kScalarBytes = 96;
constexpr int kMaxHyperparameters = 12;
constexpr int kMaxStateKeys = 4;  // of a rule's carried scalars and streams together

enum class Arithmetic : uint8_t { fp32 = 0, fp64 = 1 };

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
  int index;                        // in the list of rules/all.h
  const GroupKey* group_keys;       // of the parameter group, ended by one without a name
  const char* const* carried_keys;  // scalars of the parameter's state, null-terminated; the step count is the first
  const char* const* state_keys;    // streams of the parameter's state, null-terminated
  int hyperparameters;              // doubles that `group_keys` yield
  int carried;                      // of `carried_keys`; a rule that has any creates its state before the first step
  int (*states)(const double* hyperparameters);
  // Advances what the state carries to this step and computes the step's scalars. `first` says that the streams of the
  // state hold nothing yet, where the rule carries nothing that would tell. Returns whether the scalars are finite.
  bool (*prepare[2])(Carried* carried, bool first, const double* hyperparameters, PowerMemo& powers, Scalars* out);
  size_t scalar_bytes[2];              // of what it computes, by arithmetic
  UpdateFn update[2][kMaxStates + 1];  // by arithmetic and number of states; null where the rule has no such form
};

}  // namespace dracopt
