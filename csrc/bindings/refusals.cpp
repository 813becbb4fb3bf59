#include "bindings/refusals.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>

#include "bindings/describe.h"

namespace py = pybind11;

namespace dracopt {
namespace {

constexpr char kAdviceOnStates[] = ". Delete this parameter's state to start it afresh";

std::string describe(const Inventory& inventory, size_t i) {
  const Group& group = inventory.group_of(i);
  const Located& located = inventory.located[i];
  return describe_parameter(group.dict, group.index, static_cast<int>(located.index), located.parameter);
}

Tensor local_culprit(const Located& located, const Wrong& wrong) {
  if (wrong.culprit >= 0) return Tensor::in(located.values[wrong.culprit]);
  return wrong.culprit == Wrong::kGradient ? located.grad : located.param();
}

// Says what is wrong about the culprit.
std::string describe_fault(const Inventory& inventory, size_t i, const Wrong& wrong) {
  if (wrong.fault == Fault::missing) return "is missing";
  const Located& located = inventory.located[i];
  PyObject* const value = wrong.culprit >= 0 ? inventory.state_object(i, wrong.culprit) : nullptr;
  if (wrong.fault == Fault::memory) {
    return "lies in a storage that is too small for it, of " +
           std::to_string(local_culprit(located, wrong).storage_bytes()) + " bytes: it was freed or resized";
  }
  if (wrong.fault == Fault::no_tensor) return std::string("must be a Tensor, not ") + Py_TYPE(value)->tp_name;
  const auto parameter = py::reinterpret_borrow<py::object>(located.parameter);
  const py::object culprit = value != nullptr                    ? py::reinterpret_borrow<py::object>(value)
                             : wrong.culprit == Wrong::kGradient ? py::object(parameter.attr("grad"))
                                                                 : parameter;
  const auto attribute = [&](const char* name) { return std::string(py::str(culprit.attr(name))); };
  switch (wrong.fault) {
    case Fault::device:
      return "is on another device, " + attribute("device");
    case Fault::dtype:
      return "has a dtype that does not fit, " + attribute("dtype");
    case Fault::expanded:
      return "is expanded: several of its elements share one memory location";
    case Fault::distribution: {
      const std::string where = describe_distribution(culprit.ptr());
      return where.empty() ? "is not distributed" : "is distributed" + where;
    }
    default: {
      const Tensor tensor = Tensor::in(culprit.ptr());
      if (!same_shape(tensor, Tensor::in(located.parameter))) return "has another shape, " + shape_of(tensor);
      return "has a local tensor of another shape, " + shape_of(local_culprit(located, wrong)) + " beside " +
             shape_of(located.param());
    }
  }
}

}  // namespace

void refuse(const Inventory& inventory, const PythonReader& keys, size_t i) {
  const Wrong wrong = std::get<Wrong>(inventory.examined[i]);
  const Located& located = inventory.located[i];
  // The __repr__ of a mesh or of a name may run any code.
  std::vector<py::object> held;
  for (PyObject* object : {inventory.group_of(i).dict, located.parameter, located.local}) {
    held.push_back(py::reinterpret_borrow<py::object>(object));
  }
  for (int k = 0; k < kMaxStateKeys; ++k) {
    held.push_back(py::reinterpret_borrow<py::object>(located.values[k]));
    held.push_back(py::reinterpret_borrow<py::object>(inventory.state_object(i, k)));
  }
  const std::string fault = describe_fault(inventory, i, wrong);
  const std::string state =
      wrong.culprit >= 0 ? quoted(keys.key_of_state(inventory.group_of(i), static_cast<size_t>(wrong.culprit))) : "";
  const std::string parameter = describe(inventory, i);
  if (wrong.fault == Fault::missing) {
    throw py::key_error("the state of " + parameter + " has no " + state +
                        ". Was an option such as amsgrad switched on after the first step?" +
                        std::string(kAdviceOnStates).substr(1));
  }
  if (wrong.culprit == Wrong::kParameter) {
    const bool is_expanded = wrong.fault == Fault::expanded;
    throw py::value_error(parameter + " " + fault +
                          (is_expanded ? ", so it cannot be updated in place. Optimize a clone() of it instead"
                                       : ". Give it its memory back before the step"));
  }
  if (wrong.culprit == Wrong::kGradient) {
    throw py::value_error("the gradient of " + parameter + " " + fault +
                          ". Set .grad to None, or to a tensor like the parameter");
  }
  throw py::value_error("the state " + state + " of " + parameter + " " + fault + kAdviceOnStates);
}

// Names the largest hyperparameter without which the scalars would be finite. If there is none, names the largest of
// all, unless the state is wrong.
void refuse_scalars(const Inventory& inventory, const PythonReader& keys, size_t i) {
  const RuleEntry& rule = inventory.rule;
  const Group& group = inventory.group_of(i);
  const auto& ready = std::get<Ready>(inventory.examined[i]);
  const auto is_finite_with = [&](const double* hyperparameters) {
    StateScalar scalars[kMaxStateScalars];
    inventory.read_state_scalars(ready, scalars);
    PowerMemo powers{};
    Scalars prepared;
    return rule.prepare[static_cast<int>(ready.arithmetic)](scalars, ready.first, hyperparameters, powers, &prepared);
  };
  constexpr double zeros[kMaxHyperparameters] = {};
  const bool state_is_wrong = !is_finite_with(zeros);
  PyObject *culprit = nullptr, *largest = nullptr;  // the largest that is alone to blame, and the largest of all
  double most = 0, most_of_all = 0;
  int number = 0;
  for (size_t k = 0; rule.group_keys[k].name != nullptr; ++k) {
    const KeyKind kind = rule.group_keys[k].kind;
    for (int rate = 0; rate < (kind == KeyKind::decay_rates ? 2 : 1); ++rate, ++number) {
      const double value = group.hyperparameters[number];
      if (kind == KeyKind::flag) continue;
      double others[kMaxHyperparameters];
      std::copy(group.hyperparameters, group.hyperparameters + kMaxHyperparameters, others);
      others[number] = 0;
      if (std::abs(value) > std::abs(most_of_all)) {
        largest = keys.key_of_group(k);
        most_of_all = value;
      }
      if (std::abs(value) > std::abs(most) && is_finite_with(others)) {
        culprit = keys.key_of_group(k);
        most = value;
      }
    }
  }
  const bool is_fp32 = ready.arithmetic == Arithmetic::fp32;
  const std::string consequence = std::string(": it makes the update infinite in ") + (is_fp32 ? "fp32" : "fp64");
  if (culprit == nullptr && !state_is_wrong) {
    culprit = largest;
    most = most_of_all;
  }
  if (culprit != nullptr) {
    throw py::value_error(describe_key(group.index, culprit) + " is " + quoted(py::float_(most).ptr()) + consequence);
  }
  throw py::value_error("the state of " + describe(inventory, i) + " has wrong scalars" + consequence +
                        kAdviceOnStates);
}

void check_capture(const Inventory& inventory, const PythonReader& keys, const Backends& backends,
                   const std::string& optimizer, bool at_random) {
  std::optional<Device> device;
  bool capturing = false;
  for (size_t i = 0; i < inventory.size() && !capturing; ++i) {
    const Streams* const streams = streams_of(inventory.examined[i]);
    if (streams == nullptr || !streams->on_gpu) continue;
    const Device found{kGpuType, streams->device_index};
    if (device == found) continue;
    device = found;
    capturing = backends.is_capturing(*device, streams->backend);
  }
  if (!capturing) return;
  for (size_t i = 0; i < inventory.size(); ++i) {
    const Streams* const streams = streams_of(inventory.examined[i]);
    if (streams == nullptr) continue;
    if (inventory.rule.state_scalars > 0 && !inventory.group_of(i).capturable) {  // the words are torch's
      throw std::runtime_error("Attempting CUDA graph capture of step() for an instance of " + optimizer +
                               " but param_groups' capturable is False.");
    }
    const auto refuse_it = [&](const std::string& why) {
      throw std::runtime_error("step() cannot be captured in a CUDA graph: " + describe(inventory, i) + " " + why);
    };
    if (!streams->on_gpu) refuse_it("is not on the GPU");
    if (at_random) {
      refuse_it("is rounded at random, by a count of steps that a graph cannot advance. Leave stochastic_rounding off");
    }
    const Ready* const ready = std::get_if<Ready>(&inventory.examined[i]);
    if (ready == nullptr) refuse_it("has no state yet. Take a step before the capture");
    for (int k = 0; k < inventory.rule.state_scalars; ++k) {
      if (ready->scalar_on_gpu[k]) continue;
      refuse_it("has its state " + quoted(keys.key_of_state(inventory.group_of(i), static_cast<size_t>(k))) +
                " on the CPU. Move it to the GPU");
    }
  }
}

}  // namespace dracopt
