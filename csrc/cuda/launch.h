// A launch of the update kernel takes plain data: a table, which stays on the device from step to step, and arguments,
// which are new in every step. CUDA takes the arguments by value, so no copy precedes a launch. Triton's kernel reads
// the same table and the same arguments, of any length, in the device's memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/exact_sum.h"
#include "core/layout.h"
#include "core/rule_entry.h"
#include "core/segment.h"
#include "core/state_scalar.h"

namespace dracopt {
namespace cuda {

// The shape of the kernel. benchmarks/kernels compiles other shapes to find the fastest.
#if !defined(DRACOPT_THREADS)
#define DRACOPT_THREADS 128
#endif
#if !defined(DRACOPT_TILE)
#define DRACOPT_TILE 4096
#endif
#if !defined(DRACOPT_BLOCKS)
#define DRACOPT_BLOCKS 6
#endif

constexpr int kThreads = DRACOPT_THREADS;  // threads of a block
constexpr int kBlocks = DRACOPT_BLOCKS;    // blocks that a multiprocessor has room for, at least
constexpr int64_t kTile = DRACOPT_TILE;    // elements that a block updates
constexpr int kVectorBytes = 16;           // the widest access there is

// The dtypes of all streams fit into one word, two bits each.
DRACOPT_HD constexpr uint32_t dtype_at(int stream, Dtype dtype) { return static_cast<uint32_t>(dtype) << 2 * stream; }

// A row holds the facts of one tensor that stay the same from step to step. Rows are zeroed before they are filled, so
// that equal rows are equal byte for byte.
struct alignas(16) Row {
  void* streams[kMaxStreams];             // except the gradient, which is among the arguments
  void* state_scalars[kMaxStateScalars];  // addresses on the device; null for state scalars on the host
  int64_t numel;
  int64_t first;              // the number of its first element, as Rounding has it
  uint32_t slot;              // the place of its scalars, or of their recipe, in Arguments::words
  int32_t layout;             // number of its layout; kDense if every stream is dense
  int32_t numbers;            // number of the layout of Rounding::numbers; kDense if there is none
  uint32_t param;             // its index in the optimizer
  uint16_t dtypes;            // built by dtype_at
  uint8_t dense;              // bit k: stream k is dense; bit kGradIsSimple: the gradient alone has no gaps
  uint8_t state_scalar_fp32;  // bit k: state scalar k is in fp32, otherwise in fp64
  uint8_t states;
  bool misaligned;  // some stream other than the gradient begins within a vector
  bool maximize;
  bool has_recipe;
  Master master;
  uint8_t at_random;  // bit k: stream k is rounded at random. The step is then the word before the slot

  // Describes a stream. A row does not keep its gradient's address.
  void describe(int stream, void* data, Dtype dtype, bool is_dense) {
    if (stream != kGrad) streams[stream] = data;
    if (stream != kGrad) misaligned |= reinterpret_cast<uintptr_t>(data) % kVectorBytes != 0;
    dtypes = static_cast<uint16_t>(dtypes | dtype_at(stream, dtype));
    dense = static_cast<uint8_t>(dense | is_dense << stream);
  }
};
constexpr int32_t kDense = -1;

// The norm takes a gradient's elements in the order of the gradient's own memory. If a row has a layout, either this
// bit of Row::dense says that the gradient lies without gaps, or the next layout is the gradient's own.
constexpr int kGradIsSimple = kMaxStreams;

// A recipe lists the numbers that scalars are prepared from, if some of them lie on the device: the hyperparameters,
// then the state scalars.
struct Recipe {
  static constexpr int kMaxWords = kMaxHyperparameters + kMaxStateScalars;

  uint16_t fp32_address, fp64_address;  // bit k: word k is the address of such a number, otherwise the number itself
  bool first;
  uint64_t words[kMaxWords];  // the bits of a double or an address; only as many as the rule has

  static constexpr size_t header_words = 1;
};
static_assert(offsetof(Recipe, words) == Recipe::header_words * sizeof(uint64_t));
static_assert(Recipe::kMaxWords <= 16);

// Blocks that measure the gradients share a Norm. Between steps all of it is zero, except for the coefficient.
struct Norm {
  static constexpr int kSums = 8;  // blocks add to one of several sums, because additions at one place wait in line

  ExactSum sums[kSums];
  double coefficient;  // multiplies the gradients
  uint32_t finished;   // counts blocks
};

constexpr size_t kArgumentBytes = 32764;  // the most that CUDA passes by value
constexpr size_t kHeaderBytes = 120;
constexpr size_t kArgumentWords = (kArgumentBytes - kHeaderBytes) / sizeof(uint64_t);

struct Arguments {
  const Row* rows;
  const Layout* layouts;
  const uint32_t* first_tiles;  // the first tile of each row; ascending
  uint32_t* finished;           // counts finished blocks if some state scalars lie on the device; otherwise null
  float* found_inf;             // nothing is updated unless the number there is zero; may be null
  const float* grad_scale;      // points to the gradients' divisor; null if `divisor` holds it
  const double* multiplier;     // points to what multiplies the quotients; null if `coefficient` holds it
  double divisor, coefficient;
  Norm* norm;  // this and the next four are for the kernel that measures the gradients
  double* norm_out;
  double max_norm;
  uint32_t blocks_in_all;  // of all launches that measure
  uint16_t checks;         // whether to set `found_inf` if some gradient is not finite

  uint16_t zeroes;  // whether the update kernel sets the gradients to zero after it has read them

  uint64_t seed;   // of streams that are rounded at random
  uint32_t count;  // the number of rows
  uint32_t blocks;
  uint64_t words[kArgumentWords];  // the gradients' addresses, then the slots
};
static_assert(offsetof(Arguments, words) == kHeaderBytes && sizeof(Arguments) <= kArgumentBytes);

// Counts what a launch holds while it is being filled.
struct Filled {
  int64_t tile = kTile;          // elements that a block updates
  size_t room = kArgumentWords;  // words that the arguments may hold
  size_t tensors = 0, slot_words = 0;
  int64_t tiles = 0;

  // Returns the number of a tensor's tiles. An empty tensor has one, too: a launch must have a block to count its step.
  int64_t tiles_of(int64_t numel) const { return numel <= tile ? 1 : numel / tile + (numel % tile != 0); }

  // Takes in a tensor if there is room for its gradient's address, its tiles and a slot of so many words. `slot` is 0
  // if the tensor has a slot in this launch already.
  bool add(int64_t numel, size_t slot) {
    constexpr int64_t max_blocks = (int64_t(1) << 31) - 1;
    if (tensors + 1 + slot_words + slot > room || tiles_of(numel) > max_blocks - tiles) return false;
    ++tensors;
    slot_words += slot;
    tiles += tiles_of(numel);
    return true;
  }
};

}  // namespace cuda
}  // namespace dracopt
