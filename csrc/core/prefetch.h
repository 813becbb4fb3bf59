// Fetches memory into the cache before it is read.
#pragma once

#include "core/macros.h"

namespace dracopt {

// Fetches the line of an address, which may be any, into the second-level cache. That is near enough, and more lines
// can be under way to it than to the first level.
//
// Functions that only prefetch must be DRACOPT_INLINE. GCC finds that others have no effect, and leaves out the calls.
DRACOPT_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

}  // namespace dracopt
