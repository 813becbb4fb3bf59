// Finds the state of one parameter after the other.
#pragma once

#include <pybind11/pybind11.h>

#include <unordered_map>

namespace dracopt {

// Walks through an optimizer's state in step with the parameters, because its entries usually lie in their order. Each
// find then compares pointers. If an entry is not at the walk's position, the walk makes an index of all entries. Both
// are much faster than Tensor.__hash__, which is also Python: meanwhile another thread might take away located objects.
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
