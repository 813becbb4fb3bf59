// The work of each thread of a block. The kernel calls these functions, and the tests call them on the host.
#pragma once

#include <type_traits>

#include "core/math.h"
#include "cuda/fast_math.h"
#include "cuda/launch.h"
#include "cuda/tile.h"
#include "cuda/vectors.h"

namespace dracopt {
namespace cuda {
inline namespace DRACOPT_ISA {

// Stored names the types of a tensor's streams for a loop that is compiled for these types alone. The parameter may
// have a master, or may be rounded at random.
template <typename Param, typename Grad, typename State, Master with = Master::none, bool at_random = false>
struct Stored {
  static constexpr Master master = with;
  static constexpr bool is_random = at_random;

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

// Anyhow stands for all other types: the loop looks at every stream's dtype at run time.
struct Anyhow {
  static constexpr bool is_random = false;
};

// Left says what the loops over vectors leave of a thread's share: the vectors that VectorMath could not compute, bit n
// for vector number n, and the elements in no vector.
struct Left {
  // These are in the same word, because registers are scarce in the loops. Elements may be kLoose, or kAll of a share.
  static constexpr uint32_t kLoose = 1u << 31, kAll = 1u << 30;

  uint32_t bits;
  int lanes;  // elements of a vector
};

// Updates one thread's elements of a tensor.
template <typename Rule, typename T, int N>
struct ThreadUpdate {
  static constexpr int kStreams = kFirstState + N;
  static constexpr int kMaster = kStreams;  // the stream of masters, if there are any
  using RuleScalars = typename Rule::template Scalars<T>;

  // FastMath makes sure that no number is NaN, so two numbers can be rounded to 16 bits at once.
  static constexpr bool kInPairs = std::is_same_v<VectorMath<T>, FastMath>;

  // The most elements that a thread works on at once: a vector of the narrowest dtype that usually occurs beside T.
  static constexpr int kLanes = sizeof(T) == 8 ? 4 : 8;

  const Arguments& arguments;
  const Row& row;
  RuleScalars scalars;
  Divisor<T> divisor;
  T coefficient;  // multiplies the quotient; negative if the objective is maximized
  const Layout* layout;
  uint32_t dense;  // bit k: stream k is dense
  bool adjusts;    // the gradient is divided or multiplied
  char* data[kStreams + 1];
  uint32_t forms;  // see below
  Range range;     // the tile's elements

  // The lower bits of `forms` are dtypes by dtype_at. Bit kAligned + k says that stream k's vectors begin where the
  // tensor's do. Then follow the form of masters, and whether the parameter and whether states are rounded at random.
  // The last bit says that a vector of a parameter that is rounded at random is not one block of random bits.
  static constexpr int kAligned = 16, kMasters = 24, kRandomParam = 26, kRandomStates = 27, kApart = 28;
  static constexpr uint32_t kAllAligned = ((2u << kStreams) - 1) << kAligned;

  DRACOPT_HD ThreadUpdate(const Arguments& all, const Tile& tile, const RuleScalars& prepared)
      : arguments(all), row(all.rows[tile.row]), scalars(prepared) {
    dense = row.dense;
    forms = row.dtypes | kAllAligned | static_cast<uint32_t>(row.master) << kMasters |
            static_cast<uint32_t>(row.at_random & 1) << kRandomParam |
            static_cast<uint32_t>(row.at_random >> kFirstState != 0) << kRandomStates;
    layout = row.layout == kDense ? nullptr : arguments.layouts + row.layout;
    const auto number = static_cast<T>(arguments.grad_scale == nullptr ? arguments.divisor : *arguments.grad_scale);
    divisor = Divisor<T>::of(number);
    const auto factor = static_cast<T>(arguments.multiplier == nullptr ? arguments.coefficient : *arguments.multiplier);
    coefficient = row.maximize ? -factor : factor;
    adjusts = number != T(1) || coefficient != T(1);
    DRACOPT_UNROLL
    for (int k = 0; k < kStreams; ++k) {
      data[k] = k == kGrad ? reinterpret_cast<char*>(arguments.words[tile.row]) : static_cast<char*>(row.streams[k]);
    }
    data[kMaster] = row.master == Master::none ? nullptr : static_cast<char*>(row.streams[kMaster]);
    const bool misaligned = row.misaligned || reinterpret_cast<uintptr_t>(data[kGrad]) % kVectorBytes != 0;
    const int head = misaligned ? align(arguments.zeroes == 0) : 0;
    range = range_of(tile.number, row.numel, head, layout == nullptr ? kLanes : 0);
    if (row.numbers != kDense || (row.first + head) % kRandomBlock != 0) forms |= 1u << kApart;
    DRACOPT_UNROLL
    for (int k = 0; k <= kStreams; ++k) {
      if (is_dense(k)) data[k] += range.begin * itemsize(dtype(k));
    }
  }

  DRACOPT_HD bool is_dense(int k) const { return (apart(dense) >> k & 1) != 0; }

  // Returns the element at which vectors begin in most streams, or the first one unless another `may_begin` there. The
  // other streams are accessed element by element.
  DRACOPT_HD int align(bool may_begin) {
    int most = may_begin ? 0 : kStreams + 1, head = 0;  // a master is one more stream
    const bool has_master = data[kMaster] != nullptr;
    DRACOPT_UNROLL
    for (int candidate = 0; candidate < kStreams; ++candidate) {
      const int start = elements_to_alignment(candidate);
      int count = has_master & is_aligned(kMaster, start);
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
    forms |= static_cast<uint32_t>(!has_master | is_aligned(kMaster, head)) << (kAligned + kMaster);
    return head;
  }

  DRACOPT_HD int elements_to_alignment(int k) const {
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(data[k]) % kVectorBytes);
    return (kVectorBytes - past) % kVectorBytes / itemsize(dtype(k));
  }

  DRACOPT_HD bool is_aligned(int k, int start) const {
    const uintptr_t address = reinterpret_cast<uintptr_t>(data[k]) + static_cast<uintptr_t>(start * itemsize(dtype(k)));
    return address % kVectorBytes == 0;
  }

  // Updates the part of a thread's share of a tile that lies in vectors. Usual dtypes of models have separate loops.
  DRACOPT_HD Left in_vectors(int thread) const {
    if (all_stored<Stored<T, T, T>>()) return vectors<Stored<T, T, T>, kVectorBytes / sizeof(T)>(thread);
    if constexpr (sizeof(T) == 4) {
      if (all_stored<Stored<Bf16, Bf16, T>>()) return vectors<Stored<Bf16, Bf16, T>, kLanes>(thread);
      if (all_stored<Stored<Bf16, Bf16, Bf16>>()) return vectors<Stored<Bf16, Bf16, Bf16>, kLanes>(thread);
      if (all_stored<Stored<Fp16, Fp16, T>>()) return vectors<Stored<Fp16, Fp16, T>, kLanes>(thread);
      if (all_stored<Stored<Fp16, Fp16, Fp16>>()) return vectors<Stored<Fp16, Fp16, Fp16>, kLanes>(thread);
      using Split = Stored<Bf16, Bf16, T, Master::split16>;
      using Whole = Stored<Bf16, Bf16, T, Master::fp32>;
      using Random = Stored<Bf16, Bf16, T, Master::none, true>;
      using AllRandom = Stored<Bf16, Bf16, Bf16, Master::none, true>;
      if (all_stored<Split>()) return vectors<Split, kLanes>(thread);
      if constexpr (N < kMaxStates) {  // registers have no room for more beside three states
        if (all_stored<Whole>()) return vectors<Whole, kLanes>(thread);
        if (all_stored<Random>()) return vectors<Random, kLanes>(thread);
        if (all_stored<AllRandom>()) return vectors<AllRandom, kLanes>(thread);
      }
    }
    const bool has_master = sizeof(T) == 8 && row.master != Master::none;
    if ((forms >> kRandomParam & 3) != 0 || has_master) return {Left::kAll, 1};
    return vectors<Anyhow, 4>(thread);
  }

  // Returns whether all streams are stored as Storage says, and aligned.
  template <typename Storage>
  DRACOPT_HD bool all_stored() const {
    uint32_t such = kAllAligned | static_cast<uint32_t>(Storage::master) << kMasters |
                    static_cast<uint32_t>(Storage::is_random) << kRandomParam;
    DRACOPT_UNROLL
    for (int k = 0; k < kStreams; ++k) such |= dtype_at(k, Storage::dtype(k));
    if (Storage::master == Master::split16) such |= dtype_at(kMaster, Dtype::bf16);
    return (Storage::is_random ? forms : forms & ~(1u << kApart)) == such;
  }

  // Updates the vectors. Each Storage has its own instance of this loop.
  template <typename Storage, int lanes>
  DRACOPT_HD Left vectors(int thread) const {
    constexpr int distance = lanes * kThreads;
    static_assert(sizeof(T) == 8 || kTile + kLanes <= 30 * distance, "a thread has a bit for each of its vectors");
    Left left = {range.first > 0 || range.last < range.end ? Left::kLoose : 0, lanes};
    uint32_t bit = 1;
    for (int i = range.first + thread * lanes; i < range.last; i += distance, bit <<= 1) {
      // All streams are loaded before any of them is used, so that the loads wait together.
      Lanes<lanes, T> stored[kStreams + 1];
      DRACOPT_UNROLL
      for (int k = 0; k < kStreams; ++k) load<Storage>(k, i, stored[k]);
      if (master_in<Storage>() != Master::none) load<Storage>(kMaster, i, stored[kMaster]);
      if (!update_lanes<Storage>(stored, i)) {
        left.bits |= bit;
        continue;
      }
      DRACOPT_UNROLL
      for (int k = 0; k < kStreams; ++k) {
        if (k != kGrad) store<Storage>(k, i, stored[k]);
      }
      if (master_in<Storage>() != Master::none) store<Storage>(kMaster, i, stored[kMaster]);
    }
    return left;
  }

  // Updates the rest of a thread's share, element by element.
  DRACOPT_HD void one_by_one(int thread, Left left) const {
    const int first = (left.bits & Left::kAll) != 0 ? range.end : range.first;
    const int loose = first == range.end ? first : range.first + (range.end - range.last);
    left.bits &= ~(Left::kLoose | Left::kAll);
    for (int i = thread, lane = 0; left.bits != 0 || i < loose;) {
      int at = i < first ? i : range.last + (i - range.first);
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
  DRACOPT_HD bool update_lanes(Lanes<lanes, T> (&stored)[kStreams + 1], int at) const {
    constexpr int part = kVectorBytes / sizeof(T);  // registers have room for this many in both forms
    VectorMath<T> math;
    uint32_t random[4];
    if constexpr (Storage::is_random) {
      static_assert(lanes == kRandomBlock);
      random_block(rounding(), kParam, static_cast<uint64_t>(row.first + range.begin + at) / kRandomBlock, random);
    }
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
      if (master_in<Storage>() != Master::none) {
        DRACOPT_UNROLL
        for (int i = 0; i < part; ++i) {
          x[i][kParam] = master_of<Storage>(x[i][kParam], stored[kMaster], first + i);
        }
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
        if (k == kParam && (Storage::is_random || master_in<Storage>() != Master::none)) continue;
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
      if (Storage::is_random || master_in<Storage>() != Master::none) {
        DRACOPT_UNROLL
        for (int i = 0; i < part; i += 2) {
          math.require_numbers(x[i][kParam], x[i + 1][kParam]);
          const auto low = static_cast<float>(x[i][kParam]), high = static_cast<float>(x[i + 1][kParam]);
          const int lane = first + i;
          if constexpr (Storage::is_random) {
            const uint32_t bits = random[lane / 2 % 4];
            stored[kParam].set_pair(lane, round_random<Storage>(low, bits & 0xffffu),
                                    round_random<Storage>(high, bits >> 16));
          } else {
            set_masters<Storage>(stored, lane, low, high);
          }
        }
      }
    }
    return math.exact;
  }

  // Returns the form of masters that a loop updates.
  template <typename Storage>
  DRACOPT_HD Master master_in() const {
    if constexpr (std::is_same_v<Storage, Anyhow> && sizeof(T) == 8) {
      return Master::none;
    } else if constexpr (std::is_same_v<Storage, Anyhow>) {
      return static_cast<Master>(parts() >> kMasters & 3);
    } else {
      return Storage::master;
    }
  }

  // Returns the master of a widened parameter.
  template <typename Storage, int lanes>
  DRACOPT_HD T master_of(T param, const Lanes<lanes, T>& masters, int lane) const {
    const auto wide = static_cast<float>(param);
    if (master_in<Storage>() == Master::split16) {
      return static_cast<T>(join_master(wide, masters.template get<Bf16>(lane).bits));
    }
    const auto master = masters.template get<float>(lane);
    const bool is_bf16 = dtype_in<Storage>(kParam) == Dtype::bf16;
    return static_cast<T>(is_bf16 ? current_master(wide, master, Bf16()) : current_master(wide, master, Fp16()));
  }

  // Stores the masters of two neighbours, and the parameters that they round to.
  template <typename Storage, int lanes>
  DRACOPT_HD void set_masters(Lanes<lanes, T> (&stored)[kStreams + 1], int lane, float low, float high) const {
    // Where FastMath is used, no number is NaN.
    const auto split = [](float x) { return kInPairs ? bits_of(x) + 0x8000u : split_master(x); };
    if (dtype_in<Storage>(kParam) == Dtype::bf16) {
      stored[kParam].set_pair(lane, split(low), split(high));
    } else {
      stored[kParam].set(lane, round_master(low, Fp16()));
      stored[kParam].set(lane + 1, round_master(high, Fp16()));
    }
    if (master_in<Storage>() == Master::split16) {
      stored[kMaster].set_pair(lane, rest_of(low) << 16, rest_of(high) << 16);
    } else {
      stored[kMaster].set(lane, low);
      stored[kMaster].set(lane + 1, high);
    }
  }

  DRACOPT_HD static uint32_t rest_of(float x) { return kInPairs ? bits_of(x) : split_master(x) & 0xffffu; }

  template <typename Storage>
  DRACOPT_HD static uint32_t round_random(float x, uint32_t random) {
    return kInPairs ? bits_of(x) + random : round_at_random(x, random, Bf16());
  }

  DRACOPT_HD Rounding rounding() const {
    return {arguments.seed, static_cast<uint32_t>(arguments.words[row.slot - 1]), row.param, row.at_random, row.first,
            nullptr};
  }

  // Returns the random bits of an element's streams, 16 for each: the parameter's in the lowest, then the states'.
  DRACOPT_HD uint64_t random_bits_of(int i) const {
    uint64_t all = 0;
    int64_t element = range.begin + i;
    if (row.numbers != kDense) element = offset_of(arguments.layouts[row.numbers], kWhole, element);
    DRACOPT_NEVER_UNROLL
    for (int k = 0; k < kStreams; ++k) {
      if ((row.at_random >> k & 1) == 0) continue;
      all |= static_cast<uint64_t>(random_bits(rounding(), k, row.first + element)) << 16 * (k == kParam ? 0 : k - 1);
    }
    return all;
  }

  // Returns the address of an element. A 64-bit product takes one instruction if the size is a constant, and registers
  // if the size is not constant.
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

  // Returns a word as a new value, so that the compiler does not take it apart before a loop. The compiler would keep
  // each part in a register of its own.
  DRACOPT_HD static uint32_t apart(uint32_t word) {
    asm volatile("" : "+r"(word));
    return word;
  }

  DRACOPT_HD uint32_t parts() const { return apart(forms); }

  DRACOPT_HD Dtype dtype(int k) const { return static_cast<Dtype>(parts() >> 2 * k & 3); }

  template <typename Storage>
  DRACOPT_HD Dtype dtype_in(int k) const {
    if constexpr (std::is_same_v<Storage, Anyhow>) {
      return dtype(k);
    } else if (k == kMaster) {
      return Storage::master == Master::fp32 ? Dtype::fp32 : Dtype::bf16;
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

  // Updates an element at any address and in any layout. The store computes the element's place again, because
  // registers are scarce and few written streams are strided.
  DRACOPT_HD void one(int i) const {
    T x[kStreams];
    DRACOPT_UNROLL
    for (int k = 0; k < kStreams; ++k) {
      const int64_t at = place_of(k, i);
      as_type<Anyhow>(
          k, [&](auto type) { x[k] = static_cast<T>(widen(reinterpret_cast<const decltype(type)*>(data[k])[at])); });
    }
    const Master master = row.master;
    if (master != Master::none) x[kParam] = master_at(i, x[kParam]);
    PlainMath math;
    if (adjusts) adjust(x[kGrad], math);
    Rule::template update<T, N>(scalars, x[kParam], x[kGrad], x + kFirstState, math);
    const uint64_t random = row.at_random == 0 ? 0 : random_bits_of(i);
    DRACOPT_UNROLL
    for (int k = 0; k < kStreams; ++k) {
      if (k == kGrad) continue;
      const int64_t at = place_of(k, i);
      if (k == kParam && master != Master::none) {
        set_master_at(i, at, static_cast<float>(x[k]));
        continue;
      }
      as_type<Anyhow>(k, [&](auto type) {
        auto& stored = reinterpret_cast<decltype(type)*>(data[k])[at];
        stored = narrow<decltype(type)>(x[k]);
        if constexpr (sizeof(type) == 2) {
          const uint32_t bits = random >> 16 * (k == kParam ? 0 : k - 1) & 0xffffu;
          if ((row.at_random >> k & 1) != 0) {
            stored.bits = round_at_random(static_cast<float>(x[k]), bits, dtype(k));
          }
        }
      });
    }
  }

  DRACOPT_HD T master_at(int i, T param) const {
    const int64_t at = place_of(kMaster, i);
    const auto wide = static_cast<float>(param);
    if (row.master == Master::split16) {
      return static_cast<T>(join_master(wide, reinterpret_cast<const uint16_t*>(data[kMaster])[at]));
    }
    const float master = reinterpret_cast<const float*>(data[kMaster])[at];
    const bool is_bf16 = dtype(kParam) == Dtype::bf16;
    return static_cast<T>(is_bf16 ? current_master(wide, master, Bf16()) : current_master(wide, master, Fp16()));
  }

  // Writes a master, and the parameter at its own place.
  DRACOPT_HD void set_master_at(int i, int64_t at_param, float x) const {
    const int64_t at = place_of(kMaster, i);
    const bool is_bf16 = dtype(kParam) == Dtype::bf16;
    reinterpret_cast<uint16_t*>(data[kParam])[at_param] =
        is_bf16 ? round_master(x, Bf16()).bits : round_master(x, Fp16()).bits;
    if (row.master == Master::split16) {
      reinterpret_cast<uint16_t*>(data[kMaster])[at] = static_cast<uint16_t>(split_master(x));
    } else {
      reinterpret_cast<float*>(data[kMaster])[at] = x;
    }
  }

  DRACOPT_HD int64_t place_of(int k, int i) const { return is_dense(k) ? i : offset_of(*layout, k, range.begin + i); }

  // Divides a gradient by the scale of the loss and multiplies the quotient.
  template <typename Math>
  DRACOPT_HD void adjust(T& grad, Math& math) const {
    grad = math.quotient(grad, divisor) * coefficient;
  }
};

// Sets an element of a stream to zero.
DRACOPT_HD void zero_at(void* data, int bytes, int64_t place) {
  if (bytes == 2) static_cast<uint16_t*>(data)[place] = 0;
  if (bytes == 4) static_cast<uint32_t*>(data)[place] = 0;
  if (bytes == 8) static_cast<uint64_t*>(data)[place] = 0;
}

// Sets a thread's share of a tile of the gradient to zero. All threads of the block must have updated theirs before.
DRACOPT_HD void zero_gradient(const Arguments& arguments, const Tile& tile, int thread) {
  const Row& row = arguments.rows[tile.row];
  const int64_t begin = tile.number * kTile, left = row.numel - begin, end = left < kTile ? left : kTile;
  const bool is_dense = (row.dense >> kGrad & 1) != 0;
  const int bytes = itemsize(static_cast<Dtype>(row.dtypes >> 2 * kGrad & 3));
  DRACOPT_NEVER_UNROLL
  for (int i = thread; i < end; i += kThreads) {
    const int64_t place = is_dense ? begin + i : offset_of(arguments.layouts[row.layout], kGrad, begin + i);
    zero_at(reinterpret_cast<void*>(arguments.words[tile.row]), bytes, place);
  }
}

// Updates a thread's share of a block's tile.
template <typename Rule, typename T, int N = Rule::min_states>
DRACOPT_HD void update(const Arguments& arguments, const Tile& tile, const typename Rule::template Scalars<T>& scalars,
                       int thread) {
  if constexpr (N < Rule::max_states) {
    if (arguments.rows[tile.row].states != N) return update<Rule, T, N + 1>(arguments, tile, scalars, thread);
  }
  const ThreadUpdate<Rule, T, N> update(arguments, tile, scalars);
  const Left left = update.in_vectors(thread);
  if (left.bits == 0) return;
  // The facts about the tensor are read again, because registers are scarce in the loops before. This barrier stops the
  // compiler from keeping the facts in registers.
  asm volatile("" ::: "memory");
  const ThreadUpdate<Rule, T, N> again(arguments, tile, scalars);
  again.one_by_one(thread, left);
}

}  // namespace DRACOPT_ISA
}  // namespace cuda
}  // namespace dracopt
