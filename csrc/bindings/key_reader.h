// Reads known keys from Python dicts that mostly look alike: parameter groups, and the states of parameters.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <vector>

#include "bindings/tensor_facts.h"

namespace dracopt {

// Returns the value of a key, borrowed, or null if the key is missing.
inline PyObject* lookup(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();
  return value;
}

// Returns a string that is interned and never freed.
inline PyObject* interned(const char* name) {
  PyObject* const string = PyUnicode_InternFromString(name);
  if (string == nullptr) throw pybind11::error_already_set();
  return string;
}

// Returns a dict's version: a number that no other dict has, and that this dict loses when a key or value is replaced.
// Returns 0 if the object is no dict or Python tells no version, as from 3.14 on. A dict that shares its keys with
// other instances of a class does not always change its version (seen in 3.13), so it counts as one without a version.
inline uint64_t version_of([[maybe_unused]] PyObject* object) {
#if PY_VERSION_HEX < 0x030e0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  const auto* const dict = reinterpret_cast<PyDictObject*>(object);
  if (PyDict_Check(object) && dict->ma_values == nullptr) return dict->ma_version_tag;
#pragma GCC diagnostic pop
#endif
  return 0;
}

// Brings the entries of a dict into the cache.
DRACOPT_INLINE void prefetch_entries(PyObject* dict) {
  if (!PyDict_Check(dict)) return;
  const auto* entries = reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(dict)->ma_keys);
  for (int line = 0; line < 6; ++line) prefetch(entries + 64 * line);
}

class KeyReader {
 public:
  void append(const char* name) { keys_.push_back(interned(name)); }

  // Appends a null-terminated list of names.
  void append(const char* const* names) {
    for (; *names != nullptr; ++names) append(*names);
  }

  size_t size() const { return keys_.size(); }
  PyObject* operator[](size_t k) const { return keys_[k]; }

  // Finds the values of the first `count` keys; they are borrowed, and null if missing. A walk compares pointers with
  // the order in which the last dict had its keys, which takes half the time of lookups. Keys that the walk does not
  // meet are looked up. Returns false if a lookup would call a method of some key, which may equal one of ours.
  bool read(PyObject* dict, size_t count, PyObject** values) {
    std::fill(values, values + count, nullptr);
    size_t found = 0, i = 0;
    bool all_strings = true;
    PyObject *key, *value;
    for (Py_ssize_t position = 0; found < count && PyDict_Next(dict, &position, &key, &value); ++i) {
      if (i == order_.size()) order_.push_back({nullptr, 0});
      if (order_[i].key != key) order_[i] = {key, index_of(key)};
      if (order_[i].index >= count) {
        all_strings &= PyUnicode_CheckExact(key);
        continue;
      }
      values[order_[i].index] = value;
      ++found;
    }
    if (found == count) return true;
    if (!all_strings) return false;
    for (size_t k = 0; k < count; ++k) {
      if (values[k] == nullptr) values[k] = lookup(dict, keys_[k]);
    }
    return true;
  }

 private:
  // The place of a key in the last dict. `key` is only compared, because a string that is none of ours may be gone by
  // now. The walk passes over another string at the same address, and the string is looked up.
  struct Place {
    PyObject* key;
    size_t index;
  };

  size_t index_of(PyObject* key) const {
    return static_cast<size_t>(std::find(keys_.begin(), keys_.end(), key) - keys_.begin());
  }

  std::vector<PyObject*> keys_;
  std::vector<Place> order_;
};

}  // namespace dracopt
