#include "bindings/step_plan.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "bindings/describe.h"
#include "bindings/gpu.h"
#include "bindings/state_walk.h"
#include "bindings/tensor_facts.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace dracopt {
namespace {

// A step that is this short keeps the GIL, which costs less than taking and dropping a reference to every tensor's
// memory.
constexpr int64_t kShortStepUnits = 4 * 1024 * 1024 / kUnitBytes;

constexpr int64_t kGrainTensors = 128;

constexpr size_t kBlock = 16;  // parameters located at once

// The keys that every rule's groups have, in the order in which read_group() takes them.
constexpr const char* kDriverKeyNames[] = {"params", "maximize", "fused", "differentiable", "capturable", nullptr};
constexpr size_t kDriverKeys = 5;
constexpr size_t kMaxGroupKeys = kDriverKeys + kMaxHyperparameters;

constexpr const char* kUnderMode = "steps under a TorchDispatchMode";
constexpr const char* kSharesMemory = "tensors that share memory";

// A mode traces, counts or replaces the operations of torch, which kernels are not. torch keeps the modes of make_fx
// with pre_dispatch=True apart from the others.
bool is_under_mode() {
  return c10::impl::TorchDispatchModeTLS::stack_len() > 0 ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::PreDispatch);
}

// A step is running as long as one of these lives.
struct Running {
  explicit Running(bool& is_running) : running(is_running) { running = true; }
  ~Running() { running = false; }
  Running(const Running&) = delete;
  bool& running;
};

constexpr double kMaxStep = 9007199254740992.0;  // 2^53: beyond it a double no longer counts

void in_parallel(int64_t count, int64_t grain, ParallelFunc function, void* context) {
  if (!cpu::in_parallel(torch_parallel_for, count, grain, function, context)) {
    throw std::runtime_error("torch_parallel_for failed");
  }
}

bool is_true(PyObject* object) {
  if (object == Py_False || object == nullptr) return false;
  const int truth = object == Py_True ? 1 : PyObject_IsTrue(object);
  if (truth < 0) throw py::error_already_set();
  return truth == 1;
}

// Without Python's isinstance(), which torch overrides in Python.
bool is_tensor(PyObject* object) {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

// Calls `body(address, bytes)` with the memory over which a tensor extends, if it can be told.
template <typename Body>
void with_memory_of(const c10::TensorImpl* tensor, const Body& body) {
  if (!is_plain(tensor)) return;
  const auto bytes = static_cast<int64_t>(tensor->itemsize());
  body(readable_data(tensor, bytes), extent_of(tensor) * bytes);
}

// The tensor that holds a tensor's elements: the shard of a distributed one, or itself. Undefined for other wrappers.
at::Tensor local_of(PyObject* object) {
  const at::Tensor& tensor = THPVariable_Unpack(object);
  if (!is_python_subclass(tensor.unsafeGetTensorImpl())) return tensor;
  const auto local = py::reinterpret_steal<py::object>(PyObject_GetAttrString(object, "_local_tensor"));
  if (!local) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
    PyErr_Clear();
  }
  return local && is_tensor(local.ptr()) ? THPVariable_Unpack(local.ptr()) : at::Tensor();
}

// Does a tensor lie contiguously in the host's memory, which suffices for it?
bool lies_simply(const at::Tensor& held) {
  const c10::TensorImpl* tensor = held.unsafeGetTensorImpl();
  return held.defined() && is_on_cpu(tensor) && tensor->is_contiguous() &&
         !lacks_memory(tensor, tensor->numel(), static_cast<int64_t>(tensor->itemsize()));
}

}  // namespace

StepPlan::StepPlan(const std::string& rule, std::string optimizer)
    : rule_([&]() -> const RuleEntry& {
        const RuleEntry* found = cpu::find_rule(rule.c_str());
        if (found == nullptr) throw py::value_error("no compiled rule is named '" + rule + "'");
        return *found;
      }()),
      optimizer_(std::move(optimizer)),
      defaultdict_(py::module_::import("collections").attr("defaultdict")) {
  group_keys_.append(kDriverKeyNames);
  for (const GroupKey* key = rule_.group_keys; key->name != nullptr; ++key) group_keys_.append(key->name);
  state_keys_.append(rule_.carried_keys);
  state_keys_.append(rule_.state_keys);
}

py::object StepPlan::step(py::handle param_groups, py::handle state, double grad_scale, const Scaler& scaler,
                          std::optional<Indices> created, Indices stepped) {
  if (running_) {
    throw std::runtime_error(
        "step() of this optimizer is already running in another thread; give each thread an optimizer of its own");
  }
  const Running running(running_);
  updated_.clear();
  for (Launches& launches : launches_) launches.clear();
  grad_scale_ = grad_scale;
  if (!read_groups(param_groups.ptr()) || !locate(state.ptr())) {
    return py::reinterpret_borrow<py::object>(Py_NotImplemented);
  }
  const bool again = created.has_value();
  if (!again) created.emplace();
  std::sort(created->begin(), created->end());
  std::sort(stepped.begin(), stepped.end());
  examine(*created);
  settle(stepped);
  set_aside_overlapping();
  if (is_under_mode()) set_aside_all(kUnderMode);
  check_capture();
  set_aside_missing();
  const bool waits = host_decides(scaler);
  if (!again && (waits || !missing_.empty() || !foreign_.empty())) return todo(waits);
  if (waits || !missing_.empty() || !foreign_.empty()) {
    throw std::runtime_error("parameters or states have changed while step() was creating states");
  }
  run(scaler);
  return py::none();
}

bool StepPlan::read_groups(PyObject* param_groups) {
  if (!PyList_CheckExact(param_groups)) return false;
  constexpr Py_ssize_t ahead = 8;
  const Py_ssize_t count = PyList_GET_SIZE(param_groups);
  groups_.resize(static_cast<size_t>(count));
  for (Py_ssize_t g = 0; g < count; ++g) {
    if (g + 2 * ahead < count) prefetch(PyList_GET_ITEM(param_groups, g + 2 * ahead));
    if (g + ahead < count) prefetch_entries(PyList_GET_ITEM(param_groups, g + ahead));
    Group& group = groups_[static_cast<size_t>(g)];
    group.index = static_cast<int>(g);
    if (!read_group(PyList_GET_ITEM(param_groups, g), group)) return false;
  }
  return true;
}

bool StepPlan::read_group(PyObject* dict, Group& group) {
  if (!PyDict_CheckExact(dict)) return false;
  group.dict = dict;
  PyObject* values[kMaxGroupKeys];
  group_keys_.read(dict, group_keys_.size(), values);
  group.params = values[0];
  if (group.params == nullptr || !PyList_CheckExact(group.params)) return false;
  group.maximize = is_true(values[1]);
  group.fused = is_true(values[2]);
  group.foreign = is_true(values[3]) ? "differentiable=True" : nullptr;
  group.capturable = is_true(values[4]);
  group.gpu.reset();
  group.fp32_address = group.fp64_address = 0;

  int count = 0;
  for (size_t k = kDriverKeys; k < group_keys_.size(); ++k) {
    PyObject* const key = group_keys_[k];
    PyObject* const value = values[k];
    if (value == nullptr) throw py::key_error(describe_key(group.index, key) + " is missing");
    switch (rule_.group_keys[k - kDriverKeys].kind) {
      case KeyKind::number:
        read_number(group, key, value, false, count);
        break;
      case KeyKind::flag:
        group.hyperparameters[count++] = is_true(value);
        break;
      case KeyKind::decay_rates:
        if (!PyTuple_CheckExact(value) && !PyList_CheckExact(value)) return false;
        if (PySequence_Fast_GET_SIZE(value) != 2) {
          throw py::value_error(describe_key(group.index, key) + " must be 2 numbers, not " +
                                std::to_string(PySequence_Fast_GET_SIZE(value)));
        }
        for (Py_ssize_t i = 0; i < 2; ++i) read_number(group, key, PySequence_Fast_GET_ITEM(value, i), true, count);
        break;
    }
  }
  group.states = rule_.states(group.hyperparameters);
  return true;
}

// Reads the `count`-th hyperparameter, and counts it.
void StepPlan::read_number(Group& group, PyObject* key, PyObject* number, bool is_decay_rate, int& count) const {
  double value = 0;
  if (PyFloat_CheckExact(number)) {
    value = PyFloat_AS_DOUBLE(number);
  } else if (PyBool_Check(number)) {
    value = number == Py_True;
  } else if (is_tensor(number)) {
    const c10::TensorImpl* tensor = THPVariable_Unpack(number).unsafeGetTensorImpl();
    const Format& format = format_of(tensor);
    if (tensor->numel() != 1) {
      throw py::value_error(describe_key(group.index, key) + " must be a tensor of one element, not of shape " +
                            shape_of(tensor));
    }
    const bool is_real = format.is_native && !format.is_complex;
    if (is_plain(tensor) && lacks_memory(tensor, 1, static_cast<int64_t>(tensor->itemsize()))) {
      throw py::value_error(describe_key(group.index, key) + " is a tensor whose storage was freed");
    }
    if (is_on_cpu(tensor) && is_real) {
      value = number_at(readable_data(tensor, format.bytes()), format.dtype);
    } else if (is_on_gpu(tensor) && is_real && format.bytes() >= 4 &&
               group.gpu.value_or(tensor->device()) == tensor->device()) {
      group.gpu = tensor->device();
      (format.dtype == Dtype::fp32 ? group.fp32_address : group.fp64_address) |= static_cast<uint16_t>(1 << count);
      group.addresses[count] = readable_data(tensor, format.bytes());
      group.hyperparameters[count++] = std::numeric_limits<double>::quiet_NaN();  // only the kernel sees it
      return;
    } else {
      group.foreign = "hyperparameters that are tensors on another device or of another dtype";
      group.hyperparameters[count++] = std::numeric_limits<double>::quiet_NaN();  // only torch reads it
      return;
    }
  } else {
    value = PyFloat_AsDouble(number);
    if (value == -1.0 && PyErr_Occurred()) {
      PyErr_Clear();
      throw py::type_error(describe_key(group.index, key) + " must be a number, not " + Py_TYPE(number)->tp_name);
    }
  }
  if (!std::isfinite(value) || (is_decay_rate && !(value >= 0 && value < 1))) {
    throw py::value_error(describe_key(group.index, key) + " is " + quoted(number) + "; it must be " +
                          (is_decay_rate ? "at least 0 and less than 1" : "finite"));
  }
  group.hyperparameters[count++] = value;
}

// Finds the parameters that have a gradient, and their states. All that needs Python is done here.
bool StepPlan::locate(PyObject* state) {
  if (!PyDict_CheckExact(state) && !py::handle(reinterpret_cast<PyObject*>(Py_TYPE(state))).is(defaultdict_)) {
    return false;
  }
  located_.clear();
  for (const Group& group : groups_) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(group.params); ++i) {
      PyObject* parameter = PyList_GET_ITEM(group.params, i);
      if (!is_tensor(parameter)) {
        throw py::type_error(describe_key(group.index, group_keys_[0]) + "[" + std::to_string(i) +
                             "] must be a Tensor, not " + Py_TYPE(parameter)->tp_name);
      }
      located_.push_back({&group, static_cast<int>(i), parameter, THPVariable_Unpack(parameter).unsafeGetTensorImpl()});
    }
  }
  // In passes a block at a time, each of which follows one more pointer: these objects rarely lie in the cache, and so
  // they are fetched for the whole block at once, not waited for one after the other.
  StateWalk walk(state);
  size_t count = 0;
  for (size_t begin = 0; begin < located_.size(); begin += kBlock) {
    const size_t end = std::min(begin + kBlock, located_.size());
    for (size_t i = begin; i < end; ++i) prefetch(located_[i].param);
    const size_t first = count;
    for (size_t i = begin; i < end; ++i) {
      const at::Tensor& grad = located_[i].param->grad();
      if (!grad.defined()) {
        walk.pass(located_[i].parameter);
        continue;
      }
      Located& located = located_[count++] = located_[i];
      located.grad = grad.unsafeGetTensorImpl();
      located.state = walk.find(located.parameter);
      if (located.state != nullptr) prefetch(located.state);
    }
    for (size_t i = first; i < count; ++i) {
      if (located_[i].state != nullptr) prefetch_entries(located_[i].state);
    }
    for (size_t i = first; i < count; ++i) {
      if (located_[i].state == nullptr) continue;
      if (!PyDict_CheckExact(located_[i].state)) return false;
      state_keys_.read(located_[i].state, static_cast<size_t>(wanted_states(*located_[i].group)), located_[i].values);
    }
  }
  located_.resize(count);
  return true;
}

// Why a tensor cannot be the gradient or a moment of a parameter, which is plain.
inline StepPlan::Fault StepPlan::fault_of(const c10::TensorImpl* tensor, const c10::TensorImpl* param) {
  if (is_python_subclass(tensor)) return Fault::none;
  if (tensor->device() != param->device()) return Fault::device;
  if (!same_shape(tensor, param)) return Fault::shape;
  if (tensor->dtype() == param->dtype()) return Fault::none;
  const Format& format = format_of(tensor);
  if (!format.is_native || format.is_complex != format_of(param).is_complex) return Fault::dtype;
  return Fault::none;
}

// The same of a scalar that the state carries.
inline StepPlan::Fault StepPlan::fault_of_scalar(const c10::TensorImpl* tensor, const c10::TensorImpl* param) {
  if (is_python_subclass(tensor)) return Fault::none;
  // The kernels of the CPU look for it there; those of a GPU take it from either.
  if (!is_on_cpu(tensor) && tensor->device() != param->device()) return Fault::device;
  return tensor->numel() == 1 ? Fault::none : Fault::shape;
}

// Threads share this where the CPU updates: most of a short step's waiting is for the metadata of its tensors. The
// calling thread holds the GIL for all of them, and none calls Python. Before a launch one thread does it all, because
// the others would have to be waited for: with 16 threads steps took 10 ms more on a machine of 16 cores.
void StepPlan::examine(const Indices& created) {
  written_moved_ = grads_moved_ = !searched_;
  searched_ = false;                                   // until this step's search is through
  inference_mode_ = c10::InferenceMode::is_enabled();  // of this thread; the others do not know it
  count_ = located_.size();
  if (examined_.size() < count_) {
    examined_.resize(count_);
    segments_.resize(count_);
    prepared_.resize(count_);
  }
  struct Examination {
    StepPlan& plan;
    const Indices& created;
  } examination{*this, created};
  const auto range = [](int64_t first, int64_t last, void* context) {
    auto& [plan, created] = *static_cast<Examination*>(context);
    const auto begin = static_cast<size_t>(first), end = static_cast<size_t>(last);
    for (size_t i = begin; i < end; ++i) plan.examine(plan.located_[i], plan.examined_[i], plan.segments_[i]);
    plan.prepare(begin, end, created);
  };
  const auto count = static_cast<int64_t>(count_);
  if (count_ > 0 && is_on_gpu(located_.front().param)) {
    range(0, count, &examination);
  } else {
    in_parallel(count, kGrainTensors, range, &examination);
  }
}

void StepPlan::examine(const Located& located, Examined& examined, Segment& segment) const {
  const Group& group = *located.group;
  const auto foreign = [&](const char* reason) { examined.be_foreign(reason); };
  c10::TensorImpl* p = examined.streams[kParam] = located.param;
  c10::TensorImpl* g = examined.streams[kGrad] = located.grad;
  if (group.foreign != nullptr) return foreign(group.foreign);
  if (!THPVariable_CheckExact(located.parameter)) return foreign("tensor subclasses");
  if (!is_plain(p)) return foreign(why_not_plain(p));
  examined.on_gpu = is_on_gpu(p);
  // torch takes it on CPU only together with fused, where it means nothing.
  if (!examined.on_gpu && group.capturable && !group.fused) return foreign("capturable=True");
  if (group.gpu.has_value() && p->device() != *group.gpu) return foreign("hyperparameters on another device");
  if (is_expanded(p)) {
    examined.verdict = Verdict::expanded;
    return;
  }
  if (may_overlap_itself(p)) return foreign("strides by which elements may share memory");
  const Format& format = format_of(p);
  if (!format.is_native) return foreign("these dtypes");
  if (format.is_complex && group.fused) return foreign("complex parameters with fused=True");
  if (p->is_inference() && !inference_mode_) return foreign("inference tensors");
  if (is_lazily_cloned(p)) return foreign("lazily cloned tensors");

  const Fault fault = fault_of(g, p);
  if (fault != Fault::none) return examined.be_wrong(fault, kGradient);
  if (!is_plain(g)) return foreign(why_not_plain(g));
  examined.verdict = Verdict::ready;
  examined.written_moved = false;
  if (examine_state(located, examined)) make_segment(group, examined, segment);
}

// Returns false if the verdict is clear without a look at the streams' memory.
bool StepPlan::examine_state(const Located& located, Examined& examined) const {
  const auto foreign = [&](const char* reason) {
    examined.be_foreign(reason);
    return false;
  };
  const auto wrong = [&](Fault fault, int culprit) {
    examined.be_wrong(fault, culprit);
    return false;
  };
  const int wanted = wanted_states(*located.group);
  examined.has_recipe = located.group->gpu.has_value();
  for (int k = 0; k < wanted; ++k) {
    if (located.values[k] != nullptr && located.values[k] != Py_None) continue;
    // As in torch, a rule that carries scalars creates its state as a whole, so that a part of it is a mistake.
    const bool partial = rule_.carried > 0 && located.state != nullptr && PyDict_GET_SIZE(located.state) > 0;
    examined.verdict = partial ? Verdict::partial_state : Verdict::missing_state;
    examined.culprit = k;
    return !partial;
  }
  for (int k = 0; k < wanted; ++k) {
    if (!THPVariable_CheckExact(located.values[k])) {
      if (!is_tensor(located.values[k])) return wrong(Fault::no_tensor, k);
      return foreign("states that are tensor subclasses");
    }
    c10::TensorImpl* s = THPVariable_Unpack(located.values[k]).unsafeGetTensorImpl();
    const bool is_carried = k < rule_.carried;
    const Fault fault = is_carried ? fault_of_scalar(s, located.param) : fault_of(s, located.param);
    if (fault != Fault::none) return wrong(fault, k);
    if (!is_plain(s)) return foreign(why_not_plain(s));
    if (is_lazily_cloned(s)) return foreign("lazily cloned tensors");
    if (!is_carried) {
      if (is_expanded(s)) return wrong(Fault::expanded, k);
      if (may_overlap_itself(s)) return foreign("strides by which elements may share memory");
      examined.streams[kFirstState + k - rule_.carried] = s;
      continue;
    }
    const Format& format = format_of(s);
    if (!format.is_native || format.is_complex || format.bytes() < 4)
      return foreign("scalars of a state in this dtype");
    if (lacks_memory(s, 1, format.bytes())) return wrong(Fault::memory, k);
    void* data = writable_data(s, format.bytes());
    examined.written_moved |= examined.carried_data[k] != data;
    examined.carriers[k] = s;
    examined.carried_data[k] = data;
    examined.carried_on_gpu[k] = !is_on_cpu(s);
    examined.carried[k] = {0, format.dtype == Dtype::fp32};
    if (examined.carried_on_gpu[k]) {
      examined.has_recipe = true;
      continue;
    }
    // The host moves it on by what it cannot read then.
    if (k > 0 && examined.has_recipe) return foreign("a state on the CPU beside numbers on the GPU that it depends on");
    const double value = examined.carried[k].value = number_at(data, format.dtype);
    if (k == 0 && !(value >= 0 && value < kMaxStep && std::floor(value) == value)) {
      return foreign("step counts that are not natural numbers");
    }
  }
  return true;
}

// The work on tensors that are in order. Those of a state that is missing are left out.
void StepPlan::make_segment(const Group& group, Examined& examined, Segment& segment) const {
  const c10::TensorImpl* p = examined.streams[kParam];
  const Format& format = format_of(p);
  const int64_t numel = p->numel() * format.reals();
  const int count = kFirstState + (examined.verdict == Verdict::ready ? group.states : 0);
  const bool dense = p->is_non_overlapping_and_dense(), contiguous = p->is_contiguous();
  bool fp64 = false;
  examined.written_moved |= segment.numel != numel || examined.stream_count != count;
  examined.stream_count = count;
  examined.strided = false;
  for (int k = 0; k < count; ++k) {
    c10::TensorImpl* tensor = examined.streams[k];
    const Format& stored = format_of(tensor);
    void* data =
        k == kGrad ? const_cast<void*>(readable_data(tensor, stored.bytes())) : writable_data(tensor, stored.bytes());
    const bool simple = contiguous && tensor->is_contiguous();
    const int64_t extent = simple ? p->numel() : extent_of(tensor), bytes = extent * stored.bytes();
    if (lacks_memory(tensor, extent, stored.bytes())) {
      const int culprit = k == kParam ? kParameter : k == kGrad ? kGradient : rule_.carried + k - kFirstState;
      return examined.be_wrong(Fault::memory, culprit);
    }
    const bool moved = segment.streams[k].data != data || examined.bytes[k] != bytes;
    if (k == kGrad) {
      examined.grad_moved = moved;
    } else {
      examined.written_moved |= moved;
    }
    segment.streams[k] = {data, stored.dtype, true};
    examined.bytes[k] = bytes;
    fp64 |= stored.dtype == Dtype::fp64;
    examined.strided |= !simple && !(dense && tensor->strides() == p->strides());
  }
  examined.strided &= p->numel() > 0;
  examined.arithmetic = fp64 ? Arithmetic::fp64 : Arithmetic::fp32;
  segment.layout = nullptr;
  segment.update = rule_.update[static_cast<int>(examined.arithmetic)][group.states];
  segment.grad_scale = grad_scale_;
  segment.numel = numel;
  segment.unit_numel = kUnitBytes / itemsize(format.dtype);
  segment.maximize = group.maximize;
}

// The scalars of the ready ones. They depend on the group and on what the state carries, which neighbours nearly always
// share.
void StepPlan::prepare(size_t begin, size_t end, const Indices& created) {
  PowerMemo powers{};
  const Examined* last = nullptr;
  const Group* last_group = nullptr;
  bool last_first = false;
  for (size_t i = begin; i < end; ++i) {
    Examined& examined = examined_[i];
    if (examined.verdict != Verdict::ready) continue;
    const Group* group = located_[i].group;
    const bool first = examined.first =
        rule_.carried == 0 && !created.empty() &&
        std::binary_search(created.begin(), created.end(), Index(group->index, located_[i].index));
    bool same =
        last != nullptr && last_group == group && last_first == first && last->arithmetic == examined.arithmetic;
    for (int k = 0; same && k < rule_.carried; ++k) {
      same = last->carried[k].value == examined.carried[k].value &&
             last->carried[k].is_fp32 == examined.carried[k].is_fp32;
    }
    if (same) {
      examined.prepared = last->prepared;
    } else {
      examined.prepared = i;
      Prepared& prepared = prepared_[i];
      std::copy(examined.carried, examined.carried + rule_.carried, prepared.carried);
      rule_.prepare[static_cast<int>(examined.arithmetic)](prepared.carried, first, group->hyperparameters, powers,
                                                           &prepared.scalars);
    }
    segments_[i].scalars = &prepared_[examined.prepared].scalars;
    last = &examined;
    last_group = group;
    last_first = first;
  }
}

// Sorts what was examined: the wrong raises, the foreign are listed, the others stay.
void StepPlan::settle(const Indices& stepped) {
  missing_.clear();
  foreign_.clear();
  layouts_.clear();
  size_t kept = 0;
  for (size_t i = 0; i < count_; ++i) {
    Examined& examined = examined_[i];
    examined.located = i;
    const Index index(located_[i].group->index, located_[i].index);
    if (std::binary_search(stepped.begin(), stepped.end(), index)) continue;
    if (examined.verdict == Verdict::ready || examined.verdict == Verdict::missing_state) {
      written_moved_ |= examined.written_moved;
      grads_moved_ |= examined.grad_moved;
      if (examined.strided) lay_out(examined, segments_[i]);
      keep(i, kept++);
    } else if (examined.verdict == Verdict::foreign) {
      foreign_.push_back({i, examined.reason});
    } else {
      refuse(examined);
    }
  }
  count_ = kept;
}

// Numbers the elements of tensors that do not simply lie one after the other.
void StepPlan::lay_out(const Examined& examined, Segment& segment) {
  const bool is_complex = format_of(examined.streams[kParam]).is_complex;
  c10::SmallVector<int64_t, 8> sizes(examined.streams[kParam]->sizes()), strides[kMaxStreams];
  const int64_t* pointers[kMaxStreams];
  if (is_complex) sizes.push_back(2);
  for (int k = 0; k < examined.stream_count; ++k) {
    for (int64_t stride : examined.streams[k]->strides()) strides[k].push_back(is_complex ? 2 * stride : stride);
    if (is_complex) strides[k].push_back(1);
    pointers[k] = strides[k].data();
  }
  layouts_.push_back(make_layout(static_cast<int>(sizes.size()), sizes.data(), examined.stream_count, pointers));
  segment.layout = &layouts_.back();
  for (int k = 0; k < examined.stream_count; ++k) segment.streams[k].dense = segment.layout->dense(k);
}

void StepPlan::keep(size_t from, size_t to) {
  if (from == to) return;
  examined_[to] = examined_[from];
  segments_[to] = segments_[from];
}

void StepPlan::refuse(const Examined& examined) const {
  const Located& located = located_[examined.located];
  const std::string parameter = describe_parameter(located.group->dict, located.group->index, located.index);
  if (examined.verdict == Verdict::expanded) {
    throw py::value_error(parameter +
                          " is expanded: several of its elements share one memory location, so it cannot be updated in "
                          "place. Optimize a clone() of it instead");
  }
  const bool of_state = examined.culprit >= 0;
  const std::string state = of_state ? quoted(state_keys_[static_cast<size_t>(examined.culprit)]) : "";
  if (examined.verdict == Verdict::partial_state) {
    throw py::key_error("the state of " + parameter + " has no " + state +
                        ". Was an option such as amsgrad switched on after the first step? Delete this parameter's "
                        "state to start it afresh");
  }
  PyObject* value = of_state ? located.values[examined.culprit] : nullptr;
  const auto fault = [&]() -> std::string {
    if (examined.fault == Fault::no_tensor) return std::string("is no tensor but a ") + Py_TYPE(value)->tp_name;
    const c10::TensorImpl* tensor = of_state                        ? THPVariable_Unpack(value).unsafeGetTensorImpl()
                                    : examined.culprit == kGradient ? located.grad
                                                                    : located.param;
    switch (examined.fault) {
      case Fault::device:
        return "is on another device, " + tensor->device().str();
      case Fault::dtype:
        return std::string("has a dtype that does not fit, ") + c10::toString(tensor->dtype().toScalarType());
      case Fault::expanded:
        return "is expanded: several of its elements share one memory location";
      case Fault::memory:
        return "lies in a storage that is too small for it, of " + std::to_string(tensor->unsafe_storage().nbytes()) +
               " bytes: it was freed or resized";
      default:
        return "has another shape, " + shape_of(tensor);
    }
  };
  if (examined.culprit == kParameter) {
    throw py::value_error(parameter + " " + fault() + ". Give it its memory back before the step");
  }
  if (examined.culprit == kGradient) {
    throw py::value_error("the gradient of " + parameter + " " + fault() +
                          ". Set .grad to None, or to a tensor like the parameter");
  }
  throw py::value_error("the state " + state + " of " + parameter + " " + fault() +
                        ". Delete this parameter's state to start it afresh");
}

// Element for element in parallel is wrong for tensors that share memory: torch is to take them one after the other. So
// it is, as torch goes first, for those that share memory with what torch steps anyway.
void StepPlan::set_aside_overlapping() {
  searched_ = foreign_.empty();  // else `keep` has shifted entries, which were compared with those of other parameters
  written_moved_ |= count_ != searched_count_ || !searched_;
  searched_count_ = count_;
  if (!written_moved_ && !grads_moved_) return;

  if (written_moved_) {
    memory_.clear();
    for (size_t i = 0; i < count_; ++i) {
      const Examined& examined = examined_[i];
      for (int k = 0; k < examined.stream_count; ++k) {
        if (k != kGrad) memory_.add(i, segments_[i].streams[k].data, examined.bytes[k]);
      }
      for (int k = 0; k < rule_.carried && examined.verdict == Verdict::ready; ++k) {
        memory_.add(i, examined.carried_data[k], examined.carried[k].is_fp32 ? 4 : 8);
      }
    }
    for (const Foreign& f : foreign_) {
      with_memory_of(located_[f.located].param, [&](auto... range) { memory_.add(count_, range...); });
    }
    memory_.sort();
  }
  overlapping_.clear();
  memory_.append_overlapping(overlapping_);
  for (size_t i = 0; i < count_; ++i) {
    memory_.append_overlapping(i, segments_[i].streams[kGrad].data, examined_[i].bytes[kGrad], overlapping_);
  }
  for (const Foreign& f : foreign_) {
    with_memory_of(located_[f.located].grad,
                   [&](auto... range) { memory_.append_overlapping(count_, range..., overlapping_); });
  }
  if (overlapping_.empty()) return;

  std::vector<bool> aside(count_ + 1, false);  // the last place stands for all that are foreign already
  for (size_t i : overlapping_) aside[i] = true;
  size_t kept = 0;
  for (size_t i = 0; i < count_; ++i) {
    if (aside[i]) {
      foreign_.push_back({examined_[i].located, kSharesMemory});
    } else {
      keep(i, kept++);
    }
  }
  count_ = kept;
  searched_ = false;
}

void StepPlan::set_aside_all(const char* reason) {
  for (size_t i = 0; i < count_; ++i) foreign_.push_back({examined_[i].located, reason});
  searched_ = searched_ && count_ == 0;
  count_ = 0;
}

// Only now, so that torch gets those of them that share memory, and creates their states itself.
void StepPlan::set_aside_missing() {
  missing_is_hosts_ = false;
  size_t kept = 0;
  for (size_t i = 0; i < count_; ++i) {
    if (examined_[i].verdict == Verdict::ready) {
      keep(i, kept++);
    } else {
      const Located& located = located_[examined_[i].located];
      missing_.emplace_back(located.group->index, located.index);
      // Where torch creates a count of steps on the GPU.
      const bool counts_on_gpu = rule_.carried > 0 && (located.group->fused || located.group->capturable);
      missing_is_hosts_ |= !(examined_[i].on_gpu && counts_on_gpu);
    }
  }
  searched_ = searched_ && kept == count_;
  count_ = kept;
}

// A graph does again in every replay what the device did, but not what the host did.
void StepPlan::check_capture() const {
  std::optional<c10::Device> device;
  bool capturing = false;
  for (size_t i = 0; i < count_ && !capturing; ++i) {
    if (!examined_[i].on_gpu || device == examined_[i].streams[kParam]->device()) continue;
    device = examined_[i].streams[kParam]->device();
    capturing = is_capturing(*device);
  }
  if (!capturing) return;
  for (size_t i = 0; i < count_; ++i) {
    const Examined& examined = examined_[i];
    const Group& group = *located_[examined.located].group;
    if (rule_.carried > 0 && !group.capturable) {  // in torch's words
      throw std::runtime_error("Attempting CUDA graph capture of step() for an instance of " + optimizer_ +
                               " but param_groups' capturable is False.");
    }
    const auto refuse = [&](const std::string& why) {
      throw std::runtime_error("step() cannot be captured in a CUDA graph: " +
                               describe_parameter(group.dict, group.index, located_[examined.located].index) + " " +
                               why);
    };
    if (!examined.on_gpu) refuse("is not on the GPU");
    if (examined.verdict == Verdict::missing_state) refuse("has no state yet. Take a step before the capture");
    for (int k = 0; k < rule_.carried; ++k) {
      if (examined.carried_on_gpu[k]) continue;
      refuse("has its state " + quoted(state_keys_[static_cast<size_t>(k)]) + " on the CPU. Move it to the GPU");
    }
  }
}

// After an overflow nothing of a step may be done. A kernel sees to that, but cannot for what the host does: count
// steps, create a state that its first step fills, or update what is not on a GPU.
bool StepPlan::host_decides(const Scaler& scaler) const {
  if (!scaler.found_inf.defined() && !scaler.grad_scale.defined()) return false;
  if (!foreign_.empty() || missing_is_hosts_) return true;
  for (size_t i = 0; i < count_; ++i) {
    if (!examined_[i].on_gpu) return true;
    for (int k = 0; k < rule_.carried; ++k) {
      if (!examined_[i].carried_on_gpu[k]) return true;
    }
  }
  return false;
}

// Nothing can fail from here on, but for CUDA.
void StepPlan::run(const Scaler& scaler) {
  run_on_gpus(scaler);
  run_on_cpu();
}

Launches& StepPlan::launches_for(const Examined& examined) {
  const c10::Device device = examined.streams[kParam]->device();
  for (Launches& launches : launches_) {
    if (launches.device() == device && launches.arithmetic() == examined.arithmetic) return launches;
  }
  return launches_.emplace_back(device, examined.arithmetic);
}

// What the kernel is to know of a tensor's scalars. Returns the number of words.
size_t StepPlan::fill_slot(const Examined& examined, uint64_t* words) const {
  if (!examined.has_recipe) {
    const size_t bytes = rule_.scalar_bytes[static_cast<int>(examined.arithmetic)];
    const size_t count = (bytes + sizeof(uint64_t) - 1) / sizeof(uint64_t);
    words[count - 1] = 0;
    std::memcpy(words, prepared_[examined.prepared].scalars.bytes, bytes);
    return count;
  }
  const Group& group = *located_[examined.located].group;
  cuda::Recipe recipe{};
  recipe.fp32_address = group.fp32_address;
  recipe.fp64_address = group.fp64_address;
  recipe.first = examined.first;
  for (int k = 0; k < rule_.hyperparameters; ++k) {
    const bool is_address = (group.fp32_address | group.fp64_address) >> k & 1;
    recipe.words[k] = is_address ? reinterpret_cast<uint64_t>(group.addresses[k])
                                 : __builtin_bit_cast(uint64_t, group.hyperparameters[k]);
  }
  for (int k = 0; k < rule_.carried; ++k) {
    recipe.words[rule_.hyperparameters + k] = __builtin_bit_cast(uint64_t, examined.carried[k].value);
  }
  const size_t count = cuda::Recipe::header_words + static_cast<size_t>(rule_.hyperparameters + rule_.carried);
  std::memcpy(words, &recipe, count * sizeof(uint64_t));
  return count;
}

void StepPlan::run_on_gpus(const Scaler& scaler) {
  uint64_t slot[std::max(sizeof(Scalars), sizeof(cuda::Recipe)) / sizeof(uint64_t)];
  size_t words = 0;
  const Examined* last = nullptr;  // whose scalars are in `slot`
  for (size_t i = 0; i < count_; ++i) {
    const Examined& examined = examined_[i];
    if (!examined.on_gpu) continue;
    const Group& group = *located_[examined.located].group;
    void* carried[kMaxCarried] = {};
    uint8_t carried_fp32 = 0;
    for (int k = 0; k < rule_.carried; ++k) {
      if (examined.carried_on_gpu[k]) carried[k] = examined.carried_data[k];
      carried_fp32 |= static_cast<uint8_t>(examined.carried[k].is_fp32 << k);
    }
    const bool same = last != nullptr && last->prepared == examined.prepared && last->has_recipe == examined.has_recipe;
    if (!same) words = fill_slot(examined, slot);
    launches_for(examined).add(segments_[i], group.states, carried, carried_fp32, examined.has_recipe, &group, slot,
                               words);
    last = &examined;
  }
  for (Launches& launches : launches_) launches.prepare(scaler);
  for (Launches& launches : launches_) launches.run(rule_);

  for (size_t i = 0; i < count_; ++i) {
    if (examined_[i].on_gpu) record(examined_[i]);
  }
  // What is left is the CPU's; mostly it is nothing, or all.
  size_t kept = 0;
  for (size_t i = 0; i < count_; ++i) {
    if (!examined_[i].on_gpu) keep(i, kept++);
  }
  if (kept < count_) {
    updated_[c10::DeviceTypeName(kGpu, true)] = count_ - kept;
    searched_ = searched_ && kept == 0;
    count_ = kept;
  }
}

void StepPlan::run_on_cpu() {
  if (count_ == 0) return;
  updated_["cpu"] = count_;
  struct Step {
    cpu::Work work;
    const StepPlan* plan;
  } step{{segments_.data(), count_, number_units(segments_.data(), count_)}, this};
  if (step.work.units < kShortStepUnits) {
    in_parallel(
        step.work.units, kGrainUnits,
        [](int64_t begin, int64_t end, void* context) {
          auto& [work, plan] = *static_cast<Step*>(context);
          for (size_t i = segment_at(work.segments, work.count, begin); i < work.count; ++i) {
            const Segment& segment = work.segments[i];
            if (segment.first_unit >= end) break;
            if (segment.first_unit >= begin) plan->record(plan->examined_[i]);
          }
          cpu::run(begin, end, &work);
        },
        &step);
    return;
  }

  std::vector<c10::Storage> alive;  // whatever another thread does to the tensors meanwhile
  alive.reserve(count_ * (kMaxStates + 2));
  for (size_t i = 0; i < count_; ++i) {
    record(examined_[i]);
    for (int k = 0; k < examined_[i].stream_count; ++k) alive.push_back(examined_[i].streams[k]->storage());
  }
  const py::gil_scoped_release release;
  in_parallel(step.work.units, kGrainUnits, cpu::run, &step.work);
}

// What a step leaves beside the data.
void StepPlan::record(const Examined& examined) const {
  // As torch's in-place operations do: a backward through a graph that saved the old value must raise.
  const auto bump = [](c10::TensorImpl* tensor) {
    if (!tensor->is_inference()) tensor->bump_version();
  };
  for (int k = 0; k < examined.stream_count; ++k) {
    if (k != kGrad) bump(examined.streams[k]);
  }
  for (int k = 0; k < rule_.carried; ++k) {
    bump(examined.carriers[k]);
    if (examined.carried_on_gpu[k]) continue;  // the kernel does it
    const Carried& carried = prepared_[examined.prepared].carried[k];
    if (carried.is_fp32) {
      *static_cast<float*>(examined.carried_data[k]) = static_cast<float>(carried.value);
    } else {
      *static_cast<double*>(examined.carried_data[k]) = carried.value;
    }
  }
}

size_t StepPlan::launches() const {
  size_t count = 0;
  for (const Launches& launches : launches_) count += launches.count();
  return count;
}

// The form of a parameter that torch is to step: see dracopt_ext/foreign.py.
int StepPlan::form_of(const Foreign& foreign) const {
  enum Form { kNew = 1, kMixed = 2, kSparse = 4, kFusable = 8 };
  const Located& located = located_[foreign.located];
  int form = 0;
  const int wanted = wanted_states(*located.group);
  for (int k = 0; k < wanted; ++k) {
    if (located.values[k] == nullptr || located.values[k] == Py_None) form = kNew;
  }
  const c10::TensorImpl* grad = located.grad;
  if (grad->is_sparse()) return form | kSparse;
  if (grad->is_sparse_compressed() || grad->is_mkldnn()) return form;
  const auto dtype = located.param->dtype();
  const bool is_short = grad->dtype() == at::kBFloat16 || grad->dtype() == at::kHalf;
  bool mixed = grad->dtype() != dtype || grad->is_conj() || (grad_scale_ != 1 && is_short);
  for (int k = rule_.carried; k < wanted; ++k) {
    if (located.values[k] == nullptr || !is_tensor(located.values[k])) continue;
    mixed |= THPVariable_Unpack(located.values[k]).dtype() != dtype;
  }
  if (mixed) return form | kMixed;
  const bool may_fuse = located.group->fused && foreign.reason != kSharesMemory;
  return may_fuse && is_fusable(located) ? form | kFusable : form;
}

// Are torch's fused kernels for the CPU right for these tensors? They look at no strides and no sizes.
bool StepPlan::is_fusable(const Located& located) const {
  const Format& format = format_of(located.param);
  if (!format.is_native || format.is_complex) return false;
  const at::Tensor param = local_of(located.parameter);
  const auto gradient = py::reinterpret_steal<py::object>(THPVariable_Wrap(located.param->grad()));
  const at::Tensor grad = local_of(gradient.ptr());
  const auto has_its_shape = [&](const at::Tensor& tensor) {
    return same_shape(tensor.unsafeGetTensorImpl(), param.unsafeGetTensorImpl());
  };
  if (!lies_simply(param) || !lies_simply(grad) || !has_its_shape(grad)) return false;
  for (int k = 0; k < wanted_states(*located.group); ++k) {
    if (located.values[k] == nullptr || located.values[k] == Py_None) continue;  // torch creates it
    if (!is_tensor(located.values[k])) return false;
    const at::Tensor state = local_of(located.values[k]);
    if (!lies_simply(state)) return false;
    const bool fits = k < rule_.carried ? state.dtype() == at::kFloat && state.numel() == 1 : has_its_shape(state);
    if (!fits) return false;
  }
  return true;
}

py::object StepPlan::todo(bool host_decides) const {
  py::list foreign(foreign_.size());
  const char* reason = nullptr;
  py::str words;
  for (size_t i = 0; i < foreign_.size(); ++i) {
    const Located& located = located_[foreign_[i].located];
    if (foreign_[i].reason != reason) words = py::str(reason = foreign_[i].reason);
    PyList_SET_ITEM(foreign.ptr(), static_cast<Py_ssize_t>(i),
                    py::make_tuple(located.group->index, located.index, words, form_of(foreign_[i])).release().ptr());
  }
  return py::make_tuple(missing_, foreign, host_decides, count_ == 0 && missing_.empty());
}

}  // namespace dracopt
