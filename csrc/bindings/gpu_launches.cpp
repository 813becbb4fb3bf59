#include "bindings/gpu_launches.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "bindings/tensor_facts.h"

namespace dracopt {
namespace {

template <typename T>
size_t append(std::vector<char>& image, const std::vector<T>& items) {
  const size_t at = (image.size() + cuda::kVectorBytes - 1) / cuda::kVectorBytes * cuda::kVectorBytes;
  image.resize(at + items.size() * sizeof(T));
  if (!items.empty()) std::memcpy(image.data() + at, items.data(), items.size() * sizeof(T));
  return at;
}

}  // namespace

void GpuLaunches::begin() {
  made_ = 0;
  found_inf_ = grad_scale_ = coefficient_ = {};
  measurement_ = {};
  // A step that failed may have left a part of a sum behind.
  if (std::exchange(is_measuring_, false)) written_.clear();
}

void GpuLaunches::clear() {
  rows_.clear();
  first_tiles_.clear();
  slots_.clear();
  layouts_.clear();
  count_ = 0;
  counts_steps_ = false;
  is_complete_ = false;
}

void GpuLaunches::begin_again() {
  next_row_ = next_launch_ = 0;
  for (size_t i = 0; i < count_; ++i) {
    for (Slot& slot : launches_[i].known) slot.update = nullptr;
  }
}

bool GpuLaunches::again(const Segment& segment, const uint64_t* slot, size_t slot_words) {
  if (next_row_ == launches_[next_launch_].first_row + launches_[next_launch_].gradients.size()) ++next_launch_;
  Launch& launch = launches_[next_launch_];
  launch.gradients[next_row_ - launch.first_row] = reinterpret_cast<uint64_t>(segment.data[kGrad]);
  Slot& known = launch.known[slots_[next_row_]];
  if (rows_[next_row_++].maximize != segment.update->maximize || known.words != slot_words) return false;
  if (known.update == segment.update) return true;
  uint64_t* const words = &launch.slots[known.at];
  // Tensors share a slot while their scalars are equal.
  if (known.update != nullptr) return std::memcmp(words, slot, slot_words * sizeof(*slot)) == 0;
  std::memcpy(words, slot, slot_words * sizeof(*slot));
  known.update = segment.update;
  take_over(*segment.update);
  return true;
}

// Takes over what is equal in all updates of a step.
void GpuLaunches::take_over(const Update& update) {
  arguments_.divisor = update.grad_scale;
  arguments_.coefficient = update.coefficient;
  arguments_.zeroes = update.zeroes;
}

GpuLaunches::Launch& GpuLaunches::begin_launch() {
  if (count_ == launches_.size()) launches_.emplace_back();
  Launch& launch = launches_[count_++];
  launch.filled = empty_;
  launch.first_row = rows_.size();
  launch.gradients.clear();
  launch.slots.clear();
  launch.known.clear();
  return launch;
}

void GpuLaunches::add(const Segment& segment, const Ready& ready, const Group& group, const uint64_t* slot,
                      size_t slot_words, const Segment* gradient) {
  Launch& launch = count_ == 0 ? begin_launch() : launches_[count_ - 1];
  const auto is_slot = [&](const Slot& known) {
    return known.words == slot_words && std::memcmp(&launch.slots[known.at], slot, slot_words * sizeof(*slot)) == 0;
  };
  size_t number = launch.known.size();
  bool is_new = true;
  for (size_t i = launch.known.size(); is_new && i-- > 0 && launch.known[i].group == &group;) {
    is_new = !is_slot(launch.known[i]);
    if (!is_new) number = i;
  }
  const int64_t first_tile = launch.filled.tiles;
  if (!launch.filled.add(segment.numel, is_new ? slot_words : 0)) {
    begin_launch();
    return add(segment, ready, group, slot, slot_words, gradient);
  }
  if (is_new) {
    launch.known.push_back({&group, launch.slots.size(), slot_words, segment.update});
    launch.slots.insert(launch.slots.end(), slot, slot + slot_words);
  }
  slots_.push_back(static_cast<uint32_t>(number));
  launch.gradients.push_back(reinterpret_cast<uint64_t>(segment.data[kGrad]));
  take_over(*segment.update);
  rows_.emplace_back();
  cuda::Row& row = rows_.back();
  for (int k = 0; k < ready.streams.count; ++k) {
    row.describe(k, segment.data[k], segment.dtypes[k], segment.dense[k]);
  }
  for (int k = 0; k < kMaxStateScalars; ++k) {
    row.state_scalars[k] = ready.scalar_on_gpu[k] ? ready.scalar_data[k] : nullptr;
    row.state_scalar_fp32 |= static_cast<uint8_t>(ready.scalar_fp32[k] << k);
    counts_steps_ |= ready.scalar_on_gpu[k];
  }
  row.numel = segment.numel;
  row.slot =
      static_cast<uint32_t>(launch.known[number].at);  // make_image() adds the number of gradients before the slots
  row.numbers = cuda::kDense;
  row.master = segment.master;
  if (const Rounding* const rounding = segment.rounding) {
    ++row.slot;  // the step comes first
    row.at_random = rounding->streams;
    row.param = rounding->param;
    row.first = rounding->first;
    arguments_.seed = rounding->seed;
  }
  row.layout = cuda::kDense;
  if (segment.layout != nullptr) {
    row.layout = static_cast<int32_t>(layouts_.size());
    append_layout(*segment.layout, ready.streams.count);
    if (gradient != nullptr && gradient->layout != nullptr) append_layout(*gradient->layout, kGrad + 1);
    row.dense |= static_cast<uint8_t>((gradient != nullptr && gradient->layout == nullptr) << cuda::kGradIsSimple);
  }
  if (segment.rounding != nullptr && segment.rounding->numbers != nullptr) {
    row.numbers = static_cast<int32_t>(layouts_.size());
    append_layout(*segment.rounding->numbers, kWhole + 1);
  }
  row.states = static_cast<uint8_t>(group.states);
  row.maximize = segment.update->maximize;
  row.has_recipe = ready.has_recipe;
  first_tiles_.push_back(static_cast<uint32_t>(first_tile));
}

// Appends only the used part of a layout, because the rest may be anything, which would make equal tables differ.
void GpuLaunches::append_layout(const Layout& layout, int streams) {
  layouts_.emplace_back();
  Layout& copy = layouts_.back();
  std::memset(static_cast<void*>(&copy), 0, sizeof(copy));
  copy.dims = layout.dims;
  std::copy(layout.sizes, layout.sizes + layout.dims, copy.sizes);
  for (int k = 0; k < streams; ++k) std::copy(layout.strides[k], layout.strides[k] + layout.dims, copy.strides[k]);
}

// Makes the table for this step, and forgets the one on the device if it is another.
void GpuLaunches::make_image(bool has_norm) {
  is_complete_ = false;
  image_.clear();
  append(image_, rows_);
  auto* const rows = reinterpret_cast<cuda::Row*>(image_.data());
  for (size_t i = 0; i < count_; ++i) {
    const size_t count = launches_[i].gradients.size();
    for (size_t k = 0; k < count; ++k) rows[launches_[i].first_row + k].slot += static_cast<uint32_t>(count);
  }
  layouts_at_ = append(image_, layouts_);
  first_tiles_at_ = append(image_, first_tiles_);
  finished_at_ = append(image_, std::vector<uint32_t>(count_));
  norm_at_ = append(image_, std::vector<cuda::Norm>(has_norm ? 1 : 0));
  image_.resize((image_.size() + cuda::kVectorBytes - 1) / cuda::kVectorBytes * cuda::kVectorBytes);
  if (image_ != written_) written_.clear();
  has_norm_ = has_norm;
  is_complete_ = true;
}

void GpuLaunches::upload(const Scaler& scaler, const Backends& backends, bool has_norm) {
  if (count_ == 0) return;
  if (!is_complete_ || has_norm != has_norm_) make_image(has_norm);
  const DeviceGuard guard(key_.device);
  const bool on_gpu = key_.device.is_gpu();  // Triton's interpreter may serve the CPU
  const int64_t stream = on_gpu ? current_stream(key_.device) : 0;
  if (key_.backend == Backend::cuda) cuda_stream_ = current_cuda_stream(key_.device);
  capturing_ = on_gpu && backends.is_capturing(key_.device, key_.backend);
  // A table is for the stream that wrote it, because torch may give its memory to this stream's next tensors. A graph
  // may use the table of another stream, because graphs keep their tables.
  if (written_.empty() || (stream != table_stream_ && !capturing_)) {
    written_.clear();
    table_ = Memory(image_.size(), key_.device);
    table_stream_ = stream;
    write_table(table_, image_);
    // A capture only promises to write the table, so nothing except the graph may rely on it.
    if (!capturing_) written_ = image_;
  }
  if (capturing_) keep(table_);
  if (scaler.found_inf.is_defined()) found_inf_ = Memory::of(scaler.found_inf, key_.device);
  if (scaler.grad_scale.is_defined()) grad_scale_ = Memory::of(scaler.grad_scale, key_.device);
  if (scaler.coefficient.is_defined()) coefficient_ = Memory::of(scaler.coefficient, key_.device);
}

uint32_t GpuLaunches::blocks() const {
  int64_t blocks = 0;
  for (size_t i = 0; i < count_; ++i) blocks += launches_[i].filled.tiles;
  return static_cast<uint32_t>(blocks);
}

// Completes the arguments of a launch, except for their words.
cuda::Arguments& GpuLaunches::arguments_of(size_t i) {
  const Launch& launch = launches_[i];
  char* const table = table_.data();
  arguments_.rows = reinterpret_cast<const cuda::Row*>(table) + launch.first_row;
  arguments_.layouts = reinterpret_cast<const Layout*>(table + layouts_at_);
  arguments_.first_tiles = reinterpret_cast<const uint32_t*>(table + first_tiles_at_) + launch.first_row;
  arguments_.finished = counts_steps_ ? reinterpret_cast<uint32_t*>(table + finished_at_) + i : nullptr;
  arguments_.found_inf = reinterpret_cast<float*>(found_inf_.data());
  arguments_.grad_scale = reinterpret_cast<const float*>(grad_scale_.data());
  arguments_.multiplier = reinterpret_cast<const double*>(coefficient_.data());
  arguments_.norm = measurement_.norm;
  if (measurement_.norm != nullptr) {
    arguments_.multiplier = &measurement_.norm->coefficient;
    arguments_.norm_out = static_cast<double*>(data_of(measurement_.clipping->norm));
    arguments_.max_norm = measurement_.clipping->max_norm;
    arguments_.blocks_in_all = measurement_.blocks;
    arguments_.checks = measurement_.clipping->checks;
  }
  arguments_.count = static_cast<uint32_t>(launch.gradients.size());
  arguments_.blocks = static_cast<uint32_t>(launch.filled.tiles);
  return arguments_;
}

void GpuLaunches::measure(const Measurement& measurement) {
  if (count_ == 0) return;
  measurement_ = measurement;
  is_measuring_ = true;
  const DeviceGuard guard(key_.device);
  for (size_t i = 0; i < count_; ++i) run_measure(launches_[i], arguments_of(i));
  made_ += count_;
}

void GpuLaunches::launch() {
  if (count_ == 0) return;
  const DeviceGuard guard(key_.device);
  for (size_t i = 0; i < count_; ++i) run(launches_[i], arguments_of(i));
  made_ += count_;
  is_measuring_ = false;
  found_inf_ = grad_scale_ = coefficient_ = {};
}

void GpuLaunches::fail(const char* what, const char* error) const {
  throw std::runtime_error("CUDA could not " + std::string(what) + " on " + key_.device.name() + ": " + error + " (" +
                           std::to_string(rows_.size()) + " tensors in " + std::to_string(count_) + " launches, a " +
                           "table of " + std::to_string(image_.size()) + " bytes)");
}

}  // namespace dracopt
