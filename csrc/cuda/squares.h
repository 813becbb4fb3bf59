// The squares of a chunk of a gradient, shared by the threads of a block, in the order that core/squares.h defines. The
// kernel calls these functions, and the tests call them on the host.
#pragma once

#include "core/squares.h"
#include "cuda/launch.h"
#include "cuda/tile.h"

namespace dracopt {
namespace cuda {
inline namespace DRACOPT_ISA {

// A thread adds this many neighbouring lanes.
constexpr int kNeighbours = 4;
constexpr int kRows = kChunk / kRow;

// A block measures the tile that it would update. Other shapes of the kernel cannot measure.
constexpr bool kMeasures = kTile == kChunk && kThreads * kNeighbours == kRow;

template <typename Stored>
struct alignas(kNeighbours * sizeof(Stored)) Neighbours {
  Stored numbers[kNeighbours];
};

// The squares that a thread, or a block, has added, and whether all their numbers are finite.
struct Part {
  double sum;
  bool finite;
};

// The sums of a thread's lanes.
struct LaneSums {
  double sums[kNeighbours] = {};
  bool finite = true;

  template <typename T>
  DRACOPT_HD void add(int lane, T number) {
    const auto x = static_cast<double>(number);
    sums[lane] = fma(x, x, sums[lane]);
    // The squares of 64-bit numbers may be infinite where the numbers are not.
    if constexpr (sizeof(T) == 8) finite &= x - x == 0;
  }
};

// Adds the lanes of a whole chunk that lies in vectors. All are loaded first, so that the loads wait together.
template <typename Stored>
DRACOPT_HD void add_vectors(const Stored* chunk, int first, LaneSums& lanes) {
  using Vector = Neighbours<Stored>;
  Vector rows[kRows];
  DRACOPT_UNROLL
  for (int row = 0; row < kRows; ++row) rows[row] = *reinterpret_cast<const Vector*>(chunk + row * kRow + first);
  DRACOPT_UNROLL
  for (int row = 0; row < kRows; ++row) {
    DRACOPT_UNROLL
    for (int i = 0; i < kNeighbours; ++i) lanes.add(i, widen(rows[row].numbers[i]));
  }
}

// Adds the squares of a thread's share of a block's chunk.
DRACOPT_HD Part squares_of_thread(const Arguments& arguments, const Tile& tile, int thread) {
  const Row& row = arguments.rows[tile.row];
  const int64_t begin = tile.number * kChunk, left = row.numel - begin;
  const int first = thread * kNeighbours, end = left < kChunk ? static_cast<int>(left) : kChunk;
  const bool simple = row.layout == kDense || (row.dense >> kGradIsSimple & 1) != 0;
  const Layout* const own = simple ? nullptr : arguments.layouts + row.layout + 1;
  const auto dtype = static_cast<Dtype>(row.dtypes >> 2 * kGrad & 3);
  const auto* const data = reinterpret_cast<const void*>(arguments.words[tile.row]);
  LaneSums lanes;
  if (simple && left >= kChunk && arguments.words[tile.row] % (kNeighbours * itemsize(dtype)) == 0) {
    as_stored(data, dtype, [&](const auto* numbers) { add_vectors(numbers + begin, first, lanes); });
  } else {
    DRACOPT_NEVER_UNROLL
    for (int at = first; at < end; at += kRow) {
      DRACOPT_UNROLL
      for (int i = 0; i < kNeighbours; ++i) {
        if (at + i >= end) break;
        const int64_t place = simple ? begin + at + i : offset_of(*own, kGrad, begin + at + i);
        as_stored(data, dtype, [&](const auto* numbers) { lanes.add(i, widen(numbers[place])); });
      }
    }
  }
  const double sum = sum_of_pairs(lanes.sums, kNeighbours);
  return {sum, dtype == Dtype::fp64 ? lanes.finite : sum - sum == 0};
}

// Derives the norm and the coefficient from the sum of all squares.
DRACOPT_HD void finish(const Arguments& arguments, const ExactSum& sum) {
  const double scale = arguments.grad_scale == nullptr ? arguments.divisor : *arguments.grad_scale;
  const Clip clip = Clip::of(sum.rounded(), scale, arguments.max_norm);
  *arguments.norm_out = clip.norm;
  arguments.norm->coefficient = clip.coefficient;
  if (arguments.checks != 0 && sum.words[ExactSum::kOther] != 0) *arguments.found_inf = 1;
}

}  // namespace DRACOPT_ISA
}  // namespace cuda
}  // namespace dracopt
