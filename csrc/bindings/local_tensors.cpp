#include "bindings/local_tensors.h"

#include <structmember.h>

#include <algorithm>
#include <cstring>

#include "bindings/examine.h"
#include "bindings/key_reader.h"

namespace py = pybind11;

namespace dracopt {
namespace {

constexpr char kRedistributed[] = "distributed tensors with a gradient or state of other placements";
constexpr char kPartial[] = "distributed tensors of partial placements";
constexpr char kPlainBeside[] = "plain tensors beside distributed ones";
constexpr char kDisagrees[] = "distributed tensors that differ from their local tensors";
constexpr char kLocalSubclass[] = "distributed tensors whose local tensors are subclasses";

// Returns an attribute, or null if it is missing.
py::object attribute(py::handle object, const char* name) {
  auto found = py::reinterpret_steal<py::object>(PyObject_GetAttrString(object.ptr(), name));
  if (!found) PyErr_Clear();
  return found;
}

// Returns where objects of a class hold a slot, in bytes; 0 if the class has no such slot.
Py_ssize_t place_of_slot(const py::object& type, const char* name) {
  const py::object slot = attribute(type, name);
  if (!slot || Py_TYPE(slot.ptr()) != &PyMemberDescr_Type) return 0;
  const PyMemberDef* const member = reinterpret_cast<PyMemberDescrObject*>(slot.ptr())->d_member;
  return member->type == T_OBJECT_EX ? member->offset : 0;
}

// Says whether objects of a class simply keep this attribute, so that reading it runs no code.
bool keeps(const py::object& type, const char* name) {
  if (reinterpret_cast<PyTypeObject*>(type.ptr())->tp_getattro != PyObject_GenericGetAttr) return false;
  const py::object of_class = attribute(type, name);
  return !of_class || Py_TYPE(of_class.ptr())->tp_descr_get == nullptr;
}

// Returns a class that lives as long as the process.
PyTypeObject* lasting_type(py::object type) { return reinterpret_cast<PyTypeObject*>(type.release().ptr()); }

}  // namespace

LocalTensors::LocalTensors()
    : module_name_(interned("torch.distributed.tensor")),
      mesh_(interned("mesh")),
      placements_(interned("placements")),
      order_(interned("shard_order")) {}

void LocalTensors::prepare() {
  forgotten_.clear();
  if (replicates_) is_replicating_ = replicates_().cast<bool>();
  if (has_looked_) return;
  // The program may be importing the module now.
  const auto module =
      py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(PyImport_GetModuleDict(), module_name_));
  if (!module) PyErr_Clear();
  const py::object type = module ? attribute(module, "DTensor") : py::object();
  if (!type || !PyType_Check(type.ptr())) return;
  has_looked_ = true;
  const py::object specs = attribute(module, "_dtensor_spec"), placements = attribute(module, "placement_types");
  const py::object spec_type = specs ? attribute(specs, "DTensorSpec") : py::object();
  if (!placements || !spec_type || !PyType_Check(spec_type.ptr())) return;
  local_at_ = place_of_slot(type, "_local_tensor");
  spec_at_ = place_of_slot(type, "_spec");
  if (local_at_ == 0 || spec_at_ == 0) return;
  if (!keeps(spec_type, "mesh") || !keeps(spec_type, "placements") || !keeps(spec_type, "shard_order")) return;
  for (const char* name : {"Shard", "Replicate", "_StridedShard"}) {
    py::object found = attribute(placements, name);
    if (!found || !PyType_Check(found.ptr())) continue;
    whole_placements_.push_back(lasting_type(std::move(found)));
    if (std::strcmp(name, "Replicate") == 0) replicate_ = whole_placements_.back();
  }
  replicates_ = attribute(py::module_::import("torch._C"), "_get_dtensor_allow_implicit_replication");
  if (!replicates_) return;
  is_replicating_ = replicates_().cast<bool>();
  tensor_type_ = lasting_type(type);
  spec_type_ = lasting_type(spec_type);
}

bool LocalTensors::unwrap(Inventory& inventory) {
  unknown_.clear();
  inventory.distributions.clear();
  inventory.distributed_type = tensor_type_;
  inventory.replicates = is_replicating_;
  for (size_t i = 0; i < inventory.size() && inventory.has_subclasses && tensor_type_ != nullptr; ++i) {
    if (!inventory.located[i].grad.is_defined() || !inventory.is_distributed(inventory.located[i].parameter)) continue;
    inventory.distributions.resize(inventory.size());
    if (parts_.size() < inventory.size()) parts_.resize(inventory.size());
    if (alike_.size() < inventory.size()) alike_.resize(inventory.size());
    unwrap_one(inventory, i);
  }
  if (unknown_.empty()) return true;
  compare_unknown(inventory.size());
  return false;
}

void LocalTensors::unwrap_one(Inventory& inventory, size_t i) {
  Located& located = inventory.located[i];
  Distribution& distribution = inventory.distributions[i];
  const int scalars = inventory.rule.state_scalars;
  Objects tensors{}, specs{};
  const auto take_plain = [&](Tensor tensor, int8_t culprit) {
    const bool is_subclass = tensor.is_python_subclass();
    if (is_subclass || inventory.may_mix(tensor)) {
      distribution.unsupported = is_subclass ? kSubclasses : kPlainBeside;
    } else {
      distribution.wrong = {Fault::distribution, culprit};
    }
  };
  const auto take = [&](int stream, int8_t culprit, PyObject* tensor) -> PyObject* {
    const auto k = static_cast<size_t>(stream);
    if (!inventory.is_distributed(tensor)) {
      take_plain(Tensor::in(tensor), culprit);
      return tensor;
    }
    tensors[k] = tensor;
    specs[k] = slot(tensor, spec_at_);
    PyObject* const local = slot(tensor, local_at_);
    if (local != nullptr && is_exact_tensor(local) && specs[k] != nullptr) return local;
    distribution.unsupported = kLocalSubclass;
    return tensor;
  };
  located.version = 0;  // because the values become local tensors
  located.local = take(kParam, Wrong::kParameter, located.parameter);
  located.tensor = Tensor::in(located.local);
  const Tensor parameter = Tensor::in(located.parameter);
  if (parameter.dtype() != located.param().dtype() || parameter.is_inference() != located.param().is_inference()) {
    distribution.unsupported = kDisagrees;
  }
  if (located.grad.is_python_subclass()) {
    located.grad = Tensor::in(take(kGrad, Wrong::kGradient, located.grad.python_object()));
  } else {
    take_plain(located.grad, Wrong::kGradient);
  }
  for (int k = scalars; k < kMaxStateKeys; ++k) {
    PyObject* const value = located.values[k];
    if (value == nullptr || !is_tensor(value)) continue;
    located.values[k] = take(kFirstState + k - scalars, static_cast<int8_t>(k), value);
    if (located.values[k] != value) distribution.states[k] = value;
  }

  auto& alike = alike_[i];
  const bool are_known = std::equal(specs.begin(), specs.end(), alike.begin(),
                                    [](PyObject* spec, const py::object& known) { return known.ptr() == spec; });
  if (are_known) {
    distribution.part = parts_[i];
    return;
  }
  compare(tensors, specs, scalars, distribution);
  const bool are_alike = distribution.unsupported == nullptr && !distribution.wrong.has_value() && unknown_.empty();
  Held& row = forgotten_.emplace_back();
  for (size_t k = 0; k < kMaxStreams && are_alike; ++k) row[k] = py::reinterpret_borrow<py::object>(specs[k]);
  row.swap(alike);
  parts_[i] = distribution.part;
}

// Compares the specs of a gradient and of moments with the parameter's.
void LocalTensors::compare(const Objects& tensors, const Objects& specs, int scalars, Distribution& distribution) {
  Spec of_param{};
  if (!read_spec(specs[kParam], of_param)) {
    distribution.unsupported = kSubclasses;
    return;
  }
  if (is_partial(of_param)) distribution.unsupported = kPartial;
  distribution.part = mesh_part_of(of_param);
  bool grad_is_partial = false;
  for (size_t k = kGrad; k < kMaxStreams; ++k) {
    if (tensors[k] == nullptr || specs[k] == specs[kParam]) continue;
    Spec spec{};
    if (!read_spec(specs[k], spec)) {
      distribution.unsupported = kSubclasses;
      continue;
    }
    const bool same_places = are_equal(of_param.placements, spec.placements) != Answer::no &&
                             are_equal(of_param.order, spec.order) != Answer::no;
    if (!same_places) distribution.unsupported = kRedistributed;
    const auto culprit =
        static_cast<int8_t>(k == kGrad ? Wrong::kGradient : scalars + static_cast<int>(k) - kFirstState);
    // torch redistributes what an operation reads, except from another mesh. It makes no result partial, except that
    // SGD's buffer begins like the gradient in some versions, such as 2.11.
    const bool is_partial_here = !same_places && is_partial(spec);
    if (k == kGrad) grad_is_partial = is_partial_here;
    const bool becomes_partial = is_partial_here && k != kGrad && !grad_is_partial;
    if (becomes_partial || are_equal(of_param.mesh, spec.mesh) == Answer::no) {
      distribution.wrong = {Fault::distribution, culprit};
    } else if (!same_shape(Tensor::in(tensors[kParam]), Tensor::in(tensors[k]))) {
      distribution.wrong = {Fault::shape, culprit};
    }
  }
}

bool LocalTensors::read_spec(PyObject* object, Spec& spec) const {
  if (object == nullptr || Py_TYPE(object) != spec_type_) return false;
  const auto read = [&](PyObject* key) {
    PyObject* const value = PyObject_GetAttr(object, key);
    Py_XDECREF(value);  // the object keeps it
    if (value == nullptr) PyErr_Clear();
    return value;
  };
  spec = {read(mesh_), read(placements_), read(order_)};
  return spec.mesh != nullptr && spec.placements != nullptr && PyTuple_CheckExact(spec.placements);
}

bool LocalTensors::is_partial(const Spec& spec) const {
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(spec.placements); ++k) {
    PyTypeObject* const type = Py_TYPE(PyTuple_GET_ITEM(spec.placements, k));
    if (std::find(whole_placements_.begin(), whole_placements_.end(), type) == whole_placements_.end()) return true;
  }
  return false;
}

MeshPart LocalTensors::mesh_part_of(const Spec& spec) const {
  MeshPart part{spec.mesh, 0};
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(spec.placements) && k < 32; ++k) {
    const bool is_replicated = Py_TYPE(PyTuple_GET_ITEM(spec.placements, k)) == replicate_;
    part.replicated |= static_cast<uint32_t>(is_replicated) << k;
  }
  return part;
}

// Compares two meshes, placements or orders. Calls no Python.
LocalTensors::Answer LocalTensors::are_equal(PyObject* a, PyObject* b) {
  if (a == b) return Answer::yes;
  if (a == nullptr || b == nullptr) return Answer::no;
  const PyTypeObject* const type = Py_TYPE(a);
  if (PyTuple_Check(a) && type == Py_TYPE(b) && type->tp_richcompare == PyTuple_Type.tp_richcompare) {
    if (PyTuple_GET_SIZE(a) != PyTuple_GET_SIZE(b)) return Answer::no;
    Answer all = Answer::yes;
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(a) && all != Answer::no; ++k) {
      const Answer one = are_equal(PyTuple_GET_ITEM(a, k), PyTuple_GET_ITEM(b, k));
      if (one != Answer::yes) all = one;
    }
    return all;
  }
  const auto found = known_.find({a, b});
  if (found != known_.end()) return found->second ? Answer::yes : Answer::no;
  unknown_.push_back({a, b});
  return Answer::unknown;
}

// Asks Python about the unknown pairs, which becomes rare: torch shares most of these objects among tensors.
void LocalTensors::compare_unknown(size_t parameters) {
  std::vector<std::pair<py::object, py::object>> pairs;
  for (const auto& [a, b] : std::exchange(unknown_, {})) {
    pairs.emplace_back(py::reinterpret_borrow<py::object>(a), py::reinterpret_borrow<py::object>(b));
  }
  // A step asks about at most three objects for each tensor. A program whose steps make new ones must not fill memory.
  constexpr size_t kPairs = 2 * 3 * kMaxStreams;
  std::vector<py::object> forgotten;
  if (known_.size() > kPairs * parameters) {
    known_.clear();
    forgotten.swap(held_);
  }
  for (const auto& [a, b] : pairs) {
    const int equal = PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
    if (equal < 0) throw py::error_already_set();
    held_.push_back(a);
    held_.push_back(b);
    known_.emplace(Pair(a.ptr(), b.ptr()), equal == 1);
  }
}

}  // namespace dracopt
