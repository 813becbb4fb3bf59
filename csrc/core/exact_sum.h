// Adds numbers without rounding, so neither their order nor their grouping changes the sum. Threads, blocks of a GPU
// and launches can therefore add their parts in any order.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace dracopt {
inline namespace DRACOPT_ISA {

// An ExactSum has a word for each digit of 32 bits that a double may have. A word is wider than a digit, so up to 2^31
// additions need no carry.
struct ExactSum {
  static constexpr int kDigits = 66;  // digit k counts multiples of 2^(32 k - 1074)
  // Further words count numbers that are infinite or NaN. The last one is the caller's.
  static constexpr int kInfinite = kDigits, kNan = kDigits + 1, kOther = kDigits + 2, kWords = kDigits + 3;

  int64_t words[kWords];

  // Takes a number that is not negative apart. Calls `add(word, value)` for each word that the number changes.
  template <typename Add>
  DRACOPT_HD static void take_apart(double x, const Add& add) {
    const auto bits = __builtin_bit_cast(uint64_t, x) & ~(uint64_t(1) << 63);
    const uint64_t fraction = bits & ((uint64_t(1) << 52) - 1);
    const auto exponent = static_cast<int>(bits >> 52);
    if (exponent == 2047) return add(fraction == 0 ? kInfinite : kNan, 1);
    const uint64_t mantissa = exponent == 0 ? fraction : fraction | uint64_t(1) << 52;
    const int place = exponent == 0 ? 0 : exponent - 1;  // of the last bit
    const int digit = place / 32, shift = place % 32;
    constexpr uint64_t in_digit = 0xffffffffu;
    const uint64_t low = (mantissa << shift) & in_digit, rest = mantissa >> (32 - shift);
    if (low != 0) add(digit, static_cast<int64_t>(low));
    if ((rest & in_digit) != 0) add(digit + 1, static_cast<int64_t>(rest & in_digit));
    if (rest >> 32 != 0) add(digit + 2, static_cast<int64_t>(rest >> 32));
  }

  DRACOPT_HD void add(double x) {
    take_apart(x, [&](int word, int64_t value) { words[word] += value; });
  }

  // Returns the sum, rounded to nearest, ties to even. Numbers below 2^-1022 may be rounded twice.
  DRACOPT_HD double rounded() const {
    if (words[kNan] != 0) return static_cast<double>(__builtin_nanf(""));
    if (words[kInfinite] != 0) return __builtin_inf();
    constexpr int count = kDigits + 2;
    uint32_t digits[count];
    uint64_t carry = 0;
    for (int k = 0; k < count; ++k) {
      carry += k < kDigits ? static_cast<uint64_t>(words[k]) : 0;
      digits[k] = static_cast<uint32_t>(carry);
      carry >>= 32;
    }
    int top = count - 1;
    while (top > 2 && digits[top] == 0) --top;
    // The upper 64 bits stand for all: their last bit is set if any bit below them is.
    uint64_t upper = static_cast<uint64_t>(digits[top]) << 32 | digits[top - 1];
    uint32_t next = digits[top - 2];
    if ((upper | next) == 0) return 0;
    int unit = 32 * (top - 1) - 1074;  // the power of two that the last bit of `upper` counts
    for (; upper >> 63 == 0; --unit) {
      upper = upper << 1 | next >> 31;
      next <<= 1;
    }
    for (int k = top - 2; k-- > 0;) next |= digits[k];
    upper |= next != 0;
    const double wide = static_cast<double>(static_cast<uint32_t>(upper >> 32)) * 0x1p32 +
                        static_cast<double>(static_cast<uint32_t>(upper));
    const auto power_of_two = [](int n) { return __builtin_bit_cast(double, static_cast<int64_t>(n + 1023) << 52); };
    return wide * power_of_two(unit / 2) * power_of_two(unit - unit / 2);
  }
};

}  // namespace DRACOPT_ISA
}  // namespace dracopt
