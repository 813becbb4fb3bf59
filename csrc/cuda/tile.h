// The work of a block and of each of its threads. The kernel calls these functions; so do the tests, on the host.
#pragma once

#include <type_traits>

#include "core/math.h"
#include "cuda/fast_math.h"
#include "cuda/launch.h"

// These two tell the caches of a vector that is read or written: once and not again.
#if !defined(DRACOPT_LOAD)
#define DRACOPT_LOAD ""
#endif
#if !defined(DRACOPT_STORE)
#define DRACOPT_STORE ""
#endif

namespace dracopt {
namespace cuda {
inline namespace DRACOPT_ISA {

struct __attribute__((aligned(kVectorBytes), may_alias)) Vector {
  uint32_t words[4];
};

// Neighbours in a stream, as they are stored; of 16-bit numbers two are in a word. Looked at by shifts, not through
// pointers, which registers do not have.
template <int lanes, typename T>
struct Lanes {
  static constexpr int kVectors = lanes * sizeof(T) / kVectorBytes;
  struct Pair {
    uint32_t low, high;
  };

  Vector vectors[kVectors];

  DRACOPT_HD uint32_t& word(int i) { return vectors[i / 4].words[i % 4]; }
  DRACOPT_HD uint32_t word(int i) const { return vectors[i / 4].words[i % 4]; }

  template <typename Stored>
  DRACOPT_HD Stored get(int lane) const {
    if constexpr (sizeof(Stored) == 2) {
      return {static_cast<uint16_t>(word(lane / 2) >> 16 * (lane % 2))};
    } else if constexpr (sizeof(Stored) == 4) {
      return __builtin_bit_cast(Stored, word(lane));
    } else if constexpr (sizeof(T) == 8) {
      return __builtin_bit_cast(Stored, Pair{word(2 * lane), word(2 * lane + 1)});
    } else {
      return {};  // 64-bit streams are not met in 32-bit arithmetic
    }
  }

  template <typename Stored>
  DRACOPT_HD void set(int lane, Stored x) {
    if constexpr (sizeof(Stored) == 2) {
      uint32_t& w = word(lane / 2);
      w = lane % 2 == 0 ? x.bits : w | static_cast<uint32_t>(x.bits) << 16;  // in ascending order
    } else if constexpr (sizeof(Stored) == 4) {
      word(lane) = __builtin_bit_cast(uint32_t, x);
    } else if constexpr (sizeof(T) == 8) {
      const Pair pair = __builtin_bit_cast(Pair, x);
      word(2 * lane) = pair.low;
      word(2 * lane + 1) = pair.high;
    }
  }
};

// From and to global memory, which the compiler does not see that these addresses are of.
DRACOPT_HD Vector read(const Vector* from) {
  Vector x;
#if defined(__CUDA_ARCH__)
  asm("ld.global" DRACOPT_LOAD ".v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(x.words[0]), "=r"(x.words[1]), "=r"(x.words[2]), "=r"(x.words[3])
      : "l"(__cvta_generic_to_global(from)));
#else
  x = *from;
#endif
  return x;
}

DRACOPT_HD void write(Vector* to, const Vector& x) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global" DRACOPT_STORE ".v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(x.words[0]), "r"(x.words[1]), "r"(x.words[2]), "r"(x.words[3])
               : "memory");
#else
  *to = x;
#endif
}

// Half of a vector is read and written like a whole one, at an address that is aligned for the half alone.
DRACOPT_HD void read_half(Vector& to, const Vector* from) {
#if defined(__CUDA_ARCH__)
  asm("ld.global" DRACOPT_LOAD ".v2.u32 {%0, %1}, [%2];"
      : "=r"(to.words[0]), "=r"(to.words[1])
      : "l"(__cvta_generic_to_global(from)));
#else
  __builtin_memcpy(to.words, static_cast<const void*>(from), kVectorBytes / 2);
#endif
}

DRACOPT_HD void write_half(Vector* to, const Vector& x) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global" DRACOPT_STORE ".v2.u32 [%0], {%1, %2};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(x.words[0]), "r"(x.words[1])
               : "memory");
#else
  __builtin_memcpy(static_cast<void*>(to), x.words, kVectorBytes / 2);
#endif
}

// The part of a tensor that a block updates.
struct Tile {
  uint32_t row;
  int64_t number;  // of the tile in its tensor
};

// Finds the row that holds a block's tile: the last one whose first tile is not beyond it. In each round every thread
// looks at one row, evenly spread over those that are left. `count_threads` says for how many a condition holds.
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

// The elements of a tile, counted from its first, which is number `begin` of the tensor: those from `first` to `last`
// in vectors, those before and behind them one by one.
struct Range {
  int64_t begin;
  int first, last, end;
};

// Of a tile of a tensor whose first vector begins at element number `head`. All of its tiles then begin between two
// vectors, so that only the tensor's first and last elements are in none; all are where a vector has no lanes.
DRACOPT_HD Range range_of(int64_t number, int64_t numel, int head, int lanes) {
  const int64_t begin = number * kTile + (number > 0 ? head : 0);
  const int size = static_cast<int>(kTile) + (number > 0 ? 0 : head);
  const int end = numel <= begin ? 0 : numel - begin < size ? static_cast<int>(numel - begin) : size;
  const int before = number > 0 ? 0 : head, first = lanes == 0 || before > end ? end : before;
  return {begin, first, lanes == 0 ? end : end - (end - first) % lanes, end};
}

// Where an element of a stream lies, in elements from its first.
DRACOPT_HD int64_t offset_of(const Layout& layout, int stream, int64_t element) {
  int64_t offset = 0;
  DRACOPT_NEVER_UNROLL
  for (int d = layout.dims - 1; d >= 0; --d) {
    offset += element % layout.sizes[d] * layout.strides[stream][d];
    element /= layout.sizes[d];
  }
  return offset;
}

// The hyperparameters and carried scalars of a recipe, wherever they lie.
template <typename Rule>
DRACOPT_HD void follow(const Arguments& arguments, const Row& row, typename Rule::Hyperparameters& h,
                       Carried (&carried)[kMaxCarried], bool& first) {
  constexpr int hyperparameters = sizeof(h) / sizeof(double), count = sizeof(Rule::carried_keys) / sizeof(char*) - 1;
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
    const bool is_fp32 = row.carried_fp32 >> k & 1;
    carried[k].is_fp32 = is_fp32;
    carried[k].value = row.carried[k] == nullptr ? __builtin_bit_cast(double, recipe.words[hyperparameters + k])
                       : is_fp32                 ? static_cast<double>(*static_cast<const float*>(row.carried[k]))
                                                 : *static_cast<const double*>(row.carried[k]);
  }
}

// The scalars of a tensor whose row has a recipe.
template <typename Rule, typename T>
DRACOPT_HD typename Rule::template Scalars<T> prepare(const Arguments& arguments, const Row& row) {
  typename Rule::Hyperparameters h;
  Carried carried[kMaxCarried];
  bool first;
  follow<Rule>(arguments, row, h, carried, first);
  const auto to_the = [](double base, double exponent) { return power(base, static_cast<int64_t>(exponent)); };
  return Rule::template prepare<T>(carried, first, h, to_the);
}

// Moves what a tensor carries on the device on to the step that has been done.
template <typename Rule>
DRACOPT_HD void advance(const Arguments& arguments, const Row& row) {
  constexpr int count = sizeof(Rule::carried_keys) / sizeof(char*) - 1;
  if (!row.has_recipe) return;
  typename Rule::Hyperparameters h;
  Carried carried[kMaxCarried];
  bool first;
  follow<Rule>(arguments, row, h, carried, first);
  Rule::template prepare<double>(carried, first, h, [](double, double) { return 0.5; });  // no scalar is wanted
  DRACOPT_UNROLL
  for (int k = 0; k < count; ++k) {
    if (row.carried[k] == nullptr) continue;
    if (carried[k].is_fp32) {
      *static_cast<float*>(row.carried[k]) = static_cast<float>(carried[k].value);
    } else {
      *static_cast<double*>(row.carried[k]) = carried[k].value;
    }
  }
}

// Stored says how the streams of a tensor are stored, where a loop is compiled for just that.
template <typename Param, typename Grad, typename State>
struct Stored {
  DRACOPT_HD static constexpr Dtype dtype(int stream) {
    return stream == kParam ? dtype_of<Param> : stream == kGrad ? dtype_of<Grad> : dtype_of<State>;
  }

  // Calls `body` with a value of the type in which a stream is stored.
  template <typename Body>
  DRACOPT_HD static void as_type(int stream, const Body& body) {
    if (stream == kParam) return body(Param());
    if (stream == kGrad) return body(Grad());
    body(State());
  }
};

// Anyhow is any other way: the loop looks at every stream's dtype as it runs.
struct Anyhow {};

// Left is what the loops over vectors leave of a thread's share: the vectors that VectorMath could not compute, bit n
// for vector number n, and the elements that are in no vector.
struct Left {
  static constexpr uint32_t kLoose = 1u << 31;  // all in one word, because registers are scarce in the loops

  uint32_t bits;
  int lanes;  // of a vector
};

// How a thread updates the elements of one tensor.
template <typename Rule, typename T, int N>
struct Update {
  static constexpr int kStreams = kFirstState + N;
  using RuleScalars = typename Rule::template Scalars<T>;

  // Two numbers are rounded to 16 bits at once where FastMath has made sure that neither is NaN.
  static constexpr bool kInPairs = std::is_same_v<VectorMath<T>, FastMath>;

  // The most elements that a thread works on at once: a vector of the narrowest dtype that is met beside T.
  static constexpr int kLanes = sizeof(T) == 8 ? 4 : 8;

  RuleScalars scalars;
  Divisor<T> divisor;
  const Layout* layout;
  uint32_t dense;  // bit k: stream k is
  bool adjusts;    // the gradient is divided or negated
  bool maximize;
  char* data[kStreams];
  uint32_t forms;  // the dtypes by dtype_at; bit kAligned + k: stream k has vectors where the tensor's vectors are
  Range range;     // of the tile

  static constexpr int kAligned = 16;
  static constexpr uint32_t kAllAligned = ((1u << kStreams) - 1) << kAligned;

  DRACOPT_HD Update(const Arguments& arguments, const Tile& tile, const RuleScalars& prepared) : scalars(prepared) {
    const Row& row = arguments.rows[tile.row];
    maximize = row.maximize;
    dense = row.dense;
    forms = row.dtypes;
    layout = row.layout == kDense ? nullptr : arguments.layouts + row.layout;
    const auto number = static_cast<T>(arguments.grad_scale == nullptr ? arguments.divisor : *arguments.grad_scale);
    divisor = Divisor<T>::of(number);
    adjusts = number != T(1) || maximize;
    DRACOPT_UNROLL
    for (int k = 0; k < kStreams; ++k) {
      data[k] = k == kGrad ? reinterpret_cast<char*>(arguments.words[tile.row]) : static_cast<char*>(row.streams[k]);
      forms |= static_cast<uint32_t>(fills_vectors(k)) << (kAligned + k);
    }
    const bool misaligned = row.misaligned || reinterpret_cast<uintptr_t>(data[kGrad]) % kVectorBytes != 0;
    range = range_of(tile.number, row.numel, misaligned ? align() : 0, layout == nullptr ? kLanes : 0);
    DRACOPT_UNROLL
    for (int k = 0; k < kStreams; ++k) {
      if (is_dense(k)) data[k] += range.begin * itemsize(dtype(k));
    }
  }

  DRACOPT_HD bool is_dense(int k) const { return (dense >> k & 1) != 0; }

  // Returns the element at which vectors begin. Most streams decide it; the others are accessed element by element.
  DRACOPT_HD int align() {
    int most = 0, head = 0;
    DRACOPT_UNROLL
    for (int candidate = 0; candidate < kStreams; ++candidate) {
      const int start = elements_to_alignment(candidate);
      int count = 0;
      DRACOPT_UNROLL
      for (int k = 0; k < kStreams; ++k) count += is_aligned(k, start);
      if (count > most) {
        most = count;
        head = start;
      }
    }
    forms &= ~kAllAligned;
    DRACOPT_UNROLL
    for (int k = 0; k < kStreams; ++k) forms |= static_cast<uint32_t>(is_aligned(k, head)) << (kAligned + k);
    return head;
  }

  DRACOPT_HD int elements_to_alignment(int k) const {
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(data[k]) % kVectorBytes);
    return (kVectorBytes - past) % kVectorBytes / itemsize(dtype(k));
  }

  DRACOPT_HD bool is_aligned(int k, int start) const {
    const uintptr_t address = reinterpret_cast<uintptr_t>(data[k]) + static_cast<uintptr_t>(start * itemsize(dtype(k)));
    return address % kVectorBytes == 0 && fills_vectors(k);
  }

  // 16-bit numbers in fp64's arithmetic do not.
  DRACOPT_HD bool fills_vectors(int k) const { return kLanes * itemsize(dtype(k)) >= kVectorBytes; }

  // Updates all of a thread's share of a tile that can be done in vectors. The ways in which models are mostly stored
  // have loops of their own.
  DRACOPT_HD Left in_vectors(int thread) const {
    if (all_stored<Stored<T, T, T>>()) return vectors<Stored<T, T, T>, kVectorBytes / sizeof(T)>(thread);
    if constexpr (sizeof(T) == 4) {
      if (all_stored<Stored<Bf16, Bf16, T>>()) return vectors<Stored<Bf16, Bf16, T>, kLanes>(thread);
      if (all_stored<Stored<Bf16, Bf16, Bf16>>()) return vectors<Stored<Bf16, Bf16, Bf16>, kLanes>(thread);
      if (all_stored<Stored<Fp16, Fp16, T>>()) return vectors<Stored<Fp16, Fp16, T>, kLanes>(thread);
      if (all_stored<Stored<Fp16, Fp16, Fp16>>()) return vectors<Stored<Fp16, Fp16, Fp16>, kLanes>(thread);
    }
    return vectors<Anyhow, 4>(thread);
  }

  // Are all streams stored so, and aligned?
  template <typename Storage>
  DRACOPT_HD bool all_stored() const {
    uint32_t such = kAllAligned;
    DRACOPT_UNROLL
    for (int k = 0; k < kStreams; ++k) such |= dtype_at(k, Storage::dtype(k));
    return forms == such;
  }

  // Each way to store a tensor has its instance of this loop.
  template <typename Storage, int lanes>
  DRACOPT_HD Left vectors(int thread) const {
    constexpr int distance = lanes * kThreads;
    static_assert(sizeof(T) == 8 || kTile + kLanes <= 31 * distance, "a thread has a bit for each of its vectors");
    Left left = {range.first > 0 || range.last < range.end ? Left::kLoose : 0, lanes};
    uint32_t bit = 1;
    for (int i = range.first + thread * lanes; i < range.last; i += distance, bit <<= 1) {
      // All is loaded before any of it is used, so that the loads wait together.
      Lanes<lanes, T> stored[kStreams];
      DRACOPT_UNROLL
      for (int k = 0; k < kStreams; ++k) load<Storage>(k, i, stored[k]);
      if (!update_lanes<Storage>(stored)) {
        left.bits |= bit;
        continue;
      }
      DRACOPT_UNROLL
      for (int k = 0; k < kStreams; ++k) {
        if (k != kGrad) store<Storage>(k, i, stored[k]);
      }
    }
    return left;
  }

  // Updates the rest of it, one by one.
  DRACOPT_HD void one_by_one(int thread, Left left) const {
    const int loose = range.first + (range.end - range.last);
    left.bits &= ~Left::kLoose;
    for (int i = thread, lane = 0; left.bits != 0 || i < loose;) {
      int at = i < range.first ? i : range.last + (i - range.first);
      if (left.bits == 0) {
        i += kThreads;
      } else {
        at = range.first + (thread + lowest_bit(left.bits) * kThreads) * left.lanes + lane;
        lane = (lane + 1) % left.lanes;
        if (lane == 0) left.bits &= left.bits - 1;
      }
      one(at);
    }
  }

  // Computes the new numbers of a vector. Returns false if VectorMath could not.
  template <typename Storage, int lanes>
  DRACOPT_HD bool update_lanes(Lanes<lanes, T> (&stored)[kStreams]) const {
    constexpr int part = kVectorBytes / sizeof(T);  // registers have room for so many in both forms
    VectorMath<T> math;
    DRACOPT_UNROLL
    for (int first = 0; first < lanes; first += part) {
      T x[part][kStreams];
      DRACOPT_UNROLL
      for (int k = 0; k < kStreams; ++k) {
        as_type<Storage>(k, [&](auto type) {
          DRACOPT_UNROLL
          for (int i = 0; i < part; ++i) {
            x[i][k] = static_cast<T>(widen(stored[k].template get<decltype(type)>(first + i)));
          }
        });
      }
      if (adjusts) {
        DRACOPT_UNROLL
        for (int i = 0; i < part; ++i) adjust(x[i][kGrad], math);
      }
      DRACOPT_UNROLL
      for (int i = 0; i < part; ++i) {
        Rule::template update<T, N>(scalars, x[i][kParam], x[i][kGrad], x[i] + kFirstState, math);
      }
      DRACOPT_UNROLL
      for (int k = 0; k < kStreams; ++k) {
        if (k == kGrad) continue;
        as_type<Storage>(k, [&](auto type) {
          constexpr bool in_pairs = kInPairs && sizeof(type) == 2 && !std::is_same_v<Storage, Anyhow>;
          DRACOPT_UNROLL
          for (int i = 0; i < part; i += 2) {
            if (k == kParam || in_pairs) math.require_numbers(x[i][k], x[i + 1][k]);
            if constexpr (in_pairs) {
              stored[k].word((first + i) / 2) = narrow_pair(x[i][k], x[i + 1][k], type);
            } else {
              stored[k].set(first + i, narrow<decltype(type)>(x[i][k]));
              stored[k].set(first + i + 1, narrow<decltype(type)>(x[i + 1][k]));
            }
          }
        });
      }
    }
    return math.exact;
  }

  // Returns the address of an element. A 64-bit product takes one instruction if the size is a constant, and registers
  // if it is not.
  template <typename Storage>
  DRACOPT_HD char* address(int k, int at) const {
    using Index = std::conditional_t<std::is_same_v<Storage, Anyhow>, int, int64_t>;
    return data[k] + static_cast<Index>(at) * itemsize(dtype_in<Storage>(k));
  }

  template <typename Storage, int lanes>
  DRACOPT_HD void load(int k, int at, Lanes<lanes, T>& to) const {
    const int bytes = itemsize(dtype_in<Storage>(k));
    const char* const from = address<Storage>(k, at);
    if (!std::is_same_v<Storage, Anyhow> || (parts() >> (kAligned + k) & 1) != 0) {
      DRACOPT_UNROLL
      for (int v = 0; v < to.kVectors; ++v) {
        if ((v + 1) * kVectorBytes <= lanes * bytes) to.vectors[v] = read(reinterpret_cast<const Vector*>(from) + v);
      }
      if (lanes * bytes < kVectorBytes) read_half(to.vectors[0], reinterpret_cast<const Vector*>(from));
    } else {
      as_bits(bytes, [&](auto type) {
        DRACOPT_UNROLL
        for (int i = 0; i < lanes; ++i) to.set(i, reinterpret_cast<const decltype(type)*>(from)[i]);
      });
    }
  }

  template <typename Storage, int lanes>
  DRACOPT_HD void store(int k, int at, const Lanes<lanes, T>& from) const {
    const int bytes = itemsize(dtype_in<Storage>(k));
    char* const to = address<Storage>(k, at);
    if (!std::is_same_v<Storage, Anyhow> || (parts() >> (kAligned + k) & 1) != 0) {
      DRACOPT_UNROLL
      for (int v = 0; v < from.kVectors; ++v) {
        if ((v + 1) * kVectorBytes <= lanes * bytes) write(reinterpret_cast<Vector*>(to) + v, from.vectors[v]);
      }
      if (lanes * bytes < kVectorBytes) write_half(reinterpret_cast<Vector*>(to), from.vectors[0]);
    } else {
      as_bits(bytes, [&](auto type) {
        DRACOPT_UNROLL
        for (int i = 0; i < lanes; ++i) reinterpret_cast<decltype(type)*>(to)[i] = from.template get<decltype(type)>(i);
      });
    }
  }

  // Returns `forms` as something new, so that the compiler does not take it apart before a loop: it would keep each
  // part in a register of its own.
  DRACOPT_HD uint32_t parts() const {
    uint32_t all = forms;
    asm volatile("" : "+r"(all));
    return all;
  }

  DRACOPT_HD Dtype dtype(int k) const { return static_cast<Dtype>(parts() >> 2 * k & 3); }

  template <typename Storage>
  DRACOPT_HD Dtype dtype_in(int k) const {
    if constexpr (std::is_same_v<Storage, Anyhow>) {
      return dtype(k);
    } else {
      return Storage::dtype(k);
    }
  }

  // Calls `body` with a value of the type in which a stream is stored.
  template <typename Storage, typename Body>
  DRACOPT_HD void as_type(int k, const Body& body) const {
    if constexpr (!std::is_same_v<Storage, Anyhow>) {
      return Storage::as_type(k, body);
    } else {
      if (dtype(k) == Dtype::fp32) return body(float());
      if constexpr (sizeof(T) == 8) {
        if (dtype(k) == Dtype::fp64) return body(double());
      }
      if (dtype(k) == Dtype::bf16) return body(Bf16());
      body(Fp16());
    }
  }

  // Calls `body` with a value of a type of this size.
  template <typename Body>
  DRACOPT_HD static void as_bits(int bytes, const Body& body) {
    if (bytes == 4) return body(uint32_t());
    if constexpr (sizeof(T) == 8) {
      if (bytes == 8) return body(uint64_t());
    }
    body(Bf16());
  }

  // An element at any address and in any layout. Where it lies is worked out again to store it: few streams that are
  // written are strided, and registers are scarce.
  DRACOPT_HD void one(int i) const {
    T x[kStreams];
    DRACOPT_UNROLL
    for (int k = 0; k < kStreams; ++k) {
      const int64_t at = place_of(k, i);
      as_type<Anyhow>(
          k, [&](auto type) { x[k] = static_cast<T>(widen(reinterpret_cast<const decltype(type)*>(data[k])[at])); });
    }
    PlainMath math;
    if (adjusts) adjust(x[kGrad], math);
    Rule::template update<T, N>(scalars, x[kParam], x[kGrad], x + kFirstState, math);
    DRACOPT_UNROLL
    for (int k = 0; k < kStreams; ++k) {
      if (k == kGrad) continue;
      const int64_t at = place_of(k, i);
      as_type<Anyhow>(
          k, [&](auto type) { reinterpret_cast<decltype(type)*>(data[k])[at] = narrow<decltype(type)>(x[k]); });
    }
  }

  DRACOPT_HD int64_t place_of(int k, int i) const { return is_dense(k) ? i : offset_of(*layout, k, range.begin + i); }

  // Divides a gradient by what the loss was multiplied by, and negates it where the objective is maximized.
  template <typename Math>
  DRACOPT_HD void adjust(T& grad, Math& math) const {
    const T quotient = math.quotient(grad, divisor);
    grad = maximize ? -quotient : quotient;
  }
};

// A thread's share of a block's tile.
template <typename Rule, typename T, int N = Rule::min_states>
DRACOPT_HD void update(const Arguments& arguments, const Tile& tile, const typename Rule::template Scalars<T>& scalars,
                       int thread) {
  if constexpr (N < Rule::max_states) {
    if (arguments.rows[tile.row].states != N) return update<Rule, T, N + 1>(arguments, tile, scalars, thread);
  }
  const Update<Rule, T, N> update(arguments, tile, scalars);
  const Left left = update.in_vectors(thread);
  if (left.bits == 0) return;
  // The facts about the tensor are read again, because registers are scarce in the loops before. The compiler would
  // keep what it knows.
  asm volatile("" ::: "memory");
  const Update<Rule, T, N> again(arguments, tile, scalars);
  again.one_by_one(thread, left);
}

}  // namespace DRACOPT_ISA
}  // namespace cuda
}  // namespace dracopt
