// Reads the Python objects of a step: parameter groups, parameters, gradients and states.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/inventory.h"
#include "bindings/key_reader.h"

namespace dracopt {

// Reading functions return false if a container, number or flag may have methods of its own. Other code must not run
// while an inventory holds borrowed references, so Python must read such objects.
class PythonReader {
 public:
  PythonReader(const RuleEntry& rule, Master masters);

  // Reads the parameter groups. Throws for a hyperparameter that cannot be right.
  bool read_groups(PyObject* param_groups, Inventory& inventory);

  // Finds the parameters' gradients and states.
  bool locate(PyObject* state, Inventory& inventory);

  PyObject* key_of_group(size_t k) const { return group_keys_[kDriverKeys + k]; }  // see RuleEntry::group_keys
  // Returns the key of a value in the states of a group; see Located::values.
  PyObject* key_of_state(const Group& group, size_t k) const { return state_keys_[group.states][k]; }

 private:
  static constexpr size_t kDriverKeys = 5;
  static constexpr size_t kMaxGroupKeys = kDriverKeys + kMaxHyperparameters;

  bool read_group(PyObject* dict, Inventory& inventory, Group& group);
  bool read_number(Inventory& inventory, Group& group, PyObject* key, PyObject* number, bool is_decay_rate,
                   int& count) const;

  static bool keeps_values(const Inventory& inventory, const Located& located);
  bool read_values(const Inventory& inventory, Located& located);

  const RuleEntry& rule_;
  const pybind11::object defaultdict_;
  KeyReader group_keys_, state_keys_[kMaxStates + 1];  // by the number of states
  PyObject* state_ = nullptr;                          // the dict of all states, which the last call has read
  uint64_t state_version_ = 0;                         // of that dict; 0 if the call failed
};

}  // namespace dracopt
