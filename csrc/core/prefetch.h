// Fetches memory into the cache before it is read.
#pragma once

#include "core/macros.h"

namespace dracopt {

// Fetches the line of an address, which may be any, into the second-level cache. There it is near enough, and a
// processor waits for more lines at a time than its first-level cache can take in.
//
// Functions that only prefetch must be DRACOPT_INLINE: GCC finds that they have no effect, and leaves out the calls.
DRACOPT_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

}  // namespace dracopt
