// Rounds to 16 bits up or down at random, so that the mean of many roundings is the number itself. The random bits of
// an element follow from numbers that belong to the element, so neither engines nor threads nor sharding change them.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/layout.h"

namespace dracopt {

// Says by which random bits a tensor's streams are rounded in one step.
struct Rounding {
  uint64_t seed;
  uint32_t step, param;   // of the optimizer; the index of the parameter in the optimizer
  uint8_t streams;        // bit k: stream k is rounded at random
  int64_t first;          // the number of the tensor's first element in the whole tensor, if that is sharded
  const Layout* numbers;  // its stream kWhole lies like the whole tensor's elements; null if one after the other
};
constexpr int kWhole = 1;

constexpr int kRandomBlock = 8;  // elements that share one block of random bits

struct Philox {
  static constexpr int kRounds = 7;
  static constexpr uint32_t kFactor0 = 0xd2511f53, kFactor2 = 0xcd9e8d57, kWeyl0 = 0x9e3779b9, kWeyl1 = 0xbb67ae85;
};

inline namespace DRACOPT_ISA {

// Philox 4x32-7 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): seven rounds are the fewest that
// pass all statistical tests there.
DRACOPT_HD void philox(uint32_t (&words)[4], uint64_t seed) {
  auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  DRACOPT_UNROLL
  for (int round = 0; round < Philox::kRounds; ++round) {
    const uint64_t a = uint64_t(Philox::kFactor0) * words[0], b = uint64_t(Philox::kFactor2) * words[2];
    words[0] = static_cast<uint32_t>(b >> 32) ^ words[1] ^ key0;
    words[1] = static_cast<uint32_t>(b);
    words[2] = static_cast<uint32_t>(a >> 32) ^ words[3] ^ key1;
    words[3] = static_cast<uint32_t>(a);
    key0 += Philox::kWeyl0;
    key1 += Philox::kWeyl1;
  }
}

// Sets `words` to the random bits of a block of elements: 16 bits for each, the first element's in the lowest.
DRACOPT_HD void random_block(const Rounding& rounding, int stream, uint64_t block, uint32_t (&words)[4]) {
  words[0] = static_cast<uint32_t>(block);
  words[1] = static_cast<uint32_t>(block >> 32) | static_cast<uint32_t>(stream) << 24;
  words[2] = rounding.param;
  words[3] = rounding.step;
  philox(words, rounding.seed);
}

// Rounds by 16 random bits. The upper half of the result is x in bf16. Numbers that bf16 has stay as they are.
// Serves a number or a vector of them.
template <typename Float, typename Bits>
DRACOPT_HD Bits round_at_random(Float x, Bits random, Bf16) {
  return x != x ? Bits{} + 0x7fc00000u : __builtin_bit_cast(Bits, x) + random;
}

// The upper half of the result is x in fp16. Below the normal numbers, all bits beyond the sixteenth after the last
// place are cut off.
DRACOPT_HD uint32_t round_at_random(float x, uint32_t random, Fp16) {
  constexpr uint32_t rebias = (127 - 15) << 23, too_large = 0x47800000u, smallest_normal = 0x38800000u;
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu, sign = bits & 0x80000000u;
  const uint32_t normal = (magnitude + (random >> 3) - rebias) << 3;
  const float small = magnitude < smallest_normal ? float_of(magnitude) : 0.0f;
  const uint32_t subnormal = static_cast<uint32_t>(static_cast<int32_t>(small * 0x1p40f)) + random;
  const uint32_t finite = magnitude < smallest_normal ? subnormal : normal;
  return (x != x ? 0x7e000000u : magnitude >= too_large ? 0x7c000000u : finite & 0x7fff0000u) | sign;
}

// Returns the random bits of one element.
DRACOPT_HD uint32_t random_bits(const Rounding& rounding, int stream, int64_t element) {
  uint32_t words[4];
  random_block(rounding, stream, static_cast<uint64_t>(element) / kRandomBlock, words);
  const auto at = static_cast<uint32_t>(element) % kRandomBlock;
  const uint32_t low = at & 2 ? words[1] : words[0], high = at & 2 ? words[3] : words[2];
  return (at & 4 ? high : low) >> 16 * (at & 1) & 0xffffu;
}

// Rounds to either dtype, by 16 random bits.
DRACOPT_HD uint16_t round_at_random(float x, uint32_t random, Dtype dtype) {
  const uint32_t word = dtype == Dtype::bf16 ? round_at_random(x, random, Bf16()) : round_at_random(x, random, Fp16());
  return static_cast<uint16_t>(word >> 16);
}

}  // namespace DRACOPT_ISA
}  // namespace dracopt
