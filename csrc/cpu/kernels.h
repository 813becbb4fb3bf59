// The CPU kernels, compiled once per instruction set from kernels.cpp, and the choice between them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/rule_entry.h"

namespace dracopt {
namespace cpu {

struct Kernels {
  const char* isa;
  const RuleEntry* rules;
  size_t rule_count;
};

// The best this machine runs, or the one that the environment variable DRACOPT_ISA names. Chosen at the first call.
// Throws std::runtime_error if DRACOPT_ISA names none that this machine can run.
DRACOPT_EXPORT const Kernels& kernels();

// Names what a binding must know of these kernels: the build that made both gives it to both.
DRACOPT_EXPORT uint64_t interface();

// The rule of that name in `kernels()`; null if there is none.
DRACOPT_EXPORT const RuleEntry* find_rule(const char* name);

struct Work {
  const Segment* segments;
  size_t count;
  int64_t units;
};

// Updates the units [begin, end) of a Work. Never throws; threads may run disjoint ranges at once.
DRACOPT_EXPORT void run(int64_t begin, int64_t end, void* work);

// torch's torch_parallel_for, which these kernels are not linked to.
using ParallelFunc = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int (*)(int64_t begin, int64_t end, int64_t grain, ParallelFunc function, void* context);

// The number of times that this process was forked from one that had loaded these kernels: 0 in the first.
DRACOPT_EXPORT int forks();

// Shares [0, count) among torch's threads; in a forked child, which has none of them, the calling one does it all.
// Returns false if torch fails.
DRACOPT_EXPORT bool in_parallel(ParallelFor parallel_for, int64_t count, int64_t grain, ParallelFunc function,
                                void* context);

}  // namespace cpu
}  // namespace dracopt
