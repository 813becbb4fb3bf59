// Facts about a tensor that a step needs, derived from what torch tells.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>

#include "bindings/tensor.h"
#include "core/dtype.h"

namespace dracopt {

inline bool is_plain(Tensor tensor) { return tensor.is_plain_on_cpu() || tensor.is_plain_on_gpu(); }

// Says why a tensor is not plain, except that no backend may serve its device.
inline const char* why_not_plain(Tensor tensor) {
  if (tensor.is_python_subclass()) return "tensor subclasses";
  return tensor.is_strided() ? "lazily transformed tensors" : "sparse tensors";
}

// Says how a tensor's numbers are stored. A complex number is two real ones, side by side.
struct Format {
  bool is_native = false;
  bool is_complex = false;
  Dtype dtype = Dtype::fp32;

  int reals() const { return is_complex ? 2 : 1; }
  int bytes() const { return itemsize(dtype) * reals(); }  // the size of an element
};

// torch's numbers of dtypes are the same in all versions.
constexpr int kFp32 = 6, kBf16 = 15;

inline const Format& format_of(int dtype) {
  static constexpr auto formats = [] {
    std::array<Format, 128> table{};
    table[5] = {true, false, Dtype::fp16};
    table[kFp32] = {true, false, Dtype::fp32};
    table[7] = {true, false, Dtype::fp64};
    table[9] = {true, true, Dtype::fp32};
    table[10] = {true, true, Dtype::fp64};
    table[kBf16] = {true, false, Dtype::bf16};
    return table;
  }();
  return formats[static_cast<size_t>(dtype) & 127];
}

inline const Format& format_of(Tensor tensor) { return format_of(tensor.dtype()); }

inline bool are_equal(std::span<const int64_t> a, std::span<const int64_t> b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

inline bool same_shape(Tensor a, Tensor b) { return are_equal(a.sizes(), b.sizes()); }

// Says whether several elements lie at one place.
inline bool is_expanded(Tensor tensor) {
  if (tensor.is_non_overlapping_and_dense()) return false;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (strides[d] == 0 && sizes[d] > 1) return tensor.numel() > 0;
  }
  return false;
}

// Says whether several elements of a tensor that is not expanded might lie at one place. They cannot if each dimension
// strides over all that the faster ones reach.
inline bool may_overlap_itself(Tensor tensor) {
  if (tensor.is_non_overlapping_and_dense()) return false;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
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

// Says whether kernels may write each element of a plain tensor at any time.
inline bool is_writable(Tensor tensor, bool inference_mode) {
  return !is_expanded(tensor) && !may_overlap_itself(tensor) && !tensor.is_lazily_cloned() &&
         (!tensor.is_inference() || inference_mode);
}

// Returns the distance from a tensor's first element to the end of its last one, in elements.
inline int64_t extent_of(Tensor tensor) {
  if (tensor.numel() == 0) return 0;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  return last + 1;
}

// Says whether the storage of a plain tensor has become too small, as resize_(0) makes it.
inline bool lacks_memory(Tensor tensor, int64_t extent, int64_t itemsize) {
  const auto end = static_cast<uint64_t>(tensor.storage_offset()) + static_cast<uint64_t>(extent);
  return extent > 0 && end * static_cast<uint64_t>(itemsize) > static_cast<uint64_t>(tensor.storage_bytes());
}

// Returns a plain tensor's first element. Nobody may write there if the tensor is lazily cloned.
inline void* data_of(Tensor tensor) { return reinterpret_cast<void*>(tensor.address()); }

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

}  // namespace dracopt
