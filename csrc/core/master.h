// A master is the fp32 number that a parameter in 16 bits is rounded from. Small updates change the master where
// rounding would take them from the parameter.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace dracopt {

// Says what a parameter's last stream holds of its master. The halves of split masters lie there like bf16 numbers.
enum class Master : uint8_t { none, fp32, split16 };

inline namespace DRACOPT_ISA {

// Rounds a master to bf16, ties away from zero. Returns a word: its upper half is the parameter, and its lower half is
// what rounding took away, a signed number of units in the last place of fp32. The lower half of the master is that
// number as it is. Ties to even would not tell a tie that was rounded up from one that was rounded down.
DRACOPT_HD uint32_t split_master(float master) {
  const uint32_t bits = bits_of(master);
  return master != master ? 0x7fc00000u : ((bits + 0x8000u) & 0xffff0000u) | (bits & 0xffffu);
}

// Returns the master whose halves these are: a widened bf16 parameter, and what rounding took away. No master has
// halves that would give NaN, such as zero with a negative rest. Someone has then changed the parameter, which is the
// master.
DRACOPT_HD float join_master(float param, uint32_t rest) {
  const auto taken = static_cast<int16_t>(static_cast<uint16_t>(rest));
  const float master = float_of(bits_of(param) + static_cast<uint32_t>(static_cast<int32_t>(taken)));
  return master == master ? master : param;
}

// Rounds a master to the dtype of its parameter.
DRACOPT_HD Bf16 round_master(float master, Bf16) { return {static_cast<uint16_t>(split_master(master) >> 16)}; }
DRACOPT_HD Fp16 round_master(float master, Fp16) { return narrow<Fp16>(master); }

// Returns the master of a widened parameter. A parameter that someone has changed since it was rounded takes its
// master's place. A tie may have been rounded either way, because other libraries round ties to even.
DRACOPT_HD float current_master(float param, float master, Bf16) {
  const bool is_near = bits_of(master) - bits_of(param) + 0x8000u <= 0x10000u;
  return (is_near & (master == master)) ? master : param;
}
DRACOPT_HD float current_master(float param, float master, Fp16) {
  return widen(narrow<Fp16>(master)) == param ? master : param;
}

}  // namespace DRACOPT_ISA
}  // namespace dracopt
