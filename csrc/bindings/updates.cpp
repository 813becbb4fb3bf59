#include "bindings/updates.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <variant>

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
  grad_scale_ = grad_scale;
  zeroes_ = zeroes;
  if (std::exchange(prepared_for_, 0) == inventory.version && inventory.as_recorded && created.empty()) {
    for (size_t i = 0; i < count_; ++i) {
      prepare_one(prepared_[i], inventory, keys, powers, coefficient);
    }
    prepared_for_ = inventory.version;
    return;
  }
  count_ = 0;
  ++version_;
  const Ready* last = nullptr;  // neighbours nearly always have the same scalars
  uint32_t last_group = 0;
  PreparedUpdate* prepared = nullptr;
  StateScalar scalars[kMaxStateScalars], last_scalars[kMaxStateScalars];
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
      prepared = &prepared_[count_++];
      std::copy(scalars, scalars + rule.state_scalars, prepared->state_scalars);
      std::copy(scalars, scalars + rule.state_scalars, last_scalars);
      prepared->first_place = i;
      prepare_one(*prepared, inventory, keys, powers, coefficient);
      last = ready;
      last_group = located.group;
    }
    inventory.segments[i].update = prepared;
  }
  if (created.empty()) prepared_for_ = inventory.version;
}

// Advances an update's state scalars by a step, and prepares the rest.
void Updates::prepare_one(PreparedUpdate& prepared, const Inventory& inventory, const PythonReader& keys,
                          PowerMemo& powers, double coefficient) {
  const RuleEntry& rule = inventory.rule;
  const size_t place = prepared.first_place;
  const Ready& ready = std::get<Ready>(inventory.examined[place]);
  const Group& group = inventory.group_of(place);
  const auto arithmetic = static_cast<int>(ready.arithmetic);
  const bool finite =
      rule.prepare[arithmetic](prepared.state_scalars, ready.first, group.hyperparameters, powers, &prepared.prepared);
  if (!finite && !ready.has_recipe) refuse_scalars(inventory, keys, place);
  static_cast<Update&>(prepared) = {
      rule.update[arithmetic][group.states], &prepared.prepared, grad_scale_, coefficient, group.maximize, zeroes_};
  prepared.derive();
}

void Updates::set_coefficient(double coefficient) {
  for (size_t i = 0; i < count_; ++i) {
    prepared_[i].coefficient = coefficient;
    prepared_[i].derive();
  }
}

}  // namespace dracopt
