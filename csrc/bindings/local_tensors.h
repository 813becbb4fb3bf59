// Finds the local tensors of torch's distributed tensors (DTensor), by which FSDP2 and tensor parallelism shard.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <map>
#include <utility>
#include <vector>

#include "bindings/inventory.h"

namespace dracopt {

// Belongs to one optimizer. Kernels may update the local tensors of a parameter, its gradient and its moments if all of
// them are distributed alike, because an update treats each element by itself. A partial tensor is an exception: its
// elements are only summands of the numbers that they stand for.
class LocalTensors {
 public:
  LocalTensors();

  // Looks whether the program has loaded torch's classes. May call Python, so nothing may be borrowed yet.
  void prepare();

  // Replaces distributed tensors of located parameters by their local tensors, and notes why kernels cannot update
  // them. Returns false if Python has compared meshes or placements meanwhile: other code may have run, so everything
  // that was borrowed must be read again.
  bool unwrap(Inventory& inventory);

  // Says whether a plain parameter has a distributed gradient, which torch refuses in the middle of a step.
  static bool is_mixed(const Inventory& inventory, const Located& located) {
    return is_exact_tensor(located.parameter) && located.grad.is_python_subclass() &&
           inventory.is_distributed(located.grad.python_object()) && !inventory.may_mix(located.param());
  }

 private:
  enum class Answer : uint8_t { no, yes, unknown };
  using Pair = std::pair<PyObject*, PyObject*>;

  // By stream, and null if missing.
  using Objects = std::array<PyObject*, kMaxStreams>;
  using Held = std::array<pybind11::object, kMaxStreams>;

  // These parts of a DTensorSpec say where elements lie. The DTensorSpec keeps them alive.
  struct Spec {
    PyObject *mesh, *placements, *order;
  };

  PyObject* slot(PyObject* tensor, Py_ssize_t at) const {
    return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(tensor) + at);
  }
  void unwrap_one(Inventory& inventory, size_t i);
  void compare(const Objects& tensors, const Objects& specs, int scalars, Distribution& distribution);
  bool read_spec(PyObject* object, Spec& spec) const;
  bool is_partial(const Spec& spec) const;
  MeshPart mesh_part_of(const Spec& spec) const;
  Answer are_equal(PyObject* a, PyObject* b);
  void compare_unknown(size_t parameters);

  // The classes are null until the program loads them, and if they are not as we know them.
  PyTypeObject *tensor_type_ = nullptr, *spec_type_ = nullptr;
  std::vector<PyTypeObject*> whole_placements_;  // all except the partial ones
  PyTypeObject* replicate_ = nullptr;            // one of these
  Py_ssize_t local_at_ = 0, spec_at_ = 0;        // of a tensor's slots in the object, in bytes
  bool has_looked_ = false;
  PyObject *module_name_, *mesh_, *placements_, *order_;  // strings
  pybind11::object replicates_;                           // says whether torch takes plain tensors for replicated ones
  bool is_replicating_ = false;

  // The specs that were found to be alike, by a parameter's place in the step and by stream. torch hashes specs, so
  // they never change. Comparing them again takes four times as long as all else that a DTensor needs.
  std::vector<Held> alike_;
  std::vector<MeshPart> parts_;  // of these parameters
  std::vector<Held> forgotten_;  // until nothing is borrowed, because an object's end may run other code

  // Pairs of meshes and of placements, with Python's answer whether they are equal. They never change. They are held,
  // because the address of another object might be the same later.
  std::map<Pair, bool> known_;
  std::vector<pybind11::object> held_;
  std::vector<Pair> unknown_;
};

}  // namespace dracopt
