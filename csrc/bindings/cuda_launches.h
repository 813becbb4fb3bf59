// Brings a step to a GPU. Tensors are gathered, in their order, into as few launches as their arguments fit into.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <optional>
#include <vector>

#include "bindings/inventory.h"
#include "cuda/launch.h"

namespace dracopt {

// Numbers that torch.amp.GradScaler leaves to the kernels: tensors of one fp32 number each, undefined if missing.
struct Scaler {
  at::Tensor found_inf, grad_scale;
};

// Says whether a graph is being captured from a GPU's current stream.
bool is_capturing(c10::Device device);

// The launches of one device and one arithmetic. They keep the table on the device from step to step, and write another
// table only if anything has changed.
class CudaLaunches {
 public:
  CudaLaunches(c10::Device device, Arithmetic arithmetic) : device_(device), arithmetic_(arithmetic) {}

  c10::Device device() const { return device_; }
  Arithmetic arithmetic() const { return arithmetic_; }

  // Forgets the tensors of the step before.
  void clear();

  // Appends a tensor. `slot` holds its scalars, or the recipe for them, which tensors of one group are likely to share.
  void add(const Segment& segment, const Ready& ready, const Group& group, const uint64_t* slot, size_t slot_words);

  // The next two functions throw std::runtime_error if CUDA refuses. Neither waits for the device.

  // Brings to the device what the launches need. Allocates memory only if the table has changed.
  void upload(const Scaler& scaler);

  void launch(const RuleEntry& rule);

  size_t count() const { return launches_; }

 private:
  struct Slot {
    const Group* group;
    size_t at, words;
  };

  uint32_t slot_for(const Group& group, const uint64_t* words, size_t count, bool& is_new);
  void begin_launch();
  void append_layout(const Layout& layout, int streams);
  [[noreturn]] void fail(const char* what, const char* error) const;

  c10::Device device_;
  Arithmetic arithmetic_;

  std::vector<cuda::Row> rows_;
  std::vector<uint32_t> first_tiles_;  // each row's first tile in its launch
  std::vector<Layout> layouts_;
  std::vector<cuda::Arguments> arguments_;  // one for each launch; entries beyond launches_ are from an earlier step
  std::vector<cuda::Filled> filled_;        // likewise
  std::vector<Slot> slots_;                 // the slots of the last launch
  size_t launches_ = 0;
  bool counts_steps_ = false;  // some state scalar lies on the device
  Scaler scaler_;              // copies on this device, until the launches are made
  void* stream_ = nullptr;     // the current stream

  std::vector<char> image_, written_;  // the table for this step, and the table on the device
  at::Tensor table_;
  std::optional<c10::Stream> table_stream_;  // the stream on which the table was allocated
  std::vector<at::Tensor> captured_;         // tables that graphs refer to, which live as long as the optimizer
};

}  // namespace dracopt
