// Tiles of parameters that have masters, and of streams that are rounded at random.
#pragma once

#include "core/master.h"
#include "core/stochastic.h"
#include "cpu/tiles.h"

namespace dracopt {
inline namespace DRACOPT_ISA {

// A stream of 16-bit numbers whose bits are not converted on the way.
using Bits = uint16_t;
constexpr int64_t kMostBits = kTile<float>;  // elements of a tile

// Returns the `count` elements from number `from` on, in place or as a copy in `staged`.
DRACOPT_APART inline const Bits* load_bits(const Segment& segment, int stream, int64_t from, int64_t count,
                                           Bits* staged) {
  const Bits* const data = static_cast<const Bits*>(segment.data[stream]);
  if (segment.dense[stream]) return data + from;
  Bits* next = staged;
  for_each_run(*segment.layout, stream, from, count, [&](int64_t offset, int64_t stride, int64_t n) {
    for (int64_t i = 0; i < n; ++i) *next++ = data[offset + i * stride];
  });
  return staged;
}

// Returns where the `count` elements from number `from` on may be written, which store_bits() must follow.
DRACOPT_INLINE Bits* place_of_bits(const Segment& segment, int stream, int64_t from, Bits* staged) {
  return segment.dense[stream] ? static_cast<Bits*>(segment.data[stream]) + from : staged;
}

// Brings what was written to `staged` to its place.
DRACOPT_APART inline void store_bits(const Segment& segment, int stream, int64_t from, int64_t count,
                                     const Bits* staged) {
  if (segment.dense[stream]) return;
  Bits* const data = static_cast<Bits*>(segment.data[stream]);
  for_each_run(*segment.layout, stream, from, count, [&](int64_t offset, int64_t stride, int64_t n) {
    for (int64_t i = 0; i < n; ++i) data[offset + i * stride] = *staged++;
  });
}

inline bool rounds_at_random(const Segment& segment, int stream) {
  return segment.rounding != nullptr && (segment.rounding->streams >> stream & 1) != 0;
}

// Calls `body` with a value of the type of a stream in 16 bits.
template <typename Body>
DRACOPT_INLINE void as_half(const Segment& segment, int stream, const Body& body) {
  if (segment.dtypes[stream] == Dtype::bf16) return body(Bf16());
  body(Fp16());
}

// Replaces masters that are out of date by their parameters, given as bits.
DRACOPT_APART inline void make_current(const Segment& segment, const Bits* params, int64_t count, float* masters) {
  if (segment.dtypes[kParam] == Dtype::bf16) {
    uint32_t differs = 0;
    DRACOPT_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) {
      differs |= bits_of(current_master(widen(Bf16{params[i]}), masters[i], Bf16())) ^ bits_of(masters[i]);
    }
    for (int64_t i = 0; i < count && differs != 0; ++i) {
      masters[i] = current_master(widen(Bf16{params[i]}), masters[i], Bf16());
    }
    return;
  }
  // This is current_master() in steps, for some of which processors have instructions.
  alignas(64) Fp16 rounded[kMostBits];
  alignas(64) float wide[kMostBits], again[kMostBits];
  widen_run(reinterpret_cast<const Fp16*>(params), count, wide);
  narrow_run(masters, count, rounded);
  widen_run(rounded, count, again);
  DRACOPT_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) masters[i] = again[i] == wide[i] ? masters[i] : wide[i];
}

// Returns a tile of masters, in place or as a copy in `staged`. Their own stream is `at`.
template <typename T>
DRACOPT_APART T* load_masters(const Segment& segment, int at, int64_t from, int64_t count, T* staged) {
  alignas(64) Bits staged_params[kMostBits], staged_rests[kMostBits];
  alignas(64) float copy[kTile<float>];
  const Bits* const params = load_bits(segment, kParam, from, count, staged_params);
  if (segment.master == Master::split16) {
    const Bits* const rests = load_bits(segment, at, from, count, staged_rests);
    DRACOPT_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) staged[i] = static_cast<T>(join_master(widen(Bf16{params[i]}), rests[i]));
    return staged;
  }
  if constexpr (sizeof(T) == 4) {
    float* const masters = load(segment, at, from, count, staged);
    make_current(segment, params, count, masters);
    return masters;
  } else {
    float* const masters = load(segment, at, from, count, copy);
    make_current(segment, params, count, masters);
    for (int64_t i = 0; i < count; ++i) staged[i] = static_cast<T>(masters[i]);
    return staged;
  }
}

// Writes a tile of masters, and the parameters that they round to.
DRACOPT_APART inline void store_masters(const Segment& segment, int at, int64_t from, int64_t count,
                                        const float* masters) {
  alignas(64) Bits staged[kMostBits], staged_rests[kMostBits];
  Bits* const params = place_of_bits(segment, kParam, from, staged);
  if (segment.master == Master::split16) {
    Bits* const rests = place_of_bits(segment, at, from, staged_rests);
    DRACOPT_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t halves = split_master(masters[i]);
      params[i] = static_cast<Bits>(halves >> 16);
      rests[i] = static_cast<Bits>(halves);
    }
    store_bits(segment, at, from, count, staged_rests);
  } else {
    if (segment.dtypes[kParam] == Dtype::bf16) {
      DRACOPT_INDEPENDENT
      for (int64_t i = 0; i < count; ++i) params[i] = round_master(masters[i], Bf16()).bits;
    } else {
      narrow_run(masters, count, reinterpret_cast<Fp16*>(params));
    }
    const bool in_place = segment.dense[at] && masters == static_cast<const float*>(segment.data[at]) + from;
    if (!in_place) store(segment, at, from, count, masters);
  }
  store_bits(segment, kParam, from, count, staged);
}

inline void store_masters(const Segment& segment, int at, int64_t from, int64_t count, const double* masters) {
  alignas(64) float rounded[kTile<double>];
  for (int64_t i = 0; i < count; ++i) rounded[i] = static_cast<float>(masters[i]);
  store_masters(segment, at, from, count, rounded);
}

// Sets `words` to the random bits of `count` blocks. Each lane of a vector computes a block; the words lie in 64 bits.
DRACOPT_APART inline void random_blocks(const Rounding& rounding, int stream, uint64_t first, int count,
                                        uint64_t* words) {
  using Vector = RandomLanes::Vector;
  constexpr int lanes = RandomLanes::kLanes;
  Vector order;
  for (int lane = 0; lane < lanes; ++lane) order[lane] = static_cast<uint64_t>(RandomLanes::block_of(lane));
  Vector of_round[Philox::kRounds][2];
  auto key0 = static_cast<uint32_t>(rounding.seed), key1 = static_cast<uint32_t>(rounding.seed >> 32);
  for (auto& keys : of_round) {
    keys[0] = Vector{} + key0;
    keys[1] = Vector{} + key1;
    key0 += Philox::kWeyl0;
    key1 += Philox::kWeyl1;
  }
  for (int block = 0; block < count; block += lanes) {
    // Only the lower half of a lane counts.
    const Vector numbers = order + (first + static_cast<uint64_t>(block));
    Vector w0 = numbers, w1 = numbers >> 32 | static_cast<uint64_t>(stream) << 24;
    Vector w2 = Vector{} + rounding.param, w3 = Vector{} + rounding.step;
    DRACOPT_UNROLL
    for (const auto& keys : of_round) {
      const Vector a = RandomLanes::product(w0, Philox::kFactor0), b = RandomLanes::product(w2, Philox::kFactor2);
      w0 = b >> 32 ^ w1 ^ keys[0];
      w1 = b;
      w2 = a >> 32 ^ w3 ^ keys[1];
      w3 = a;
    }
    RandomLanes::store((w0 & 0xffffffffu) | w1 << 32, (w2 & 0xffffffffu) | w3 << 32, words + 2 * block);
  }
}

// Room for the random bits of a tile, with whole vectors of blocks.
template <int64_t kElements>
struct RandomBits {
  static constexpr int64_t kMost = kElements + (RandomLanes::kLanes + 1) * kRandomBlock;
  alignas(64) uint64_t words[kMost * sizeof(Bits) / sizeof(uint64_t)];
};

// Returns the random bits of `count` elements that follow one another from number `element` on in the whole tensor.
inline const Bits* random_run(const Rounding& rounding, int stream, int64_t element, int64_t count, uint64_t* words) {
  const auto first = static_cast<uint64_t>(element) / kRandomBlock;
  const uint64_t end = (static_cast<uint64_t>(element + count) + kRandomBlock - 1) / kRandomBlock;
  random_blocks(rounding, stream, first, static_cast<int>(end - first), words);
  return reinterpret_cast<const Bits*>(words) + static_cast<uint64_t>(element) % kRandomBlock;
}

// Returns the random bits of the `count` elements from number `from` on, for which `words` has room.
DRACOPT_APART inline const Bits* random_tile(const Segment& segment, int stream, int64_t from, int64_t count,
                                             uint64_t* words) {
  const Rounding& rounding = *segment.rounding;
  if (rounding.numbers == nullptr) return random_run(rounding, stream, rounding.first + from, count, words);
  auto* const bits = reinterpret_cast<Bits*>(words);
  int64_t done = 0;
  for_each_run(*rounding.numbers, kWhole, from, count, [&](int64_t offset, int64_t stride, int64_t n) {
    RandomBits<kRandomBlock> run;
    for (int64_t i = 0; i < n;) {
      const int64_t element = rounding.first + offset + i * stride;
      const int64_t most = stride == 1 ? kRandomBlock - element % kRandomBlock : 1,
                    length = most < n - i ? most : n - i;
      const Bits* const found = random_run(rounding, stream, element, length, run.words);
      for (int64_t k = 0; k < length; ++k) bits[done++] = found[k];
      i += length;
    }
  });
  return bits;
}

// Rounds a tile at random and writes it.
template <typename T>
DRACOPT_APART void store_at_random(const Segment& segment, int stream, int64_t from, int64_t count, const T* numbers) {
  RandomBits<kMostBits> room;
  alignas(64) Bits staged[kMostBits];
  const Bits* const random = random_tile(segment, stream, from, count, room.words);
  Bits* const to = place_of_bits(segment, stream, from, staged);
  as_half(segment, stream, [&](auto stored) {
    DRACOPT_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) {
      to[i] = static_cast<Bits>(round_at_random(static_cast<float>(numbers[i]), uint32_t(random[i]), stored) >> 16);
    }
  });
  store_bits(segment, stream, from, count, staged);
}

// Writes the staged elements of a parameter or state back, rounded as the segment says. `at` is the stream of masters.
template <typename T>
DRACOPT_APART void store_rounded(const Segment& segment, int stream, int at, int64_t from, int64_t count,
                                 const T* staged) {
  if (stream == kParam && segment.master != Master::none) return store_masters(segment, at, from, count, staged);
  rounds_at_random(segment, stream) ? store_at_random(segment, stream, from, count, staged)
                                    : store(segment, stream, from, count, staged);
}

}  // namespace DRACOPT_ISA
}  // namespace dracopt
