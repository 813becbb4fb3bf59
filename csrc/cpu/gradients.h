// Passes over gradients alone: the squares of their elements, and changes in place.
#pragma once

#include "core/squares.h"
#include "cpu/kernels.h"
#include "cpu/tiles.h"

namespace dracopt {
inline namespace DRACOPT_ISA {

// Returns sum + x^2, rounded once. The square of a float is exact, so it needs no fused multiply-add, which may be
// slow.
DRACOPT_HD double plus_square(double sum, float x) {
#if defined(__FP_FAST_FMA)
  return fma(static_cast<double>(x), static_cast<double>(x), sum);
#else
  return sum + static_cast<double>(x) * static_cast<double>(x);
#endif
}
DRACOPT_HD double plus_square(double sum, double x) { return fma(x, x, sum); }

// Sets `sums` to those of each lane of a chunk that is not empty, and returns the number of lanes. The loop follows the
// memory's order, in which the processor fetches ahead by itself.
template <typename T>
DRACOPT_HD int add_rows(const T* numbers, int count, double* sums) {
  int lanes = kRow;
  while (lanes / 2 >= count) lanes /= 2;  // all others are absent
  const int first = count < lanes ? count : lanes;
  DRACOPT_INDEPENDENT
  for (int i = 0; i < first; ++i) sums[i] = plus_square(0, numbers[i]);
  for (int i = first; i < lanes; ++i) sums[i] = 0;
  for (int begin = lanes; begin < count; begin += lanes) {
    const T* const row = numbers + begin;
    const int length = count - begin < lanes ? count - begin : lanes;
    DRACOPT_INDEPENDENT
    for (int i = 0; i < length; ++i) sums[i] = plus_square(sums[i], row[i]);
  }
  return lanes;
}

template <typename T>
bool are_finite(const T* numbers, int64_t count) {
  bool all = true;
  for (int64_t i = 0; i < count; ++i) all &= numbers[i] - numbers[i] == 0;
  return all;
}

template <typename T>
cpu::Squares squares_of(const Segment& segment, int64_t chunk) {
  alignas(64) double sums[kRow];
  alignas(64) T staged[kChunk];
  const int64_t from = chunk * kChunk, left = segment.numel - from;
  const int count = left < kChunk ? static_cast<int>(left) : kChunk;
  const T* const numbers = load(segment, kGrad, from, count, staged);
  const int lanes = add_rows(numbers, count, sums);
  const double sum = sum_of_pairs(sums, lanes);
  const bool finite = sum - sum == 0;
  // The squares of 64-bit numbers may be infinite where the numbers are not.
  return {sum, finite || (sizeof(T) == 8 && are_finite(numbers, count))};
}

// Adds the squares of a chunk of the gradient.
inline cpu::Squares squares(const Segment& segment, int64_t chunk) {
  return segment.dtypes[kGrad] == Dtype::fp64 ? squares_of<double>(segment, chunk) : squares_of<float>(segment, chunk);
}

// Changes the elements [begin, end) of a tensor, which is in the place of the gradient.
template <typename T, typename Change>
DRACOPT_HD void change_in_place(const Segment& segment, int64_t begin, int64_t end, const Change& change) {
  alignas(64) T staged[kTile<T>];
  for (int64_t from = begin; from < end; from += kTile<T>) {
    const int64_t count = end - from < kTile<T> ? end - from : kTile<T>;
    T* const tile = load(segment, kGrad, from, count, staged);
    DRACOPT_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) tile[i] = change(tile[i]);
    if (tile == staged) store(segment, kGrad, from, count, staged);
  }
}

template <typename T>
void multiply(const Segment& segment, int64_t begin, int64_t end) {
  const T factor = static_cast<T>(*static_cast<const double*>(segment.update->scalars));
  change_in_place<T>(segment, begin, end, [factor](T x) { return x * factor; });
}

// Limits the elements to [-most, most], in this order and like torch, which keeps NaN.
template <typename T>
void limit(const Segment& segment, int64_t begin, int64_t end) {
  const T most = static_cast<T>(*static_cast<const double*>(segment.update->scalars));
  change_in_place<T>(segment, begin, end, [most](T x) {
    const T at_least = x < -most ? -most : x;
    return at_least > most ? most : at_least;
  });
}

template <typename T>
void zero(const Segment& segment, int64_t begin, int64_t end) {
  change_in_place<T>(segment, begin, end, [](T) { return T(0); });
}

}  // namespace DRACOPT_ISA
}  // namespace dracopt
