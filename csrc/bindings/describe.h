// Names groups, parameters and tensors in error messages.
#pragma once

#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "bindings/tensor.h"

namespace dracopt {

inline std::string quoted(PyObject* object) {
  const auto held = pybind11::reinterpret_borrow<pybind11::object>(object);  // a __repr__ may run any code
  return pybind11::repr(held).cast<std::string>();
}

// Returns, for example, "param_groups[0]['lr']".
inline std::string describe_key(int group, PyObject* key) {
  return "param_groups[" + std::to_string(group) + "][" + quoted(key) + "]";
}

// Returns, for example, "[10, 4]".
inline std::string shape_of(Tensor tensor) {
  std::string text;
  for (const int64_t size : tensor.sizes()) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

// Returns the list of a group's parameter names, or null if there is none. Calls no methods of keys.
inline PyObject* names_in(PyObject* group) {
  PyObject *key, *value;
  for (Py_ssize_t position = 0; PyDict_Next(group, &position, &key, &value);) {
    if (!PyUnicode_CheckExact(key) || PyUnicode_CompareWithASCIIString(key, "param_names") != 0) continue;
    return PyList_CheckExact(value) ? value : nullptr;
  }
  return nullptr;
}

// Returns, for example, " over DeviceMesh((2,), 'cpu', stride=(1,)) by (Shard(dim=0),)". The text is empty for tensors
// that are not distributed.
inline std::string describe_distribution(PyObject* tensor) {
  if (!Tensor::in(tensor).is_python_subclass()) return "";
  const auto held = pybind11::reinterpret_borrow<pybind11::object>(tensor);
  if (!pybind11::hasattr(held, "device_mesh") || !pybind11::hasattr(held, "placements")) return "";
  return " over " + std::string(pybind11::repr(held.attr("device_mesh"))) + " by " +
         std::string(pybind11::repr(held.attr("placements")));
}

// Returns, for example, "parameter 3 of group 0 ('layer.weight', shape [10, 4])".
inline std::string describe_parameter(PyObject* group, int group_index, int index, PyObject* parameter) {
  std::ostringstream out;
  out << "parameter " << index << " of group " << group_index << " (";
  const auto held = pybind11::reinterpret_borrow<pybind11::object>(parameter);
  const std::string shape = shape_of(Tensor::in(parameter));
  PyObject* const names = names_in(group);
  if (names != nullptr && index < PyList_GET_SIZE(names)) out << quoted(PyList_GET_ITEM(names, index)) << ", ";
  out << "shape " << shape << describe_distribution(parameter) << ")";
  return out.str();
}

}  // namespace dracopt
