// The forms in which a stream of numbers may lie in memory, and how one number is read and written. Arithmetic is never
// done in them but in float or double.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/macros.h"

namespace dracopt {

enum class Dtype : uint8_t { fp32, fp64, bf16, fp16 };

DRACOPT_HD constexpr int itemsize(Dtype dtype) { return dtype == Dtype::fp64 ? 8 : dtype == Dtype::fp32 ? 4 : 2; }

inline namespace DRACOPT_ISA {

struct Bf16 {
  uint16_t bits;
};

struct Fp16 {
  uint16_t bits;
};

template <typename Stored>
constexpr Dtype dtype_of = std::is_same_v<Stored, float>    ? Dtype::fp32
                           : std::is_same_v<Stored, double> ? Dtype::fp64
                           : std::is_same_v<Stored, Bf16>   ? Dtype::bf16
                                                            : Dtype::fp16;

DRACOPT_HD uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
DRACOPT_HD float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

DRACOPT_HD float widen(float x) { return x; }
DRACOPT_HD double widen(double x) { return x; }

DRACOPT_HD float widen(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

// In integers throughout, so that every compiler vectorises it and no mode of the processor changes it.
DRACOPT_HD float widen(Fp16 x) {
  constexpr uint32_t rebias = (127 - 15) << 23, infinity = 0x7c00 << 13, smallest_normal = 0x0400 << 13;
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t normal = magnitude + rebias + (magnitude >= infinity ? rebias : 0);
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(x.bits & 0x7fffu)) * 0x1p-24f);
  return float_of((magnitude < smallest_normal ? subnormal : normal) | (x.bits & 0x8000u) << 16);
}

// To the nearest, ties to even; 64-bit numbers take the way over float, as in torch.
template <typename Stored, typename T>
DRACOPT_HD Stored narrow(T x) {
  if constexpr (std::is_floating_point_v<Stored>) {
    return static_cast<Stored>(x);
  } else {
    const float value = static_cast<float>(x);
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
    const bool is_nan = value != value;
    if constexpr (std::is_same_v<Stored, Bf16>) {
      const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
      return {static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
    } else {
      constexpr uint32_t rebias = (127 - 15) << 23, too_large = 0x47800000u, smallest_normal = 0x38800000u;
      const uint32_t normal = (magnitude - rebias + 0xfffu + (magnitude >> 13 & 1)) >> 13;
      // One half has its last place where the smallest fp16 has it: the addition rounds.
      const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
      const uint32_t finite = magnitude < smallest_normal ? subnormal : normal;
      return {static_cast<uint16_t>((is_nan ? 0x7e00u : magnitude >= too_large ? 0x7c00u : finite) | sign)};
    }
  }
}

}  // namespace DRACOPT_ISA
}  // namespace dracopt
