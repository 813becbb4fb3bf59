// Differences between the compilers that see the rules: host C++ (once per instruction set) and CUDA C++.
#pragma once

// Marks a small function that is called for every tensor. Without the mark the compiler inlines it only while it has
// few callers, and one more makes all of them slower.
#define DRACOPT_INLINE inline __attribute__((always_inline))

#if defined(__CUDACC__)
#define DRACOPT_HD __host__ __device__ __forceinline__
#else
#define DRACOPT_HD DRACOPT_INLINE
#endif

// Marks a function of which one copy suffices for all callers, because each call does much.
#if defined(__clang__)
#define DRACOPT_APART __attribute__((noinline))
#else
#define DRACOPT_APART __attribute__((noinline, noclone))
#endif

// Every translation unit that is compiled for an instruction set of its own names the set here. The name becomes an
// inline namespace, so that the linker never merges an inline function compiled for AVX-512 into the baseline code.
#if !defined(DRACOPT_ISA)
#define DRACOPT_ISA host
#endif

// Marks the functions that other libraries call. The kernels are a library of their own and hide all else.
#define DRACOPT_EXPORT __attribute__((visibility("default")))

// DRACOPT_UNROLL precedes a short loop over arrays in registers, which cannot be indexed at run time.
#if defined(__CUDACC__)
#define DRACOPT_UNROLL _Pragma("unroll")
#define DRACOPT_NEVER_UNROLL _Pragma("unroll 1")
#elif defined(__GNUC__)
#define DRACOPT_UNROLL _Pragma("GCC unroll 16")
#define DRACOPT_NEVER_UNROLL _Pragma("GCC unroll 1")
#else
#define DRACOPT_UNROLL
#define DRACOPT_NEVER_UNROLL
#endif

// Declares the next loop's iterations independent: no stream overlaps another except element for element.
#if defined(__clang__)
#define DRACOPT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define DRACOPT_INDEPENDENT _Pragma("GCC ivdep")
#else
#define DRACOPT_INDEPENDENT
#endif
