#include "bindings/python_reader.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "bindings/describe.h"
#include "bindings/state_walk.h"

namespace py = pybind11;

namespace dracopt {
namespace {

// The keys that every rule's groups have, in the order in which read_group() takes them.
constexpr const char* kDriverKeyNames[] = {"params", "maximize", "fused", "differentiable", "capturable", nullptr};

constexpr size_t kBlock = 16;  // parameters located at once

// Reads a flag. Returns false if Python must say whether the object is true.
bool read_flag(PyObject* object, bool& flag) {
  flag = object == Py_True;
  return object == nullptr || object == Py_False || object == Py_None || flag;
}

// Enters a tensor of one element into the group as its k-th hyperparameter. Returns whether the host must read it.
bool enter_tensor(Inventory& inventory, Group& group, PyObject* key, Tensor tensor, int k) {
  const bool is_ours = is_plain(tensor);
  if (!tensor.is_python_subclass() && tensor.numel() != 1) {
    throw py::value_error(describe_key(group.index, key) + " must be a tensor of one element, not of shape " +
                          shape_of(tensor));
  }
  const Format& format = format_of(tensor);
  const bool is_real = format.is_native && !format.is_complex;
  if (is_ours && lacks_memory(tensor, 1, tensor.itemsize())) {
    throw py::value_error(describe_key(group.index, key) + " is a tensor whose storage was freed");
  }
  const void* const data = is_ours && is_real ? data_of(tensor) : nullptr;
  const bool on_gpu = data != nullptr && !tensor.is_plain_on_cpu();
  const bool serves = data != nullptr && (!on_gpu || (format.bytes() >= 4 && is_aligned(data, format.dtype) &&
                                                      group.gpu.value_or(tensor.device()) == tensor.device()));
  group.bytes[k] = serves ? static_cast<uint8_t>(format.bytes()) : 0;
  if (!serves) {
    group.unsupported = "hyperparameters that are tensors on another device or of another dtype";
    return false;
  }
  group.addresses[k] = data;
  group.reads_memory = true;
  if (!on_gpu) return true;
  group.gpu = tensor.device();
  inventory.hyperparameters_on_gpus.push_back(tensor);
  (format.dtype == Dtype::fp32 ? group.fp32_address : group.fp64_address) |= static_cast<uint16_t>(1 << k);
  return false;
}

// Says whether a group is what an earlier step has read from its dict.
bool is_known(PyObject* dict, const Group& group) {
  const uint64_t version = version_of(dict);
  return group.lasts && group.dict == dict && group.version == version && version != 0;
}

}  // namespace

PythonReader::PythonReader(const RuleEntry& rule, Master masters)
    : rule_(rule), defaultdict_(py::module_::import("collections").attr("defaultdict")) {
  group_keys_.append(kDriverKeyNames);
  for (const GroupKey* key = rule_.group_keys; key->name != nullptr; ++key) group_keys_.append(key->name);
  for (int states = 0; states <= kMaxStates; ++states) {
    state_keys_[states].append(rule_.state_scalar_keys);
    for (int k = 0; k < states && rule_.state_keys[k] != nullptr; ++k) state_keys_[states].append(rule_.state_keys[k]);
    state_keys_[states].append(masters == Master::split16 ? "master_remainder" : "master");
  }
}

bool PythonReader::read_groups(PyObject* param_groups, Inventory& inventory) {
  if (!PyList_CheckExact(param_groups)) return false;
  constexpr Py_ssize_t ahead = 8;
  const Py_ssize_t count = PyList_GET_SIZE(param_groups);
  inventory.groups.resize(static_cast<size_t>(count));
  inventory.hyperparameters_on_gpus.clear();
  for (Py_ssize_t g = 0; g < count; ++g) {
    if (g + 2 * ahead < count) prefetch(PyList_GET_ITEM(param_groups, g + 2 * ahead));
    if (g + ahead < count && !is_known(PyList_GET_ITEM(param_groups, g + ahead), inventory.groups[g + ahead])) {
      prefetch_entries(PyList_GET_ITEM(param_groups, g + ahead));
    }
    Group& group = inventory.groups[static_cast<size_t>(g)];
    group.index = static_cast<int>(g);
    PyObject* const dict = PyList_GET_ITEM(param_groups, g);
    if (is_known(dict, group)) continue;
    group.version = 0;  // in case that the group cannot be read
    if (!read_group(dict, inventory, group)) return false;
    group.version = version_of(dict);
  }
  return true;
}

bool PythonReader::read_group(PyObject* dict, Inventory& inventory, Group& group) {
  if (!PyDict_CheckExact(dict)) return false;
  group.dict = dict;
  PyObject* values[kMaxGroupKeys];
  if (!group_keys_.read(dict, group_keys_.size(), values)) return false;
  group.params = values[0];
  if (group.params == nullptr || !PyList_CheckExact(group.params)) return false;
  const auto require = [&](size_t k) {
    if (values[k] != nullptr) return;
    throw py::key_error(describe_key(group.index, group_keys_[k]) +
                        " is missing: was a checkpoint of another class loaded?");
  };
  require(1);  // a missing flag is off, except for this one, which torch requires
  bool differentiable;
  if (!read_flag(values[1], group.maximize) || !read_flag(values[2], group.fused) ||
      !read_flag(values[3], differentiable) || !read_flag(values[4], group.capturable)) {
    return false;
  }
  group.capturable &= rule_.state_scalars > 0;  // otherwise there is no count of steps that a graph must advance
  group.unsupported = differentiable ? "differentiable=True" : nullptr;
  group.lasts = true;
  group.reads_memory = false;
  group.gpu.reset();
  group.fp32_address = group.fp64_address = 0;

  int count = 0;
  bool flag;
  for (size_t k = kDriverKeys; k < group_keys_.size(); ++k) {
    PyObject* const key = group_keys_[k];
    PyObject* const value = values[k];
    require(k);
    switch (rule_.group_keys[k - kDriverKeys].kind) {
      case KeyKind::number:
        if (!read_number(inventory, group, key, value, false, count)) return false;
        break;
      case KeyKind::flag:
        if (!read_flag(value, flag)) return false;
        group.bytes[count] = 0;
        group.hyperparameters[count++] = flag;
        break;
      case KeyKind::decay_rates:
        if (!PyTuple_CheckExact(value) && !PyList_CheckExact(value)) return false;
        group.lasts &= PyTuple_CheckExact(value);
        if (PySequence_Fast_GET_SIZE(value) != 2) {
          throw py::value_error(describe_key(group.index, key) + " must be 2 numbers, not " +
                                std::to_string(PySequence_Fast_GET_SIZE(value)));
        }
        for (Py_ssize_t i = 0; i < 2; ++i) {
          if (!read_number(inventory, group, key, PySequence_Fast_GET_ITEM(value, i), true, count)) return false;
        }
        break;
    }
  }
  group.states = rule_.states(group.hyperparameters);
  return true;
}

// Reads the `count`-th hyperparameter, and counts it.
bool PythonReader::read_number(Inventory& inventory, Group& group, PyObject* key, PyObject* number, bool is_decay_rate,
                               int& count) const {
  const int k = count++;
  double value = 0;
  if (PyFloat_Check(number)) {
    value = PyFloat_AS_DOUBLE(number);
    group.bytes[k] = 0;
  } else if (PyLong_Check(number)) {
    value = PyLong_AsDouble(number);
    if (value == -1.0 && PyErr_Occurred()) {
      PyErr_Clear();
      throw py::value_error(describe_key(group.index, key) + " is too large for a float");
    }
    group.bytes[k] = 0;
  } else if (!is_tensor(number)) {
    return false;
  } else {
    const Tensor tensor = Tensor::in(number);
    group.lasts = false;
    if (!enter_tensor(inventory, group, key, tensor, k)) {
      group.hyperparameters[k] = std::numeric_limits<double>::quiet_NaN();  // only torch or the kernel reads it
      return true;
    }
    value = number_at(group.addresses[k], format_of(tensor).dtype);
  }
  if (!std::isfinite(value) || (is_decay_rate && !(value >= 0 && value < 1))) {
    throw py::value_error(describe_key(group.index, key) + " is " + quoted(number) + "; it must be " +
                          (is_decay_rate ? "at least 0 and less than 1" : "finite"));
  }
  group.hyperparameters[k] = value;
  return true;
}

bool PythonReader::locate(PyObject* state, Inventory& inventory) {
  if (!PyDict_CheckExact(state) && !py::handle(reinterpret_cast<PyObject*>(Py_TYPE(state))).is(defaultdict_)) {
    return false;
  }
  const uint64_t version = version_of(state);
  const uint64_t known = std::exchange(state_version_, 0);  // in case that this call fails
  const bool same_state = state == state_ && version == known && version != 0;
  std::vector<Located>& located = inventory.located;
  size_t total = 0;
  for (const Group& group : inventory.groups) total += static_cast<size_t>(PyList_GET_SIZE(group.params));
  located.resize(total);
  inventory.has_subclasses = false;
  StateWalk walk(state);
  // Each pass over a block follows one more pointer. These objects rarely lie in the cache, so a pass fetches those of
  // the whole block at once instead of waiting for one after the other.
  const Group* group = inventory.groups.data();
  Py_ssize_t index = 0;
  for (size_t begin = 0; begin < total; begin += kBlock) {
    const size_t end = std::min(begin + kBlock, total);
    Located* const block = &located[begin];
    const size_t count = end - begin;
    for (size_t i = 0; i < count; ++i) {
      for (; index == PyList_GET_SIZE(group->params); index = 0) ++group;
      PyObject* const parameter = PyList_GET_ITEM(group->params, index);
      prefetch(parameter);
      // Unless the user has changed much, these are as in the step before.
      block[i].tensor.prefetch();
      prefetch(block[i].entries);
      block[i].group = static_cast<uint32_t>(group->index);
      block[i].index = static_cast<uint32_t>(index++) & 0x7fffffff;
      block[i].knows_state &= same_state && block[i].parameter == parameter;
      block[i].parameter = block[i].local = parameter;
    }
    for (size_t i = 0; i < count; ++i) {
      PyObject* const parameter = block[i].parameter;
      if (!is_exact_tensor(parameter)) {
        inventory.has_subclasses = true;
        if (!is_tensor(parameter)) {
          throw py::type_error(describe_key(block[i].group, group_keys_[0]) + "[" + std::to_string(block[i].index) +
                               "] must be a Tensor, not " + Py_TYPE(parameter)->tp_name);
        }
      }
      const Tensor tensor = Tensor::in(parameter);
      if (tensor != std::exchange(block[i].tensor, tensor)) tensor.prefetch();
    }
    for (size_t i = 0; i < count; ++i) {
      Located& found = block[i];
      found.grad = found.param().grad();
      if (!found.knows_state && found.grad.is_defined()) {
        found.entries = walk.find(found.parameter);
        found.knows_state = true;
        prefetch(found.entries);
      } else if (!found.knows_state) {
        walk.pass(found.parameter);
        found.entries = nullptr;
      }
    }
    bool lacks_values[kBlock];
    for (size_t i = 0; i < count; ++i) {
      lacks_values[i] = block[i].grad.is_defined() && !keeps_values(inventory, block[i]);
      if (lacks_values[i] && block[i].entries != nullptr) prefetch_entries(block[i].entries);
    }
    for (size_t i = 0; i < count; ++i) {
      if (lacks_values[i] && !read_values(inventory, block[i])) return false;
    }
  }
  state_ = state;
  state_version_ = version;
  return true;
}

// Says whether the values that an earlier step has read from a state are the state's values now.
bool PythonReader::keeps_values(const Inventory& inventory, const Located& located) {
  return located.entries != nullptr && located.version != 0 && located.version == version_of(located.entries) &&
         located.wanted == inventory.wanted_values(located) && located.states == inventory.groups[located.group].states;
}

bool PythonReader::read_values(const Inventory& inventory, Located& located) {
  std::fill_n(located.values, kMaxStateKeys, nullptr);
  located.version = 0;
  located.wanted = static_cast<uint8_t>(inventory.wanted_values(located));
  located.states = static_cast<uint8_t>(inventory.groups[located.group].states);
  located.has_state = false;
  if (located.entries == nullptr) return true;
  if (!PyDict_CheckExact(located.entries)) return false;
  KeyReader& keys = state_keys_[inventory.groups[located.group].states];
  if (!keys.read(located.entries, located.wanted, located.values)) return false;
  located.has_state = PyDict_GET_SIZE(located.entries) > 0;
  located.version = version_of(located.entries);
  return true;
}

}  // namespace dracopt
