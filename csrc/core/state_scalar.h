// The scalars that a tensor's state carries from step to step.
#pragma once

#include "core/macros.h"

namespace dracopt {

constexpr int kMaxStateScalars = 2;

// A state scalar is rounded to fp32 or fp64, as the user's state holds it. Arithmetic rounds alike: a step count in
// fp32 stops at 2^24, as in torch.
struct StateScalar {
  double value;
  bool is_fp32;

  DRACOPT_HD double rounded(double x) const { return is_fp32 ? static_cast<double>(static_cast<float>(x)) : x; }
  DRACOPT_HD double add(double x) { return value = rounded(value + rounded(x)); }
  DRACOPT_HD double multiply(double x) { return value = rounded(value * rounded(x)); }
};

}  // namespace dracopt
