#include "bindings/step_plan.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "bindings/examine.h"
#include "bindings/refusals.h"
#include "bindings/todo.h"
#include "bindings/written_memory.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace dracopt {
namespace {

// A thread is not worth waking for fewer tensors: it takes about 60 us to wake one that sleeps, as long as to compare
// a thousand tensors with the step before.
constexpr int64_t kGrainTensors = 1024;

// Fetches what the comparison of a place will read, as far as the step before tells. First come the objects and the
// numbers, then what the objects point to.
DRACOPT_INLINE void prefetch_objects(const Inventory& inventory, size_t i) {
  const Located& located = inventory.located[i];
  located.grad.prefetch();
  for (int k = 0; k < located.wanted; ++k) {
    prefetch(located.values[k]);
    located.tensors[k].prefetch();
  }
  const auto* const ready = std::get_if<Ready>(&inventory.examined[i]);
  if (ready == nullptr) return;
  for (int k = 0; k < inventory.rule.state_scalars; ++k) prefetch(ready->scalar_data[k]);
}

DRACOPT_INLINE void prefetch_parts(const Located& located) {
  if (!located.grad.is_defined()) return;
  located.grad.prefetch_storage();
  const auto of_written = [](Tensor tensor) {
    tensor.prefetch_storage();
    tensor.prefetch_version();
  };
  of_written(located.param());
  for (int k = 0; k < located.wanted; ++k) {
    PyObject* const value = located.values[k];
    if (value != nullptr && is_exact_tensor(value)) of_written(Tensor::in(value));
  }
}

// Marks a step as running for as long as the object lives, in the process that made it. A child that is forked
// meanwhile inherits only the number of its parent.
struct Running {
  Running(int& process, int none) : running_in(process), no_process(none) { running_in = cpu::forks(); }
  ~Running() { running_in = no_process; }
  Running(const Running&) = delete;
  int& running_in;
  const int no_process;
};

const RuleEntry& find_rule(const std::string& name) {
  const RuleEntry* const found = cpu::find_rule(name.c_str());
  if (found == nullptr) throw py::value_error("no compiled rule is named '" + name + "'");
  return *found;
}

}  // namespace

StepPlan::StepPlan(const std::string& rule, std::string optimizer, Backends backends, Master masters)
    : optimizer_(std::move(optimizer)),
      backends_(std::move(backends)),
      inventory_{find_rule(rule), masters},
      reader_(inventory_.rule, masters) {}

py::object StepPlan::step(py::handle param_groups, py::handle state, Options options) {
  if (running_in_ == cpu::forks()) throw std::runtime_error("this plan is in the middle of a step");
  const Running running(running_in_, kNoProcess);
  runner_.clear();
  zeroed_ = false;
  // Nothing is borrowed yet, so these functions may call Python.
  const bool under_mode = is_under_mode(), inference_mode = in_inference_mode();
  local_tensors_.prepare();
  do {
    if (!reader_.read_groups(param_groups.ptr(), inventory_) || !reader_.locate(state.ptr(), inventory_)) {
      return py::reinterpret_borrow<py::object>(Py_NotImplemented);
    }
  } while (!local_tensors_.unwrap(inventory_));
  examine_all(inference_mode);
  // If all is as before, nothing is wrong, unsupported or missing, and nothing must be counted again.
  bool is_counted = std::exchange(counted_, 0) == inventory_.version && options.stepped.empty() && !under_mode;
  if (!is_counted) classify(options.stepped);
  is_counted &= !search_.set_aside(inventory_, is_counted);
  if (under_mode) set_aside_all(kUnderMode);
  if (!is_counted) inventory_.count();
  counted_ = inventory_.version;
  if (inventory_.tally.on_gpus > 0) {
    check_capture(inventory_, reader_, backends_, optimizer_, options.at_random.has_value());
  }

  const bool finds_overflow =
      options.clipping.has_value() && options.clipping->checks && options.scaler.found_inf.is_plain_on_cpu();
  const bool waits = host_decides(options.scaler, finds_overflow) ||
                     (options.scaler.coefficient.is_defined() && inventory_.tally.on_gpus != inventory_.tally.all()) ||
                     (options.clipping.has_value() && norm_is_elsewhere(*options.clipping, options.scaler));
  const bool is_blocked = waits || inventory_.tally.missing_states + inventory_.tally.unsupported > 0;
  const bool adjusts = options.grad_scale != 1 || options.coefficient != 1;
  if (is_blocked && !options.created.has_value()) return make_todo(inventory_, adjusts, waits);
  if (is_blocked) throw std::runtime_error("parameters or states have changed while step() was creating states");
  std::vector<Run> created = std::move(options.created).value_or(std::vector<Run>());
  std::sort(created.begin(), created.end());
  const bool zeroes = options.zeroes && may_zero(inference_mode);
  updates_.prepare(inventory_, reader_, created, options.grad_scale, options.coefficient, zeroes);
  if (options.at_random.has_value()) round_at_random(*options.at_random);
  if (options.only_looks) return make_todo(inventory_, adjusts, waits);
  zeroed_ = runner_.run(inventory_, updates_, options.scaler, options.clipping, backends_) && zeroes;
  return py::none();
}

// Threads share the examination if the CPU updates, because a short step mostly waits for the metadata of its tensors.
// The calling thread holds the GIL for all threads, and none of them calls Python. Before a launch one thread examines
// everything, because a launch must wait for all threads: with 16 of them, steps took 10 ms more on 16 cores.
void StepPlan::examine_all(bool inference_mode) {
  search_.begin();
  const size_t size = inventory_.size();
  const bool same_size = inventory_.examined.size() == size && inventory_.segments.size() == size;
  inventory_.segments.resize(size);
  inventory_.examined.resize(size);
  const uint64_t version = inventory_.version++;  // in case that this fails
  bool same_terms = true;                         // in all groups
  for (Group& group : inventory_.groups) {
    group.same_terms = std::exchange(group.examined_for, Terms{}) == group;
    same_terms &= group.same_terms;
  }
  struct Share {
    Inventory& inventory;
    const Backends& backends;
    SharedMemorySearch& search;
    bool inference_mode;  // of this thread; the other threads do not know the mode
    bool same_terms, on_gpu;
    std::atomic<bool> changed = false, not_recorded = false;
  } share{inventory_,     backends_,  search_,
          inference_mode, same_terms, size > 0 && inventory_.located.front().param().is_plain_on_gpu()};
  const auto range = [](int64_t begin, int64_t end, void* context) {
    auto& share = *static_cast<Share*>(context);
    Inventory& inventory = share.inventory;
    const int scalars = inventory.rule.state_scalars;
    bool changed = false, not_recorded = false, moved = false;
    // A GPU's kernels may have become unavailable since the step before.
    int known_gpu = -1;
    Backends::Found on_gpu{};
    const auto has_same_backend = [&](const Streams& streams) {
      if (!streams.on_gpu) return true;
      if (streams.device_index != known_gpu) {
        on_gpu = share.backends.for_device({kGpuType, known_gpu = streams.device_index});
      }
      return on_gpu.why_not == nullptr && on_gpu.backend == streams.backend;
    };
    const auto last = static_cast<size_t>(end);
    for (auto i = static_cast<size_t>(begin); i < last; ++i) {
      constexpr size_t far = 4, near = 2;  // in places
      if (i + far < last) prefetch_objects(inventory, i + far);
      if (i + near < last) prefetch_parts(inventory.located[i + near]);
      Located& located = inventory.located[i];
      Examined& examined = inventory.examined[i];
      Segment& segment = inventory.segments[i];
      const bool has_gradient = located.grad.is_defined();
      if (!has_gradient && std::holds_alternative<PassedOver>(examined)) continue;
      const auto* const ready = std::get_if<Ready>(&examined);
      AsBefore as_before;
      if (has_gradient && ready != nullptr && (share.same_terms || inventory.group_of(i).same_terms) &&
          (!inventory.has_subclasses || is_exact_tensor(located.local)) && !inventory.is_set_apart(i) &&
          has_same_backend(ready->streams) &&
          is_as_before(located, *ready, segment, scalars, share.inference_mode, as_before)) {
        moved |= std::exchange(segment.data[kGrad], as_before.gradient) != as_before.gradient;
        not_recorded |= !as_before.as_recorded;
        continue;
      }
      changed = true;
      Segment segment_now{};
      const Examined now =
          has_gradient ? examine(inventory, share.backends, i, share.inference_mode, segment_now) : PassedOver{};
      share.search.compare(examined, segment, now, segment_now);
      examined = now;
      segment = segment_now;
      for (int k = 0; k < kMaxStateKeys && std::holds_alternative<Ready>(now); ++k) {
        located.tensors[k] = located.values[k] == nullptr ? Tensor() : Tensor::in(located.values[k]);
      }
    }
    if (moved) share.search.note_moved_gradient();
    if (changed) share.changed = true;
    if (not_recorded) share.not_recorded = true;
  };
  const auto count = static_cast<int64_t>(size);
  if (share.on_gpu) {
    range(0, count, &share);
  } else {
    in_parallel(count, kGrainTensors, range, &share);
  }
  for (Group& group : inventory_.groups) group.examined_for = group;
  if (same_size && !share.changed) inventory_.version = version;
  inventory_.as_recorded = !share.not_recorded;
}

// Marks what torch has stepped, raises if anything else is wrong, and adds layouts to what is in order.
void StepPlan::classify(std::vector<Index>& stepped) {
  std::sort(stepped.begin(), stepped.end());
  inventory_.layouts.clear();
  for (size_t i = 0; i < inventory_.size(); ++i) {
    if (std::binary_search(stepped.begin(), stepped.end(), inventory_.index_of(i))) {
      inventory_.examined[i] = PassedOver{};
    } else if (std::holds_alternative<Unsupported>(inventory_.examined[i]) &&
               LocalTensors::is_mixed(inventory_, inventory_.located[i])) {
      inventory_.examined[i] = Wrong{Fault::distribution, Wrong::kGradient};
    }
    if (std::holds_alternative<Wrong>(inventory_.examined[i])) refuse(inventory_, reader_, i);
    const Streams* const streams = streams_of(inventory_.examined[i]);
    if (streams == nullptr || !streams->strided) continue;
    Segment& segment = inventory_.segments[i];
    segment.layout = &inventory_.layouts.emplace_back(layout_of(inventory_, i));
    for (int k = 0; k < streams->count; ++k) segment.dense[k] = segment.layout->dense(k);
  }
}

void StepPlan::set_aside_all(const char* reason) {
  for (size_t i = 0; i < inventory_.size(); ++i) {
    if (streams_of(inventory_.examined[i]) != nullptr) inventory_.examined[i] = Unsupported{reason};
  }
}

// Tells the segments of streams in 16 bits by which random bits they are rounded.
void StepPlan::round_at_random(const AtRandom& at_random) {
  inventory_.roundings.assign(inventory_.size(), {});
  inventory_.numbers.clear();
  auto shard = at_random.shards.begin();
  for (size_t i = 0; i < inventory_.size(); ++i) {
    const Index index = inventory_.index_of(i);
    Segment& segment = inventory_.segments[i];
    Rounding& rounding = inventory_.roundings[i];
    rounding.seed = at_random.seed;
    rounding.step = at_random.steps.at(static_cast<size_t>(index.first));
    rounding.param = at_random.first_param + static_cast<uint32_t>(i);
    if (shard != at_random.shards.end() && Index(std::get<0>(*shard), std::get<1>(*shard)) == index) {
      number_shard(inventory_.located[i].param(), *shard++, rounding);
    }
    if (!std::holds_alternative<Ready>(inventory_.examined[i])) continue;
    for (int k = 0; k < kFirstState + inventory_.group_of(i).states; ++k) {
      const bool wanted = k == kParam ? segment.master == Master::none : k != kGrad && at_random.states;
      if (wanted && itemsize(segment.dtypes[k]) == 2) rounding.streams |= static_cast<uint8_t>(1 << k);
    }
    segment.rounding = rounding.streams == 0 ? nullptr : &rounding;
  }
}

// Says where the elements of a shard lie in the whole tensor.
void StepPlan::number_shard(Tensor local, const Shard& shard, Rounding& rounding) {
  const auto& [group, index, first, strides] = shard;
  rounding.first = first;
  if (strides.size() != local.sizes().size()) throw std::invalid_argument("a shard has other dimensions");
  if (local.numel() == 0) return;
  const int64_t* const both[] = {local.strides().data(), strides.data()};
  const Layout layout = make_layout(static_cast<int>(strides.size()), local.sizes().data(), 2, both);
  if (!layout.dense(kWhole)) rounding.numbers = &inventory_.numbers.emplace_back(layout);
}

// Says whether each update may write its gradient, because no other update reads that memory. Gradients that may have a
// graph must be detached, which is torch's work.
bool StepPlan::may_zero(bool inference_mode) {
  std::vector<std::pair<const void*, int64_t>> found;
  found.reserve(inventory_.size());
  for (size_t i = 0; i < inventory_.size(); ++i) {
    const Tensor gradient = inventory_.located[i].grad;
    if (!gradient.is_defined()) continue;
    if (!std::holds_alternative<Ready>(inventory_.examined[i])) return false;
    if (!is_writable(gradient, inference_mode) || gradient.may_have_graph()) return false;
    found.emplace_back(inventory_.segments[i].data[kGrad], inventory_.bytes_of(i, kGrad));
  }
  if (found == apart_) return true;
  const bool are_apart = overlapping(found).empty();
  apart_ = are_apart ? std::move(found) : std::vector<std::pair<const void*, int64_t>>();
  return are_apart;
}

// Says whether the host must read the scaler's numbers. After an overflow a step must do nothing. A kernel ensures this
// for its own work, but the host also counts steps, creates states that a first step fills, and updates on the CPU,
// except where this step itself finds the overflow.
bool StepPlan::host_decides(const Scaler& scaler, bool finds_overflow) const {
  if (!scaler.found_inf.is_defined() && !scaler.grad_scale.is_defined()) return false;
  const RuleEntry& rule = inventory_.rule;
  for (size_t i = 0; i < inventory_.size(); ++i) {
    const Examined& examined = inventory_.examined[i];
    const Streams* const streams = streams_of(examined);
    if (streams == nullptr && !std::holds_alternative<Unsupported>(examined)) continue;
    if (finds_overflow && streams != nullptr && !streams->on_gpu && std::holds_alternative<Ready>(examined)) continue;
    if (streams == nullptr || !streams->on_gpu) return true;
    if (const auto* ready = std::get_if<Ready>(&examined)) {
      for (int k = 0; k < rule.state_scalars; ++k) {
        if (!ready->scalar_on_gpu[k]) return true;
      }
    } else {
      // If torch creates the step count on the GPU, the GPU can take the first step.
      const Group& group = inventory_.group_of(i);
      if (rule.state_scalars == 0 || (!group.fused && !group.capturable)) return true;
    }
  }
  return false;
}

// Says whether this step cannot find the norm by itself: not all gradients lie where the norm is wanted, other
// processes have a part of those on a GPU, or states must not be created before the norm is known.
bool StepPlan::norm_is_elsewhere(const Clipping& clipping, const Scaler& scaler) const {
  if (!is_plain(clipping.norm)) return true;  // a mode of torch has made it
  const Device device = clipping.norm.device();
  if (clipping.checks && scaler.found_inf.device() != device) return true;
  if (!inventory_.distributions.empty() && !device.is_cpu()) return true;
  if (device.is_gpu() && (clipping.needs_a_norm || inventory_.tally.all() == 0)) return true;
  for (size_t i = 0; i < inventory_.size(); ++i) {
    if (!inventory_.located[i].grad.is_defined()) continue;
    if (streams_of(inventory_.examined[i]) == nullptr) return true;
    if (clipping.needs_a_norm && std::holds_alternative<MissingState>(inventory_.examined[i])) return true;
    if (inventory_.located[i].param().device() != device) return true;
  }
  return false;
}

}  // namespace dracopt
