// The CUDA kernels and their launcher. Built without nvcc, absent.cpp takes their place; in the tests, the host does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/rule_entry.h"
#include "cuda/launch.h"

namespace dracopt {
namespace cuda {

// Why a GPU cannot be used, in a few words; null if it can. Looks for devices at the first call.
DRACOPT_EXPORT const char* unavailable(int device);

// The GPU architectures that machine code was compiled for, ten times their number: 900 is sm_90. Later ones are served
// by PTX, which their driver compiles.
DRACOPT_EXPORT const std::vector<int>& architectures();

// The following act on the current device and return null or the name of CUDA's error. A stream is a cudaStream_t.

// Updates what the arguments describe, by a rule of which `rule` is the index.
DRACOPT_EXPORT const char* launch(int rule, Arithmetic arithmetic, const Arguments& arguments, void* stream);

// Writes to the device's memory, in the stream's order and without a copy that a graph could not capture. The address
// and the size are multiples of 16.
DRACOPT_EXPORT const char* write_table(void* to, const void* from, size_t bytes, void* stream);

// Is a graph being captured from this stream?
DRACOPT_EXPORT const char* is_capturing(void* stream, bool& answer);

}  // namespace cuda
}  // namespace dracopt
