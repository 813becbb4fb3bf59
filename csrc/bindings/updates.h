// The updates of a step. Tensors of one group that have taken equally many steps share an update.
#pragma once

#include <deque>

#include "bindings/inventory.h"
#include "bindings/python_reader.h"

namespace dracopt {

// An update with its scalars, which the rule prepared from a group's hyperparameters and the scalars of a state.
struct PreparedUpdate : Update {
  Scalars prepared;
  StateScalar state_scalars[kMaxStateScalars];  // after this step
  size_t first_place;                           // of the inventory's places that have this update
};

// Returns the update of a segment that Updates has prepared.
inline const PreparedUpdate& prepared_of(const Segment& segment) {
  return static_cast<const PreparedUpdate&>(*segment.update);
}

class Updates {
 public:
  // Gives every ready parameter its update. Parameters in `created`, which is sorted, take their first step.
  // Throws if a scalar is infinite.
  void prepare(Inventory& inventory, const PythonReader& keys, const std::vector<Run>& created, double grad_scale,
               double coefficient, bool zeroes);

  double grad_scale() const { return grad_scale_; }
  bool zeroes() const { return zeroes_; }

  // Changes whenever parameters get other updates than they had.
  uint64_t version() const { return version_; }

  // Multiplies the gradients of all updates, after their division.
  void set_coefficient(double coefficient);

 private:
  void prepare_one(PreparedUpdate& prepared, const Inventory& inventory, const PythonReader& keys, PowerMemo& powers,
                   double coefficient);

  std::deque<PreparedUpdate> prepared_;  // entries beyond count_ are from an earlier step
  size_t count_ = 0;
  double grad_scale_ = 1;  // of all updates
  bool zeroes_ = false;
  uint64_t prepared_for_ = 0;  // the version of the inventory whose parameters all have an update; 0 if there is none
  uint64_t version_ = 0;
};

}  // namespace dracopt
