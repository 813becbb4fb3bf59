// Arithmetic that rounds alike everywhere. Every build turns contraction off, so a multiplication and an addition round
// twice. The code writes fma where one rounding is meant.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/macros.h"

namespace dracopt {
inline namespace DRACOPT_ISA {

DRACOPT_HD float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DRACOPT_HD double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }

DRACOPT_HD float sqrt(float x) { return __builtin_sqrtf(x); }
DRACOPT_HD double sqrt(double x) { return __builtin_sqrt(x); }

// Flag holds a choice that is the same for a whole tensor. Bits replace a branch, so the loop stays one loop and
// vectorises.
template <typename T>
using Flag = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

template <typename T>
DRACOPT_HD Flag<T> flag(bool value) {
  return value ? ~Flag<T>(0) : Flag<T>(0);
}

template <typename T>
DRACOPT_HD T select(Flag<T> chosen, T a, T b) {
  const auto bits = (__builtin_bit_cast(Flag<T>, a) & chosen) | (__builtin_bit_cast(Flag<T>, b) & ~chosen);
  return __builtin_bit_cast(T, bits);
}

// Returns the larger of two numbers, or NaN if either is NaN, like torch.maximum.
template <typename T>
DRACOPT_HD T maximum(T a, T b) {
  return ((a > b) | (a != a)) ? a : b;
}

template <typename... T>
bool all_finite(T... numbers) {
  return ((numbers - numbers == 0) && ...);
}

// Returns the number of the lowest bit that is set.
DRACOPT_HD int lowest_bit(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

// A Divisor is a number that divides many others, with its reciprocal, which FastMath uses. The reciprocal is NaN if
// FastMath must not use it, and then FastMath's quotients are NaN.
template <typename T>
struct Divisor {
  static constexpr T kMost = T(0x1p40);

  T value, inverse;

  DRACOPT_HD static Divisor of(T value) {
    return {value, value > 0 && value <= kMost ? T(1) / value : static_cast<T>(__builtin_nanf(""))};
  }
};

// PlainMath has IEEE's operations as they are. Rules call them by name where a GPU has a faster way to the same bits.
struct PlainMath {
  static constexpr bool exact = true;

  template <typename T>
  DRACOPT_HD T root_over(T x, const Divisor<T>& d) const {
    return sqrt(x) / d.value;
  }
  template <typename T>
  DRACOPT_HD T quotient(T x, T d) const {
    return x / d;
  }
  template <typename T>
  DRACOPT_HD T quotient(T x, const Divisor<T>& d) const {
    return x / d.value;
  }
  template <typename T>
  DRACOPT_HD void require_numbers(T, T) const {}
};

// Returns x^n for 0 <= x <= 1 and n >= 0, within an ulp, by repeated squaring of an unevaluated sum of two doubles.
// Host and device get the same bits, which pow() does not give.
DRACOPT_HD double power(double x, int64_t n) {
  double hi = 1.0, lo = 0.0;
  for (double base = x, base_lo = 0.0; n > 0; n >>= 1) {
    if (n & 1) {
      const double product = hi * base;
      lo = fma(hi, base, -product) + (hi * base_lo + lo * base);
      hi = product + lo;
      lo = (product - hi) + lo;
    }
    const double square = base * base;
    base_lo = fma(base, base, -square) + 2.0 * base * base_lo;
    base = square + base_lo;
    base_lo = (square - base) + base_lo;
  }
  return hi;
}

// Returns e^(x + correction) for a correction that is tiny beside x, within an ulp (0 where the result is not normal,
// infinite beyond e^709). Host and device get the same bits, which exp() and pow() do not give.
DRACOPT_HD double exponential(double x, double correction) {
  if (!(x > -708.0)) return x != x ? x : 0.0;
  if (x > 709.0) return __builtin_inf();
  constexpr double round_to_integer = 0x1.8p52, ln2 = 0x1.62e42fefa39efp-1, ln2_rest = 0x1.abc9e3b39803fp-56;
  const double n = (x * 0x1.71547652b82fep+0 + round_to_integer) - round_to_integer;
  const double rest = fma(-n, ln2, x), r = rest + fma(-n, ln2_rest, correction);
  double series = 1.0;  // Taylor's, in Horner's form
  DRACOPT_UNROLL
  for (int k = 14; k > 1; --k) series = fma(series, r * (1.0 / k), 1.0);
  series = fma(series, r, 1.0);
  return series * __builtin_bit_cast(double, (static_cast<int64_t>(n) + 1023) << 52);
}

}  // namespace DRACOPT_ISA
}  // namespace dracopt
