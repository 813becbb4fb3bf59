// Runs are neighbours of a stream in memory. The processor's own instructions convert them where it has any. They give
// the bits that core/dtype.h defines, and are written out here because no compiler finds all of them by itself.
#pragma once

#include "core/dtype.h"
#include "core/stochastic.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace dracopt {
inline namespace DRACOPT_ISA {

// The update loop converts a block at a time: as many neighbours as two vectors of fp32 hold.
#if defined(__AVX512F__)
constexpr int kBlock = 32;
#elif defined(__AVX__)
constexpr int kBlock = 16;
#else
constexpr int kBlock = 8;
#endif

template <typename T, typename Stored>
DRACOPT_INLINE void widen_run(const Stored* from, int64_t count, T* to) {
  DRACOPT_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(widen(from[i]));
}

template <typename T, typename Stored>
DRACOPT_INLINE void narrow_run(const T* from, int64_t count, Stored* to) {
  DRACOPT_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) to[i] = narrow<Stored>(from[i]);
}

#if defined(__F16C__) || defined(__aarch64__)
#if defined(__AVX512F__)
constexpr int kFp16Lanes = 16;
constexpr __mmask16 kAll = 0xffff;  // GCC 12 warns of its own headers where nothing is masked
DRACOPT_INLINE void widen_vector(const Fp16* from, float* to) {
  _mm512_storeu_ps(to, _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
DRACOPT_INLINE void narrow_vector(const float* from, Fp16* to) {
  const __m256i rounded = _mm512_maskz_cvtps_ph(kAll, _mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
}
#elif defined(__F16C__)
constexpr int kFp16Lanes = 8;
DRACOPT_INLINE void widen_vector(const Fp16* from, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
DRACOPT_INLINE void narrow_vector(const float* from, Fp16* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}
#else
constexpr int kFp16Lanes = 4;
DRACOPT_INLINE void widen_vector(const Fp16* from, float* to) {
  vst1q_f32(to, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits))));
}
DRACOPT_INLINE void narrow_vector(const float* from, Fp16* to) {
  vst1_u16(&to->bits, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from))));
}
#endif

DRACOPT_INLINE void widen_run(const Fp16* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kFp16Lanes <= count; i += kFp16Lanes) widen_vector(from + i, to + i);
  for (; i < count; ++i) to[i] = widen(from[i]);
}

DRACOPT_INLINE void narrow_run(const float* from, int64_t count, Fp16* to) {
  int64_t i = 0;
  for (; i + kFp16Lanes <= count; i += kFp16Lanes) narrow_vector(from + i, to + i);
  for (; i < count; ++i) to[i] = narrow<Fp16>(from[i]);
}
#endif

// Blocks of one type are read and written in one order, but that order need not be the memory's.
template <typename Stored>
DRACOPT_INLINE void widen_block(const Stored* from, float* to) {
  widen_run(from, kBlock, to);
}

template <typename Stored>
DRACOPT_INLINE void narrow_block(const float* from, Stored* to) {
  narrow_run(from, kBlock, to);
}

#if defined(__AVX512F__)
// A bf16 number of a stream whose blocks AVX512_BF16 rounds, where the processor has it.
struct RoundedByProcessor : Bf16 {};

inline bool processor_rounds_to_bf16() { return __builtin_cpu_supports("avx512bf16") != 0; }

// Rounds a block that holds a NaN or a subnormal number.
DRACOPT_APART inline void narrow_special(__m512 low, __m512 high, Bf16* to) {
  alignas(64) float numbers[kBlock];
  _mm512_store_ps(numbers, low);
  _mm512_store_ps(numbers + kBlock / 2, high);
  narrow_run(numbers, kBlock, to);
}

// The instruction takes subnormal numbers for zero and keeps a NaN's bits, which is not what this library does. Where
// the processor is told to flush subnormal numbers (torch.set_flush_denormal), they become zeros here as well.
DRACOPT_INLINE void narrow_block(const float* from, RoundedByProcessor* to) {
  const __m512 low = _mm512_loadu_ps(from), high = _mm512_loadu_ps(from + kBlock / 2);
  constexpr int nan_or_subnormal = 0xa1;
  const int special = _mm512_fpclass_ps_mask(low, nan_or_subnormal) | _mm512_fpclass_ps_mask(high, nan_or_subnormal);
  if (__builtin_expect(special != 0, false)) return narrow_special(low, high, to);
  __m512i rounded;  // in assembly, so that one instruction needs no instruction set of its own
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(rounded) : "v"(high), "v"(low));
  _mm512_storeu_si512(to, rounded);
}
#endif

// By integer arithmetic two neighbours are converted as one word: the first halves of all words, then the second.
// Words in the memory's order would take twice the operations.
struct Words {
  static constexpr int kBytes = kBlock * sizeof(Bf16);
  using Bits = uint32_t __attribute__((vector_size(kBytes)));
  using Floats = float __attribute__((vector_size(kBytes)));

  template <typename Vector>
  static Vector read(const void* from) {
    Vector vector;
    __builtin_memcpy(&vector, from, sizeof(vector));
    return vector;
  }

  // Writes the upper halves of both.
  static void write(Bits low, Bits high, Bf16* to) {
    const Bits words = low >> 16 | (high & 0xffff0000u);
    __builtin_memcpy(to, &words, sizeof(words));
  }
};

DRACOPT_INLINE void widen_block(const Bf16* from, float* to) {
  const auto words = Words::read<Words::Bits>(from);
  const auto low = words << 16, high = words & 0xffff0000u;
  __builtin_memcpy(to, &low, sizeof(low));
  __builtin_memcpy(to + kBlock / 2, &high, sizeof(high));
}

DRACOPT_INLINE void narrow_block(const float* from, Bf16* to) {
  const auto low = round_to_bf16<Words::Bits>(Words::read<Words::Floats>(from));
  const auto high = round_to_bf16<Words::Bits>(Words::read<Words::Floats>(from + kBlock / 2));
  Words::write(low, high, to);
}

// Rounds by the block's random bits.
DRACOPT_INLINE void narrow_block(const float* from, const uint16_t* random, Bf16* to) {
  const auto bits = Words::read<Words::Bits>(random);
  const auto low = round_at_random(Words::read<Words::Floats>(from), bits & 0xffffu, Bf16());
  const auto high = round_at_random(Words::read<Words::Floats>(from + kBlock / 2), bits >> 16, Bf16());
  Words::write(low, high, to);
}

// Each 64-bit lane of a vector computes a block of random bits.
struct RandomLanes {
  static constexpr int kLanes = kBlock / 4;
  using Vector = uint64_t __attribute__((vector_size(kLanes * sizeof(uint64_t))));

  // Returns the products of the lanes' lower halves and a factor.
  static Vector product(Vector x, uint32_t factor) {
#if defined(__AVX512F__)
    return Vector(_mm512_maskz_mul_epu32(0xff, __m512i(x), _mm512_set1_epi32(static_cast<int>(factor))));
#elif defined(__AVX2__)
    return Vector(_mm256_mul_epu32(__m256i(x), _mm256_set1_epi32(static_cast<int>(factor))));
#elif defined(__SSE2__)
    return Vector(_mm_mul_epu32(__m128i(x), _mm_set1_epi32(static_cast<int>(factor))));
#else
    return (x & 0xffffffffu) * factor;
#endif
  }

  // Returns the number of the block that a lane computes, so that store() need not move lanes.
  static constexpr int block_of(int lane) { return lane % 2 * (kLanes / 2) + lane / 2; }

  // Writes the blocks in their order. Each has two words.
  static void store(Vector first, Vector second, uint64_t* words) {
    for (int lane = 0; lane < kLanes; ++lane) {
      words[2 * block_of(lane)] = first[lane];
      words[2 * block_of(lane) + 1] = second[lane];
    }
  }
};

}  // namespace DRACOPT_ISA
}  // namespace dracopt
