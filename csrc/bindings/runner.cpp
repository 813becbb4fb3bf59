#include "bindings/runner.h"

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cpu/kernels.h"

namespace dracopt {
namespace {

// A shorter step keeps the GIL, which costs less than a reference to every tensor's memory.
constexpr int64_t kShortStepUnits = 4 * 1024 * 1024 / kUnitBytes;

// Advances what a step changes beside the streams: versions, and the state scalars that the host holds.
void record(const Inventory& inventory, const Updates& updates, size_t i) {
  // A backward through a graph that saved the old value must raise, as after torch's in-place operations.
  const auto bump = [](c10::TensorImpl* tensor) {
    if (!tensor->is_inference()) tensor->bump_version();
  };
  const Ready& ready = *std::get_if<Ready>(&inventory.examined[i]);
  const Located& located = inventory.located[i];
  bump(located.param());
  for (int k = kFirstState; k < ready.streams.count; ++k) bump(inventory.tensor_of(i, k));
  for (int k = 0; k < inventory.rule.state_scalars; ++k) {
    bump(tensor_in(located.values[k]));
    if (ready.scalar_on_gpu[k]) continue;  // the kernel does it
    const double value = updates[ready.update].state_scalars[k].value;
    if (ready.scalar_fp32[k]) {
      *static_cast<float*>(ready.scalar_data[k]) = static_cast<float>(value);
    } else {
      *static_cast<double*>(ready.scalar_data[k]) = value;
    }
  }
}

// Writes a parameter's scalars, or the recipe for them, into the slot. Returns the number of words.
size_t fill_slot(const Inventory& inventory, const Updates& updates, size_t i, const Ready& ready, uint64_t* words) {
  const RuleEntry& rule = inventory.rule;
  if (!ready.has_recipe) {
    const size_t bytes = rule.scalar_bytes[static_cast<int>(ready.arithmetic)];
    const size_t count = (bytes + sizeof(uint64_t) - 1) / sizeof(uint64_t);
    words[count - 1] = 0;
    std::memcpy(words, updates[ready.update].scalars.bytes, bytes);
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

}  // namespace

void in_parallel(int64_t count, int64_t grain, cpu::ParallelFunc function, void* context) {
  if (!cpu::in_parallel(torch_parallel_for, count, grain, function, context)) {
    throw std::runtime_error("torch_parallel_for failed");
  }
}

void Runner::clear() {
  updated_.clear();
  for (CudaLaunches& launches : launches_) launches.clear();
}

size_t Runner::launches() const {
  size_t count = 0;
  for (const CudaLaunches& launches : launches_) count += launches.count();
  return count;
}

void Runner::run(Inventory& inventory, const Updates& updates, const Scaler& scaler) {
  int64_t units = 0;
  size_t on_cpu = 0, on_gpu = 0;
  for (size_t i = 0; i < inventory.size(); ++i) {
    const auto* const ready = std::get_if<Ready>(&inventory.examined[i]);
    if (ready == nullptr) continue;
    ++(ready->streams.on_gpu ? on_gpu : on_cpu);
    if (!ready->streams.on_gpu) units += units_of(inventory.segments[i].numel, inventory.segments[i].unit_numel);
  }
  if (on_gpu > 0) updated_[c10::DeviceTypeName(kGpu, true)] = on_gpu;
  if (on_cpu > 0) updated_["cpu"] = on_cpu;
  // Without the GIL another thread may do anything to the tensors, so their memory must be kept alive.
  const bool holds_gil = units < kShortStepUnits;
  std::vector<c10::Storage> alive;
  if (!holds_gil) alive.reserve(on_cpu * kMaxStreams);
  for (size_t i = 0; i < inventory.size() && !holds_gil; ++i) {
    const auto* const ready = std::get_if<Ready>(&inventory.examined[i]);
    for (int k = 0; ready != nullptr && !ready->streams.on_gpu && k < ready->streams.count; ++k) {
      alive.push_back(inventory.tensor_of(i, k)->storage());
    }
  }
  gathered_.clear();
  places_.clear();
  if (on_cpu > 0 && on_cpu < inventory.size()) {
    gathered_.reserve(on_cpu);
    places_.reserve(on_cpu);
    for (size_t i = 0; i < inventory.size(); ++i) {
      const auto* const ready = std::get_if<Ready>(&inventory.examined[i]);
      if (ready == nullptr || ready->streams.on_gpu) continue;
      gathered_.push_back(inventory.segments[i]);
      places_.push_back(static_cast<uint32_t>(i));
    }
  }
  // Nothing can fail from here on, except CUDA.
  if (on_gpu > 0) run_on_gpus(inventory, updates, scaler);
  if (on_cpu > 0) run_on_cpu(inventory, updates, holds_gil);
}

CudaLaunches& Runner::launches_for(c10::Device device, Arithmetic arithmetic) {
  for (CudaLaunches& launches : launches_) {
    if (launches.device() == device && launches.arithmetic() == arithmetic) return launches;
  }
  return launches_.emplace_back(device, arithmetic);
}

void Runner::run_on_gpus(const Inventory& inventory, const Updates& updates, const Scaler& scaler) {
  uint64_t slot[std::max(sizeof(Scalars), sizeof(cuda::Recipe)) / sizeof(uint64_t)];
  size_t words = 0;
  const Ready* last = nullptr;  // the parameter whose scalars are in `slot`
  for (size_t i = 0; i < inventory.size(); ++i) {
    const auto* const ready = std::get_if<Ready>(&inventory.examined[i]);
    if (ready == nullptr || !ready->streams.on_gpu) continue;
    const bool same = last != nullptr && last->update == ready->update && last->has_recipe == ready->has_recipe;
    if (!same) words = fill_slot(inventory, updates, i, *ready, slot);
    launches_for(inventory.located[i].param()->device(), ready->arithmetic)
        .add(inventory.segments[i], *ready, inventory.group_of(i), slot, words);
    last = ready;
  }
  for (CudaLaunches& launches : launches_) launches.upload(scaler);
  for (CudaLaunches& launches : launches_) launches.launch(inventory.rule);
  for (size_t i = 0; i < inventory.size(); ++i) {
    const auto* const ready = std::get_if<Ready>(&inventory.examined[i]);
    if (ready != nullptr && ready->streams.on_gpu) record(inventory, updates, i);
  }
}

void Runner::run_on_cpu(Inventory& inventory, const Updates& updates, bool holds_gil) {
  struct Share {
    cpu::Work work;
    const Inventory* inventory;
    const Updates* updates;
    const uint32_t* places;  // the segments' places in the inventory; null if they are its own

    void record_at(size_t i) const { record(*inventory, *updates, places == nullptr ? i : places[i]); }
  };
  Segment* const segments = places_.empty() ? inventory.segments.data() : gathered_.data();
  const size_t count = places_.empty() ? inventory.size() : gathered_.size();
  Share share{{segments, count, number_units(segments, count)},
              &inventory,
              &updates,
              places_.empty() ? nullptr : places_.data()};
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
  const pybind11::gil_scoped_release release;
  in_parallel(share.work.units, kGrainUnits, cpu::run_range, &share.work);
}

}  // namespace dracopt
