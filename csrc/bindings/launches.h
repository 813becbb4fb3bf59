// How a step gets to a GPU: its tensors are gathered, in their order, into as few launches as their arguments fit into.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <optional>
#include <vector>

#include "core/rule_entry.h"
#include "core/segment.h"
#include "cuda/launch.h"

namespace dracopt {

// What torch.amp.GradScaler leaves to the kernels: tensors of one fp32 number each, undefined where there is none.
struct Scaler {
  at::Tensor found_inf, grad_scale;
};

// Is a graph being captured from a GPU's current stream?
bool is_capturing(c10::Device device);

// Launches are those of one device and one arithmetic. From step to step they keep the table on the device, and write
// another one only if anything in it has changed.
class Launches {
 public:
  Launches(c10::Device device, Arithmetic arithmetic) : device_(device), arithmetic_(arithmetic) {}

  c10::Device device() const { return device_; }
  Arithmetic arithmetic() const { return arithmetic_; }

  // Forgets the tensors of the step before.
  void clear();

  // Appends a tensor. `slot` holds its scalars, or the recipe for them, and `group` says where it comes from: those of
  // one group are likely to have the same.
  void add(const Segment& segment, int states, void* const* carried, uint8_t carried_fp32, bool has_recipe,
           const void* group, const uint64_t* slot, size_t slot_words);

  // Brings to the device what the launches need. Allocates memory only if the table has changed.
  void prepare(const Scaler& scaler);

  // Both throw std::runtime_error if CUDA refuses. Nothing is waited for.
  void run(const RuleEntry& rule);

  size_t count() const { return launches_; }

 private:
  struct Slot {
    const void* group;
    size_t at, words;
  };

  uint32_t slot_for(const void* group, const uint64_t* words, size_t count, bool& is_new);
  void begin_launch();
  void append_layout(const Layout& layout, int streams);
  [[noreturn]] void fail(const char* what, const char* error) const;

  c10::Device device_;
  Arithmetic arithmetic_;

  std::vector<cuda::Row> rows_;
  std::vector<uint32_t> first_tiles_;  // of each row, in its launch
  std::vector<Layout> layouts_;
  std::vector<cuda::Arguments> arguments_;  // of each launch; those beyond launches_ are from an earlier step
  std::vector<cuda::Filled> filled_;        // likewise
  std::vector<Slot> slots_;                 // of the last launch
  size_t launches_ = 0;
  bool counts_steps_ = false;  // some carried scalar lies on the device
  Scaler scaler_;              // on this device, until it has run
  void* stream_ = nullptr;     // the current one

  std::vector<char> image_, written_;  // the table as it is to be, and as it is on the device
  at::Tensor table_;
  std::optional<c10::Stream> table_stream_;  // on which it was allocated
  std::vector<at::Tensor> captured_;         // tables that a graph refers to: they live as long as the optimizer
};

}  // namespace dracopt
