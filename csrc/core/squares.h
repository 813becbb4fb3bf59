// Defines the order in which the squares of a tensor's elements are added, so that every engine gets the same bits.
//
// A chunk of kChunk elements lies in rows of kRow. Each lane adds the squares of its elements in double precision, row
// after row. Then neighbours are added in pairs, and pairs of these sums, until one is left. Absent elements count as
// zeros, which change no sum. The sums of all chunks are added exactly.
//
// Products of fp32 numbers are exact, so the sum of n elements in any number is off by at most 16 roundings, and a norm
// by less than 10 units of 2^-53.
#pragma once

#include <cstdint>

#include "core/exact_sum.h"
#include "core/math.h"

namespace dracopt {

constexpr int kChunk = 4096, kRow = 512;

inline int64_t chunks_of(int64_t numel) { return numel / kChunk + (numel % kChunk != 0); }

inline namespace DRACOPT_ISA {

// Adds neighbours in pairs until one sum is left. `count` is a power of two. Two levels at a time take half the passes.
DRACOPT_HD double sum_of_pairs(double* sums, int count) {
  for (; count > 2; count /= 4) {
    DRACOPT_INDEPENDENT
    for (int i = 0; i < count / 4; ++i) {
      const double* const four = sums + 4 * i;
      sums[i] = (four[0] + four[1]) + (four[2] + four[3]);
    }
  }
  return count == 2 ? sums[0] + sums[1] : sums[0];
}

// The global norm of gradients, and what multiplies them so that it is at most `max_norm`, except for what the formula
// of torch.nn.utils.clip_grad_norm_ adds to the norm.
struct Clip {
  double norm, coefficient;

  // Takes the sum of the squares of gradients that have yet to be divided by `grad_scale`.
  DRACOPT_HD static Clip of(double sum_of_squares, double grad_scale, double max_norm) {
    const double norm = sqrt(sum_of_squares) / grad_scale;
    const double coefficient = max_norm / (norm + 1e-6);
    return {norm, coefficient > 1 ? 1 : coefficient};
  }
};

}  // namespace DRACOPT_ISA
}  // namespace dracopt
