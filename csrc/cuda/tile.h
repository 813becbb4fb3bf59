// Finds the part of a tensor that a block updates, and the scalars for it.
#pragma once

#include "core/math.h"
#include "cuda/launch.h"

namespace dracopt {
namespace cuda {
inline namespace DRACOPT_ISA {

// The part of a tensor that a block updates.
struct Tile {
  uint32_t row;
  int64_t number;  // the tile's number in its tensor
};

// Finds the row that holds a block's tile: the last one whose first tile is not beyond that tile. In each round every
// thread looks at one row, evenly spread over the rows that are left. `count_threads` counts the threads for which a
// condition holds.
template <typename CountThreads>
DRACOPT_HD Tile tile_of(const Arguments& arguments, uint32_t block, const CountThreads& count_threads) {
  uint32_t row = 0;
  for (uint32_t rows = arguments.count; rows > 1;) {
    const uint32_t distance = (rows + kThreads - 1) / kThreads;
    const auto is_passed = [&](uint32_t thread) {
      const uint32_t at = thread * distance;
      return at < rows && arguments.first_tiles[row + at] <= block;
    };
    const uint32_t passed = distance * (count_threads(is_passed) - 1);
    row += passed;
    rows = rows - passed < distance ? rows - passed : distance;
  }
  return {row, static_cast<int64_t>(block - arguments.first_tiles[row])};
}

// The elements of a tile, counted from its first, which is number `begin` of the tensor. Vectors hold the elements from
// `first` to `last`. The elements before and behind the vectors are updated one by one.
struct Range {
  int64_t begin;
  int first, last, end;
};

// Returns the range of a tile in a tensor whose first vector begins at element number `head`. Every later tile begins
// between two vectors, so that only the tensor's first and last elements are in no vector. No element is in one if
// `lanes` is 0.
DRACOPT_HD Range range_of(int64_t number, int64_t numel, int head, int lanes) {
  const int64_t begin = number * kTile + (number > 0 ? head : 0);
  const int size = static_cast<int>(kTile) + (number > 0 ? 0 : head);
  const int end = numel <= begin ? 0 : numel - begin < size ? static_cast<int>(numel - begin) : size;
  const int before = number > 0 ? 0 : head, first = lanes == 0 || before > end ? end : before;
  return {begin, first, lanes == 0 ? end : end - (end - first) % lanes, end};
}

// Returns where an element of a stream lies, in elements from the stream's first.
DRACOPT_HD int64_t offset_of(const Layout& layout, int stream, int64_t element) {
  int64_t offset = 0;
  DRACOPT_NEVER_UNROLL
  for (int d = layout.dims - 1; d >= 0; --d) {
    offset += element % layout.sizes[d] * layout.strides[stream][d];
    element /= layout.sizes[d];
  }
  return offset;
}

// Reads the hyperparameters and state scalars of a recipe, wherever they lie.
template <typename Rule>
DRACOPT_HD void follow(const Arguments& arguments, const Row& row, typename Rule::Hyperparameters& h,
                       StateScalar (&state_scalars)[kMaxStateScalars], bool& first) {
  constexpr int hyperparameters = sizeof(h) / sizeof(double),
                count = sizeof(Rule::state_scalar_keys) / sizeof(char*) - 1;
  const auto& recipe = *reinterpret_cast<const Recipe*>(arguments.words + row.slot);
  first = recipe.first;
  auto* const numbers = reinterpret_cast<double*>(&h);
  DRACOPT_UNROLL
  for (int k = 0; k < hyperparameters; ++k) {
    const auto* const address = reinterpret_cast<const void*>(recipe.words[k]);
    numbers[k] = recipe.fp32_address >> k & 1   ? static_cast<double>(*static_cast<const float*>(address))
                 : recipe.fp64_address >> k & 1 ? *static_cast<const double*>(address)
                                                : __builtin_bit_cast(double, recipe.words[k]);
  }
  DRACOPT_UNROLL
  for (int k = 0; k < count; ++k) {
    const bool is_fp32 = row.state_scalar_fp32 >> k & 1;
    state_scalars[k].is_fp32 = is_fp32;
    state_scalars[k].value = row.state_scalars[k] == nullptr
                                 ? __builtin_bit_cast(double, recipe.words[hyperparameters + k])
                             : is_fp32 ? static_cast<double>(*static_cast<const float*>(row.state_scalars[k]))
                                       : *static_cast<const double*>(row.state_scalars[k]);
  }
}

// Prepares the scalars of a tensor whose row has a recipe.
template <typename Rule, typename T>
DRACOPT_HD typename Rule::template Scalars<T> scalars_from_recipe(const Arguments& arguments, const Row& row) {
  typename Rule::Hyperparameters h;
  StateScalar state_scalars[kMaxStateScalars];
  bool first;
  follow<Rule>(arguments, row, h, state_scalars, first);
  const auto to_the = [](double base, double exponent) { return power(base, static_cast<int64_t>(exponent)); };
  return Rule::template prepare<T>(state_scalars, first, h, to_the);
}

// Advances a tensor's state scalars on the device to the step that has been done.
template <typename Rule>
DRACOPT_HD void advance(const Arguments& arguments, const Row& row) {
  constexpr int count = sizeof(Rule::state_scalar_keys) / sizeof(char*) - 1;
  if (!row.has_recipe) return;
  typename Rule::Hyperparameters h;
  StateScalar state_scalars[kMaxStateScalars];
  bool first;
  follow<Rule>(arguments, row, h, state_scalars, first);
  Rule::template prepare<double>(state_scalars, first, h, [](double, double) { return 0.5; });  // no scalar is used
  DRACOPT_UNROLL
  for (int k = 0; k < count; ++k) {
    if (row.state_scalars[k] == nullptr) continue;
    if (state_scalars[k].is_fp32) {
      *static_cast<float*>(row.state_scalars[k]) = static_cast<float>(state_scalars[k].value);
    } else {
      *static_cast<double*>(row.state_scalars[k]) = state_scalars[k].value;
    }
  }
}

}  // namespace DRACOPT_ISA
}  // namespace cuda
}  // namespace dracopt
