#include "bindings/cuda_launches.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bindings/gpu.h"
#include "cuda/kernels.h"

namespace dracopt {
namespace {

c10::Stream current_stream(c10::Device device) { return c10::impl::VirtualGuardImpl(kGpu).getStream(device); }

// Returns the stream's cudaStream_t, although this binary knows no CUDA.
void* handle_of(const c10::Stream& stream) {
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 11
  // An import would search sys.meta_path, which may run anyone's code in the middle of a step.
  const auto module = pybind11::reinterpret_borrow<pybind11::object>(PyImport_AddModule("torch._C"));
  return reinterpret_cast<void*>(module.attr("_cuda_getCurrentRawStream")(stream.device_index()).cast<uintptr_t>());
#else
  return stream.native_handle();
#endif
}

template <typename T>
size_t append(std::vector<char>& image, const std::vector<T>& items) {
  const size_t at = (image.size() + cuda::kVectorBytes - 1) / cuda::kVectorBytes * cuda::kVectorBytes;
  image.resize(at + items.size() * sizeof(T));
  if (!items.empty()) std::memcpy(image.data() + at, items.data(), items.size() * sizeof(T));
  return at;
}

}  // namespace

bool is_capturing(c10::Device device) {
  const c10::DeviceGuard guard(device);
  bool answer = false;
  const char* const error = cuda::is_capturing(handle_of(current_stream(device)), answer);
  if (error != nullptr)
    throw std::runtime_error(std::string("cannot tell whether a graph is being captured: ") + error);
  return answer;
}

void CudaLaunches::clear() {
  rows_.clear();
  first_tiles_.clear();
  layouts_.clear();
  launches_ = 0;
  counts_steps_ = false;
  scaler_ = {};
}

void CudaLaunches::begin_launch() {
  // Each vector is checked by its own size, because memory may run out between the two.
  if (launches_ == arguments_.size()) arguments_.emplace_back();
  if (launches_ == filled_.size()) filled_.emplace_back();
  filled_[launches_] = {};
  arguments_[launches_].count = 0;
  slots_.clear();
  ++launches_;
}

// Returns the place of these words in the last launch's arguments. Slots grow downwards from the arguments' end.
uint32_t CudaLaunches::slot_for(const Group& group, const uint64_t* words, size_t count, bool& is_new) {
  const cuda::Arguments& arguments = arguments_[launches_ - 1];
  for (size_t i = slots_.size(); i-- > 0 && slots_[i].group == &group;) {
    is_new = slots_[i].words != count || std::memcmp(arguments.words + slots_[i].at, words, count * 8) != 0;
    if (!is_new) return static_cast<uint32_t>(slots_[i].at);
  }
  is_new = true;
  return static_cast<uint32_t>(cuda::kArgumentWords - filled_[launches_ - 1].slot_words - count);
}

void CudaLaunches::add(const Segment& segment, const Ready& ready, const Group& group, const uint64_t* slot,
                       size_t slot_words) {
  if (launches_ == 0) begin_launch();
  bool is_new;
  uint32_t at = slot_for(group, slot, slot_words, is_new);
  const int64_t first_tile = filled_[launches_ - 1].tiles;
  if (!filled_[launches_ - 1].add(segment.numel, is_new ? slot_words : 0)) {
    begin_launch();
    return add(segment, ready, group, slot, slot_words);
  }
  cuda::Arguments& arguments = arguments_[launches_ - 1];
  if (is_new) {
    std::memcpy(arguments.words + at, slot, slot_words * sizeof(uint64_t));
    slots_.push_back({&group, at, slot_words});
  }
  arguments.words[arguments.count++] = reinterpret_cast<uint64_t>(segment.data[kGrad]);
  arguments.divisor = segment.update->grad_scale;

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
  row.slot = at;
  row.layout = cuda::kDense;
  if (segment.layout != nullptr) {
    row.layout = static_cast<int32_t>(layouts_.size());
    append_layout(*segment.layout, ready.streams.count);
  }
  row.states = static_cast<uint8_t>(group.states);
  row.maximize = segment.update->maximize;
  row.has_recipe = ready.has_recipe;
  first_tiles_.push_back(static_cast<uint32_t>(first_tile));
}

// Appends only the used part of a layout, because the rest may be anything, which would make equal tables differ.
void CudaLaunches::append_layout(const Layout& layout, int streams) {
  layouts_.emplace_back();
  Layout& copy = layouts_.back();
  std::memset(static_cast<void*>(&copy), 0, sizeof(copy));
  copy.dims = layout.dims;
  std::copy(layout.sizes, layout.sizes + layout.dims, copy.sizes);
  for (int k = 0; k < streams; ++k) std::copy(layout.strides[k], layout.strides[k] + layout.dims, copy.strides[k]);
}

void CudaLaunches::upload(const Scaler& scaler) {
  if (launches_ == 0) return;
  const c10::DeviceGuard guard(device_);
  const c10::Stream stream = current_stream(device_);
  stream_ = handle_of(stream);
  image_.clear();
  append(image_, rows_);
  const size_t layouts = append(image_, layouts_), first_tiles = append(image_, first_tiles_);
  const size_t finished = append(image_, std::vector<uint32_t>(launches_));
  image_.resize((image_.size() + cuda::kVectorBytes - 1) / cuda::kVectorBytes * cuda::kVectorBytes);

  bool capturing = false;
  const char* error = cuda::is_capturing(stream_, capturing);
  if (error == nullptr && image_ != written_) {
    written_.clear();
    table_ = at::empty({static_cast<int64_t>(image_.size())}, at::TensorOptions(device_).dtype(at::kByte));
    table_stream_ = stream;
    error = cuda::write_table(table_.mutable_data_ptr(), image_.data(), image_.size(), stream_);
    // A capture only promises to write the table, so nothing except the graph may rely on it.
    if (error == nullptr && !capturing) written_ = image_;
  }
  if (error != nullptr) fail("write the table of tensors", error);
  if (stream != table_stream_) {
    c10::impl::VirtualGuardImpl(kGpu).recordDataPtrOnStream(table_.storage().data_ptr(), stream);
  }
  if (capturing && (captured_.empty() || !captured_.back().is_same(table_))) captured_.push_back(table_);

  const auto here = [&](const at::Tensor& number) { return number.defined() ? number.to(device_, true) : number; };
  scaler_ = {here(scaler.found_inf), here(scaler.grad_scale)};
  const auto address = [](const at::Tensor& number) {
    return number.defined() ? static_cast<const float*>(number.const_data_ptr()) : nullptr;
  };
  char* const table = static_cast<char*>(table_.mutable_data_ptr());
  size_t first_row = 0;
  for (size_t i = 0; i < launches_; ++i) {
    cuda::Arguments& arguments = arguments_[i];
    arguments.rows = reinterpret_cast<const cuda::Row*>(table) + first_row;
    arguments.layouts = reinterpret_cast<const Layout*>(table + layouts);
    arguments.first_tiles = reinterpret_cast<const uint32_t*>(table + first_tiles) + first_row;
    arguments.finished = counts_steps_ ? reinterpret_cast<uint32_t*>(table + finished) + i : nullptr;
    arguments.found_inf = address(scaler_.found_inf);
    arguments.grad_scale = address(scaler_.grad_scale);
    arguments.blocks = static_cast<uint32_t>(filled_[i].tiles);
    first_row += arguments.count;
  }
}

void CudaLaunches::launch(const RuleEntry& rule) {
  if (launches_ == 0) return;
  const c10::DeviceGuard guard(device_);
  for (size_t i = 0; i < launches_; ++i) {
    const char* const error = cuda::launch(rule.index, arithmetic_, arguments_[i], stream_);
    if (error != nullptr) fail("launch the update kernel", error);
  }
  scaler_ = {};
}

void CudaLaunches::fail(const char* what, const char* error) const {
  throw std::runtime_error("CUDA could not " + std::string(what) + " on " + device_.str() + ": " + error + " (" +
                           std::to_string(rows_.size()) + " tensors in " + std::to_string(launches_) + " launches, a " +
                           "table of " + std::to_string(image_.size()) + " bytes)");
}

}  // namespace dracopt
