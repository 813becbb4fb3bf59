// The updates of a step. Tensors of one group that have taken equally many steps share an update.
#pragma once

#include <deque>

#include "bindings/inventory.h"
#include "bindings/python_reader.h"

namespace dracopt {

// An update with its scalars, which the rule prepared from a group's hyperparameters and the scalars of a state.
struct PreparedUpdate {
  Scalars scalars;
  StateScalar state_scalars[kMaxStateScalars];  // after this step
  Update update;
};

class Updates {
 public:
  // Gives every ready parameter its update. Parameters in `created`, which is sorted, take their first step.
  // Throws if a scalar is infinite.
  void prepare(Inventory& inventory, const PythonReader& keys, const std::vector<Run>& created, double grad_scale,
               double coefficient, bool zeroes);

  double grad_scale() const { return grad_scale_; }
  bool zeroes() const { return zeroes_; }

  // Multiplies the gradients of all updates, after their division.
  void set_coefficient(double coefficient);

  const PreparedUpdate& operator[](uint32_t number) const { return prepared_[number]; }

 private:
  std::deque<PreparedUpdate> prepared_;  // entries beyond count_ are from an earlier step
  size_t count_ = 0;
  double grad_scale_ = 1;  // of all updates
  bool zeroes_ = false;
};

}  // namespace dracopt
