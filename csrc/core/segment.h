// The work of one step as plain data: a list of segments, one per tensor, and the units by which threads share it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dracopt {

constexpr int kMaxStates = 3;
constexpr int kUnitBytes = 64;  // of the parameter: a cache line

struct Segment;

// Updates the elements [begin, end) of a segment.
using UpdateFn = void (*)(const Segment& segment, int64_t begin, int64_t end);

// One tensor's part of a step: its streams and the scalars that its rule prepared.
struct Segment {
  void* param;
  const void* grad;
  void* states[kMaxStates];
  void* step;  // the tensor's step counter; null if its rule does not count
  const void* scalars;
  UpdateFn update;
  int64_t numel;
  int64_t first_unit;  // of the flattened list; ascending
  int32_t unit_numel;  // elements in a unit
  bool maximize;
};

// A tensor's length in units. At least one, so that many tiny tensors are shared between threads as well.
inline int64_t units_of(int64_t numel, int itemsize) {
  return numel * itemsize <= kUnitBytes ? 1 : (numel * itemsize + kUnitBytes - 1) / kUnitBytes;
}

// The segment that holds a unit: the last one whose first unit is not beyond it.
inline size_t segment_at(const Segment* segments, size_t count, int64_t unit) {
  size_t low = 0;
  for (size_t high = count; high - low > 1;) {
    const size_t middle = low + (high - low) / 2;
    (segments[middle].first_unit <= unit ? low : high) = middle;
  }
  return low;
}

}  // namespace dracopt
