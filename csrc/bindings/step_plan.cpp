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
constexpr const char* kMisaligned = "addresses that are no multiples of an element's size";

// A mode traces, counts or replaces the operations of torch, which kernels are not. torch keeps the modes of make_fx
// with pre_dispatch=True apart from the others.
bool is_under_mode() {
  return c10::impl::TorchDispatchModeTLS::stack_len() > 0 ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::PreDispatch);
}

// A step is running as long as one of these lives, in the process that made it: a child forked meanwhile only inherits
// the number of its parent.
struct Running {
  Running(int& process, int none) : running_in(process), no_process(none) { running_in = cpu::forks(); }
  ~Running() { running_in = no_process; }
  Running(const Running&) = delete;
  int& running_in;
  const int no_process;
};

constexpr double kMaxStep = 9007199254740992.0;  // 2^53: beyond it a double no longer counts

void in_parallel(int64_t count, int64_t grain, ParallelFunc function, void* context) {
  if (!cpu::in_parallel(torch_parallel_for, count, grain, function, context)) {
    throw std::runtime_error("torch_parallel_for failed");
  }
}

// Reads a flag. Returns false if Python must say whether that is true.
bool read_flag(PyObject* object, bool& flag) {
  flag = object == Py_True;
  return object == nullptr || object == Py_False || object == Py_None || flag;
}

// Is a parameter in one of the runs, which are sorted?
bool is_in(const StepPlan::Runs& runs, int group, int index) {
  const auto next =
      std::upper_bound(runs.begin(), runs.end(), StepPlan::Run(group, index, std::numeric_limits<int>::max()));
  if (next == runs.begin()) return false;
  const auto& [of_group, begin, end] = *std::prev(next);
  return of_group == group && begin <= index && index < end;
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

// A tensor that holds what was borrowed.
at::Tensor hold(c10::TensorImpl* tensor) {
  return at::Tensor(c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::reclaim_copy(tensor));
}

// The tensor that holds a tensor's elements: the shard of a distributed one, or itself. Undefined for other wrappers.
at::Tensor local_of(const at::Tensor& tensor) {
  if (!is_python_subclass(tensor.unsafeGetTensorImpl())) return tensor;
  const auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
  const auto local = py::reinterpret_steal<py::object>(PyObject_GetAttrString(object.ptr(), "_local_tensor"));
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
                          std::optional<Runs> created, Indices stepped) {
  if (running_in_ == cpu::forks()) {
    throw std::runtime_error("this plan is in the middle of a step");
  }
  const Running running(running_in_, kNoProcess);
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
  examine();
  settle(stepped);
  const bool searched = set_aside_overlapping();
  if (is_under_mode()) set_aside_all(kUnderMode);
  check_capture();
  set_aside_missing();
  searched_ = searched && count_ == searched_count_;
  const bool waits = host_decides(scaler);
  if (!again && (waits || !missing_.empty() || !foreign_.empty())) return todo(waits);
  if (waits || !missing_.empty() || !foreign_.empty()) {
    throw std::runtime_error("parameters or states have changed while step() was creating states");
  }
  prepare(*created);
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
  if (!group_keys_.read(dict, group_keys_.size(), values)) return false;
  group.params = values[0];
  if (group.params == nullptr || !PyList_CheckExact(group.params)) return false;
  bool differentiable;
  if (!read_flag(values[1], group.maximize) || !read_flag(values[2], group.fused) ||
      !read_flag(values[3], differentiable) || !read_flag(values[4], group.capturable)) {
    return false;
  }
  group.foreign = differentiable ? "differentiable=True" : nullptr;
  group.reads_memory = false;
  group.gpu.reset();
  group.fp32_address = group.fp64_address = 0;

  int count = 0;
  bool flag;
  for (size_t k = kDriverKeys; k < group_keys_.size(); ++k) {
    PyObject* const key = group_keys_[k];
    PyObject* const value = values[k];
    if (value == nullptr) throw py::key_error(describe_key(group.index, key) + " is missing");
    switch (rule_.group_keys[k - kDriverKeys].kind) {
      case KeyKind::number:
        if (!read_number(group, key, value, false, count)) return false;
        break;
      case KeyKind::flag:
        if (!read_flag(value, flag)) return false;
        group.bytes[count] = 0;
        group.hyperparameters[count++] = flag;
        break;
      case KeyKind::decay_rates:
        if (!PyTuple_CheckExact(value) && !PyList_CheckExact(value)) return false;
        if (PySequence_Fast_GET_SIZE(value) != 2) {
          throw py::value_error(describe_key(group.index, key) + " must be 2 numbers, not " +
                                std::to_string(PySequence_Fast_GET_SIZE(value)));
        }
        for (Py_ssize_t i = 0; i < 2; ++i) {
          if (!read_number(group, key, PySequence_Fast_GET_ITEM(value, i), true, count)) return false;
        }
        break;
    }
  }
  group.states = rule_.states(group.hyperparameters);
  return true;
}

// Reads the `count`-th hyperparameter, and counts it. Returns false if Python must say which number it is.
bool StepPlan::read_number(Group& group, PyObject* key, PyObject* number, bool is_decay_rate, int& count) {
  double value = 0;
  uint8_t bytes = 0;
  if (PyFloat_Check(number)) {
    value = PyFloat_AS_DOUBLE(number);
  } else if (PyLong_Check(number)) {
    value = PyLong_AsDouble(number);
    if (value == -1.0 && PyErr_Occurred()) {
      PyErr_Clear();
      throw py::value_error(describe_key(group.index, key) + " is too large for a float");
    }
  } else if (!is_tensor(number)) {
    return false;
  } else {
    const c10::TensorImpl* tensor = THPVariable_Unpack(number).unsafeGetTensorImpl();
    const bool is_ours = is_plain(tensor);
    if (!is_python_subclass(tensor) && tensor->numel() != 1) {
      throw py::value_error(describe_key(group.index, key) + " must be a tensor of one element, not of shape " +
                            shape_of(tensor));
    }
    const Format& format = format_of(tensor);
    const bool is_real = format.is_native && !format.is_complex;
    if (is_ours && lacks_memory(tensor, 1, static_cast<int64_t>(tensor->itemsize()))) {
      throw py::value_error(describe_key(group.index, key) + " is a tensor whose storage was freed");
    }
    const void* const data = is_ours && is_real ? readable_data(tensor, format.bytes()) : nullptr;
    const bool on_gpu = data != nullptr && !is_on_cpu(tensor);
    const bool serves = data != nullptr && (!on_gpu || (format.bytes() >= 4 && is_aligned(data, format.dtype) &&
                                                        group.gpu.value_or(tensor->device()) == tensor->device()));
    if (serves) {
      bytes = static_cast<uint8_t>(format.bytes());
      reads_moved_ |= group.bytes[count] != bytes || group.addresses[count] != data;
      group.addresses[count] = data;
      group.reads_memory = true;
    } else {
      group.foreign = "hyperparameters that are tensors on another device or of another dtype";
    }
    if (serves && on_gpu) {
      group.gpu = tensor->device();
      (format.dtype == Dtype::fp32 ? group.fp32_address : group.fp64_address) |= static_cast<uint16_t>(1 << count);
    }
    if (!serves || on_gpu) {
      group.bytes[count] = bytes;
      group.hyperparameters[count++] = std::numeric_limits<double>::quiet_NaN();  // only torch, or the kernel, sees it
      return true;
    }
    value = number_at(data, format.dtype);
  }
  if (!std::isfinite(value) || (is_decay_rate && !(value >= 0 && value < 1))) {
    throw py::value_error(describe_key(group.index, key) + " is " + quoted(number) + "; it must be " +
                          (is_decay_rate ? "at least 0 and less than 1" : "finite"));
  }
  group.bytes[count] = bytes;
  group.hyperparameters[count++] = value;
  return true;
}

c10::TensorImpl* StepPlan::Located::param() const { return THPVariable_Unpack(parameter).unsafeGetTensorImpl(); }

// The tensor of a stream that is there.
c10::TensorImpl* StepPlan::tensor_of(const Located& located, int stream) const {
  if (stream == kParam) return located.param();
  if (stream == kGrad) return located.grad;
  return THPVariable_Unpack(located.values[rule_.carried + stream - kFirstState]).unsafeGetTensorImpl();
}

// The tensor of a carried scalar.
c10::TensorImpl* StepPlan::carrier_of(const Located& located, int k) const {
  return THPVariable_Unpack(located.values[k]).unsafeGetTensorImpl();
}

std::string StepPlan::describe(const Located& located) const {
  const Group& group = group_of(located);
  return describe_parameter(group.dict, group.index, static_cast<int>(located.index), located.param());
}

// Finds the parameters that have a gradient, and their states. All that needs Python is done here.
bool StepPlan::locate(PyObject* state) {
  if (!PyDict_CheckExact(state) && !py::handle(reinterpret_cast<PyObject*>(Py_TYPE(state))).is(defaultdict_)) {
    return false;
  }
  located_.clear();
  size_t total = 0;
  for (const Group& group : groups_) total += static_cast<size_t>(PyList_GET_SIZE(group.params));
  located_.reserve(total);
  for (const Group& group : groups_) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(group.params); ++i) {
      PyObject* parameter = PyList_GET_ITEM(group.params, i);
      if (!is_tensor(parameter)) {
        throw py::type_error(describe_key(group.index, group_keys_[0]) + "[" + std::to_string(i) +
                             "] must be a Tensor, not " + Py_TYPE(parameter)->tp_name);
      }
      located_.push_back({static_cast<uint32_t>(group.index), static_cast<uint32_t>(i), false, parameter, nullptr, {}});
    }
  }
  // In passes a block at a time, each of which follows one more pointer: these objects rarely lie in the cache, and so
  // they are fetched for the whole block at once, not waited for one after the other.
  StateWalk walk(state);
  size_t count = 0;
  for (size_t begin = 0; begin < total; begin += kBlock) {
    const size_t end = std::min(begin + kBlock, total);
    for (size_t i = begin; i < end; ++i) prefetch(located_[i].param());
    const size_t first = count;
    PyObject* states[kBlock];
    for (size_t i = begin; i < end; ++i) {
      const at::Tensor& grad = located_[i].param()->grad();
      if (!grad.defined()) {
        walk.pass(located_[i].parameter);
        continue;
      }
      PyObject* found = states[count - first] = walk.find(located_[i].parameter);
      if (found != nullptr) prefetch(found);
      Located& located = located_[count++] = located_[i];
      located.grad = grad.unsafeGetTensorImpl();
    }
    for (size_t i = first; i < count; ++i) {
      if (states[i - first] != nullptr) prefetch_entries(states[i - first]);
    }
    for (size_t i = first; i < count; ++i) {
      PyObject* const entries = states[i - first];
      Located& located = located_[i];
      if (entries == nullptr) continue;
      if (!PyDict_CheckExact(entries)) return false;
      const auto wanted = static_cast<size_t>(wanted_states(group_of(located)));
      if (!state_keys_.read(entries, wanted, located.values)) return false;
      located.has_state = PyDict_GET_SIZE(entries) > 0;
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

// A scalar that the state carries may be stored in any dtype, and on the CPU beside a parameter on a GPU.
inline StepPlan::Fault StepPlan::fault_of_scalar(const c10::TensorImpl* tensor, const c10::TensorImpl* param) {
  if (is_python_subclass(tensor)) return Fault::none;
  // The kernels of the CPU look for it there; those of a GPU take it from either.
  if (!is_on_cpu(tensor) && tensor->device() != param->device()) return Fault::device;
  return tensor->numel() == 1 ? Fault::none : Fault::shape;
}

// Threads share this where the CPU updates: most of a short step's waiting is for the metadata of its tensors. The
// calling thread holds the GIL for all of them, and none calls Python. Before a launch one thread does it all, because
// the others would have to be waited for: with 16 threads steps took 10 ms more on a machine of 16 cores.
void StepPlan::examine() {
  if (!std::exchange(searched_, false)) written_moved_ = reads_moved_ = true;
  inference_mode_ = c10::InferenceMode::is_enabled();  // of this thread; the others do not know it
  count_ = located_.size();
  // Each by its own size, as memory may run out between the two.
  if (examined_.size() < count_) examined_.resize(count_);
  if (segments_.size() < count_) segments_.resize(count_);
  const auto range = [](int64_t first, int64_t last, void* context) {
    auto& plan = *static_cast<StepPlan*>(context);
    const auto begin = static_cast<size_t>(first), end = static_cast<size_t>(last);
    for (size_t i = begin; i < end; ++i) plan.examine(plan.located_[i], plan.examined_[i], plan.segments_[i]);
  };
  const auto count = static_cast<int64_t>(count_);
  if (count_ > 0 && is_on_gpu(located_.front().param())) {
    range(0, count, this);
  } else {
    in_parallel(count, kGrainTensors, range, this);
  }
}

void StepPlan::examine(const Located& located, Examined& examined, Segment& segment) const {
  const Group& group = group_of(located);
  const auto foreign = [&](const char* reason) { examined.be_foreign(reason); };
  c10::TensorImpl* const p = located.param();
  const c10::TensorImpl* const g = located.grad;
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
  if (examine_state(located, examined)) make_segment(located, examined, segment);
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
  const c10::TensorImpl* p = located.param();
  const int wanted = wanted_states(group_of(located));
  examined.has_recipe = group_of(located).gpu.has_value();
  for (int k = 0; k < wanted; ++k) {
    if (located.values[k] != nullptr && located.values[k] != Py_None) continue;
    // As in torch, a rule that carries scalars creates its state as a whole, so that a part of it is a mistake.
    const bool partial = rule_.carried > 0 && located.has_state;
    examined.verdict = partial ? Verdict::partial_state : Verdict::missing_state;
    examined.culprit = static_cast<int8_t>(k);
    return !partial;
  }
  for (int k = 0; k < wanted; ++k) {
    if (!THPVariable_CheckExact(located.values[k])) {
      if (!is_tensor(located.values[k])) return wrong(Fault::no_tensor, k);
      return foreign("states that are tensor subclasses");
    }
    c10::TensorImpl* s = THPVariable_Unpack(located.values[k]).unsafeGetTensorImpl();
    const bool is_carried = k < rule_.carried;
    const Fault fault = is_carried ? fault_of_scalar(s, p) : fault_of(s, p);
    if (fault != Fault::none) return wrong(fault, k);
    if (!is_plain(s)) return foreign(why_not_plain(s));
    if (is_lazily_cloned(s)) return foreign("lazily cloned tensors");
    if (!is_carried) {
      if (is_expanded(s)) return wrong(Fault::expanded, k);
      if (may_overlap_itself(s)) return foreign("strides by which elements may share memory");
      continue;
    }
    const Format& format = format_of(s);
    if (!format.is_native || format.is_complex || format.bytes() < 4)
      return foreign("scalars of a state in this dtype");
    if (lacks_memory(s, 1, format.bytes())) return wrong(Fault::memory, k);
    void* data = writable_data(s, format.bytes());
    if (!is_aligned(data, format.dtype)) return foreign(kMisaligned);
    const bool is_fp32 = format.dtype == Dtype::fp32;
    examined.written_moved |= examined.carried_data[k] != data || examined.carried_fp32[k] != is_fp32;
    examined.carried_data[k] = data;
    examined.carried_fp32[k] = is_fp32;
    examined.carried_on_gpu[k] = !is_on_cpu(s);
    if (examined.carried_on_gpu[k]) {
      examined.has_recipe = true;
      continue;
    }
    // The host moves it on by what it cannot read then.
    if (k > 0 && examined.has_recipe) return foreign("a state on the CPU beside numbers on the GPU that it depends on");
    const double value = number_at(data, format.dtype);
    if (k == 0 && !(value >= 0 && value < kMaxStep && std::floor(value) == value)) {
      return foreign("step counts that are not natural numbers");
    }
  }
  return true;
}

// The work on tensors that are in order. Those of a state that is missing are left out.
void StepPlan::make_segment(const Located& located, Examined& examined, Segment& segment) const {
  const Group& group = group_of(located);
  const c10::TensorImpl* p = located.param();
  const Format& format = format_of(p);
  const int64_t numel = p->numel() * format.reals();
  const int count = kFirstState + (examined.verdict == Verdict::ready ? group.states : 0);
  const bool dense = p->is_non_overlapping_and_dense(), contiguous = p->is_contiguous();
  bool fp64 = false;
  examined.written_moved |= segment.numel != numel || examined.stream_count != count;
  examined.stream_count = static_cast<uint8_t>(count);
  examined.strided = false;
  for (int k = 0; k < count; ++k) {
    c10::TensorImpl* tensor = tensor_of(located, k);
    const Format& stored = format_of(tensor);
    void* data =
        k == kGrad ? const_cast<void*>(readable_data(tensor, stored.bytes())) : writable_data(tensor, stored.bytes());
    const bool simple = contiguous && tensor->is_contiguous();
    const int64_t extent = simple ? p->numel() : extent_of(tensor);
    if (lacks_memory(tensor, extent, stored.bytes())) {
      const int culprit = k == kParam ? kParameter : k == kGrad ? kGradient : rule_.carried + k - kFirstState;
      return examined.be_wrong(Fault::memory, culprit);
    }
    if (!is_aligned(data, stored.dtype) && extent > 0) return examined.be_foreign(kMisaligned);
    // How far a tensor with gaps extends is not remembered.
    const bool has_gaps = !simple && !tensor->is_non_overlapping_and_dense();
    const bool moved = segment.data[k] != data || segment.dtypes[k] != stored.dtype || has_gaps;
    if (k == kGrad) {
      examined.grad_moved = moved;
    } else {
      examined.written_moved |= moved;
    }
    segment.data[k] = data;
    segment.dtypes[k] = stored.dtype;
    segment.dense[k] = true;
    fp64 |= stored.dtype == Dtype::fp64;
    examined.strided |= !simple && !(dense && tensor->strides() == p->strides());
  }
  examined.strided &= p->numel() > 0;
  examined.arithmetic = fp64 ? Arithmetic::fp64 : Arithmetic::fp32;
  segment.layout = nullptr;
  segment.numel = numel;
  segment.unit_numel = kUnitBytes / itemsize(format.dtype);
}

// The carried scalars before this step; of those on a GPU, without the value.
void StepPlan::read_carried(const Examined& examined, Carried* carried) const {
  for (int k = 0; k < rule_.carried; ++k) {
    const bool is_fp32 = examined.carried_fp32[k];
    double value = 0;
    if (!examined.carried_on_gpu[k]) {
      const void* const data = examined.carried_data[k];
      value = is_fp32 ? *static_cast<const float*>(data) : *static_cast<const double*>(data);
    }
    carried[k] = {value, is_fp32};
  }
}

// The scalars. They depend on the group and on what the state carries, which neighbours nearly always share.
void StepPlan::prepare(const Runs& created) {
  PowerMemo powers{};
  const Examined* last = nullptr;
  const Update* update = nullptr;
  Carried carried[kMaxCarried], last_carried[kMaxCarried];
  prepared_count_ = 0;
  for (size_t i = 0; i < count_; ++i) {
    Examined& examined = examined_[i];
    const Located& located = located_[examined.located];
    examined.first =
        rule_.carried == 0 && is_in(created, static_cast<int>(located.group), static_cast<int>(located.index));
    read_carried(examined, carried);
    bool same = last != nullptr && located_[last->located].group == located.group && last->first == examined.first &&
                last->arithmetic == examined.arithmetic && last->has_recipe == examined.has_recipe;
    for (int k = 0; same && k < rule_.carried; ++k) {
      same = carried[k].value == last_carried[k].value && carried[k].is_fp32 == last_carried[k].is_fp32;
    }
    if (!same) {
      if (prepared_count_ == prepared_.size()) prepared_.emplace_back();
      Prepared& prepared = prepared_[prepared_count_++];
      std::copy(carried, carried + rule_.carried, prepared.carried);
      std::copy(carried, carried + rule_.carried, last_carried);
      const Group& group = group_of(located);
      const auto arithmetic = static_cast<int>(examined.arithmetic);
      const bool finite =
          rule_.prepare[arithmetic](prepared.carried, examined.first, group.hyperparameters, powers, &prepared.scalars);
      if (!finite && !examined.has_recipe) refuse_scalars(examined);
      prepared.update = {rule_.update[arithmetic][group.states], &prepared.scalars, grad_scale_, group.maximize};
      update = &prepared.update;
      last = &examined;
    }
    examined.prepared = static_cast<uint32_t>(prepared_count_ - 1);
    segments_[i].update = update;
  }
}

// Names the largest of the hyperparameters without which the scalars would be finite; else the largest of all, unless
// the state is wrong.
void StepPlan::refuse_scalars(const Examined& examined) const {
  const Group& group = group_of(examined);
  const bool is_fp32 = examined.arithmetic == Arithmetic::fp32;
  const auto is_finite_with = [&](const double* hyperparameters) {
    Carried carried[kMaxCarried];
    read_carried(examined, carried);
    PowerMemo powers{};
    Scalars scalars;
    return rule_.prepare[static_cast<int>(examined.arithmetic)](carried, examined.first, hyperparameters, powers,
                                                                &scalars);
  };
  constexpr double zeros[kMaxHyperparameters] = {};
  const bool state_is_wrong = !is_finite_with(zeros);
  PyObject *culprit = nullptr, *largest = nullptr;  // on its own; in any case
  double most = 0, most_of_all = 0;
  int number = 0;
  for (size_t k = kDriverKeys; k < group_keys_.size(); ++k) {
    const KeyKind kind = rule_.group_keys[k - kDriverKeys].kind;
    for (int i = 0; i < (kind == KeyKind::decay_rates ? 2 : 1); ++i, ++number) {
      const double value = group.hyperparameters[number];
      if (kind == KeyKind::flag) continue;
      double others[kMaxHyperparameters];
      std::copy(group.hyperparameters, group.hyperparameters + kMaxHyperparameters, others);
      others[number] = 0;
      if (std::abs(value) > std::abs(most_of_all)) {
        largest = group_keys_[k];
        most_of_all = value;
      }
      if (std::abs(value) > std::abs(most) && is_finite_with(others)) {
        culprit = group_keys_[k];
        most = value;
      }
    }
  }
  const std::string consequence = std::string(": it makes the update infinite in ") + (is_fp32 ? "fp32" : "fp64");
  if (culprit == nullptr && !state_is_wrong) {
    culprit = largest;
    most = most_of_all;
  }
  if (culprit != nullptr) {
    throw py::value_error(describe_key(group.index, culprit) + " is " + quoted(py::float_(most).ptr()) + consequence);
  }
  throw py::value_error("the state of " + describe(located_[examined.located]) + " has wrong scalars" + consequence +
                        ". Delete this parameter's state to start it afresh");
}

// Sorts what was examined: the wrong raises, the foreign are listed, the others stay.
void StepPlan::settle(const Indices& stepped) {
  missing_.clear();
  foreign_.clear();
  layouts_.clear();
  size_t kept = 0;
  for (size_t i = 0; i < count_; ++i) {
    Examined& examined = examined_[i];
    examined.located = static_cast<uint32_t>(i);
    if (std::binary_search(stepped.begin(), stepped.end(), index_of(located_[i]))) continue;
    if (examined.verdict == Verdict::ready || examined.verdict == Verdict::missing_state) {
      written_moved_ |= examined.written_moved;
      reads_moved_ |= examined.grad_moved;
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
  const Located& located = located_[examined.located];
  const bool is_complex = format_of(located.param()).is_complex;
  c10::SmallVector<int64_t, 8> sizes(located.param()->sizes()), strides[kMaxStreams];
  const int64_t* pointers[kMaxStreams];
  if (is_complex) sizes.push_back(2);
  for (int k = 0; k < examined.stream_count; ++k) {
    for (int64_t stride : tensor_of(located, k)->strides()) strides[k].push_back(is_complex ? 2 * stride : stride);
    if (is_complex) strides[k].push_back(1);
    pointers[k] = strides[k].data();
  }
  layouts_.push_back(make_layout(static_cast<int>(sizes.size()), sizes.data(), examined.stream_count, pointers));
  segment.layout = &layouts_.back();
  for (int k = 0; k < examined.stream_count; ++k) segment.dense[k] = segment.layout->dense(k);
}

void StepPlan::keep(size_t from, size_t to) {
  if (from == to) return;
  examined_[to] = examined_[from];
  segments_[to] = segments_[from];
}

// Says how the culprit is wrong.
std::string StepPlan::describe_fault(const Examined& examined) const {
  const Located& located = located_[examined.located];
  PyObject* const value = examined.culprit >= 0 ? located.values[examined.culprit] : nullptr;
  if (examined.fault == Fault::no_tensor) return std::string("is no tensor but a ") + Py_TYPE(value)->tp_name;
  const c10::TensorImpl* const tensor = value != nullptr ? THPVariable_Unpack(value).unsafeGetTensorImpl()
                                        : examined.culprit == kGradient ? located.grad
                                                                        : located.param();
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
}

void StepPlan::refuse(const Examined& examined) const {
  const std::string fault = examined.verdict == Verdict::wrong ? describe_fault(examined) : "";
  const std::string state =
      examined.culprit >= 0 ? quoted(state_keys_[static_cast<size_t>(examined.culprit)]) : std::string();
  const std::string parameter = describe(located_[examined.located]);  // a name's __repr__ may change what was located
  if (examined.verdict == Verdict::expanded) {
    throw py::value_error(parameter +
                          " is expanded: several of its elements share one memory location, so it cannot be updated in "
                          "place. Optimize a clone() of it instead");
  }
  if (examined.verdict == Verdict::partial_state) {
    throw py::key_error("the state of " + parameter + " has no " + state +
                        ". Was an option such as amsgrad switched on after the first step? Delete this parameter's "
                        "state to start it afresh");
  }
  if (examined.culprit == kParameter) {
    throw py::value_error(parameter + " " + fault + ". Give it its memory back before the step");
  }
  if (examined.culprit == kGradient) {
    throw py::value_error("the gradient of " + parameter + " " + fault +
                          ". Set .grad to None, or to a tensor like the parameter");
  }
  throw py::value_error("the state " + state + " of " + parameter + " " + fault +
                        ". Delete this parameter's state to start it afresh");
}

// Tensors that share memory are set aside, as element for element in parallel is wrong for them: torch takes them one
// after the other. So are those that share memory with what torch steps anyway, because torch goes first. Returns
// whether the next step may rely on the search.
bool StepPlan::set_aside_overlapping() {
  // If some are foreign, `keep` has shifted entries, which were compared with those of other parameters.
  written_moved_ |= count_ != searched_count_ || !foreign_.empty();
  if (!written_moved_ && !reads_moved_) return true;

  // Owners are the segments, then what is foreign, then the groups. Parts are the streams, then the carried scalars.
  constexpr int kFirstCarried = kMaxStreams;
  static_assert(kMaxStreams + kMaxCarried <= WrittenMemory::kMaxParts);
  const size_t first_group = count_ + foreign_.size();
  const auto end_of = [&](const WrittenMemory::Piece& piece) {
    int64_t bytes = 0;
    const int part = static_cast<int>(piece.part);
    if (piece.owner >= count_) {
      with_memory_of(located_[foreign_[piece.owner - count_].located].param(),
                     [&](const void*, int64_t of_it) { bytes = of_it; });
    } else if (part < kFirstCarried) {
      bytes = bytes_of(piece.owner, part);
    } else {
      bytes = examined_[piece.owner].carried_fp32[part - kFirstCarried] ? 4 : 8;
    }
    return piece.begin + static_cast<uintptr_t>(bytes);
  };
  overlapping_.clear();
  if (written_moved_) {
    size_t pieces = foreign_.size();
    for (size_t i = 0; i < count_; ++i) pieces += static_cast<size_t>(examined_[i].stream_count - 1 + rule_.carried);
    memory_.clear();
    memory_.reserve(pieces);
    for (size_t i = 0; i < count_; ++i) {
      const Examined& examined = examined_[i];
      for (int k = 0; k < examined.stream_count && segments_[i].numel > 0; ++k) {
        if (k != kGrad) memory_.add(i, k, segments_[i].data[k]);
      }
      for (int k = 0; k < rule_.carried && examined.verdict == Verdict::ready; ++k) {
        memory_.add(i, kFirstCarried + k, examined.carried_data[k]);
      }
    }
    for (size_t i = 0; i < foreign_.size(); ++i) {
      with_memory_of(located_[foreign_[i].located].param(), [&](const void* data, int64_t bytes) {
        if (bytes > 0) memory_.add(count_ + i, 0, data);
      });
    }
    memory_.sort();
    memory_.append_overlapping(end_of, overlapping_);
  }
  const auto read = [&](size_t reader, const void* data, int64_t bytes) {
    memory_.append_overlapping(reader, data, bytes, end_of, overlapping_);
  };
  for (size_t i = 0; i < count_; ++i) read(i, segments_[i].data[kGrad], bytes_of(i, kGrad));
  for (size_t i = 0; i < foreign_.size(); ++i) {
    with_memory_of(located_[foreign_[i].located].grad, [&](auto... range) { read(count_ + i, range...); });
  }
  // torch's later groups see the new value of a hyperparameter that is updated like a parameter.
  const auto place_of = [&](const Group& group) { return first_group + static_cast<size_t>(group.index); };
  for (const Group& group : groups_) {
    for (int k = 0; group.reads_memory && k < rule_.hyperparameters; ++k) {
      read(place_of(group), group.addresses[k], group.bytes[k]);
    }
  }
  if (overlapping_.empty()) {
    searched_count_ = count_;
    written_moved_ = reads_moved_ = false;
    return foreign_.empty();
  }

  std::vector<bool> aside(first_group + groups_.size(), false);
  for (size_t i : overlapping_) aside[i] = true;
  size_t kept = 0;
  for (size_t i = 0; i < count_; ++i) {
    if (aside[i] || aside[place_of(group_of(examined_[i]))]) {
      foreign_.push_back({examined_[i].located, kSharesMemory});
    } else {
      keep(i, kept++);
    }
  }
  count_ = kept;
  return false;
}

// The bytes over which a stream of a segment extends.
int64_t StepPlan::bytes_of(size_t i, int stream) const {
  const Segment& segment = segments_[i];
  if (!examined_[i].strided) return segment.numel * itemsize(segment.dtypes[stream]);
  const c10::TensorImpl* tensor = tensor_of(located_[examined_[i].located], stream);
  return extent_of(tensor) * format_of(tensor).bytes();
}

void StepPlan::set_aside_all(const char* reason) {
  for (size_t i = 0; i < count_; ++i) foreign_.push_back({examined_[i].located, reason});
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
      const Group& group = group_of(located);
      const auto [group_index, index] = index_of(located);
      const bool joins =
          !missing_.empty() && std::get<0>(missing_.back()) == group_index && std::get<2>(missing_.back()) == index;
      if (joins) {
        ++std::get<2>(missing_.back());
      } else {
        missing_.emplace_back(group_index, index, index + 1);
      }
      // Where torch creates a count of steps on the GPU.
      const bool counts_on_gpu = rule_.carried > 0 && (group.fused || group.capturable);
      missing_is_hosts_ |= !(examined_[i].on_gpu && counts_on_gpu);
    }
  }
  count_ = kept;
}

// A graph does again in every replay what the device did, but not what the host did.
void StepPlan::check_capture() const {
  std::optional<c10::Device> device;
  bool capturing = false;
  for (size_t i = 0; i < count_ && !capturing; ++i) {
    if (!examined_[i].on_gpu || device == param_of(examined_[i])->device()) continue;
    device = param_of(examined_[i])->device();
    capturing = is_capturing(*device);
  }
  if (!capturing) return;
  for (size_t i = 0; i < count_; ++i) {
    const Examined& examined = examined_[i];
    if (rule_.carried > 0 && !group_of(examined).capturable) {  // in torch's words
      throw std::runtime_error("Attempting CUDA graph capture of step() for an instance of " + optimizer_ +
                               " but param_groups' capturable is False.");
    }
    const auto refuse = [&](const std::string& why) {
      throw std::runtime_error("step() cannot be captured in a CUDA graph: " + describe(located_[examined.located]) +
                               " " + why);
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

void StepPlan::run(const Scaler& scaler) {
  int64_t units = 0;
  size_t on_gpu = 0;
  for (size_t i = 0; i < count_; ++i) {
    if (examined_[i].on_gpu) {
      ++on_gpu;
    } else {
      units += units_of(segments_[i].numel, segments_[i].unit_numel);
    }
  }
  if (on_gpu > 0) updated_[c10::DeviceTypeName(kGpu, true)] = on_gpu;
  if (on_gpu < count_) updated_["cpu"] = count_ - on_gpu;
  const bool holds_gil = units < kShortStepUnits;
  std::vector<c10::Storage> alive;  // whatever another thread does to the tensors meanwhile
  if (!holds_gil) alive.reserve((count_ - on_gpu) * (kMaxStates + 2));
  for (size_t i = 0; i < count_ && !holds_gil; ++i) {
    const Located& located = located_[examined_[i].located];
    for (int k = 0; k < examined_[i].stream_count && !examined_[i].on_gpu; ++k) {
      alive.push_back(tensor_of(located, k)->storage());
    }
  }
  // Nothing can fail from here on, but for CUDA.
  run_on_gpus(scaler);
  run_on_cpu(holds_gil);
}

Launches& StepPlan::launches_for(const Examined& examined) {
  const c10::Device device = param_of(examined)->device();
  for (Launches& launches : launches_) {
    if (launches.device() == device && launches.arithmetic() == examined.arithmetic) return launches;
  }
  return launches_.emplace_back(device, examined.arithmetic);
}

// The slot says what the kernel must know of a tensor's scalars. Returns the number of words.
size_t StepPlan::fill_slot(const Examined& examined, uint64_t* words) const {
  if (!examined.has_recipe) {
    const size_t bytes = rule_.scalar_bytes[static_cast<int>(examined.arithmetic)];
    const size_t count = (bytes + sizeof(uint64_t) - 1) / sizeof(uint64_t);
    words[count - 1] = 0;
    std::memcpy(words, prepared_[examined.prepared].scalars.bytes, bytes);
    return count;
  }
  const Group& group = group_of(examined);
  cuda::Recipe recipe{};
  recipe.fp32_address = group.fp32_address;
  recipe.fp64_address = group.fp64_address;
  recipe.first = examined.first;
  for (int k = 0; k < rule_.hyperparameters; ++k) {
    const bool is_address = (group.fp32_address | group.fp64_address) >> k & 1;
    recipe.words[k] = is_address ? reinterpret_cast<uint64_t>(group.addresses[k])
                                 : __builtin_bit_cast(uint64_t, group.hyperparameters[k]);
  }
  Carried carried[kMaxCarried];
  read_carried(examined, carried);
  for (int k = 0; k < rule_.carried; ++k) {
    recipe.words[rule_.hyperparameters + k] = __builtin_bit_cast(uint64_t, carried[k].value);
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
    const Group& group = group_of(examined);
    void* carried[kMaxCarried] = {};
    uint8_t carried_fp32 = 0;
    for (int k = 0; k < rule_.carried; ++k) {
      if (examined.carried_on_gpu[k]) carried[k] = examined.carried_data[k];
      carried_fp32 |= static_cast<uint8_t>(examined.carried_fp32[k] << k);
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
  // The rest is the CPU's; mostly it is nothing, or all.
  size_t kept = 0;
  for (size_t i = 0; i < count_; ++i) {
    if (!examined_[i].on_gpu) keep(i, kept++);
  }
  searched_ = searched_ && (kept == 0 || kept == count_);
  count_ = kept;
}

void StepPlan::run_on_cpu(bool holds_gil) {
  if (count_ == 0) return;
  struct Step {
    cpu::Work work;
    const StepPlan* plan;
  } step{{segments_.data(), count_, number_units(segments_.data(), count_)}, this};
  if (holds_gil) {
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

  for (size_t i = 0; i < count_; ++i) record(examined_[i]);
  const py::gil_scoped_release release;
  in_parallel(step.work.units, kGrainUnits, cpu::run, &step.work);
}

// A step leaves more than data: versions, and carried scalars on the host.
void StepPlan::record(const Examined& examined) const {
  // As torch's in-place operations do: a backward through a graph that saved the old value must raise.
  const auto bump = [](c10::TensorImpl* tensor) {
    if (!tensor->is_inference()) tensor->bump_version();
  };
  const Located& located = located_[examined.located];
  bump(located.param());
  for (int k = kFirstState; k < examined.stream_count; ++k) bump(tensor_of(located, k));
  for (int k = 0; k < rule_.carried; ++k) {
    bump(carrier_of(located, k));
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
  const int wanted = wanted_states(group_of(located));
  for (int k = 0; k < wanted; ++k) {
    if (located.values[k] == nullptr || located.values[k] == Py_None) form = kNew;
  }
  const c10::TensorImpl* grad = located.grad;
  if (grad->is_sparse()) return form | kSparse;
  if (grad->is_sparse_compressed() || grad->is_mkldnn()) return form;
  const auto dtype = located.param()->dtype();
  const bool is_short = grad->dtype() == at::kBFloat16 || grad->dtype() == at::kHalf;
  bool mixed = grad->dtype() != dtype || grad->is_conj() || (grad_scale_ != 1 && is_short);
  for (int k = rule_.carried; k < wanted; ++k) {
    if (located.values[k] == nullptr || !is_tensor(located.values[k])) continue;
    mixed |= THPVariable_Unpack(located.values[k]).dtype() != dtype;
  }
  if (mixed) return form | kMixed;
  const bool may_fuse = group_of(located).fused && foreign.reason != kSharesMemory;
  return may_fuse && is_fusable(located) ? form | kFusable : form;
}

// Are torch's fused kernels for the CPU right for these tensors? They look at no strides and no sizes.
bool StepPlan::is_fusable(const Located& located) const {
  const Format& format = format_of(located.param());
  if (!format.is_native || format.is_complex) return false;
  const at::Tensor param = local_of(THPVariable_Unpack(located.parameter)), grad = local_of(hold(located.grad));
  const auto has_its_shape = [&](const at::Tensor& tensor) {
    return same_shape(tensor.unsafeGetTensorImpl(), param.unsafeGetTensorImpl());
  };
  if (!lies_simply(param) || !lies_simply(grad) || !has_its_shape(grad)) return false;
  for (int k = 0; k < wanted_states(group_of(located)); ++k) {
    if (located.values[k] == nullptr || located.values[k] == Py_None) continue;  // torch creates it
    if (!is_tensor(located.values[k])) return false;
    const at::Tensor state = local_of(THPVariable_Unpack(located.values[k]));
    if (!lies_simply(state)) return false;
    const bool fits = k < rule_.carried ? state.dtype() == at::kFloat && state.numel() == 1 : has_its_shape(state);
    if (!fits) return false;
  }
  return true;
}

py::object StepPlan::todo(bool host_decides) const {
  // Other code may run from here on, the properties of a tensor subclass and finalizers: what is looked at is held.
  std::vector<py::object> objects;
  std::vector<at::Tensor> grads;
  for (const Foreign& f : foreign_) {
    const Located& located = located_[f.located];
    objects.push_back(py::reinterpret_borrow<py::object>(located.parameter));
    for (PyObject* value : located.values) {
      if (value != nullptr) objects.push_back(py::reinterpret_borrow<py::object>(value));
    }
    grads.push_back(hold(located.grad));
  }
  std::vector<int> forms;
  for (size_t i = 0; i < foreign_.size(); ++i) forms.push_back(form_of(foreign_[i]));
  py::list foreign(foreign_.size());
  const char* reason = nullptr;
  py::str words;
  for (size_t i = 0; i < foreign_.size(); ++i) {
    const Located& located = located_[foreign_[i].located];
    if (foreign_[i].reason != reason) words = py::str(reason = foreign_[i].reason);
    PyList_SET_ITEM(foreign.ptr(), static_cast<Py_ssize_t>(i),
                    py::make_tuple(located.group, located.index, words, forms[i]).release().ptr());
  }
  return py::make_tuple(missing_, foreign, host_decides, count_ == 0 && missing_.empty());
}

}  // namespace dracopt
