#include "bindings/backends.h"

#include <mutex>
#include <set>
#include <stdexcept>

#include "cuda/kernels.h"

namespace dracopt {

const char* lasting(const std::string& text) {
  static std::set<std::string> texts;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  return texts.insert(text).first->c_str();
}

Backends::Found Backends::for_device(Device device) const {
  if (device.is_cpu() && cpu_) return {Backend::cpu, nullptr};
  if (device.is_cpu()) {
    return {Backend::triton, triton_.has_value() && triton_->on_cpu ? nullptr : "tensors on the CPU"};
  }
  if (!device.is_gpu()) return {Backend::cpu, "tensors on a device without kernels"};
  const char* const no_cuda = cuda_ ? cuda::unavailable(device.index) : "they may not be used";
  if (no_cuda == nullptr) return {Backend::cuda, nullptr};
  if (!triton_.has_value()) {
    return {Backend::cuda, lasting(std::string("tensors on a GPU without the native kernels (") + no_cuda + ")")};
  }
  const auto index = static_cast<size_t>(device.index);
  const char* const no_kernels = index < triton_->no_kernels.size() ? triton_->no_kernels[index] : nullptr;
  if (no_kernels == nullptr) return {Backend::triton, nullptr};
  return {Backend::triton, lasting(std::string("tensors on a GPU without Triton kernels (") + no_kernels + ")")};
}

bool Backends::is_capturing(Device device, Backend backend) const {
  const DeviceGuard guard(device);
  if (backend == Backend::triton) return !triton_->is_capturing.is_none() && triton_->is_capturing().cast<bool>();
  bool answer = false;
  if (const char* const error = cuda::is_capturing(current_cuda_stream(device), answer)) {
    throw std::runtime_error(std::string("cannot tell whether a graph is being captured: ") + error);
  }
  return answer;
}

}  // namespace dracopt
