#include "bindings/runner.h"

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "bindings/cuda_launches.h"
#include "bindings/gradients.h"
#include "bindings/triton_launches.h"
#include "core/squares.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace dracopt {
namespace {

// A shorter step keeps the GIL, which costs less than holding every tensor's memory.
constexpr int64_t kShortStepUnits = HeldMemory::kWorthBytes / kUnitBytes;

// Advances what a step changes beside the streams: versions, and the state scalars that the host holds.
DRACOPT_INLINE void record(const Inventory& inventory, size_t i) {
  const Ready& ready = *std::get_if<Ready>(&inventory.examined[i]);
  const Located& located = inventory.located[i];
  const int scalars = inventory.rule.state_scalars, values = scalars + ready.streams.count - kFirstState;
  // A backward through a graph that saved the old value must raise, as after torch's in-place operations.
  located.param().bump_version();
  for (int k = 0; k < values; ++k) located.tensors[k].bump_version();
  if (const Distribution* const distribution = inventory.distribution_of(i)) {
    // Graphs save distributed tensors, or views of local ones.
    if (located.parameter != located.local) Tensor::in(located.parameter).bump_version();
    for (PyObject* state : distribution->states) {
      if (state != nullptr) Tensor::in(state).bump_version();
    }
  }
  const StateScalar* const advanced = prepared_of(inventory.segments[i]).state_scalars;
  for (int k = 0; k < scalars; ++k) {
    if (ready.scalar_on_gpu[k]) continue;  // the kernel does it
    if (ready.scalar_fp32[k]) {
      *static_cast<float*>(ready.scalar_data[k]) = static_cast<float>(advanced[k].value);
    } else {
      *static_cast<double*>(ready.scalar_data[k]) = advanced[k].value;
    }
  }
}

// Counts the change of a gradient that the update will zero, while the gradient is certainly there.
void count_zeroing(const Located& located) {
  located.grad.bump_version();
  if (located.parameter != located.local) Tensor::in(located.parameter).grad().bump_version();
}

// Writes a parameter's scalars, or the recipe for them, into the slot. Returns the number of words.
size_t fill_slot(const Inventory& inventory, size_t i, const Ready& ready, uint64_t* words) {
  const RuleEntry& rule = inventory.rule;
  if (!ready.has_recipe) {
    const size_t bytes = rule.scalar_bytes[static_cast<int>(ready.arithmetic)];
    const size_t count = (bytes + sizeof(uint64_t) - 1) / sizeof(uint64_t);
    words[count - 1] = 0;
    std::memcpy(words, inventory.segments[i].update->scalars, bytes);
    return count;
  }
  const Group& group = inventory.group_of(i);
  cuda::Recipe recipe{};
  recipe.fp32_address = group.fp32_address;
  recipe.fp64_address = group.fp64_address;
  recipe.first = ready.first;
  for (int k = 0; k < rule.hyperparameters; ++k) {
    const bool is_address = (group.fp32_address | group.fp64_address) >> k & 1;
    recipe.words[k] = is_address ? reinterpret_cast<uint64_t>(group.addresses[k])
                                 : __builtin_bit_cast(uint64_t, group.hyperparameters[k]);
  }
  StateScalar scalars[kMaxStateScalars];
  inventory.read_state_scalars(ready, scalars);
  for (int k = 0; k < rule.state_scalars; ++k) {
    recipe.words[rule.hyperparameters + k] = __builtin_bit_cast(uint64_t, scalars[k].value);
  }
  const size_t count = cuda::Recipe::header_words + static_cast<size_t>(rule.hyperparameters + rule.state_scalars);
  std::memcpy(words, &recipe, count * sizeof(uint64_t));
  return count;
}

// Holds a slot's words. Neighbours share the words if they share an update and are both rounded at random, or neither.
struct SlotWords {
  void take(const Inventory& inventory, size_t i, const Ready& ready) {
    const Update* const its = inventory.segments[i].update;
    const Rounding* const rounding = inventory.segments[i].rounding;
    const size_t before = rounding != nullptr;
    if (update == its && words_before == before) return;
    update = its;
    words_before = before;
    words[0] = rounding == nullptr ? 0 : rounding->step;
    count = before + fill_slot(inventory, i, ready, words + before);
  }

  const Update* update = nullptr;
  size_t words_before = 0;  // the scalars or their recipe
  size_t count = 0;
  uint64_t words[1 + std::max(sizeof(Scalars), sizeof(cuda::Recipe)) / sizeof(uint64_t)];
};

// Returns null unless a launch updates the parameter.
const Ready* launched(const Examined& examined) {
  const auto* const ready = std::get_if<Ready>(&examined);
  return ready != nullptr && ready->streams.backend != Backend::cpu ? ready : nullptr;
}

// Keeps what a step has found alive, because other code may run meanwhile and take any of it away.
class Alive {
 public:
  void reserve(size_t parameters) {
    memory_.reserve(parameters * (kMaxStreams + kMaxStateScalars));
    objects_.reserve(parameters * 2 * (1 + kMaxStateKeys));
  }

  void hold_memory(const Inventory& inventory, size_t i) {
    const Ready& ready = *std::get_if<Ready>(&inventory.examined[i]);
    for (int k = 0; k < ready.streams.count; ++k) memory_.push_back(inventory.tensor_of(i, k).hold_memory());
  }

  // Also holds the objects that record() asks after the update.
  void hold(const Inventory& inventory, size_t i) {
    hold_memory(inventory, i);
    const Located& located = inventory.located[i];
    hold(located.parameter);
    for (int k = 0; k < located.wanted; ++k) {
      if (k < inventory.rule.state_scalars) memory_.push_back(Tensor::in(located.values[k]).hold_memory());
      hold(located.values[k]);
    }
    const Distribution* const distribution = inventory.distribution_of(i);
    if (distribution == nullptr) return;
    hold(located.local);
    for (PyObject* state : distribution->states) {
      if (state != nullptr) hold(state);
    }
  }

  void hold_hyperparameters(const Inventory& inventory) {
    for (const Tensor tensor : inventory.hyperparameters_on_gpus) memory_.push_back(tensor.hold_memory());
  }

 private:
  void hold(PyObject* object) { objects_.push_back(py::reinterpret_borrow<py::object>(object)); }

  std::vector<HeldMemory> memory_;
  std::vector<py::object> objects_;
};

// Reads the tensors from the objects that are held. Other code may have run since they were examined, and have put
// other tensors into the objects, as swap_tensors() does.
void read_again(Inventory& inventory) {
  for (size_t i = 0; i < inventory.size(); ++i) {
    if (!std::holds_alternative<Ready>(inventory.examined[i])) continue;
    Located& located = inventory.located[i];
    located.tensor = Tensor::in(located.local);
    for (int k = 0; k < located.wanted; ++k) {
      located.tensors[k] = Tensor::in(located.values[k]);
    }
  }
}

// Gradients on the CPU that are the same part of the same mesh.
struct OfMesh {
  MeshPart part;  // empty if the gradients are not distributed
  std::vector<Segment> gradients;
};

std::vector<OfMesh> by_mesh(const Inventory& inventory, std::deque<Layout>& layouts) {
  std::vector<OfMesh> shares(1);
  for (size_t i = 0; i < inventory.size(); ++i) {
    if (!inventory.located[i].grad.is_defined()) continue;
    const Distribution* const distribution = inventory.distribution_of(i);
    const MeshPart part = distribution == nullptr ? MeshPart{} : distribution->part;
    auto share = std::find_if(shares.begin(), shares.end(), [&](const OfMesh& known) { return known.part == part; });
    if (share == shares.end()) share = shares.insert(share, {part, {}});
    const Segment& segment = inventory.segments[i];
    share->gradients.push_back(segment.layout == nullptr ? segment
                                                         : segment_of_gradient(inventory.located[i].grad, layouts));
  }
  return shares;
}

// Finds the norm, and gives the updates their coefficient. Returns false if the step must change nothing.
bool clip_on_cpu(const Inventory& inventory, Updates& updates, const Scaler& scaler, const Clipping& clipping,
                 bool holds_gil) {
  std::deque<Layout> layouts;
  const std::vector<OfMesh> shares = by_mesh(inventory, layouts);
  std::vector<cpu::Squares> squares;
  {
    std::optional<py::gil_scoped_release> released;
    if (!holds_gil) released.emplace();
    // The update that follows wakes as many threads, and finds the gradients in their caches.
    for (const OfMesh& share : shares) squares.push_back(sum_of_squares(share.gradients, kGrainUnits * kUnitBytes));
  }
  auto [sum, finite] = squares.front();
  if (shares.size() > 1) {
    py::list parts;
    for (size_t k = 1; k < shares.size(); ++k) {
      parts.append(py::make_tuple(py::handle(shares[k].part.mesh), shares[k].part.replicated, squares[k].sum));
    }
    sum += clipping.add_over_meshes(parts).cast<double>();
    finite = all_finite(sum);  // in any process
  }
  const auto clip = Clip::of(sum, updates.grad_scale(), clipping.max_norm);
  *static_cast<double*>(data_of(clipping.norm)) = clip.norm;
  if (clipping.checks && !finite) {
    *static_cast<float*>(data_of(scaler.found_inf)) = 1;
    return false;
  }
  if (clipping.needs_a_norm && !all_finite(clip.norm)) return false;
  updates.set_coefficient(clip.coefficient);
  return true;
}

}  // namespace

void in_parallel(int64_t count, int64_t grain, cpu::ParallelFunc function, void* context) {
  if (!cpu::in_parallel(torch_parallel_for, count, grain, function, context)) {
    throw std::runtime_error("torch_parallel_for failed");
  }
}

void Runner::clear() {
  updated_.clear();
  for (const auto& launches : launches_) launches->begin();
}

size_t Runner::launches() const {
  size_t count = 0;
  for (const auto& launches : launches_) count += launches->made();
  return count;
}

bool Runner::run(Inventory& inventory, Updates& updates, const Scaler& scaler, const std::optional<Clipping>& clipping,
                 const Backends& backends) {
  const Tally& tally = inventory.tally;
  for (int k = 0; k < kBackends; ++k) {
    const char* const name = name_of(static_cast<Backend>(k));
    if (tally.ready[k][0] > 0) updated_[{"cpu", name}] = tally.ready[k][0];
    if (tally.ready[k][1] > 0) updated_[{kGpuName, name}] = tally.ready[k][1];
  }
  const size_t on_cpu = tally.on_cpu();

  // Python launches Triton's kernels and adds over processes, and a long step on the CPU lets go of the GIL.
  const auto& by_triton = tally.ready[static_cast<int>(Backend::triton)];
  const bool on_host = clipping.has_value() && clipping->norm.device().is_cpu();
  const bool holds_gil = tally.cpu_units < kShortStepUnits;
  const bool calls_python =
      by_triton[0] + by_triton[1] > 0 || (clipping.has_value() && !inventory.distributions.empty());
  // The norm comes before versions and steps are counted, which needs the objects.
  const bool needs_objects = calls_python || (on_host && !holds_gil);
  Alive alive;
  if (needs_objects || !holds_gil) alive.reserve(inventory.size());
  if (calls_python) alive.hold_hyperparameters(inventory);
  for (size_t i = 0; i < inventory.size() && (needs_objects || !holds_gil || updates.zeroes()); ++i) {
    const auto* const ready = std::get_if<Ready>(&inventory.examined[i]);
    if (ready == nullptr) continue;
    if (needs_objects) {
      alive.hold(inventory, i);
    } else if (!holds_gil && ready->streams.backend == Backend::cpu) {
      alive.hold_memory(inventory, i);
    }
    if (updates.zeroes()) count_zeroing(inventory.located[i]);
  }
  gathered_.clear();
  places_.clear();
  if (on_cpu > 0 && on_cpu < inventory.size()) {
    gathered_.reserve(on_cpu);
    places_.reserve(on_cpu);
    for (size_t i = 0; i < inventory.size(); ++i) {
      const auto* const ready = std::get_if<Ready>(&inventory.examined[i]);
      if (ready == nullptr || ready->streams.backend != Backend::cpu) continue;
      gathered_.push_back(inventory.segments[i]);
      places_.push_back(static_cast<uint32_t>(i));
    }
  }
  if (on_host && !clip_on_cpu(inventory, updates, scaler, *clipping, holds_gil)) {
    updated_.clear();
    return false;
  }
  if (on_host && needs_objects) read_again(inventory);
  // Nothing can fail from here on, except on a GPU.
  if (tally.on_gpus + by_triton[0] > 0) {
    run_launches(inventory, updates, scaler, clipping.has_value() && !on_host ? &*clipping : nullptr, backends,
                 calls_python);
  }
  if (on_cpu > 0) run_on_cpu(inventory, holds_gil);
  return true;
}

GpuLaunches& Runner::launches_for(const LaunchKey& key, const RuleEntry& rule, const Backends& backends) {
  for (const auto& launches : launches_) {
    if (launches->key() == key) return *launches;
  }
  if (key.backend == Backend::cuda) return *launches_.emplace_back(std::make_unique<CudaLaunches>(key, rule));
  return *launches_.emplace_back(std::make_unique<TritonLaunches>(key, rule, backends.triton()));
}

// Fills the launches with the tensors of this step.
void Runner::fill(const Inventory& inventory, const Clipping* clipping, const Backends& backends) {
  for (const auto& launches : launches_) launches->clear();
  by_place_.clear();
  by_place_.reserve(inventory.size());
  const RuleEntry& rule = inventory.rule;
  SlotWords slot;
  Segment gradient;
  std::deque<Layout> own;  // of gradients
  for (size_t i = 0; i < inventory.size(); ++i) {
    const Ready* const ready = launched(inventory.examined[i]);
    if (ready == nullptr) {
      by_place_.push_back(nullptr);
      continue;
    }
    const Segment& segment = inventory.segments[i];
    slot.take(inventory, i, *ready);
    const bool by_triton = ready->streams.backend == Backend::triton;
    const LaunchKey key{inventory.device_of(ready->streams), ready->streams.backend, ready->arithmetic,
                        by_triton ? forms_for_triton(segment, inventory.group_of(i).states) : uint16_t(0)};
    const bool has_own_layout = clipping != nullptr && segment.layout != nullptr;
    if (has_own_layout) gradient = segment_of_gradient(inventory.located[i].grad, own);
    by_place_.push_back(&launches_for(key, rule, backends));
    by_place_.back()->add(segment, *ready, inventory.group_of(i), slot.words, slot.count,
                          has_own_layout ? &gradient : nullptr);
  }
}

// Fills the launches with the tensors of the step before, which have the same updates as then. Returns false if other
// launches are needed.
bool Runner::fill_again(const Inventory& inventory) {
  for (const auto& launches : launches_) launches->begin_again();
  SlotWords slot;
  for (size_t i = 0; i < inventory.size(); ++i) {
    if (by_place_[i] == nullptr) continue;
    slot.take(inventory, i, std::get<Ready>(inventory.examined[i]));
    if (!by_place_[i]->again(inventory.segments[i], slot.words, slot.count)) return false;
  }
  return true;
}

void Runner::run_launches(Inventory& inventory, const Updates& updates, const Scaler& scaler, const Clipping* clipping,
                          const Backends& backends, bool calls_python) {
  const bool is_repeated = std::exchange(filled_for_, 0) == updates.version() && fill_again(inventory);
  if (!is_repeated) fill(inventory, clipping, backends);
  filled_for_ = updates.version();
  GpuLaunches* owner = nullptr;  // of the norm
  GpuLaunches::Measurement measurement{nullptr, clipping, 0};
  for (const auto& launches : launches_) {
    const bool is_first = clipping != nullptr && owner == nullptr && launches->count() > 0;
    if (is_first) owner = launches.get();
    launches->upload(scaler, backends, is_first);
    measurement.blocks += launches->blocks();
  }
  if (owner != nullptr) measurement.norm = owner->norm();
  for (const auto& launches : launches_) {
    if (owner != nullptr) launches->measure(measurement);
  }
  for (const auto& launches : launches_) launches->launch();
  if (calls_python) read_again(inventory);
  for (size_t i = 0; i < inventory.size(); ++i) {
    if (launched(inventory.examined[i]) != nullptr) record(inventory, i);
  }
}

void Runner::run_on_cpu(Inventory& inventory, bool holds_gil) {
  struct Share {
    cpu::Work work;
    const Inventory* inventory;
    const uint32_t* places;  // the segments' places in the inventory; null if they are its own

    void record_at(size_t i) const { record(*inventory, places == nullptr ? i : places[i]); }
  };
  Segment* const segments = places_.empty() ? inventory.segments.data() : gathered_.data();
  const size_t count = places_.empty() ? inventory.size() : gathered_.size();
  Share share{{segments, count, inventory.tally.cpu_units}, &inventory, places_.empty() ? nullptr : places_.data()};
  if (holds_gil) {
    in_parallel(
        share.work.units, kGrainUnits,
        [](int64_t begin, int64_t end, void* context) {
          auto& mine = *static_cast<Share*>(context);
          const cpu::Work& work = mine.work;
          for (size_t i = segment_at(work.segments, work.count, begin); i < work.count; ++i) {
            if (work.segments[i].first_unit >= end) break;
            if (work.segments[i].first_unit >= begin) mine.record_at(i);
          }
          cpu::run_range(begin, end, &mine.work);
        },
        &share);
    return;
  }
  for (size_t i = 0; i < count; ++i) share.record_at(i);
  const py::gil_scoped_release release;
  in_parallel(share.work.units, kGrainUnits, cpu::run_range, &share.work);
}

}  // namespace dracopt
