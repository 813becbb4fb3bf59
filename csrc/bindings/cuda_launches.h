// Launches the CUDA kernels, which take their arguments by value.
#pragma once

#include "bindings/gpu_launches.h"

namespace dracopt {

class CudaLaunches final : public GpuLaunches {
 public:
  CudaLaunches(LaunchKey key, const RuleEntry& rule) : GpuLaunches(key, {}), rule_(rule) {}

 private:
  void write_table(Memory& table, const std::vector<char>& image) override;
  static void fill(const Launch& launch, cuda::Arguments& arguments);
  void run_measure(const Launch& launch, cuda::Arguments& arguments) override;
  void run(const Launch& launch, cuda::Arguments& arguments) override;

  const RuleEntry& rule_;
};

}  // namespace dracopt
