// A key of the parameter group that a rule reads.
#pragma once

namespace dracopt {

enum class KeyKind { number, decay_rates, flag };

// Decay rates are a pair of numbers, each of them a hyperparameter, at least 0 and less than 1. Only a flag's truth
// counts.
struct GroupKey {
  const char* name = nullptr;
  KeyKind kind = KeyKind::number;
};

}  // namespace dracopt
