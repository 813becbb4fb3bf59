// The memory that the kernels work on: a GPU's, or the host's if the launcher is the simulated one.
#pragma once

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace memory {

#if defined(__CUDACC__)
inline void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
inline void* allocate(size_t bytes) {
  void* found = nullptr;
  require(cudaMalloc(&found, bytes), "cudaMalloc");
  return found;
}
inline void release(void* data) { require(cudaFree(data), "cudaFree"); }
inline void copy(void* to, const void* from, size_t bytes) {
  require(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "cudaMemcpy");
}
// Says why no kernel can be launched; null if kernels can be launched.
inline const char* unavailable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#else
inline void* allocate(size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256 + 256); }
inline void release(void* data) { std::free(data); }
inline void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
inline const char* unavailable() { return nullptr; }
#endif

}  // namespace memory
