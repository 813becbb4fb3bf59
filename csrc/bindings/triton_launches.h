// Launches the Triton kernels through Python. They read their arguments in the device's memory.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/gpu_launches.h"

namespace dracopt {

class TritonLaunches final : public GpuLaunches {
 public:
  TritonLaunches(LaunchKey key, const RuleEntry& rule, const Triton& triton);

 private:
  void write_table(Memory& table, const std::vector<char>& image) override;
  void run(const Launch& launch, cuda::Arguments& arguments) override;
  void copy_to_device(Memory& to, Memory& from);

  const pybind11::object launcher_;
};

// Returns the dtypes of a parameter's streams for a LaunchKey. One kernel serves parameters with and without the rule's
// last states, because a missing state counts as stored like the parameter.
uint16_t dtypes_for_triton(const RuleEntry& rule, const Segment& segment, int streams);

}  // namespace dracopt
