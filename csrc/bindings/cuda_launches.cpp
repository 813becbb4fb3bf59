#include "bindings/cuda_launches.h"

#include <algorithm>

#include "cuda/kernels.h"

namespace dracopt {

void CudaLaunches::write_table(Memory& table, const std::vector<char>& image) {
  const char* const error = cuda::write_table(table.data(), image.data(), image.size(), stream());
  if (error != nullptr) fail("write the table of tensors", error);
}

void CudaLaunches::fill(const Launch& launch, cuda::Arguments& arguments) {
  const auto slots = std::copy(launch.gradients.begin(), launch.gradients.end(), arguments.words);
  std::copy(launch.slots.begin(), launch.slots.end(), slots);
}

void CudaLaunches::run_measure(const Launch& launch, cuda::Arguments& arguments) {
  fill(launch, arguments);
  const char* const error = cuda::measure(arguments, stream());
  if (error != nullptr) fail("launch the kernel that measures gradients", error);
}

void CudaLaunches::run(const Launch& launch, cuda::Arguments& arguments) {
  fill(launch, arguments);
  const char* const error = cuda::launch(rule_.index, key().arithmetic, arguments, stream());
  if (error != nullptr) fail("launch the update kernel", error);
}

}  // namespace dracopt
