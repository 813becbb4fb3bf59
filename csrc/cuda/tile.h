// The work of one thread of a block, as functions of its number. The kernel calls them; so do the tests, on the host.
#pragma once

#include "core/math.h"
#include "cuda/launch.h"

// How the caches are told of a vector that is read or written: once and not again.
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

// The part of a tensor that a block updates.
struct Tile {
  uint32_t row;
  int64_t number;  // of the tile in its tensor
};

// The row that holds a block's tile: the last one whose first tile is not beyond it.
DRACOPT_HD Tile tile_of(const Arguments& arguments, uint32_t block) {
  uint32_t low = 0;
  for (uint32_t high = arguments.count; high - low > 1;) {
    const uint32_t middle = low + (high - low) / 2;
    (arguments.first_tiles[middle] <= block ? low : high) = middle;
  }
  return {low, static_cast<int64_t>(block - arguments.first_tiles[low])};
}

// The elements of a tile: those from `first` to `last` in vectors, those before and behind them one by one.
struct Range {
  int64_t begin, first, last, end;
};

// Of a tile of a tensor whose first vector begins at element number `head`. All of its tiles then begin between two
// vectors, so that only the tensor's first and last elements are in none; all are where a vector has no lanes.
DRACOPT_HD Range range_of(int64_t number, int64_t numel, int head, int lanes) {
  int64_t begin = number * kTile, end = begin + kTile + head;
  if (number > 0) begin += head;
  if (end > numel) end = numel;
  if (begin > end) begin = end;
  int64_t first = number > 0 ? begin : head;
  if (lanes == 0 || first > end) first = end;
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

// How a thread updates the elements of one tensor.
template <typename Rule, typename T, int N>
struct Update {
  static constexpr int kStreams = kFirstState + N;
  using RuleScalars = typename Rule::template Scalars<T>;

  // What a thread works on at once: a vector of the narrowest dtype that is met beside T; more would not fit into the
  // registers.
  static constexpr int kLanes = sizeof(T) == 8 ? 4 : 8;

  RuleScalars scalars;
  T sign, divisor;
  const Layout* layout;
  uint32_t dense;  // bit k: stream k is
  bool divides;
  bool direct;  // all streams are stored as T, and aligned
  char* data[kStreams];
  Dtype dtypes[kStreams];
  bool aligned[kStreams];  // in vectors, from element number `head` on
  int head;                // the first element that begins a vector

  DRACOPT_HD Update(const Arguments& arguments, const Tile& tile, const Row& row, const RuleScalars& prepared)
      : scalars(prepared), sign(row.maximize ? T(-1) : T(1)), divisor(static_cast<T>(arguments.divisor)) {
    layout = row.layout == kDense ? nullptr : arguments.layouts + row.layout;
    dense = row.dense;
    if (arguments.grad_scale != nullptr) divisor = static_cast<T>(*arguments.grad_scale);
    divides = divisor != T(1);
    direct = true;
    uintptr_t misaligned = 0;
    DRACOPT_UNROLL
    for (int k = 0; k < kStreams; ++k) {
      data[k] = k == kGrad ? reinterpret_cast<char*>(arguments.words[tile.row]) : static_cast<char*>(row.streams[k]);
      dtypes[k] = row.dtypes[k];
      direct &= dtypes[k] == dtype_of<T>;
      aligned[k] = fills_vectors(k);
      misaligned |= reinterpret_cast<uintptr_t>(data[k]) % kVectorBytes;
    }
    head = 0;
    if (misaligned != 0) align();
  }

  // Most streams decide where vectors begin; the others are accessed element by element.
  DRACOPT_HD void align() {
    int most = 0;
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
    DRACOPT_UNROLL
    for (int k = 0; k < kStreams; ++k) {
      aligned[k] = is_aligned(k, head);
      direct &= aligned[k];
    }
  }

  DRACOPT_HD int elements_to_alignment(int k) const {
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(data[k]) % kVectorBytes);
    return (kVectorBytes - past) % kVectorBytes / itemsize(dtypes[k]);
  }

  DRACOPT_HD bool is_aligned(int k, int start) const {
    const uintptr_t address =
        reinterpret_cast<uintptr_t>(data[k]) + static_cast<uintptr_t>(start * itemsize(dtypes[k]));
    return address % kVectorBytes == 0 && fills_vectors(k);
  }

  // 16-bit numbers in fp64's arithmetic do not.
  DRACOPT_HD bool fills_vectors(int k) const { return kLanes * itemsize(dtypes[k]) >= kVectorBytes; }

  // A thread's share of a tile.
  DRACOPT_HD void tile(int64_t number, int64_t numel, int thread) const {
    const Range range = range_of(number, numel, head, layout == nullptr ? kLanes : 0);
    if (direct) {
      vectors<true>(range.first, range.last, thread);
    } else {
      vectors<false>(range.first, range.last, thread);
    }
    const int64_t before = range.first - range.begin, loose = before + (range.end - range.last);
    for (int64_t i = thread; i < loose; i += kThreads) one(i < before ? range.begin + i : range.last + (i - before));
  }

  template <bool kDirect>
  DRACOPT_HD void vectors(int64_t begin, int64_t end, int thread) const {
    constexpr int lanes = kDirect ? kVectorBytes / sizeof(T) : kLanes, at_once = kLanes / lanes;
    constexpr int distance = lanes * kThreads;
    for (int64_t i = begin + thread * lanes; i < end; i += at_once * distance) {
      // All is loaded before any of it is used, so that the loads wait together.
      Lanes<lanes, T> stored[at_once][kStreams];
      DRACOPT_UNROLL
      for (int u = 0; u < at_once; ++u) {
        DRACOPT_UNROLL
        for (int k = 0; k < kStreams; ++k) {
          if (i + u * distance < end) load<kDirect>(k, i + u * distance, stored[u][k]);
        }
      }
      DRACOPT_UNROLL
      for (int u = 0; u < at_once; ++u) {
        if (i + u * distance < end) update_lanes<kDirect>(i + u * distance, stored[u]);
      }
    }
  }

  template <bool kDirect, int lanes>
  DRACOPT_HD void update_lanes(int64_t at, Lanes<lanes, T> (&stored)[kStreams]) const {
    constexpr int part = kVectorBytes / sizeof(T);  // as many as the registers have room for in both forms
    DRACOPT_UNROLL
    for (int first = 0; first < lanes; first += part) {
      T x[part][kStreams];
      DRACOPT_UNROLL
      for (int k = 0; k < kStreams; ++k) {
        as_type<kDirect>(k, [&](auto type) {
          DRACOPT_UNROLL
          for (int i = 0; i < part; ++i) {
            x[i][k] = static_cast<T>(widen(stored[k].template get<decltype(type)>(first + i)));
          }
        });
      }
      DRACOPT_UNROLL
      for (int i = 0; i < part; ++i) element(x[i]);
      DRACOPT_UNROLL
      for (int k = 0; k < kStreams; ++k) {
        if (k == kGrad) continue;
        as_type<kDirect>(k, [&](auto type) {
          DRACOPT_UNROLL
          for (int i = 0; i < part; ++i) stored[k].set(first + i, narrow<decltype(type)>(x[i][k]));
        });
      }
    }
    DRACOPT_UNROLL
    for (int k = 0; k < kStreams; ++k) {
      if (k != kGrad) store<kDirect>(k, at, stored[k]);
    }
  }

  template <bool kDirect, int lanes>
  DRACOPT_HD void load(int k, int64_t at, Lanes<lanes, T>& to) const {
    const int bytes = itemsize(kDirect ? dtype_of<T> : dtypes[k]);
    const char* const from = data[k] + at * bytes;
    if (kDirect || aligned[k]) {
      DRACOPT_UNROLL
      for (int v = 0; v < to.kVectors; ++v) {
        if (v * kVectorBytes < lanes * bytes) to.vectors[v] = read(reinterpret_cast<const Vector*>(from) + v);
      }
    } else {
      as_bits(bytes, [&](auto type) {
        DRACOPT_UNROLL
        for (int i = 0; i < lanes; ++i) to.set(i, reinterpret_cast<const decltype(type)*>(from)[i]);
      });
    }
  }

  template <bool kDirect, int lanes>
  DRACOPT_HD void store(int k, int64_t at, const Lanes<lanes, T>& from) const {
    const int bytes = itemsize(kDirect ? dtype_of<T> : dtypes[k]);
    char* const to = data[k] + at * bytes;
    if (kDirect || aligned[k]) {
      DRACOPT_UNROLL
      for (int v = 0; v < from.kVectors; ++v) {
        if (v * kVectorBytes < lanes * bytes) write(reinterpret_cast<Vector*>(to) + v, from.vectors[v]);
      }
    } else {
      as_bits(bytes, [&](auto type) {
        DRACOPT_UNROLL
        for (int i = 0; i < lanes; ++i) reinterpret_cast<decltype(type)*>(to)[i] = from.template get<decltype(type)>(i);
      });
    }
  }

  // Calls `body` with a value of the type in which a stream is stored.
  template <bool kDirect, typename Body>
  DRACOPT_HD void as_type(int k, const Body& body) const {
    if constexpr (kDirect) return body(T());
    if (dtypes[k] == Dtype::fp32) return body(float());
    if constexpr (sizeof(T) == 8) {
      if (dtypes[k] == Dtype::fp64) return body(double());
    }
    if (dtypes[k] == Dtype::bf16) return body(Bf16());
    body(Fp16());
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

  // An element at any address and in any layout.
  DRACOPT_HD void one(int64_t i) const {
    T x[kStreams];
    int64_t at[kStreams];
    DRACOPT_UNROLL
    for (int k = 0; k < kStreams; ++k) {
      at[k] = dense >> k & 1 ? i : offset_of(*layout, k, i);
      as_type<false>(
          k, [&](auto type) { x[k] = static_cast<T>(widen(reinterpret_cast<const decltype(type)*>(data[k])[at[k]])); });
    }
    element(x);
    DRACOPT_UNROLL
    for (int k = 0; k < kStreams; ++k) {
      if (k == kGrad) continue;
      as_type<false>(
          k, [&](auto type) { reinterpret_cast<decltype(type)*>(data[k])[at[k]] = narrow<decltype(type)>(x[k]); });
    }
  }

  DRACOPT_HD void element(T (&x)[kStreams]) const {
    if (divides) x[kGrad] = x[kGrad] / divisor;
    Rule::template update<T, N>(scalars, x[kParam], sign * x[kGrad], x + kFirstState);
  }
};

// A thread's share of a block's tile.
template <typename Rule, typename T, int N = Rule::min_states>
DRACOPT_HD void update(const Arguments& arguments, const Tile& tile, const Row& row,
                       const typename Rule::template Scalars<T>& scalars, int thread) {
  if constexpr (N < Rule::max_states) {
    if (row.states != N) return update<Rule, T, N + 1>(arguments, tile, row, scalars, thread);
  }
  const Update<Rule, T, N> update(arguments, tile, row, scalars);
  update.tile(tile.number, row.numel, thread);
}

}  // namespace DRACOPT_ISA
}  // namespace cuda
}  // namespace dracopt
