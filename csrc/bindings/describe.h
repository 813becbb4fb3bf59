// The words in which errors name groups, parameters and tensors.
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <sstream>
#include <string>

namespace dracopt {

inline std::string quoted(PyObject* object) {
  const auto held = pybind11::reinterpret_borrow<pybind11::object>(object);  // its __repr__ may be anyone's code
  return pybind11::repr(held).cast<std::string>();
}

// "param_groups[0]['lr']"
inline std::string describe_key(int group, PyObject* key) {
  return "param_groups[" + std::to_string(group) + "][" + quoted(key) + "]";
}

// "[10, 4]"
inline std::string shape_of(const c10::TensorImpl* tensor) {
  std::ostringstream out;
  out << tensor->sizes();
  return out.str();
}

// "parameter 3 of group 0 ('layer.weight', shape [10, 4])"
inline std::string describe_parameter(PyObject* group, int group_index, int index) {
  PyObject* const tensor = PyList_GET_ITEM(PyDict_GetItemString(group, "params"), index);
  const std::string shape = shape_of(THPVariable_Unpack(tensor).unsafeGetTensorImpl());
  std::string name;
  PyObject* const names = PyDict_GetItemString(group, "param_names");
  if (names != nullptr && PyList_Check(names) && index < PyList_GET_SIZE(names)) {
    name = quoted(PyList_GET_ITEM(names, index)) + ", ";
  }
  return "parameter " + std::to_string(index) + " of group " + std::to_string(group_index) + " (" + name + "shape " +
         shape + ")";
}

}  // namespace dracopt
