// The build compiles this file once per instruction set, names the set in DRACOPT_ISA and sets the compiler's target to
// match. Use no function of a standard header that the compiler does not always inline, because the linker would merge
// such functions across instruction sets.
#include "cpu/kernels.h"

#include "cpu/gradients.h"
#include "cpu/patches.h"
#include "cpu/rounding.h"
#include "cpu/runs.h"
#include "cpu/tiles.h"
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
bool prepare(StateScalar* state_scalars, bool first, const double* hyperparameters, PowerMemo& powers, Scalars* out) {
  using RuleScalars = typename Rule::template Scalars<T>;
  static_assert(sizeof(RuleScalars) <= kScalarBytes, "raise kScalarBytes in core/rule_entry.h");
  const auto& h = *reinterpret_cast<const typename Rule::Hyperparameters*>(hyperparameters);
  const auto power = [&](double base, double exponent) { return memoized_power(powers, base, exponent); };
  const RuleScalars scalars = Rule::template prepare<T>(state_scalars, first, h, power);
  *reinterpret_cast<RuleScalars*>(out->bytes) = scalars;
  return scalars.finite();
}

// Constants are the numbers that the loop reads of an Update, in registers.
template <typename Rule, typename T>
struct Constants {
  explicit Constants(const Update& update)
      : scalars(*static_cast<const typename Rule::template Scalars<T>*>(update.scalars)),
        factor(static_cast<T>(update.factor)) {}

  const typename Rule::template Scalars<T> scalars;
  const T factor;
};

// The one loop of every update. The compiler vectorises the loop.
template <typename Rule, int N, typename T>
DRACOPT_INLINE void apply(const Constants<Rule, T>& constants, T* const* tiles, int64_t count) {
  const auto [scalars, factor] = constants;
  T* const param = tiles[kParam];
  const T* const grad = tiles[kGrad];
  T* const* const states = tiles + kFirstState;
  PlainMath math;
  DRACOPT_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    T of_element[kMaxStates];
    for (int k = 0; k < N; ++k) of_element[k] = states[k][i];
    Rule::template update<T, N>(scalars, param[i], factor * grad[i], of_element, math);
    for (int k = 0; k < N; ++k) states[k][i] = of_element[k];
  }
}

constexpr int64_t kBlocksTile = 8 * kTile<float>;  // larger, because blocks are not staged in memory

// Updates a tile's whole blocks, in a segment whose streams are all in the dtype `Stored`. Returns how many elements
// they have.
template <typename Rule, typename Stored, int N, bool at_random = false>
DRACOPT_APART int64_t apply_blocks(const Segment& segment, int64_t from, int64_t count) {
  Stored* streams[kFirstState + N];
  for (int k = 0; k < kFirstState + N; ++k) streams[k] = static_cast<Stored*>(segment.data[k]) + from;
  const Constants<Rule, float> constants(*segment.update);
  RandomBits<at_random ? kBlocksTile : 0> room[at_random ? kFirstState + N : 1];
  const Bits* random[kFirstState + N] = {};
  for (int k = 0; k < kFirstState + N && at_random; ++k) {
    if (rounds_at_random(segment, k)) random[k] = random_tile(segment, k, from, count, room[k].words);
  }
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    alignas(64) float block[kFirstState + N][kBlock];
    float* tiles[kFirstState + N];
    for (int k = 0; k < kFirstState + N; ++k) {
      tiles[k] = block[k];
      widen_block(streams[k] + i, block[k]);
    }
    apply<Rule, N>(constants, tiles, kBlock);
    for (int k = 0; k < kFirstState + N; ++k) {
      if constexpr (at_random) {
        if (random[k] != nullptr) {
          narrow_block(block[k], random[k] + i, streams[k] + i);
          continue;
        }
      }
      if (k != kGrad) narrow_block(block[k], streams[k] + i);
    }
  }
  return i;
}

template <typename Rule, int N>
int64_t apply_bf16_blocks(const Segment& segment, int64_t from, int64_t count) {
  if (segment.rounding != nullptr) return apply_blocks<Rule, Bf16, N, true>(segment, from, count);
#if defined(__AVX512F__)
  if (processor_rounds_to_bf16()) return apply_blocks<Rule, RoundedByProcessor, N>(segment, from, count);
#endif
  return apply_blocks<Rule, Bf16, N>(segment, from, count);
}

// Updates a tile of any segment: load, apply, store.
template <typename Rule, typename T, int N>
DRACOPT_APART void apply_staged(const Segment& segment, int64_t from, int64_t count) {
  alignas(64) T staged[kFirstState + N][kTile<T>];
  T* tiles[kFirstState + N];
  const bool in_place = all_dense(segment, kFirstState + N, dtype_of<T>);
  for (int k = 0; k < kFirstState + N; ++k) {
    if (k == kParam && segment.master != Master::none) {
      tiles[k] = load_masters(segment, kFirstState + N, from, count, staged[k]);
    } else {
      tiles[k] = in_place ? static_cast<T*>(segment.data[k]) + from : load(segment, k, from, count, staged[k]);
    }
  }
  tiles[kGrad] = divided(*segment.update, tiles[kGrad], count, staged[kGrad]);
  apply<Rule, N>(Constants<Rule, T>(*segment.update), tiles, count);
  for (int k = 0; k < kFirstState + N && !in_place; ++k) {
    const bool is_staged = tiles[k] == staged[k] || (k == kParam && segment.master != Master::none);
    if (k != kGrad && is_staged) store_rounded(segment, k, kFirstState + N, from, count, tiles[k]);
  }
}

// Updates the patches of a range.
template <typename Rule, typename T, int N>
DRACOPT_APART void update_patches(const Segment& segment, int row_dim, int64_t begin, int64_t end) {
  const Patches<T> patches(segment, kFirstState + N, row_dim);
  alignas(64) T staged[kFirstState + N][Patches<T>::kMost];  // at most 90 KB of the stack
  const Constants<Rule, T> constants(*segment.update);
  const int64_t last = patches.first_from(end);
  for (int64_t number = patches.first_from(begin); number < last; ++number) {
    const Patch patch = patches.at(number);
    Rows<T> rows[kFirstState + N];
    bool adjacent = true;
    for (int k = 0; k < kFirstState + N; ++k) {
      rows[k] = load(patches, patch, segment, k, staged[k]);
      adjacent &= rows[k].pitch == patch.columns;
    }
    const int64_t count = adjacent ? 1 : patch.rows, length = patch.rows * patch.columns / count;
    for (int64_t row = 0; row < count; ++row) {
      T* tiles[kFirstState + N];
      for (int k = 0; k < kFirstState + N; ++k) {
        tiles[k] = rows[k].first + row * rows[k].pitch;
        if (!adjacent && rows[k].first != staged[k]) prefetch_run(tiles[k] + kPatchesAhead * length, 1, length);
      }
      tiles[kGrad] = divided(*segment.update, tiles[kGrad], length, staged[kGrad] + row * length);
      apply<Rule, N>(constants, tiles, length);
    }
    for (int k = 0; k < kFirstState + N; ++k) {
      if (k != kGrad && rows[k].first == staged[k]) store(patches, patch, segment, k, staged[k]);
    }
    if (segment.update->zeroes) clear(patches, patch, segment, kGrad);
  }
}

// Updates a range a tile at a time.
template <typename Rule, typename T, int N>
void update(const Segment& segment, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == 4) {  // patches of fp64 would make the library larger
    if (segment.layout != nullptr && segment.rounds_simply()) {
      const int row_dim = find_row_dim(segment, kFirstState + N);
      if (row_dim != segment.layout->dims - 1) return update_patches<Rule, T, N>(segment, row_dim, begin, end);
    }
  }
  const bool in_blocks = sizeof(T) == 4 && !segment.update->divides && segment.master == Master::none;
  const bool all_bf16 = in_blocks && all_dense(segment, kFirstState + N, Dtype::bf16);
  const bool all_fp16 = in_blocks && segment.rounding == nullptr && all_dense(segment, kFirstState + N, Dtype::fp16);
  const int64_t tile = all_bf16 || all_fp16 ? kBlocksTile : kTile<T>;
  for (int64_t from = begin; from < end; from += tile) {
    const int64_t count = end - from < tile ? end - from : tile;
    int64_t done = 0;
    if (all_bf16) done = apply_bf16_blocks<Rule, N>(segment, from, count);
    if (all_fp16) done = apply_blocks<Rule, Fp16, N>(segment, from, count);
    if (done < count) apply_staged<Rule, T, N>(segment, from + done, count - done);
    if (segment.update->zeroes) clear<T>(segment, kGrad, from, count);
  }
}

template <typename Rule, typename T, int N = 0>
constexpr void fill(UpdateFn* table) {
  if constexpr (N >= Rule::min_states && N <= Rule::max_states) table[N] = update<Rule, T, N>;
  if constexpr (N < kMaxStates) fill<Rule, T, N + 1>(table);
}

template <typename Rule>
constexpr size_t numbers_in_group() {
  size_t count = 0;
  for (const GroupKey& key : Rule::group_keys) {
    count += key.name == nullptr ? 0 : key.kind == KeyKind::decay_rates ? 2 : 1;
  }
  return count;
}

template <typename Rule>
constexpr RuleEntry entry() {
  using Hyperparameters = typename Rule::Hyperparameters;
  static_assert(sizeof(Hyperparameters) == numbers_in_group<Rule>() * sizeof(double), "group_keys yield other numbers");
  static_assert(sizeof(Hyperparameters) <= kMaxHyperparameters * sizeof(double), "raise kMaxHyperparameters");
  RuleEntry e{};
  e.name = Rule::name;
  e.index = rule_index<Rule>();
  e.group_keys = Rule::group_keys;
  e.state_scalar_keys = Rule::state_scalar_keys;
  e.state_keys = Rule::state_keys;
  e.hyperparameters = sizeof(Hyperparameters) / sizeof(double);
  e.state_scalars = sizeof(Rule::state_scalar_keys) / sizeof(char*) - 1;
  static_assert(sizeof(Rule::state_scalar_keys) / sizeof(char*) - 1 <= kMaxStateScalars,
                "raise kMaxStateScalars in core/state_scalar.h");
  static_assert((sizeof(Rule::state_scalar_keys) + sizeof(Rule::state_keys)) / sizeof(char*) - 2 < kMaxStateKeys,
                "raise kMaxStateKeys in core/rule_entry.h");
  e.states = [](const double* h) { return Rule::states(*reinterpret_cast<const Hyperparameters*>(h)); };
  e.prepare[static_cast<int>(Arithmetic::fp32)] = prepare<Rule, float>;
  e.prepare[static_cast<int>(Arithmetic::fp64)] = prepare<Rule, double>;
  e.scalar_bytes[static_cast<int>(Arithmetic::fp32)] = sizeof(typename Rule::template Scalars<float>);
  e.scalar_bytes[static_cast<int>(Arithmetic::fp64)] = sizeof(typename Rule::template Scalars<double>);
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
const cpu::Kernels isa_kernels = {DRACOPT_NAME(DRACOPT_ISA),           kRules,
                                  sizeof(kRules) / sizeof(kRules[0]),  squares,
                                  {multiply<float>, multiply<double>}, {limit<float>, limit<double>},
                                  {zero<float>, zero<double>}};

}  // namespace DRACOPT_ISA
}  // namespace dracopt
