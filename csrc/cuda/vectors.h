// A thread holds neighbours of a stream in registers, and reads and writes them as vectors.
#pragma once

#include "core/macros.h"
#include "cuda/launch.h"

// These two may hold cache operators for vectors that are read or written once and not again.
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

// Lanes holds neighbours of a stream as they are stored, two 16-bit numbers in a word. Shifts extract the numbers,
// because registers have no addresses.
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
      return {};  // 32-bit arithmetic has no 64-bit streams
    }
  }

  template <typename Stored>
  DRACOPT_HD void set(int lane, Stored x) {
    if constexpr (sizeof(Stored) == 2) {
      uint32_t& w = word(lane / 2);
      w = lane % 2 == 0 ? x.bits : w | static_cast<uint32_t>(x.bits) << 16;  // lanes are set in ascending order
    } else if constexpr (sizeof(Stored) == 4) {
      word(lane) = __builtin_bit_cast(uint32_t, x);
    } else if constexpr (sizeof(T) == 8) {
      const Pair pair = __builtin_bit_cast(Pair, x);
      word(2 * lane) = pair.low;
      word(2 * lane + 1) = pair.high;
    }
  }

  // Sets a lane with an even number and the next one, each to the upper half of a word.
  DRACOPT_HD void set_pair(int lane, uint32_t low, uint32_t high) { word(lane / 2) = low >> 16 | (high & 0xffff0000u); }
};

// Reads and writes name global memory, because the compiler does not see that the addresses belong to it.
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

// Half a vector is read and written like a whole one, at an address that is aligned for the half alone.
DRACOPT_HD void read_half(Vector& to, const Vector* from) {
#if defined(__CUDA_ARCH__)
  asm("ld.global" DRACOPT_LOAD ".v2.u32 {%0, %1}, [%2];"
      : "=r"(to.words[0]), "=r"(to.words[1])
      : "l"(__cvta_generic_to_global(from)));
#else
  __builtin_memcpy(to.words, static_cast<const void*>(from), kVectorBytes / 2);
#endif
}

DRACOPT_HD void write_half(Vector* to, const Vector& x) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global" DRACOPT_STORE ".v2.u32 [%0], {%1, %2};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(x.words[0]), "r"(x.words[1])
               : "memory");
#else
  __builtin_memcpy(static_cast<void*>(to), x.words, kVectorBytes / 2);
#endif
}

}  // namespace DRACOPT_ISA
}  // namespace cuda
}  // namespace dracopt
