// What a step needs to know of a tensor, read from its TensorImpl without a dispatch.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/COW.h>

#include <sstream>
#include <string>

namespace dracopt {

// An ordinary dense CPU tensor: none of the dispatch keys by which torch marks subclasses, lazy or wrapped tensors.
inline bool is_plain(const c10::TensorImpl* tensor) {
  static constexpr c10::DispatchKeySet dense_cpu(c10::DispatchKey::CPU);
  static constexpr c10::DispatchKeySet allowed = dense_cpu | c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView) |
                                                 c10::DispatchKeySet(c10::DispatchKey::AutogradCPU) |
                                                 c10::DispatchKeySet(c10::DispatchKey::AutocastCPU);
  const uint64_t keys = tensor->key_set().raw_repr();
  return (keys & ~allowed.raw_repr()) == 0 && (keys & dense_cpu.raw_repr()) == dense_cpu.raw_repr() &&
         tensor->unsafe_storage();
}

inline const char* why_not_plain(const c10::TensorImpl* tensor) {
  if (tensor->layout() != c10::kStrided) return "sparse tensors";
  if (!tensor->device().is_cpu()) return "tensors on a device without native kernels";
  return "tensor subclasses and lazily transformed tensors";
}

inline bool is_fp64(const c10::TensorImpl* tensor) { return tensor->dtype() == caffe2::TypeMeta::Make<double>(); }

inline bool is_native_dtype(const c10::TensorImpl* tensor) {
  return tensor->dtype() == caffe2::TypeMeta::Make<float>() || is_fp64(tensor);
}

inline bool same_shape(const c10::TensorImpl* a, const c10::TensorImpl* b) {
  const auto x = a->sizes(), y = b->sizes();
  if (x.size() != y.size()) return false;
  for (size_t d = 0; d < x.size(); ++d) {
    if (x[d] != y[d]) return false;
  }
  return true;
}

// Both of one shape. The same elements in the same order of memory?
inline bool same_order(const c10::TensorImpl* a, const c10::TensorImpl* b) {
  return (a->is_contiguous() && b->is_contiguous()) || a->strides() == b->strides();
}

// Do several elements lie at one place?
inline bool is_expanded(const c10::TensorImpl* tensor) {
  for (int64_t d = 0; d < tensor->dim(); ++d) {
    if (tensor->strides()[d] == 0 && tensor->sizes()[d] > 1) return true;
  }
  return false;
}

// Does a write have to copy the storage first, as torch's lazy clones are? No parallel region may do that.
inline bool is_lazily_cloned(const c10::TensorImpl* tensor) {
  return c10::impl::cow::is_cow_data_ptr(tensor->unsafe_storage().data_ptr());
}

// The first element of a plain tensor, to be written; not of one that is lazily cloned.
inline void* writable_data(c10::TensorImpl* tensor, int64_t itemsize) {
  return static_cast<char*>(tensor->unsafe_storage().mutable_data()) + tensor->storage_offset() * itemsize;
}

inline const void* readable_data(const c10::TensorImpl* tensor, int64_t itemsize) {
  return static_cast<const char*>(tensor->unsafe_storage().data()) + tensor->storage_offset() * itemsize;
}

inline std::string shape_of(const c10::TensorImpl* tensor) {
  std::ostringstream out;
  out << tensor->sizes();
  return out.str();
}

inline void prefetch(const void* address) { __builtin_prefetch(address); }

}  // namespace dracopt
