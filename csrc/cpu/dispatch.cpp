// Picks the instruction set once, walks the segments of a range, and shares ranges between threads.
#if defined(DRACOPT_X86_64)
#include <cpuid.h>
#endif
#include <pthread.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace dracopt {

// Each instruction set has its own object file. ISA_FLAGS in setup.py lists the sets, and says whether the build has
// those of x86-64.
namespace baseline {
extern const cpu::Kernels isa_kernels;
}
#if defined(DRACOPT_X86_64)
namespace avx2 {
extern const cpu::Kernels isa_kernels;
}
namespace avx512 {
extern const cpu::Kernels isa_kernels;
}
#endif

namespace cpu {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool runs;
};

// An environment variable may hold any bytes; Python's errors may not.
std::string printable(const std::string& bytes) {
  std::string text;
  for (const char byte : bytes) {
    char escaped[5] = {byte};
    if (byte < ' ' || byte > '~') std::snprintf(escaped, sizeof(escaped), "\\x%02x", byte & 0xff);
    text += escaped;
  }
  return text;
}

#if defined(DRACOPT_X86_64)
// Older Clangs do not know this feature by its name.
bool has_f16c() {
  unsigned int eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

const Kernels& choose() {
#if defined(DRACOPT_X86_64)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  const Candidate candidates[] = {
      {&avx512::isa_kernels, has_avx512}, {&avx2::isa_kernels, has_avx2}, {&baseline::isa_kernels, true}};
#else
  const Candidate candidates[] = {{&baseline::isa_kernels, true}};
#endif
  const char* wanted = std::getenv("DRACOPT_ISA");
  if (wanted != nullptr && *wanted == '\0') wanted = nullptr;
  std::string available;
  for (const Candidate& candidate : candidates) {
    if (!candidate.runs) continue;
    if (wanted == nullptr || std::strcmp(wanted, candidate.kernels->isa) == 0) return *candidate.kernels;
    available += available.empty() ? "" : ", ";
    available += candidate.kernels->isa;
  }
  throw std::runtime_error("DRACOPT_ISA=" + printable(wanted) + " is not among what this machine runs: " + available);
}

// torch's thread pool does not survive fork(): a child that enters it waits for threads that do not exist.
std::atomic<int> fork_count{0};
const int at_fork = pthread_atfork(nullptr, nullptr, [] { ++fork_count; });

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

uint64_t interface() { return DRACOPT_INTERFACE; }

const RuleEntry* find_rule(const char* name) {
  const Kernels& k = kernels();
  for (size_t i = 0; i < k.rule_count; ++i) {
    if (std::strcmp(k.rules[i].name, name) == 0) return &k.rules[i];
  }
  return nullptr;
}

void run_range(int64_t begin, int64_t end, void* context) {
  const Work& work = *static_cast<const Work*>(context);
  run_units(work.segments, work.count, begin, end);
}

int forks() { return fork_count; }

bool in_parallel(ParallelFor parallel_for, int64_t count, int64_t grain, ParallelFunc function, void* context) {
  if (count == 0) return true;
  if (fork_count == 0 && parallel_for != nullptr) return parallel_for(0, count, grain, function, context) == 0;
  function(0, count, context);
  return true;
}

}  // namespace cpu
}  // namespace dracopt
