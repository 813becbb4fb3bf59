// The list of rules: a new optimizer adds its header and its name here.
#pragma once

#include <type_traits>

#include "rules/adam.h"
#include "rules/lion.h"
#include "rules/nadam.h"
#include "rules/sgd.h"

#define DRACOPT_FOR_EACH_RULE(apply) apply(Adam) apply(Lion) apply(NAdam) apply(Sgd)

namespace dracopt {
inline namespace DRACOPT_ISA {

// Returns the place of a rule in the list, from zero.
template <typename Rule>
constexpr int rule_index() {
  int index = 0;
  bool found = false;
#define DRACOPT_COUNT(Other) index += (found |= std::is_same_v<Rule, Other>) ? 0 : 1;
  DRACOPT_FOR_EACH_RULE(DRACOPT_COUNT)
#undef DRACOPT_COUNT
  return index;
}

}  // namespace DRACOPT_ISA
}  // namespace dracopt
