// The CPU kernels, compiled once per instruction set from kernels.cpp, and the choice between them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/rule_entry.h"

namespace dracopt {
namespace cpu {

// The sum of the squares in a chunk of a gradient (see core/squares.h), and whether all its elements are finite.
struct Squares {
  double sum;
  bool finite;
};

struct Kernels {
  const char* isa;
  const RuleEntry* rules;
  size_t rule_count;
  Squares (*squares)(const Segment& segment, int64_t chunk);
  // Changes of gradients in place, by arithmetic. An Update's scalars are one double.
  UpdateFn multiply[2], limit[2], zero[2];
};

// Returns the best kernels for this machine, or those that the environment variable DRACOPT_ISA names. Chooses at the
// first call. Throws std::runtime_error if DRACOPT_ISA names none that this machine can run.
DRACOPT_EXPORT const Kernels& kernels();

// Identifies the headers that kernels and bindings share. A binding must have been built with the same number.
DRACOPT_EXPORT uint64_t interface();

// Returns the rule of that name in `kernels()`, or null if there is none.
DRACOPT_EXPORT const RuleEntry* find_rule(const char* name);

struct Work {
  const Segment* segments;
  size_t count;
  int64_t units;
};

// Updates the units [begin, end) of a Work. Never throws; threads may run disjoint ranges at once.
DRACOPT_EXPORT void run_range(int64_t begin, int64_t end, void* work);

// The types of torch's torch_parallel_for. These kernels are not linked to torch.
using ParallelFunc = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int (*)(int64_t begin, int64_t end, int64_t grain, ParallelFunc function, void* context);

// Returns how many forks separate this process from the one that loaded these kernels, 0 in the latter.
DRACOPT_EXPORT int forks();

// Shares [0, count) among torch's threads. A forked child has none of these threads, so the calling thread does all the
// work. Returns false if torch fails.
DRACOPT_EXPORT bool in_parallel(ParallelFor parallel_for, int64_t count, int64_t grain, ParallelFunc function,
                                void* context);

}  // namespace cpu
}  // namespace dracopt
