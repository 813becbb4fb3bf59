// The kernels that the sweep compares.
#pragma once

#include <cstdint>
#include <vector>

struct Variant {
  const char* name;
  const char* about;  // its macros, as they were given to the compiler
  int threads;
  int64_t tile;
  const void* kernel;
};

// Returns the variants, which are registered before main() begins.
std::vector<Variant>& variants();
