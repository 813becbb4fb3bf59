// Facts about a tensor that a step needs, read from the TensorImpl without a dispatch.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/COW.h>

#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "bindings/gpu.h"
#include "core/dtype.h"
#include "cuda/kernels.h"

namespace dracopt {

// Says whether a tensor has the key of a backend, and otherwise only allowed keys. torch marks subclasses, lazy and
// wrapped tensors by other keys, so a dense tensor is none of them.
inline bool is_dense(const c10::TensorImpl* tensor, c10::DispatchKeySet key, c10::DispatchKeySet allowed) {
  const uint64_t keys = tensor->key_set().raw_repr();
  const uint64_t any = allowed.raw_repr() | c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView).raw_repr();
  return (keys & ~any) == 0 && (keys & key.raw_repr()) == key.raw_repr() && tensor->unsafe_storage();
}

// Says whether a tensor is an ordinary dense one in the host's memory.
inline bool is_on_cpu(const c10::TensorImpl* tensor) {
  static constexpr c10::DispatchKeySet key(c10::DispatchKey::CPU);
  static constexpr c10::DispatchKeySet allowed =
      key | c10::DispatchKeySet(c10::DispatchKey::AutogradCPU) | c10::DispatchKeySet(c10::DispatchKey::AutocastCPU);
  return is_dense(tensor, key, allowed);
}

// Says whether a tensor is an ordinary dense one on a GPU that the kernels can run on.
inline bool is_on_gpu(const c10::TensorImpl* tensor) {
  return is_dense(tensor, kGpuKey, kGpuKeys) && cuda::unavailable(tensor->device().index()) == nullptr;
}

inline bool is_plain(const c10::TensorImpl* tensor) { return is_on_cpu(tensor) || is_on_gpu(tensor); }

// Says whether Python may decide a tensor's shape, device or layout. No parallel region can ask for these.
inline bool is_python_subclass(const c10::TensorImpl* tensor) {
  return tensor->key_set().has(c10::DispatchKey::Python);
}

// Returns a text that lives as long as the process, as the reasons of `unavailable` do.
inline const char* why_not_on_gpu(const char* unavailable) {
  static std::map<std::string, std::string> texts;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  std::string& text = texts[unavailable];
  if (text.empty()) text = std::string("tensors on a GPU without the native kernels (") + unavailable + ")";
  return text.c_str();
}

inline const char* why_not_plain(const c10::TensorImpl* tensor) {
  if (is_python_subclass(tensor)) return "tensor subclasses";
  if (tensor->layout() != c10::kStrided) return "sparse tensors";
  if (tensor->device().type() == kGpu) {
    if (const char* why = cuda::unavailable(tensor->device().index())) return why_not_on_gpu(why);
  }
  if (!tensor->device().is_cpu()) return "tensors on a device without native kernels";
  return "lazily transformed tensors";
}

// Says how a tensor's numbers are stored. A complex number is two real ones, side by side.
struct Format {
  bool is_native = false;
  bool is_complex = false;
  Dtype dtype = Dtype::fp32;

  int reals() const { return is_complex ? 2 : 1; }
  int bytes() const { return itemsize(dtype) * reals(); }  // the size of an element
};

inline const Format& format_of(const c10::TensorImpl* tensor) {
  static constexpr auto formats = [] {
    std::array<Format, static_cast<size_t>(c10::ScalarType::NumOptions) + 1> table{};
    const auto set = [&](c10::ScalarType type, Dtype dtype, bool is_complex) {
      table[static_cast<size_t>(type)] = {true, is_complex, dtype};
    };
    set(c10::ScalarType::Float, Dtype::fp32, false);
    set(c10::ScalarType::Double, Dtype::fp64, false);
    set(c10::ScalarType::BFloat16, Dtype::bf16, false);
    set(c10::ScalarType::Half, Dtype::fp16, false);
    set(c10::ScalarType::ComplexFloat, Dtype::fp32, true);
    set(c10::ScalarType::ComplexDouble, Dtype::fp64, true);
    return table;
  }();
  return formats[static_cast<size_t>(tensor->dtype().toScalarType())];
}

inline bool same_shape(const c10::TensorImpl* a, const c10::TensorImpl* b) {
  const auto x = a->sizes(), y = b->sizes();
  if (x.size() != y.size()) return false;
  for (size_t d = 0; d < x.size(); ++d) {
    if (x[d] != y[d]) return false;
  }
  return true;
}

// Says whether several elements lie at one place.
inline bool is_expanded(const c10::TensorImpl* tensor) {
  if (tensor->is_non_overlapping_and_dense()) return false;
  for (int64_t d = 0; d < tensor->dim(); ++d) {
    if (tensor->strides()[d] == 0 && tensor->sizes()[d] > 1) return tensor->numel() > 0;
  }
  return false;
}

// Says whether several elements of a tensor that is not expanded might lie at one place. They cannot if each dimension
// strides over all that the faster ones reach.
inline bool may_overlap_itself(const c10::TensorImpl* tensor) {
  if (tensor->is_non_overlapping_and_dense()) return false;
  const auto sizes = tensor->sizes(), strides = tensor->strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    int64_t reach = 0;
    for (size_t e = 0; e < sizes.size(); ++e) {
      const bool faster = strides[e] < strides[d] || (strides[e] == strides[d] && e > d);
      if (faster && sizes[e] > 1) reach += (sizes[e] - 1) * strides[e];
    }
    if (sizes[d] > 1 && strides[d] <= reach) return true;
  }
  return false;
}

// Returns the distance from a tensor's first element to the end of its last one, in elements.
inline int64_t extent_of(const c10::TensorImpl* tensor) {
  if (tensor->numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t d = 0; d < tensor->dim(); ++d) last += (tensor->sizes()[d] - 1) * tensor->strides()[d];
  return last + 1;
}

// Says whether a write must copy the storage first, as for torch's lazy clones. No parallel region may do that.
inline bool is_lazily_cloned(const c10::TensorImpl* tensor) {
  return c10::impl::cow::is_cow_data_ptr(tensor->unsafe_storage().data_ptr());
}

// Says whether the storage of a plain tensor has become too small, as resize_(0) makes it.
inline bool lacks_memory(const c10::TensorImpl* tensor, int64_t extent, int64_t itemsize) {
  const auto end = static_cast<uint64_t>(tensor->storage_offset()) + static_cast<uint64_t>(extent);
  return extent > 0 && end * static_cast<uint64_t>(itemsize) > tensor->unsafe_storage().nbytes();
}

// Returns the address of a plain tensor's first element. The address is no pointer yet, because an empty tensor's lies
// in no storage.
inline uintptr_t place_in(const void* storage, const c10::TensorImpl* tensor, int64_t itemsize) {
  return reinterpret_cast<uintptr_t>(storage) +
         static_cast<uintptr_t>(tensor->storage_offset()) * static_cast<uintptr_t>(itemsize);
}

// Returns a plain tensor's first element for writing. The tensor must not be lazily cloned.
inline void* writable_data(c10::TensorImpl* tensor, int64_t itemsize) {
  return reinterpret_cast<void*>(place_in(tensor->unsafe_storage().mutable_data(), tensor, itemsize));
}

inline const void* readable_data(const c10::TensorImpl* tensor, int64_t itemsize) {
  return reinterpret_cast<const void*>(place_in(tensor->unsafe_storage().data(), tensor, itemsize));
}

// Says whether numbers of this dtype may be read and written at an address.
inline bool is_aligned(const void* data, Dtype dtype) {
  return (reinterpret_cast<uintptr_t>(data) & static_cast<uintptr_t>(itemsize(dtype) - 1)) == 0;
}

// Returns the number at any address, widened.
inline double number_at(const void* data, Dtype dtype) {
  double number = 0;
  as_stored(data, dtype, [&](const auto* stored) {
    std::remove_cvref_t<decltype(*stored)> copy;
    std::memcpy(&copy, stored, sizeof(copy));
    number = widen(copy);
  });
  return number;
}

inline void prefetch(const void* address) { __builtin_prefetch(address); }

}  // namespace dracopt
