// What differs between the compilers that see the rules: host C++ (once per instruction set) and CUDA C++.
#pragma once

#if defined(__CUDACC__)
#define DRACOPT_HD __host__ __device__ __forceinline__
#else
#define DRACOPT_HD inline __attribute__((always_inline))
#endif

// Every translation unit that is compiled for an instruction set of its own names it here. The name becomes an inline
// namespace, so that the linker never merges an inline function compiled for AVX-512 into the baseline code.
#if !defined(DRACOPT_ISA)
#define DRACOPT_ISA host
#endif

// The kernels are a library of their own. What others call of it is marked by this; all else stays hidden.
#define DRACOPT_EXPORT __attribute__((visibility("default")))

// The next loop is short, and what it indexes must not be indexed at run time: registers cannot be.
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

// The next loop's iterations are independent: no stream overlaps another except element for element.
#if defined(__clang__)
#define DRACOPT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define DRACOPT_INDEPENDENT _Pragma("GCC ivdep")
#else
#define DRACOPT_INDEPENDENT
#endif
