// Finds the state of one parameter after the other.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <unordered_map>

namespace dracopt {

// The optimizer's state, by parameter. Its entries usually lie in the order of the parameters: a walk in step with them
// compares pointers. Once an entry is not at the walk's position, an index of all entries is made. Either is much
// faster than Tensor.__hash__; and that is Python, during which another thread might take away what was located.
class StateWalk {
 public:
  explicit StateWalk(PyObject* state) : state_(state) { advance(); }

  PyObject* find(PyObject* parameter) {
    if (parameter == key_) {
      PyObject* found = value_;
      advance();
      return found;
    }
    if (!indexed_) make_index();
    const auto found = index_.find(parameter);
    return found == index_.end() ? nullptr : found->second;
  }

  void pass(PyObject* parameter) {
    if (parameter == key_) advance();
  }

 private:
  void advance() {
    if (!PyDict_Next(state_, &position_, &key_, &value_)) key_ = nullptr;
  }

  void make_index() {
    indexed_ = true;
    PyObject *key, *value;
    for (Py_ssize_t position = 0; PyDict_Next(state_, &position, &key, &value);) index_.emplace(key, value);
  }

  PyObject* state_;
  Py_ssize_t position_ = 0;
  PyObject *key_ = nullptr, *value_ = nullptr;
  bool indexed_ = false;
  std::unordered_map<PyObject*, PyObject*> index_;
};

}  // namespace dracopt
