// Says where the elements of tensors of one shape lie, if they do not simply lie one after the other.
#pragma once

#include <cstdint>

namespace dracopt {

constexpr int kMaxStates = 3;
constexpr int kMaxStreams = 2 + kMaxStates + 1;  // the parameter, its gradient, its states and its master

// A tensor that fits into an address space has no more dimensions of two or more elements than this.
constexpr int kMaxDims = 48;

// A layout numbers the elements in the order of the parameter's memory; the last dimension runs fastest. Dimensions
// that all streams traverse as one are merged.
struct Layout {
  int dims;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxStreams][kMaxDims];  // in elements

  // Returns whether a stream's elements lie one after the other.
  bool dense(int stream) const {
    int64_t stride = 1;
    for (int d = dims - 1; d >= 0; stride *= sizes[d--]) {
      if (strides[stream][d] != stride) return false;
    }
    return true;
  }
};

// Makes the layout of tensors of one shape, with at least one element. The first stream is the parameter's, and no two
// of its elements share an address.
inline Layout make_layout(int dims, const int64_t* sizes, int streams, const int64_t* const* strides) {
  int order[kMaxDims], count = 0;  // slowest first, without dimensions of one element
  for (int d = 0; d < dims; ++d) {
    if (sizes[d] == 1) continue;
    int at = count++;
    for (; at > 0 && strides[0][order[at - 1]] < strides[0][d]; --at) order[at] = order[at - 1];
    order[at] = d;
  }
  Layout layout;
  layout.dims = 0;
  for (int i = 0; i < count; ++i) {
    const int d = order[i];
    int at = layout.dims - 1;
    bool joins = at >= 0;
    for (int k = 0; k < streams && joins; ++k) joins = layout.strides[k][at] == strides[k][d] * sizes[d];
    if (!joins) layout.sizes[++at] = 1;
    layout.sizes[at] *= sizes[d];
    for (int k = 0; k < streams; ++k) layout.strides[k][at] = strides[k][d];
    layout.dims = at + 1;
  }
  if (count == 0) {
    layout.dims = 1;
    layout.sizes[0] = 1;
    for (int k = 0; k < streams; ++k) layout.strides[k][0] = 1;
  }
  return layout;
}

}  // namespace dracopt
