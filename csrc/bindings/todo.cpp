#include "bindings/todo.h"

#include "bindings/examine.h"

namespace py = pybind11;

namespace dracopt {
namespace {

enum Form { kNew = 1, kMixed = 2, kSparse = 4, kFusable = 8 };  // see dracopt_ext/todo.py

// Says whether a tensor lies contiguously in the host's memory and its storage is large enough.
bool lies_simply(Tensor tensor) {
  return tensor.is_plain_on_cpu() && tensor.is_contiguous() && !lacks_memory(tensor, tensor.numel(), tensor.itemsize());
}

bool is_absent(PyObject* value) { return value == nullptr || value == Py_None; }

// Says whether torch's fused kernels for the CPU are right for these tensors. They ignore strides and sizes.
// Distributed tensors are left out, because these kernels lose what they write into a moment of other placements, and
// because all processes must agree on the kernel.
bool is_fusable(const Inventory& inventory, const Group& group, const Located& located, Tensor grad) {
  const Tensor param = Tensor::in(located.parameter);
  if (!lies_simply(param) || !lies_simply(grad) || !same_shape(grad, param)) return false;
  const Format& format = format_of(param);
  if (!format.is_native || format.is_complex) return false;
  for (int k = 0; k < located.wanted; ++k) {
    if (is_absent(located.values[k])) continue;  // torch creates the value
    if (!is_tensor(located.values[k])) return false;
    const Tensor state = Tensor::in(located.values[k]);
    if (!lies_simply(state)) return false;
    const Format& stored = format_of(state);
    const bool is_fp32 = stored.is_native && !stored.is_complex && stored.dtype == Dtype::fp32;
    const bool is_scalar = k < inventory.rule.state_scalars;
    if (!(is_scalar ? is_fp32 && state.numel() == 1 : same_shape(state, param))) return false;
  }
  return true;
}

int form_of(const Inventory& inventory, size_t i, PyObject* grad_object, bool adjusts) {
  const Located& located = inventory.located[i];
  const Group& group = inventory.group_of(i);
  const int wanted = located.wanted;
  int form = 0;
  for (int k = 0; k < wanted; ++k) {
    if (is_absent(located.values[k])) form = kNew;
  }
  const Tensor grad = Tensor::in(grad_object);
  if (grad.is_sparse_coo()) return form | kSparse;
  if (!grad.is_strided()) return form;
  const int dtype = located.param().dtype();
  const bool is_short = format_of(grad).is_native && format_of(grad).bytes() == 2;
  bool mixed = grad.dtype() != dtype || grad.is_conjugated() || (adjusts && is_short);
  for (int k = inventory.rule.state_scalars; k < wanted; ++k) {
    if (located.values[k] == nullptr || !is_tensor(located.values[k])) continue;
    mixed |= Tensor::in(located.values[k]).dtype() != dtype;
  }
  if (mixed) return form | kMixed;
  const bool may_fuse = group.fused && std::get_if<Unsupported>(&inventory.examined[i])->reason != kSharesMemory;
  return may_fuse && is_fusable(inventory, group, located, grad) ? form | kFusable : form;
}

std::vector<Run> runs_of_missing(const Inventory& inventory) {
  std::vector<Run> runs;
  for (size_t i = 0; i < inventory.size(); ++i) {
    if (!std::holds_alternative<MissingState>(inventory.examined[i])) continue;
    const auto [group, index] = inventory.index_of(i);
    const bool joins = !runs.empty() && std::get<0>(runs.back()) == group && std::get<2>(runs.back()) == index;
    if (joins) {
      ++std::get<2>(runs.back());
    } else {
      runs.emplace_back(group, index, index + 1);
    }
  }
  return runs;
}

}  // namespace

py::tuple make_todo(const Inventory& inventory, bool adjusts, bool host_decides) {
  // Other code may run from here on, such as a tensor subclass's properties and finalizers. Objects that are looked at
  // are held.
  std::vector<py::object> objects;
  std::vector<size_t> places;
  bool nothing_left = true;
  for (size_t i = 0; i < inventory.size(); ++i) {
    nothing_left &= streams_of(inventory.examined[i]) == nullptr;
    if (!std::holds_alternative<Unsupported>(inventory.examined[i])) continue;
    const Located& located = inventory.located[i];
    places.push_back(i);
    objects.push_back(py::reinterpret_borrow<py::object>(located.parameter));
    objects.push_back(py::reinterpret_borrow<py::object>(located.local));
    for (PyObject* value : located.values) {
      if (value != nullptr) objects.push_back(py::reinterpret_borrow<py::object>(value));
    }
  }
  std::vector<int> forms;
  for (size_t i : places) {
    const py::object grad = py::handle(inventory.located[i].parameter).attr("grad");
    // Code that ran meanwhile may have taken the gradient away, and then torch passes over the parameter.
    forms.push_back(is_tensor(grad.ptr()) ? form_of(inventory, i, grad.ptr(), adjusts) : 0);
  }
  // No other code sees the list before it is full.
  py::list unsupported(places.size());
  const char* reason = nullptr;
  py::str text;
  for (size_t n = 0; n < places.size(); ++n) {
    const auto* const found = std::get_if<Unsupported>(&inventory.examined[places[n]]);
    if (found->reason != reason) text = py::str(reason = found->reason);
    const auto [group, index] = inventory.index_of(places[n]);
    PyList_SET_ITEM(unsupported.ptr(), static_cast<Py_ssize_t>(n),
                    py::make_tuple(group, index, text, forms[n]).release().ptr());
  }
  return py::make_tuple(runs_of_missing(inventory), unsupported, host_decides, nothing_left);
}

}  // namespace dracopt
