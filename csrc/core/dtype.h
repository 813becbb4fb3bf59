// The dtypes of a stream in memory, and how one number is read and written. Arithmetic is done in float or double only.
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

// The host works on the bits as integers. That defines what the instructions of cpu/runs.h do, and serves processors
// without them. A NaN becomes quiet and keeps its sign and its leading bits. A GPU has one instruction, which gives the
// same result except for the bits of a NaN.
DRACOPT_HD float widen(Fp16 x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  constexpr uint32_t rebias = (127 - 15) << 23, infinity = 0x7c00 << 13, smallest_normal = 0x0400 << 13;
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t quiet = magnitude > infinity ? 0x00400000u : 0;
  const uint32_t normal = (magnitude + rebias + (magnitude >= infinity ? rebias : 0)) | quiet;
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(x.bits & 0x7fffu)) * 0x1p-24f);
  return float_of((magnitude < smallest_normal ? subnormal : normal) | (x.bits & 0x8000u) << 16);
#endif
}

// The upper half of the result is x in bf16, rounded to nearest, ties to even. Serves a number or a vector of them.
template <typename Bits, typename Float>
DRACOPT_HD Bits round_to_bf16(Float x) {
  const auto bits = __builtin_bit_cast(Bits, x);
  return x != x ? Bits{} + 0x7fc00000u : bits + 0x7fffu + (bits >> 16 & 1);
}

DRACOPT_HD uint16_t round_to_fp16(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
  return rounded;
#else
  constexpr uint32_t rebias = (127 - 15) << 23, too_large = 0x47800000u, smallest_normal = 0x38800000u;
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
  const uint32_t normal = (magnitude - rebias + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  // The last place of 0.5f is the smallest fp16 number, so the addition rounds.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = magnitude < smallest_normal ? subnormal : normal;
  const uint32_t nan = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  return static_cast<uint16_t>((x != x ? nan : magnitude >= too_large ? 0x7c00u : finite) | sign);
#endif
}

// Rounds to nearest, ties to even. 64-bit numbers are rounded to float first, as in torch.
template <typename Stored, typename T>
DRACOPT_HD Stored narrow(T x) {
  if constexpr (std::is_floating_point_v<Stored>) {
    return static_cast<Stored>(x);
  } else if constexpr (std::is_same_v<Stored, Bf16>) {
    return {static_cast<uint16_t>(round_to_bf16<uint32_t>(static_cast<float>(x)) >> 16)};
  } else {
    return {round_to_fp16(static_cast<float>(x))};
  }
}

// Rounds two numbers at once and puts the first into the lower half. On a GPU neither may be NaN.
DRACOPT_HD uint32_t narrow_pair(float low, float high, Bf16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return round_to_bf16<uint32_t>(low) >> 16 | (round_to_bf16<uint32_t>(high) & 0xffff0000u);
#endif
}

DRACOPT_HD uint32_t narrow_pair(float low, float high, Fp16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return round_to_fp16(low) | static_cast<uint32_t>(round_to_fp16(high)) << 16;
#endif
}

// `To`, which is const if `Void` is.
template <typename Void, typename To>
using LikeVoid = std::conditional_t<std::is_const_v<Void>, const To, To>;

// Calls `body` with the address as a pointer to the type that is stored there.
template <typename Void, typename Body>
DRACOPT_HD void as_stored(Void* data, Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::fp32:
      return body(static_cast<LikeVoid<Void, float>*>(data));
    case Dtype::fp64:
      return body(static_cast<LikeVoid<Void, double>*>(data));
    case Dtype::bf16:
      return body(static_cast<LikeVoid<Void, Bf16>*>(data));
    case Dtype::fp16:
      return body(static_cast<LikeVoid<Void, Fp16>*>(data));
  }
}

}  // namespace DRACOPT_ISA
}  // namespace dracopt
