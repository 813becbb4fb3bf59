// Compiled once per instruction set: the build names it in DRACOPT_ISA and sets the compiler's target to match.
// Only the standard headers that define no function may be included: the linker would merge theirs across instruction
// sets.
#include "cpu/kernels.h"

#include "rules/all.h"

namespace dracopt {
inline namespace DRACOPT_ISA {
namespace {

double memoized_power(PowerMemo& memo, double base, double exponent) {
  const auto n = static_cast<int64_t>(exponent);
  for (int i = 0; i < PowerMemo::kEntries; ++i) {
    if (memo.base[i] == base && memo.exponent[i] == n) return memo.value[i];
  }
  const int i = memo.next;
  memo.next = (i + 1) % PowerMemo::kEntries;
  memo.base[i] = base;
  memo.exponent[i] = n;
  return memo.value[i] = power(base, n);
}

template <typename Rule, typename T>
void prepare(double step, const double* hyperparameters, PowerMemo& powers, Scalars* out) {
  using RuleScalars = typename Rule::template Scalars<T>;
  static_assert(sizeof(RuleScalars) <= kScalarBytes, "raise kScalarBytes in core/rule_entry.h");
  const auto& h = *reinterpret_cast<const typename Rule::Hyperparameters*>(hyperparameters);
  const auto power = [&](double base, double exponent) { return memoized_power(powers, base, exponent); };
  *reinterpret_cast<RuleScalars*>(out->bytes) = Rule::template prepare<T>(step, h, power);
}

constexpr int64_t kTileBytes = 1024;

// The processor's own prefetchers lose track of so many streams at once: on one large tensor this gains a tenth.
template <typename T>
void prefetch_tile(const T* stream) {
  for (int64_t line = 0; line < kTileBytes; line += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(stream) + line);
  }
}

// The one loop: load, apply the rule, store. The compiler vectorises it; the tail is the same code.
template <typename Rule, typename T, int N>
void update(const Segment& segment, int64_t begin, int64_t end) {
  const auto scalars = *static_cast<const typename Rule::template Scalars<T>*>(segment.scalars);
  const T sign = segment.maximize ? T(-1) : T(1);
  T* param = static_cast<T*>(segment.param);
  const T* grad = static_cast<const T*>(segment.grad);
  T* states[kMaxStates];
  for (int k = 0; k < N; ++k) states[k] = static_cast<T*>(segment.states[k]);

  constexpr int64_t tile = kTileBytes / sizeof(T), ahead = 2 * tile;
  for (int64_t from = begin; from < end; from += tile) {
    const int64_t to = end - from < tile ? end : from + tile;
    if (end - from > ahead) {
      prefetch_tile(param + from + ahead);
      prefetch_tile(grad + from + ahead);
      for (int k = 0; k < N; ++k) prefetch_tile(states[k] + from + ahead);
    }
    DRACOPT_INDEPENDENT
    for (int64_t i = from; i < to; ++i) {
      T p = param[i], s[kMaxStates];
      for (int k = 0; k < N; ++k) s[k] = states[k][i];
      Rule::template update<T, N>(scalars, p, sign * grad[i], s);
      for (int k = 0; k < N; ++k) states[k][i] = s[k];
      param[i] = p;
    }
  }
}

template <typename Rule, typename T, int N = 0>
constexpr void fill(UpdateFn* table) {
  if constexpr (N >= Rule::min_states && N <= Rule::max_states) table[N] = update<Rule, T, N>;
  if constexpr (N < kMaxStates) fill<Rule, T, N + 1>(table);
}

template <typename Rule>
constexpr RuleEntry entry() {
  using Hyperparameters = typename Rule::Hyperparameters;
  static_assert(sizeof(Hyperparameters) <= kMaxHyperparameters * sizeof(double), "raise kMaxHyperparameters");
  RuleEntry e{};
  e.name = Rule::name;
  e.group_keys = Rule::group_keys;
  e.state_keys = Rule::state_keys;
  e.hyperparameters = sizeof(Hyperparameters) / sizeof(double);
  e.counts_steps = Rule::counts_steps;
  e.states = [](const double* h) { return Rule::states(*reinterpret_cast<const Hyperparameters*>(h)); };
  e.prepare[static_cast<int>(Arithmetic::fp32)] = prepare<Rule, float>;
  e.prepare[static_cast<int>(Arithmetic::fp64)] = prepare<Rule, double>;
  fill<Rule, float>(e.update[static_cast<int>(Arithmetic::fp32)]);
  fill<Rule, double>(e.update[static_cast<int>(Arithmetic::fp64)]);
  return e;
}

#define DRACOPT_ENTRY(Rule) entry<Rule>(),
constexpr RuleEntry kRules[] = {DRACOPT_FOR_EACH_RULE(DRACOPT_ENTRY)};

#define DRACOPT_STRING(x) #x
#define DRACOPT_NAME(x) DRACOPT_STRING(x)

}  // namespace

extern const cpu::Kernels isa_kernels;
const cpu::Kernels isa_kernels = {DRACOPT_NAME(DRACOPT_ISA), kRules, sizeof(kRules) / sizeof(kRules[0])};

}  // namespace DRACOPT_ISA
}  // namespace dracopt
