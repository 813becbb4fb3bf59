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
const Kernels& kernels();

// The rule of that name in `kernels()`; null if there is none.
const RuleEntry* find_rule(const char* name);

struct Work {
  const Segment* segments;
  size_t count;
  int64_t units;
};

// Updates the units [begin, end) of a Work. Never throws; threads may run disjoint ranges at once.
void run(int64_t begin, int64_t end, void* work);

}  // namespace cpu
}  // namespace dracopt
