// Square roots and quotients in fewer instructions than CUDA's compiler takes, with the same bits.
#pragma once

#include <type_traits>

#include "core/math.h"

// The architecture for which the build makes PTX but no machine code; 0 if the build makes no PTX.
#if !defined(DRACOPT_PTX)
#define DRACOPT_PTX 0
#endif

namespace dracopt {
namespace cuda {
inline namespace DRACOPT_ISA {

// A GPU has instructions for these two estimates, which take subnormal numbers for zero.
DRACOPT_HD float estimate_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / (x > -0x1p-126f && x < 0x1p-126f ? 0 * x : x);
#endif
}

DRACOPT_HD float estimate_reciprocal_root(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / sqrt(x > -0x1p-126f && x < 0x1p-126f ? 0 * x : x);
#endif
}

// FastMath has the operations of PlainMath and gives the same bits, as long as `exact` stays true. Arguments beyond the
// proved range make `exact` false or the result NaN. `require_numbers` makes `exact` false if one of its arguments is
// NaN. PlainMath must then compute everything again.
//
// CUDA's compiler turns IEEE's operations into the same sequences for every GPU that it knows: an estimate, a Newton
// step, and a correction by the remainder, which the fused multiply-add gives exactly. The compiler puts a branch
// around each sequence, for rare arguments, so that no two overlap. Here one branch serves a whole vector. The
// sequences are as exact as a GPU's estimates allow: benchmarks/kernels/check.cpp tests every estimate on a GPU.
struct FastMath {
  bool exact = true;

  // Returns IEEE's sqrt(x) / d, or NaN.
  DRACOPT_HD float root_over(float x, const Divisor<float>& d) {
    require(is_zero_or_from(x, 0x1p-100f));
    const float y = estimate_reciprocal_root(x + 0x1p-126f);  // the estimate for x, but finite where x is zero
    const float root = x * y, half = 0.5f * y;
    return divide(fma(fma(-root, root, x), half, root), d.value, d.inverse);
  }

  // Both overloads return IEEE's x / d, or NaN.
  DRACOPT_HD float quotient(float x, const Divisor<float>& d) const {
    return is_zero_or_from(x, kLeast) ? divide(x, d.value, d.inverse) : __builtin_nanf("");
  }

  DRACOPT_HD float quotient(float x, float d) {
    require(is_zero_or_from(x, kLeast));
    require(divides_by(d));
    return divide(x, d, reciprocal(d));
  }

  // Returns the correctly rounded reciprocal of a divisor.
  DRACOPT_HD static float reciprocal(float d) {
    const float estimate = estimate_reciprocal(d);
    return fma(estimate, fma(-d, estimate, 1.0f), estimate);
  }

  // Returns whether a divisor is neither too large nor negative. A subnormal divisor leads to NaN by itself.
  DRACOPT_HD static bool divides_by(float d) {
    return __builtin_bit_cast(uint32_t, d) <= __builtin_bit_cast(uint32_t, Divisor<float>::kMost);
  }

  // Makes `exact` false if either number is NaN. Infinite arguments, quotients that overflow and arguments beyond the
  // proof lead to NaN.
  DRACOPT_HD void require_numbers(float x, float y) { require((x == x) & (y == y)); }

 private:
  // The least numerator other than zero. Divisors are at most Divisor::kMost, so no quotient is subnormal, and every
  // remainder can be represented.
  static constexpr float kLeast = 0x1p-80f;

  DRACOPT_HD void require(bool condition) { exact &= condition; }

  // Zero alone wraps around, to the largest integer.
  DRACOPT_HD static bool is_zero_or_from(float x, float least) {
    const auto doubled = [](float y) { return 2 * __builtin_bit_cast(uint32_t, y) - 1; };
    return doubled(x) >= doubled(least);
  }

  // Divides by the correctly rounded reciprocal of d (Markstein 1990). The remainder has the other sign, so that the
  // quotient of -0 is -0, which a negative divisor would not give.
  DRACOPT_HD static float divide(float x, float d, float inverse) {
    const float q = x * inverse;
    return fma(fma(d, q, -x), -inverse, q);
  }
};

// VectorMath computes vectors of T. Future GPUs run PTX, which avoids FastMath because nobody knows their estimates.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == DRACOPT_PTX
template <typename T>
using VectorMath = PlainMath;
#else
template <typename T>
using VectorMath = std::conditional_t<sizeof(T) == 4, FastMath, PlainMath>;
#endif

}  // namespace DRACOPT_ISA
}  // namespace cuda
}  // namespace dracopt
