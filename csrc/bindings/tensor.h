// The only place that knows how torch lays out its objects. A build chooses one of two headers with the same names:
// tensor_of_one_torch.h is compiled for one minor version of torch, and tensor_of_any_torch.h for all of them.
//
// - Tensor: what a step asks of a user's tensor. It is borrowed, and as small as a pointer. A plain tensor is an
//   ordinary dense one in the memory of the host or of a GPU. Its key set has no further key, by which torch marks
//   subclasses, lazy tensors and wrappers.
// - HeldMemory: keeps a tensor's memory alive.
// - Memory: bytes that torch allocates on a device.
// - DeviceGuard, current_stream(), current_cuda_stream(): a GPU's current state.
// - is_tensor(), is_exact_tensor(), in_inference_mode(), is_under_mode().
// - define_places(): lets Python say where torch keeps facts.
#pragma once

#include <cstdint>
#include <string>

#include "core/macros.h"
#include "core/prefetch.h"

namespace dracopt {

#if defined(DRACOPT_SIMULATED_GPU)  // the tests' device, which lies in the host's memory
constexpr int kGpuType = 20;        // PrivateUse1
constexpr char kGpuName[] = "simulated";
#else
constexpr int kGpuType = 1;  // CUDA; torch counts AMD's GPUs among these
constexpr char kGpuName[] = "cuda";
#endif

// A device by torch's numbers.
struct Device {
  int type, index;

  bool operator==(const Device&) const = default;
  bool is_cpu() const { return type == 0; }
  bool is_gpu() const { return type == kGpuType; }
  bool needs_pinned_memory() const { return type == 1; }  // of the host, for copies that nobody waits for
  std::string name() const { return is_cpu() ? "cpu" : kGpuName + (":" + std::to_string(index)); }
};

constexpr Device kHost{0, -1};

// Facts of a plain tensor, read at once.
struct TensorFacts {
  int dtype;  // torch's number
  size_t dims;
  const int64_t *sizes, *strides;
  int64_t numel, storage_offset, storage_bytes;
  uintptr_t storage;
  bool is_lazily_cloned;
};

}  // namespace dracopt

#if defined(DRACOPT_ANY_TORCH)
#include "bindings/tensor_of_any_torch.h"
#else
#include "bindings/tensor_of_one_torch.h"
#endif
