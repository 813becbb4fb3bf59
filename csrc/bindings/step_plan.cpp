#include "bindings/step_plan.h"

#include <pthread.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <unordered_map>

#include "bindings/tensor_facts.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace dracopt {
namespace {

// Below this many bytes of parameters a thread is not worth waking; and a step that is this short keeps the GIL, which
// costs less than taking and dropping a reference to every tensor's memory.
constexpr int64_t kGrainUnits = 32 * 1024 / kUnitBytes;
constexpr int64_t kShortStepUnits = 4 * 1024 * 1024 / kUnitBytes;

constexpr int64_t kGrainTensors = 128;

constexpr size_t kBlock = 16;  // parameters located at once

// The keys that every rule's groups have, in the order in which read_group() takes them.
constexpr const char* kDriverKeyNames[] = {"params", "maximize", "differentiable", "capturable", nullptr};
constexpr size_t kDriverKeys = 4;
constexpr size_t kMaxGroupKeys = kDriverKeys + kMaxHyperparameters;
constexpr const char* kStepKeyName[] = {"step", nullptr};

constexpr double kMaxStep = 9007199254740992.0;  // 2^53: beyond it a double no longer counts

// torch's thread pool does not survive fork(): a child that enters it waits for threads that do not exist.
std::atomic<bool> in_forked_child{false};
const int at_fork = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

void in_parallel(int64_t count, int64_t grain, ParallelFunc function, void* context) {
  if (count == 0) return;
  if (in_forked_child) return function(0, count, context);
  if (torch_parallel_for(0, count, grain, function, context) != 0)
    throw std::runtime_error("torch_parallel_for failed");
}

bool is_true(PyObject* object) {
  if (object == Py_False || object == nullptr) return false;
  const int truth = object == Py_True ? 1 : PyObject_IsTrue(object);
  if (truth < 0) throw py::error_already_set();
  return truth == 1;
}

std::string quoted(PyObject* text) { return py::repr(text).cast<std::string>(); }

// "param_groups[0]['lr']"
std::string describe_key(int group, PyObject* key) {
  return "param_groups[" + std::to_string(group) + "][" + quoted(key) + "]";
}

// "parameter 3 of group 0 ('layer.weight', shape [10, 4])"
std::string describe_parameter(PyObject* group, int group_index, int index) {
  std::string name;
  PyObject* names = PyDict_GetItemString(group, "param_names");
  if (names != nullptr && PyList_Check(names) && index < PyList_GET_SIZE(names)) {
    name = quoted(PyList_GET_ITEM(names, index)) + ", ";
  }
  PyObject* tensor = PyList_GET_ITEM(PyDict_GetItemString(group, "params"), index);
  return "parameter " + std::to_string(index) + " of group " + std::to_string(group_index) + " (" + name + "shape " +
         shape_of(THPVariable_Unpack(tensor).unsafeGetTensorImpl()) + ")";
}

// Without Python's isinstance(), which torch overrides in Python.
bool is_tensor(PyObject* object) {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

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

}  // namespace

StepPlan::StepPlan(const std::string& rule)
    : rule_([&]() -> const RuleEntry& {
        const RuleEntry* found = cpu::find_rule(rule.c_str());
        if (found == nullptr) throw py::value_error("no compiled rule is named '" + rule + "'");
        return *found;
      }()) {
  group_keys_.append(kDriverKeyNames);
  group_keys_.append(rule_.group_keys);
  if (rule_.counts_steps) state_keys_.append(kStepKeyName);
  state_keys_.append(rule_.state_keys);
}

py::object StepPlan::step(py::handle param_groups, py::handle state, std::optional<Indices> created, Indices stepped) {
  if (running_) {
    throw std::runtime_error(
        "step() of this optimizer is already running in another thread; give each thread an optimizer of its own");
  }
  updated_ = 0;
  read_groups(param_groups.ptr());
  locate(state.ptr());
  const bool again = created.has_value();
  if (!again) created.emplace();
  std::sort(created->begin(), created->end());
  std::sort(stepped.begin(), stepped.end());
  examine(*created);
  settle(stepped);
  set_aside_overlapping();
  set_aside_missing();
  if (!again && (!missing_.empty() || !foreign_.empty())) return todo();
  if (!missing_.empty() || !foreign_.empty()) {
    throw std::runtime_error("parameters or states have changed while step() was creating states");
  }
  run();
  updated_ = count_;
  return py::none();
}

void StepPlan::read_groups(PyObject* param_groups) {
  if (!PyList_Check(param_groups)) throw py::type_error("param_groups must be a list");
  constexpr Py_ssize_t ahead = 8;
  const Py_ssize_t count = PyList_GET_SIZE(param_groups);
  groups_.resize(static_cast<size_t>(count));
  for (Py_ssize_t g = 0; g < count; ++g) {
    if (g + 2 * ahead < count) prefetch(PyList_GET_ITEM(param_groups, g + 2 * ahead));
    if (g + ahead < count) prefetch_entries(PyList_GET_ITEM(param_groups, g + ahead));
    Group& group = groups_[static_cast<size_t>(g)];
    group.index = static_cast<int>(g);
    read_group(PyList_GET_ITEM(param_groups, g), group);
  }
}

void StepPlan::read_group(PyObject* dict, Group& group) {
  if (!PyDict_Check(dict)) throw py::type_error("param_groups[" + std::to_string(group.index) + "] must be a dict");
  group.dict = dict;
  PyObject* values[kMaxGroupKeys];
  group_keys_.read(dict, group_keys_.size(), values);
  group.params = values[0];
  if (group.params == nullptr || !PyList_Check(group.params)) {
    throw py::type_error(describe_key(group.index, group_keys_[0]) + " must be a list of tensors");
  }
  group.maximize = is_true(values[1]);
  group.foreign = nullptr;
  if (is_true(values[2])) group.foreign = "differentiable=True";
  if (is_true(values[3])) group.foreign = "capturable=True";

  int count = 0;
  const auto append = [&](PyObject* key, PyObject* number) {
    double value = 0;
    if (PyFloat_CheckExact(number)) {
      value = PyFloat_AS_DOUBLE(number);
    } else if (PyBool_Check(number)) {
      value = number == Py_True;
    } else if (is_tensor(number)) {
      group.foreign = "hyperparameters that are tensors";
    } else {
      value = PyFloat_AsDouble(number);
      if (value == -1.0 && PyErr_Occurred()) {
        PyErr_Clear();
        throw py::type_error(describe_key(group.index, key) + " must be a number, not " + Py_TYPE(number)->tp_name);
      }
    }
    if (count < rule_.hyperparameters) group.hyperparameters[count] = value;
    ++count;
  };
  for (size_t k = kDriverKeys; k < group_keys_.size(); ++k) {
    PyObject* value = values[k];
    if (value == nullptr) throw py::key_error(describe_key(group.index, group_keys_[k]) + " is missing");
    if (PyTuple_Check(value) || PyList_Check(value)) {
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(value); ++i) {
        append(group_keys_[k], PySequence_Fast_GET_ITEM(value, i));
      }
    } else {
      append(group_keys_[k], value);
    }
  }
  if (count != rule_.hyperparameters) {
    throw py::value_error("param_groups[" + std::to_string(group.index) + "] holds " + std::to_string(count) +
                          " hyperparameters, not " + std::to_string(rule_.hyperparameters) +
                          ": is a tuple such as betas of another length?");
  }
  group.states = group.foreign == nullptr ? rule_.states(group.hyperparameters) : 0;
}

// Finds the parameters that have a gradient, and their states. All that needs Python is done here.
void StepPlan::locate(PyObject* state) {
  if (!PyDict_Check(state)) throw py::type_error("the optimizer's state must be a dict");
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
      if (located_[i].state == nullptr || !PyDict_Check(located_[i].state)) continue;
      state_keys_.read(located_[i].state, wanted_states(*located_[i].group), located_[i].values);
    }
  }
  located_.resize(count);
}

// Threads share this: most of a step's waiting is for the metadata of its tensors. The calling thread holds the GIL for
// all of them, and none calls Python.
void StepPlan::examine(const Indices& created) {
  inference_mode_ = c10::InferenceMode::is_enabled();  // of this thread; the others do not know it
  count_ = located_.size();
  if (examined_.size() < count_) {
    examined_.resize(count_);
    segments_.resize(count_);
    scalars_.resize(count_);
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
  in_parallel(static_cast<int64_t>(count_), kGrainTensors, range, &examination);
}

void StepPlan::examine(const Located& located, Examined& examined, Segment& segment) const {
  const Group& group = *located.group;
  c10::TensorImpl* p = located.param;
  c10::TensorImpl* g = located.grad;
  const auto foreign = [&](const char* reason) {
    examined.verdict = Verdict::foreign;
    examined.reason = reason;
  };
  if (group.foreign != nullptr) return foreign(group.foreign);
  if (!THPVariable_CheckExact(located.parameter)) return foreign("tensor subclasses");
  if (!is_plain(p)) return foreign(why_not_plain(p));
  if (!p->is_non_overlapping_and_dense()) {
    if (!is_expanded(p)) return foreign("these strides");
    examined.verdict = Verdict::expanded;
    return;
  }
  if (!is_plain(g)) return foreign(why_not_plain(g));
  if (!same_shape(p, g)) {
    examined.verdict = Verdict::wrong_gradient;
    return;
  }
  if (!is_native_dtype(p) || g->dtype() != p->dtype()) return foreign("these dtypes");
  if (!same_order(p, g)) return foreign("these strides");
  if (p->is_inference() && !inference_mode_) return foreign("inference tensors");
  if (is_lazily_cloned(p)) return foreign("lazily cloned tensors");

  const bool fp64 = is_fp64(p);
  const int itemsize = fp64 ? 8 : 4;
  const int counters = rule_.counts_steps ? 1 : 0;
  const auto wanted = static_cast<int>(wanted_states(group));
  examined.verdict = Verdict::ready;
  for (int k = 0; k < wanted && examined.verdict == Verdict::ready; ++k) {
    if (located.values[k] != nullptr && located.values[k] != Py_None) continue;
    // As in torch, a rule that counts steps creates its state as a whole, so that a part of it is a mistake.
    const bool partial = rule_.counts_steps && located.state != nullptr && PyDict_Check(located.state) &&
                         PyDict_GET_SIZE(located.state) > 0;
    examined.culprit = k;
    examined.verdict = partial ? Verdict::partial_state : Verdict::missing_state;
    if (partial) return;
  }

  void* step = nullptr;
  void* states[kMaxStates] = {};
  examined.written[0] = p;
  examined.written_count = 1;
  for (int k = 0; k < wanted && examined.verdict == Verdict::ready; ++k) {
    if (!THPVariable_CheckExact(located.values[k])) return foreign("states that are not plain tensors");
    c10::TensorImpl* s = THPVariable_Unpack(located.values[k]).unsafeGetTensorImpl();
    const bool is_step = k < counters;
    if (!is_plain(s)) return foreign(why_not_plain(s));
    if (is_lazily_cloned(s)) return foreign("lazily cloned tensors");
    if (is_step ? s->numel() != 1 : !same_shape(s, p)) {
      examined.verdict = Verdict::wrong_state;
      examined.culprit = k;
      return;
    }
    if (!is_step) {
      if (s->dtype() != p->dtype()) return foreign("these dtypes");
      if (!same_order(p, s)) return foreign("these strides");
      examined.written[examined.written_count++] = s;
      states[k - counters] = writable_data(s, itemsize);
      continue;
    }
    if (!is_native_dtype(s)) return foreign("these dtypes");
    examined.step_is_fp64 = is_fp64(s);
    step = writable_data(s, examined.step_is_fp64 ? 8 : 4);
    // In the counter's own type, so that it saturates as torch's does (at 2^24 in fp32).
    const double next = examined.step_is_fp64 ? *static_cast<double*>(step) + 1
                                              : static_cast<double>(*static_cast<float*>(step) + 1.0f);
    if (!(next >= 1 && next <= kMaxStep && std::floor(next) == next)) {
      return foreign("step counts that are not natural numbers");
    }
    examined.next_step = next;
  }

  void* param = writable_data(p, itemsize);
  const void* grad = readable_data(g, itemsize);
  const int64_t numel = p->numel();
  examined.written_moved = segment.param != param || segment.numel != numel || segment.step != step ||
                           !std::equal(states, states + kMaxStates, segment.states);
  examined.grad_moved = segment.grad != grad;
  segment.param = param;
  segment.grad = grad;
  std::copy(states, states + kMaxStates, segment.states);
  segment.step = step;
  segment.update = rule_.update[static_cast<int>(fp64 ? Arithmetic::fp64 : Arithmetic::fp32)][group.states];
  segment.numel = numel;
  segment.unit_numel = kUnitBytes / itemsize;
  segment.maximize = group.maximize;
}

// The scalars of the ready ones. They depend on the group and the step number, which neighbours nearly always share.
void StepPlan::prepare(size_t begin, size_t end, const Indices& created) {
  PowerMemo powers{};
  size_t last = end;
  for (size_t i = begin; i < end; ++i) {
    Examined& examined = examined_[i];
    if (examined.verdict != Verdict::ready) continue;
    const Group* group = located_[i].group;
    if (!rule_.counts_steps) {  // only whether the step is the first matters then
      const Index index(group->index, located_[i].index);
      examined.next_step = !created.empty() && std::binary_search(created.begin(), created.end(), index) ? 1 : 2;
    }
    if (last == end || located_[last].group != group || examined_[last].next_step != examined.next_step ||
        segments_[last].unit_numel != segments_[i].unit_numel) {
      const Arithmetic arithmetic = segments_[i].unit_numel == kUnitBytes / 8 ? Arithmetic::fp64 : Arithmetic::fp32;
      rule_.prepare[static_cast<int>(arithmetic)](examined.next_step, group->hyperparameters, powers, &scalars_[i]);
      last = i;
    }
    segments_[i].scalars = &scalars_[last];
  }
}

// Sorts what was examined: the wrong raises, the foreign are listed, the others stay.
void StepPlan::settle(const Indices& stepped) {
  missing_.clear();
  foreign_.clear();
  written_moved_ = grads_moved_ = !searched_;
  searched_ = false;  // until this step's search is through
  size_t kept = 0;
  for (size_t i = 0; i < count_; ++i) {
    Examined& examined = examined_[i];
    examined.located = i;
    const Index index(located_[i].group->index, located_[i].index);
    if (std::binary_search(stepped.begin(), stepped.end(), index)) continue;
    if (examined.verdict == Verdict::ready || examined.verdict == Verdict::missing_state) {
      written_moved_ |= examined.written_moved;
      grads_moved_ |= examined.grad_moved;
      keep(i, kept++);
    } else if (examined.verdict == Verdict::foreign) {
      foreign_.push_back({index.first, index.second, examined.reason});
    } else {
      refuse(examined);
    }
  }
  count_ = kept;
}

void StepPlan::keep(size_t from, size_t to) {
  if (from == to) return;
  examined_[to] = examined_[from];
  segments_[to] = segments_[from];
}

void StepPlan::refuse(const Examined& examined) const {
  const Located& located = located_[examined.located];
  const std::string parameter = describe_parameter(located.group->dict, located.group->index, located.index);
  const auto state = [&] { return quoted(state_keys_[static_cast<size_t>(examined.culprit)]); };
  const char* const afresh = ". Delete this parameter's state to start it afresh";
  switch (examined.verdict) {
    case Verdict::expanded:
      throw py::value_error(parameter +
                            " is expanded: several of its elements share one memory location, so it cannot be updated "
                            "in place. Optimize a clone() of it instead");
    case Verdict::wrong_gradient:
      throw py::value_error(parameter + " has a gradient of another shape, " + shape_of(located.grad) +
                            ". Set .grad to None, or to a tensor of the parameter's shape");
    case Verdict::partial_state:
      throw py::key_error("the state of " + parameter + " has no " + state() +
                          ". Was an option such as amsgrad switched on after the first step?" + (afresh + 1));
    default:
      throw py::value_error("the state " + state() + " of " + parameter + " has another shape, " +
                            shape_of(THPVariable_Unpack(located.values[examined.culprit]).unsafeGetTensorImpl()) +
                            afresh);
  }
}

// Element for element in parallel is wrong for tensors that share memory: torch is to take them one after the other.
void StepPlan::set_aside_overlapping() {
  searched_ = true;
  written_moved_ |= count_ != searched_count_;
  searched_count_ = count_;
  if (!written_moved_ && !grads_moved_) return;

  const auto bytes = [&](size_t i) { return segments_[i].numel * (kUnitBytes / segments_[i].unit_numel); };
  if (written_moved_) {
    memory_.clear();
    for (size_t i = 0; i < count_; ++i) {
      memory_.add(i, segments_[i].param, bytes(i));
      for (void* state : segments_[i].states) memory_.add(i, state, state != nullptr ? bytes(i) : 0);
      if (segments_[i].step != nullptr) memory_.add(i, segments_[i].step, examined_[i].step_is_fp64 ? 8 : 4);
    }
    memory_.sort();
  }
  overlapping_.clear();
  memory_.append_overlapping(overlapping_);
  for (size_t i = 0; i < count_; ++i) memory_.append_overlapping(i, segments_[i].grad, bytes(i), overlapping_);
  if (overlapping_.empty()) return;

  std::vector<bool> aside(count_, false);
  for (size_t i : overlapping_) aside[i] = true;
  size_t kept = 0;
  for (size_t i = 0; i < count_; ++i) {
    if (aside[i]) {
      const Located& located = located_[examined_[i].located];
      foreign_.push_back({located.group->index, located.index, "tensors that share memory"});
    } else {
      keep(i, kept++);
    }
  }
  count_ = kept;
  searched_ = false;
}

// Only now, so that torch gets those of them that share memory, and creates their states itself.
void StepPlan::set_aside_missing() {
  size_t kept = 0;
  for (size_t i = 0; i < count_; ++i) {
    if (examined_[i].verdict == Verdict::ready) {
      keep(i, kept++);
    } else {
      const Located& located = located_[examined_[i].located];
      missing_.emplace_back(located.group->index, located.index);
    }
  }
  searched_ = searched_ && kept == count_;
  count_ = kept;
}

// Nothing can fail from here on.
void StepPlan::run() {
  struct Step {
    cpu::Work work;
    const StepPlan* plan;
  } step{{segments_.data(), count_, 0}, this};
  for (size_t i = 0; i < count_; ++i) {
    Segment& segment = segments_[i];
    segment.first_unit = step.work.units;
    step.work.units += units_of(segment.numel, kUnitBytes / segment.unit_numel);
  }
  if (step.work.units < kShortStepUnits) {
    in_parallel(
        step.work.units, kGrainUnits,
        [](int64_t begin, int64_t end, void* context) {
          auto& [work, plan] = *static_cast<Step*>(context);
          for (size_t i = segment_at(work.segments, work.count, begin); i < work.count; ++i) {
            const Segment& segment = work.segments[i];
            if (segment.first_unit >= end) break;
            if (segment.first_unit >= begin) plan->record(plan->examined_[i], segment);
          }
          cpu::run(begin, end, &work);
        },
        &step);
    return;
  }

  std::vector<c10::Storage> alive;  // whatever another thread does to the tensors meanwhile
  alive.reserve(count_ * (kMaxStates + 2));
  for (size_t i = 0; i < count_; ++i) {
    record(examined_[i], segments_[i]);
    alive.push_back(located_[examined_[i].located].grad->storage());
    for (int k = 0; k < examined_[i].written_count; ++k) alive.push_back(examined_[i].written[k]->storage());
  }
  running_ = true;
  {
    py::gil_scoped_release release;
    in_parallel(step.work.units, kGrainUnits, cpu::run, &step.work);
  }
  running_ = false;
}

// What a step leaves beside the data.
void StepPlan::record(const Examined& examined, const Segment& segment) const {
  if (segment.step != nullptr && examined.step_is_fp64) {
    *static_cast<double*>(segment.step) = examined.next_step;
  } else if (segment.step != nullptr) {
    *static_cast<float*>(segment.step) = static_cast<float>(examined.next_step);
  }
  // As torch's in-place operations do: a backward through a graph that saved the old value must raise.
  for (int k = 0; k < examined.written_count; ++k) {
    if (!examined.written[k]->is_inference()) examined.written[k]->bump_version();
  }
}

py::object StepPlan::todo() const {
  py::list foreign;
  for (const Foreign& f : foreign_) foreign.append(py::make_tuple(f.group, f.index, f.reason));
  return py::make_tuple(missing_, foreign);
}

}  // namespace dracopt
