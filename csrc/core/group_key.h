// Describes a key of the parameter group that a rule reads.
#pragma once

namespace dracopt {

enum class KeyKind { number, decay_rates, flag };

// Decay rates are a pair of hyperparameters, each at least 0 and less than 1. A rule reads only the truth of a flag.
struct GroupKey {
  const char* name = nullptr;
  KeyKind kind = KeyKind::number;
};

}  // namespace dracopt
