// Runs the updates of a step, on GPUs and on the CPU.
#pragma once

#include <deque>
#include <map>
#include <string>

#include "bindings/cuda_launches.h"
#include "bindings/inventory.h"
#include "bindings/updates.h"
#include "cpu/kernels.h"

namespace dracopt {

// Shares the range among threads if it is long enough. Returns when all of it is done.
void in_parallel(int64_t count, int64_t grain, cpu::ParallelFunc function, void* context);

class Runner {
 public:
  // Forgets the step before.
  void clear();

  // Updates every ready parameter. Once tensors change, nothing can fail unless CUDA refuses memory or a launch.
  void run(Inventory& inventory, const Updates& updates, const Scaler& scaler);

  // Returns how many parameters were updated, by type of device.
  const std::map<std::string, size_t>& updated() const { return updated_; }
  size_t launches() const;

 private:
  void run_on_gpus(const Inventory& inventory, const Updates& updates, const Scaler& scaler);
  void run_on_cpu(Inventory& inventory, const Updates& updates, bool holds_gil);
  CudaLaunches& launches_for(c10::Device device, Arithmetic arithmetic);

  std::deque<CudaLaunches> launches_;
  std::map<std::string, size_t> updated_;
  // The CPU's share of the inventory; empty if the CPU updates all of it, or nothing.
  std::vector<Segment> gathered_;
  std::vector<uint32_t> places_;
};

}  // namespace dracopt
