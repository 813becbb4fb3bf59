// Launches the Triton kernels through Python. They read their arguments in the device's memory.
#pragma once

#include <pybind11/pybind11.h>

#include <map>

#include "bindings/gpu_launches.h"

namespace dracopt {

class TritonLaunches final : public GpuLaunches {
 public:
  TritonLaunches(LaunchKey key, const RuleEntry& rule, const Triton& triton);

  void begin() override;

 private:
  void write_table(Memory& table, const std::vector<char>& image) override;
  void run_measure(const Launch& launch, cuda::Arguments& arguments) override;
  void run(const Launch& launch, cuda::Arguments& arguments) override;
  void copy_to_device(Memory& to, Memory& from);
  Memory send(const Launch& launch, const cuda::Arguments& arguments);
  void call(const char* launcher, const cuda::Arguments& arguments, Memory& sent);

  const pybind11::object launcher_;
  std::map<const Launch*, Memory> sent_;  // arguments that a launch that measures has left on the device
};

// Returns how a parameter's streams are stored and rounded, for a LaunchKey.
uint16_t forms_for_triton(const Segment& segment, int states);

}  // namespace dracopt
