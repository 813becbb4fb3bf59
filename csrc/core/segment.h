// The work of one step as plain data: a list of segments, one per tensor, and the units by which threads share it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/layout.h"
#include "core/master.h"
#include "core/prefetch.h"
#include "core/stochastic.h"

namespace dracopt {

constexpr int kUnitBytes = 64;  // the parameter's part of a unit: a cache line

// A thread is not worth waking for fewer units than this: waking one that sleeps takes about 60 us.
constexpr int64_t kGrainUnits = 128 * 1024 / kUnitBytes;

struct Segment;

// Updates the elements [begin, end) of a segment.
using UpdateFn = void (*)(const Segment& segment, int64_t begin, int64_t end);

enum StreamIndex : int { kParam, kGrad, kFirstState };

// Says how a tensor is updated. Tensors of one group that have taken equally many steps share an Update.
struct Update {
  UpdateFn function;
  const void* scalars;  // prepared by the rule
  double grad_scale;    // divides the gradient
  double coefficient;   // multiplies the quotient, because the gradients are clipped
  bool maximize;
  bool zeroes;  // the gradient becomes zero after it was read

  // The update's loop multiplies by one number: the coefficient, or the reciprocal of the scale if that is exact. Where
  // this does not suffice, gradients are divided before.
  double factor = 1;
  bool divides = false;

  // Derives the last two from the others. The reciprocal of a power of two is exact in every arithmetic.
  void derive() {
    const auto scale = static_cast<float>(grad_scale);
    const uint32_t bits = __builtin_bit_cast(uint32_t, scale), exponent = bits >> 23;
    const bool is_exact = (bits & 0x7fffff) == 0 && exponent > 0 && exponent < 253 && scale == grad_scale;
    divides = !is_exact || (grad_scale != 1 && coefficient != 1);
    factor = (maximize ? -1 : 1) * coefficient / (divides ? 1 : grad_scale);
  }
};

// One tensor's part of a step.
struct Segment {
  void* data[kMaxStreams];  // the streams' memory; the gradient is only read, unless the update zeroes it
  Dtype dtypes[kMaxStreams];
  bool dense[kMaxStreams];  // the stream's elements lie one after the other; if not, the layout says where
  Master master;            // what the last stream holds, behind the states; none if there is no such stream
  int32_t unit_numel;       // elements in a unit
  const Layout* layout;     // null if every stream is dense
  const Update* update;
  const Rounding* rounding;  // null if all streams are rounded to nearest
  int64_t numel;
  int64_t first_unit;  // its number in the whole list; ascending

  // Says whether each stream is rounded to nearest by itself.
  bool rounds_simply() const { return master == Master::none && rounding == nullptr; }
};

// Returns a tensor's length in units, at least one, so that threads share many tiny tensors as well.
inline int64_t units_of(int64_t numel, int32_t unit_numel) {
  return numel <= unit_numel ? 1 : numel / unit_numel + (numel % unit_numel != 0);
}

// Appends a segment to a list of `units` units, which grows.
inline void append_units(Segment& segment, int64_t& units) {
  segment.first_unit = units;
  units += units_of(segment.numel, segment.unit_numel);
}

// Counts the units of a list, and gives each segment the number of its first unit.
inline int64_t number_units(Segment* segments, size_t count) {
  int64_t units = 0;
  for (size_t i = 0; i < count; ++i) append_units(segments[i], units);
  return units;
}

// Finds the segment that holds a unit: the last one whose first unit is not beyond that unit.
inline size_t segment_at(const Segment* segments, size_t count, int64_t unit) {
  size_t low = 0;
  for (size_t high = count; high - low > 1;) {
    const size_t middle = low + (high - low) / 2;
    (segments[middle].first_unit <= unit ? low : high) = middle;
  }
  return low;
}

// Fetches the first line of each stream.
DRACOPT_INLINE void prefetch_streams(const Segment& segment) {
  for (int k = 0; k < kMaxStreams && segment.data[k] != nullptr; ++k) prefetch(segment.data[k]);
}

// Updates the units [begin, end) of the list. The processor does not foresee where the next tensors lie.
inline void run_units(const Segment* segments, size_t count, int64_t begin, int64_t end) {
  constexpr size_t ahead = 4;
  for (size_t i = segment_at(segments, count, begin); i < count; ++i) {
    const Segment& segment = segments[i];
    if (segment.first_unit >= end) break;
    if (i + ahead < count) prefetch_streams(segments[i + ahead]);
    const int64_t from = begin > segment.first_unit ? (begin - segment.first_unit) * segment.unit_numel : 0;
    const int64_t units = end - segment.first_unit;
    const int64_t to = units < units_of(segment.numel, segment.unit_numel) ? units * segment.unit_numel : segment.numel;
    segment.update->function(segment, from, to);
  }
}

}  // namespace dracopt
