#include "bindings/updates.h"

#include <algorithm>
#include <limits>

#include "bindings/refusals.h"

namespace dracopt {
namespace {

bool is_in(const std::vector<Run>& runs, const Located& located) {
  const auto group = static_cast<int>(located.group), index = static_cast<int>(located.index);
  const auto next = std::upper_bound(runs.begin(), runs.end(), Run(group, index, std::numeric_limits<int>::max()));
  if (next == runs.begin()) return false;
  const auto& [of_group, begin, end] = *std::prev(next);
  return of_group == group && begin <= index && index < end;
}

}  // namespace

void Updates::prepare(Inventory& inventory, const PythonReader& keys, const std::vector<Run>& created,
                      double grad_scale, double coefficient, bool zeroes) {
  const RuleEntry& rule = inventory.rule;
  PowerMemo powers{};
  const Ready* last = nullptr;  // neighbours nearly always have the same scalars
  uint32_t last_group = 0;
  StateScalar scalars[kMaxStateScalars], last_scalars[kMaxStateScalars];
  count_ = 0;
  grad_scale_ = grad_scale;
  zeroes_ = zeroes;
  for (size_t i = 0; i < inventory.size(); ++i) {
    auto* const ready = std::get_if<Ready>(&inventory.examined[i]);
    if (ready == nullptr) continue;
    const Located& located = inventory.located[i];
    ready->first = rule.state_scalars == 0 && is_in(created, located);
    inventory.read_state_scalars(*ready, scalars);
    bool same = last != nullptr && last_group == located.group && last->first == ready->first &&
                last->arithmetic == ready->arithmetic && last->has_recipe == ready->has_recipe;
    for (int k = 0; same && k < rule.state_scalars; ++k) {
      same = scalars[k].value == last_scalars[k].value && scalars[k].is_fp32 == last_scalars[k].is_fp32;
    }
    if (!same) {
      if (count_ == prepared_.size()) prepared_.emplace_back();
      PreparedUpdate& prepared = prepared_[count_++];
      std::copy(scalars, scalars + rule.state_scalars, prepared.state_scalars);
      std::copy(scalars, scalars + rule.state_scalars, last_scalars);
      const Group& group = inventory.group_of(i);
      const auto arithmetic = static_cast<int>(ready->arithmetic);
      const bool finite = rule.prepare[arithmetic](prepared.state_scalars, ready->first, group.hyperparameters, powers,
                                                   &prepared.scalars);
      if (!finite && !ready->has_recipe) refuse_scalars(inventory, keys, i);
      prepared.update = {
          rule.update[arithmetic][group.states], &prepared.scalars, grad_scale, coefficient, group.maximize, zeroes};
      prepared.update.derive();
      last = ready;
      last_group = located.group;
    }
    ready->update = static_cast<uint32_t>(count_ - 1);
    inventory.segments[i].update = &prepared_[count_ - 1].update;
  }
}

void Updates::set_coefficient(double coefficient) {
  for (size_t i = 0; i < count_; ++i) {
    prepared_[i].update.coefficient = coefficient;
    prepared_[i].update.derive();
  }
}

}  // namespace dracopt
