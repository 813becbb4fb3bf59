// The CUDA kernels and their launcher. A build without nvcc uses absent.cpp instead; the tests run them on the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/rule_entry.h"
#include "cuda/launch.h"

namespace dracopt {
namespace cuda {

// Says in a few words why a GPU cannot be used; null if the GPU can be used. Looks for devices at the first call.
DRACOPT_EXPORT const char* unavailable(int device);

// Returns the GPU architectures that machine code was compiled for, ten times their number: 900 is sm_90. Later ones
// run PTX, which their driver compiles.
DRACOPT_EXPORT const std::vector<int>& architectures();

// The following functions act on the current device and return null or the name of CUDA's error. A stream is a
// cudaStream_t.

// Updates the tensors that the arguments describe, by the rule with the index `rule`.
DRACOPT_EXPORT const char* launch(int rule, Arithmetic arithmetic, const Arguments& arguments, void* stream);

// Adds the squares of the gradients that the arguments describe, and derives the norm when all launches have been made.
DRACOPT_EXPORT const char* measure(const Arguments& arguments, void* stream);

// Writes to the device's memory, in the stream's order and without a copy that a graph could not capture. The address
// and the size are multiples of 16.
DRACOPT_EXPORT const char* write_table(void* to, const void* from, size_t bytes, void* stream);

// Sets `answer` to whether a graph is being captured from this stream.
DRACOPT_EXPORT const char* is_capturing(void* stream, bool& answer);

}  // namespace cuda
}  // namespace dracopt
