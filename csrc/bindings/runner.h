// Runs the updates of a step, on GPUs and on the CPU.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "bindings/backends.h"
#include "bindings/gpu_launches.h"
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

  // Updates every ready parameter, with its gradient clipped if there is a `clipping`. Once tensors change, nothing can
  // fail unless a GPU refuses memory or a launch. Returns false if the norm has shown that nothing may change.
  bool run(Inventory& inventory, Updates& updates, const Scaler& scaler, const std::optional<Clipping>& clipping,
           const Backends& backends);

  // The type of a device, and the name of a backend.
  using Where = std::pair<std::string, std::string>;
  // Returns how many parameters were updated where.
  const std::map<Where, size_t>& updated() const { return updated_; }
  size_t launches() const;

 private:
  void fill(const Inventory& inventory, const Clipping* clipping, const Backends& backends);
  bool fill_again(const Inventory& inventory);
  void run_launches(Inventory& inventory, const Updates& updates, const Scaler& scaler, const Clipping* clipping,
                    const Backends& backends, bool calls_python);
  void run_on_cpu(Inventory& inventory, bool holds_gil);
  GpuLaunches& launches_for(const LaunchKey& key, const RuleEntry& rule, const Backends& backends);

  std::vector<std::unique_ptr<GpuLaunches>> launches_;
  uint64_t filled_for_ = 0;             // the version of the updates; 0 if the launches are not filled
  std::vector<GpuLaunches*> by_place_;  // those that hold a place's tensor; null if there are none
  std::map<Where, size_t> updated_;
  // The CPU's share of the inventory; empty if the CPU updates all of it, or nothing.
  std::vector<Segment> gathered_;
  std::vector<uint32_t> places_;
};

}  // namespace dracopt
