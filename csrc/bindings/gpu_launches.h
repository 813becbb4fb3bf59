// Brings a step to a GPU. Tensors are gathered, in their order, into as few launches as their arguments fit into.
#pragma once

#include <vector>

#include "bindings/backends.h"
#include "bindings/inventory.h"
#include "cuda/launch.h"

namespace dracopt {

// Numbers that the kernels read: tensors of one element each, undefined if missing.
struct Scaler {
  Tensor found_inf, grad_scale;  // torch.amp.GradScaler's, in fp32
  Tensor coefficient;            // multiplies the gradients after their division, in fp64
};

// Says how to clip the gradients of a step by their global norm.
struct Clipping {
  double max_norm;
  Tensor norm;        // takes the norm before clipping, in fp64; lies where all gradients lie
  bool checks;        // sets Scaler::found_inf, and changes nothing else, if some gradient is not finite
  bool needs_a_norm;  // changes nothing else if the norm is not finite
  // This function takes (mesh, replicated, sum) for each MeshPart of distributed gradients on the CPU, where `sum` is
  // of the squares in this process. It returns the sum for all processes.
  pybind11::object add_over_meshes;
};

// Tensors with equal keys are updated by the same kernel.
struct LaunchKey {
  Device device;
  Backend backend;
  Arithmetic arithmetic;
  uint16_t forms;  // of the streams, if the kernel is compiled for them; otherwise 0. See forms_for_triton()

  bool operator==(const LaunchKey&) const = default;
};

// The launches of one kernel on one device. They keep the table on the device from step to step, and write another
// table only if anything has changed.
class GpuLaunches {
 public:
  virtual ~GpuLaunches() = default;

  const LaunchKey& key() const { return key_; }

  // Begins a step.
  virtual void begin();

  // Forgets the tensors of the step before.
  void clear();

  // These take the tensors of the step before once more. Each again() repeats the add() of that step for the same
  // tensor, of which only the gradient's address and the scalars may differ. Returns false if add() would make another
  // table; the tensors must then be forgotten and added.
  void begin_again();
  bool again(const Segment& segment, const uint64_t* slot, size_t slot_words);

  // Appends a tensor. `slot` holds its scalars, or the recipe for them, which tensors of one group are likely to share.
  // `gradient` describes the gradient alone if it will be measured and the segment has a layout, and is null otherwise.
  void add(const Segment& segment, const Ready& ready, const Group& group, const uint64_t* slot, size_t slot_words,
           const Segment* gradient);

  // The next functions throw std::runtime_error if the device refuses. None waits for the device.

  // Brings to the device what the launches need. Allocates memory only if the table has changed.
  void upload(const Scaler& scaler, const Backends& backends, bool has_norm);

  // A Measurement says where the launches on one device add what they measure, and what comes of it.
  struct Measurement {
    cuda::Norm* norm;
    const Clipping* clipping;
    uint32_t blocks;  // of all launches
  };

  // Measures the gradients, which the launches then clip.
  void measure(const Measurement& measurement);

  void launch();

  size_t count() const { return count_; }
  size_t made() const { return made_; }
  uint32_t blocks() const;
  cuda::Norm* norm() const { return reinterpret_cast<cuda::Norm*>(table_.data() + norm_at_); }

 protected:
  // An `empty` launch says how much a launch may hold.
  GpuLaunches(LaunchKey key, cuda::Filled empty) : key_(key), empty_(empty) {}

  struct Slot {
    const Group* group;
    size_t at, words;
    const Update* update;  // whose scalars these are; null until this step has written them
  };

  // The words of one launch's arguments are the gradients' addresses, then the slots.
  struct Launch {
    cuda::Filled filled;
    size_t first_row;
    std::vector<uint64_t> gradients, slots;
    std::vector<Slot> known;
  };

  bool is_capturing() const { return capturing_; }
  void* stream() const { return cuda_stream_; }                         // the current one
  void keep(Memory memory) { captured_.push_back(std::move(memory)); }  // for as long as the optimizer lives
  [[noreturn]] void fail(const char* what, const char* error) const;

  // Writes the table in the current stream's order.
  virtual void write_table(Memory& table, const std::vector<char>& image) = 0;

  // Make a launch whose arguments are complete except for their words. A launch that measures comes first, if at all.
  virtual void run_measure(const Launch& launch, cuda::Arguments& arguments) = 0;
  virtual void run(const Launch& launch, cuda::Arguments& arguments) = 0;

 private:
  Launch& begin_launch();
  void take_over(const Update& update);
  void make_image(bool has_norm);
  void append_layout(const Layout& layout, int streams);
  cuda::Arguments& arguments_of(size_t i);

  const LaunchKey key_;
  const cuda::Filled empty_;

  std::vector<cuda::Row> rows_;
  std::vector<uint32_t> first_tiles_;  // each row's first tile in its launch
  std::vector<uint32_t> slots_;        // each row's slot, as a number in Launch::known
  std::vector<Layout> layouts_;
  std::vector<Launch> launches_;  // entries beyond count_ are from an earlier step
  size_t count_ = 0;
  size_t made_ = 0;           // in this step
  bool is_complete_ = false;  // the image is of these rows, with a norm if `has_norm_`
  bool has_norm_ = false;
  size_t next_row_ = 0, next_launch_ = 0;  // of again()
  bool counts_steps_ = false;              // some state scalar lies on the device
  cuda::Arguments arguments_;
  Memory found_inf_, grad_scale_, coefficient_;  // on this device, until the launches are made
  Measurement measurement_{};                    // of this step, if there is a norm
  bool is_measuring_ = false;
  void* cuda_stream_ = nullptr;
  bool capturing_ = false;  // a graph

  std::vector<char> image_, written_;  // the table for this step, and the table on the device
  size_t layouts_at_ = 0, first_tiles_at_ = 0, finished_at_ = 0, norm_at_ = 0;
  Memory table_;
  int64_t table_stream_ = 0;      // the number of the stream that wrote the table
  std::vector<Memory> captured_;  // memory that graphs refer to
};

}  // namespace dracopt
