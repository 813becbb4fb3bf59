"""Tests the rules' scalars, the numbering of strided elements, the sharing of work, conversions and kernels. They are
compiled on their own, without torch, and for a 64-bit Arm as well if a cross compiler and an emulator are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from .isa import ISA_FLAGS, runs

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "c++").split()[0]
MACHINES = {
    "this machine": (COMPILER, []),
    "aarch64": ("aarch64-linux-gnu-g++", ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]),
}
"""The compiler for each machine, and the command that runs its programs."""

OutputOf = Callable[..., str]


def compile_and_run(machine: str, folder: Path, program: str, *flags: str) -> str:
    """Returns what the program prints."""
    compiler, emulator = MACHINES[machine]
    if any(shutil.which(tool) is None for tool in (compiler, *emulator[:1])):
        pytest.skip(f"no compiler or emulator for {machine}")
    (folder / "program.cpp").write_text(program)
    common = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *common, *flags, "program.cpp", "-o", "program"], cwd=folder, check=True)
    return subprocess.run([*emulator, folder / "program"], capture_output=True, text=True, check=True).stdout


@pytest.fixture(params=MACHINES)
def output_of(request: pytest.FixtureRequest, tmp_path: Path) -> OutputOf:
    return lambda program, *flags: compile_and_run(request.param, tmp_path, program, *flags)


POWERS = """
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include "rules/all.h"
int main() {
  long wrong = 0, wrong_by_more = 0;
  for (double beta : {0.0, 0.3, 0.9, 0.95, 0.98, 0.99, 0.999, 0.9999}) {
    for (long step = 1; step <= 1000000; ++step) {
      const double ours = dracopt::power(beta, step), libm = std::pow(beta, double(step));
      wrong += float(1 - ours) != float(1 - libm) || float(std::sqrt(1 - ours)) != float(std::sqrt(1 - libm));
      wrong_by_more += std::fabs(ours - libm) > 2.3e-16 * libm + 1e-290;
    }
  }
  std::printf("%ld %ld", wrong, wrong_by_more);
}
"""


def test_bias_corrections_are_those_of_libm_up_to_a_million_steps(output_of: OutputOf) -> None:
    assert output_of(POWERS) == "0 0", "powers that round to another fp32 scalar; those more than an ulp off"


MOMENTA = """
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include "rules/all.h"
int main() {
  long wrong = 0, wrong_by_more = 0;
  for (double decay : {0.0, 1e-4, 4e-3, 0.3, 7.0}) {
    for (long step = 1; step <= 1000000; ++step) {
      dracopt::NAdam::Hyperparameters h{1e-3, 0.9, 0.999, 1e-8, 0, decay, 0};
      const double ours = dracopt::NAdam::momentum(double(step), h);
      const double libm = 0.9 * (1 - 0.5 * std::pow(0.96, double(step) * decay));
      wrong += float(ours) != float(libm) || float(1 - ours) != float(1 - libm);
      wrong_by_more += std::fabs(ours - libm) > 2.3e-16;
    }
  }
  double worst = 0;
  for (double x = -707.99; x < 709; x += 0.0137) {
    worst = std::fmax(worst, std::fabs(dracopt::exponential(x, 0) - std::exp(x)) / std::exp(x));
  }
  const bool ends = dracopt::exponential(720, 0) == INFINITY && dracopt::exponential(1e300, 0) == INFINITY &&
                    dracopt::exponential(-1e300, 0) == 0 && dracopt::exponential(-INFINITY, 0) == 0 &&
                    std::isnan(dracopt::exponential(NAN, 0)) && dracopt::exponential(0, 0) == 1;
  std::printf("%ld %ld %d %d", wrong, wrong_by_more, worst < 4.5e-16, int(ends));
}
"""


def test_nadams_momenta_are_those_of_libm_up_to_a_million_steps(output_of: OutputOf) -> None:
    assert output_of(MOMENTA) == "0 0 1 1", "other fp32 scalars; more than an ulp off; exponential; its ends"


# The segments' update function records its range. No memory is allocated: the largest has 2^40 elements.
SHARING = """
#include <cstdio>
#include <initializer_list>
#include <vector>
#include "core/segment.h"
using namespace dracopt;
struct Range { const Segment* segment; int64_t begin, end; };
static std::vector<Range> ranges;
static void update(const Segment& s, int64_t begin, int64_t end) { ranges.push_back({&s, begin, end}); }
int main() {
  long faults = 0;
  const Update recording{update, nullptr, 1, 1, false, false};
  const int64_t large = int64_t(1) << 31;
  const std::vector<std::vector<int64_t>> lists = {
      {large + 77}, {0, large * 512, 0, 1}, {5, large, large - 1, large + 1, 0, 63, 64, 65}, {0}, {1, 1, 1}};
  for (const auto& list : lists) {
    for (int32_t unit_numel : {8, 16, 32}) {
      std::vector<Segment> segments(list.size());
      int64_t units = 0;
      for (size_t i = 0; i < list.size(); ++i) {
        segments[i].update = &recording;
        segments[i].numel = list[i];
        segments[i].unit_numel = unit_numel;
        segments[i].first_unit = units;
        units += units_of(list[i], unit_numel);
      }
      for (int64_t threads : {1, 2, 3, 7, 64}) {
        ranges.clear();
        const int64_t grain = (units + threads - 1) / threads;
        for (int64_t from = 0; from < units; from += grain) {
          run_units(segments.data(), segments.size(), from, from + grain < units ? from + grain : units);
        }
        // Every segment's ranges follow one another from its first to its last element.
        size_t r = 0;
        for (const Segment& s : segments) {
          int64_t at = 0;
          do {
            faults += r == ranges.size() || ranges[r].segment != &s || ranges[r].begin != at || ranges[r].end < at;
            if (r < ranges.size()) at = ranges[r++].end;
          } while (at < s.numel && faults == 0);
          faults += at != s.numel;
        }
        faults += r != ranges.size();
      }
    }
  }
  std::printf("%ld", faults);
}
"""


def test_work_is_shared_without_gap_or_overlap_beyond_two_to_the_31(output_of: OutputOf) -> None:
    assert output_of(SHARING) == "0"


LAYOUTS = """
#include <cstdio>
#include <vector>
#include "core/layout.h"
using namespace dracopt;
static void show(std::vector<int64_t> sizes, std::vector<std::vector<int64_t>> strides) {
  const int64_t* pointers[kMaxStreams] = {};
  for (size_t k = 0; k < strides.size(); ++k) pointers[k] = strides[k].data();
  const Layout layout = make_layout(int(sizes.size()), sizes.data(), int(strides.size()), pointers);
  for (int d = 0; d < layout.dims; ++d) {
    std::printf("%lld:", (long long)layout.sizes[d]);
    for (size_t k = 0; k < strides.size(); ++k) std::printf("%s%lld", k ? "," : "", (long long)layout.strides[k][d]);
    std::printf(" ");
  }
  for (size_t k = 0; k < strides.size(); ++k) std::printf("%d", int(layout.dense(int(k))));
  std::printf("\\n");
}
int main() {
  const int64_t G = int64_t(1) << 30;
  show({4, 5, 6}, {{30, 6, 1}, {30, 6, 1}});            // one dimension
  show({4, 5, 6}, {{30, 6, 1}, {1, 4, 20}});            // nothing joins
  show({4, 5, 6}, {{1, 24, 4}, {1, 24, 4}});            // dense in another order
  show({4, 5, 6}, {{30, 6, 1}, {60, 12, 2}});           // joins with gaps
  show({4, 1, 6}, {{6, 99, 1}, {6, 77, 1}});            // a dimension of one element
  show({1, 1}, {{5, 7}, {9, 9}});                       // one element
  show({8 * G, 6}, {{6, 1}, {0, 1}});                   // expanded along more than 2^31 elements
  show({2, 4 * G, 3}, {{12 * G, 3, 1}, {1, 6, 2}});     // strides beyond 2^31
}
"""


def test_layouts_join_what_all_streams_traverse_as_one(output_of: OutputOf) -> None:
    giga = 2**30
    assert output_of(LAYOUTS).splitlines() == [
        "120:1,1 11",
        "4:30,1 5:6,4 6:1,20 10",
        "120:1,1 11",
        "120:1,2 10",
        "24:1,1 11",
        "1:1,1 11",
        f"{8 * giga}:6,0 6:1,1 10",
        f"2:{12 * giga},1 {12 * giga}:1,2 10",
    ]


EXTREMES = """
#include <cstdio>
#include <vector>
#include "cpu/tiles.h"
using namespace dracopt;
int main() {
  // Element numbers beyond 2^31, in a layout of which only the offsets are computed.
  const int64_t M = int64_t(1) << 32;
  Layout layout{};
  layout.dims = 2;
  layout.sizes[0] = 5; layout.sizes[1] = M;
  layout.strides[0][0] = M; layout.strides[0][1] = 1;
  layout.strides[1][0] = 1; layout.strides[1][1] = 5;
  for_each_run(layout, 1, 3 * M - 2, 4, [](int64_t offset, int64_t stride, int64_t n) {
    std::printf("%lld+%lldx%lld ", (long long)offset, (long long)stride, (long long)n);
  });
}
"""


def test_offsets_beyond_two_to_the_31(output_of: OutputOf) -> None:
    big = 2**32
    assert output_of(EXTREMES).split() == [f"{2 + (big - 2) * 5}+5x2", "3+5x2"]


# Cuts tensors of which one is transposed, and shares them among threads. No memory is allocated.
PATCHES = """
#include <cstdio>
#include <initializer_list>
#include <vector>
#include "cpu/patches.h"
using namespace dracopt;
static long faults = 0;

static void check(std::vector<int64_t> sizes, std::vector<int64_t> other) {
  Segment segment{};
  Layout layout{};
  layout.dims = static_cast<int>(sizes.size());
  segment.numel = 1;
  for (int d = layout.dims - 1; d >= 0; --d) {
    layout.sizes[d] = sizes[static_cast<size_t>(d)];
    layout.strides[0][d] = segment.numel;
    layout.strides[1][d] = other[static_cast<size_t>(d)];
    segment.numel *= layout.sizes[d];
  }
  segment.layout = &layout;
  const int row_dim = find_row_dim(segment, 2);
  faults += row_dim == layout.dims - 1;
  if (row_dim == layout.dims - 1) return;
  const Patches<float> patches(segment, 2, row_dim);
  faults += patches.first_from(0) != 0;
  const int64_t all = patches.first_from(segment.numel);
  // Ranges share the patches without gap or overlap, and about evenly.
  for (int64_t threads : {1, 2, 3, 7, 64}) {
    const int64_t share = segment.numel / threads;
    int64_t before = 0;
    for (int64_t t = 1; t <= threads; ++t) {
      const int64_t end = patches.first_from(t == threads ? segment.numel : t * share);
      faults += end < before || end > all || (all > 64 * 64 && end - before > 2 * all / threads);
      before = end;
    }
    faults += before != all;
  }
  if (segment.numel > 1000000) return;
  // Every element belongs to one patch, at one place in both tensors.
  std::vector<int> found(static_cast<size_t>(segment.numel));
  for (int64_t number = 0; number < all; ++number) {
    const Patch patch = patches.at(number);
    faults += patch.rows < 1 || patch.columns < 1 || patch.rows * patch.columns > Patches<float>::kMost;
    for (int64_t row = 0; row < patch.rows; ++row) {
      for (int64_t column = 0; column < patch.columns; ++column) {
        int64_t at = patch.offsets[0] + row * patches.row_stride(0) + column * patches.column_stride(0), theirs = 0;
        ++found[static_cast<size_t>(at)];
        for (int d = layout.dims - 1; d >= 0; at /= layout.sizes[d--]) {
          theirs += at % layout.sizes[d] * layout.strides[1][d];
        }
        faults += theirs != patch.offsets[1] + row * patches.row_stride(1) + column * patches.column_stride(1);
      }
    }
  }
  for (int times : found) faults += times != 1;
}

int main() {
  const int64_t G = int64_t(1) << 30;
  check({64, 64}, {1, 64});
  check({300, 2}, {1, 300});
  check({129, 65}, {1, 129});
  check({1000, 130}, {2, 2000});
  check({7, 300, 9}, {2700, 1, 300});          // channels_last
  check({40, 5, 3, 11}, {1, 40, 200, 600});    // their order is the reverse
  check({70, 5, 70}, {1, 0, 70});              // they are expanded along the second
  check({4 * G, 1000}, {1, 4 * G});
  check({5, 8 * G, 3}, {24 * G, 1, 8 * G});
  // Patches do not pay for few elements, nor if the rows' elements share cache lines.
  for (int64_t other : {3, 0, 17}) {
    Segment segment{};
    Layout layout{2, {other == 3 ? 3 : 300, 50}, {{50, 1}, {1, other}}};
    segment.layout = &layout;
    faults += find_row_dim(segment, 2) != (other == 17 ? 0 : 1);
  }
  std::printf("%ld", faults);
}
"""


def test_patches_hold_every_element_once(output_of: OutputOf) -> None:
    assert output_of(PATCHES) == "0"


# Compares the processor's conversions with the integer arithmetic that defines them, NaNs included.
CONVERSIONS = """
#include <cstdio>
#include <cstring>
#include "cpu/runs.h"
using namespace dracopt;
static long wrong = 0;

static uint32_t bits(float x) { return bits_of(x); }
static uint32_t bits(Bf16 x) { return x.bits; }
#if !defined(__AVX512F__)
using RoundedByProcessor = Bf16;
static bool processor_rounds_to_bf16() { return false; }
#endif
static uint32_t bits(Fp16 x) { return x.bits; }

// The order of a block's numbers once they are widened.
template <typename Stored>
static void find_order(int* order) {
  Stored numbers[kBlock];
  float wide[kBlock];
  for (int i = 0; i < kBlock; ++i) numbers[i] = narrow<Stored>(static_cast<float>(i));
  widen_block(numbers, wide);
  for (int i = 0; i < kBlock; ++i) order[i] = static_cast<int>(wide[i]);
}

template <typename Stored>
static void narrow_all(const uint32_t (&patterns)[kBlock]) {
  static int order[kBlock];
  if (order[1] == 0) find_order<Stored>(order);
  float numbers[kBlock], permuted[kBlock];
  std::memcpy(numbers, patterns, sizeof(numbers));
  for (int i = 0; i < kBlock; ++i) permuted[i] = numbers[order[i]];
  Stored run[kBlock], block[kBlock];
  RoundedByProcessor rounded[kBlock];
  narrow_run(numbers, kBlock - 1, run);  // with a rest that fills no vector
  run[kBlock - 1] = narrow<Stored>(numbers[kBlock - 1]);
  narrow_block(permuted, block);
  for (int i = 0; i < kBlock; ++i) {
    const uint32_t expected = bits(narrow<Stored>(numbers[i]));
    wrong += (bits(run[i]) != expected) + (bits(block[i]) != expected);
  }
  if (!std::is_same_v<Stored, Bf16> || !processor_rounds_to_bf16()) return;
  narrow_block(numbers, rounded);
  for (int i = 0; i < kBlock; ++i) wrong += bits(rounded[i]) != bits(narrow<Bf16>(numbers[i]));
}

template <typename Stored>
static void widen_all() {
  int order[kBlock];
  find_order<Stored>(order);
  for (uint32_t first = 0; first < 0x10000; first += kBlock) {
    Stored numbers[kBlock];
    float run[kBlock], block[kBlock];
    for (int i = 0; i < kBlock; ++i) numbers[i].bits = static_cast<uint16_t>(first + static_cast<uint32_t>(i));
    widen_run(numbers, kBlock - 1, run);
    run[kBlock - 1] = widen(numbers[kBlock - 1]);
    widen_block(numbers, block);
    for (int i = 0; i < kBlock; ++i) {
      wrong += (bits(run[i]) != bits(widen(numbers[i]))) + (bits(block[i]) != bits(widen(numbers[order[i]])));
    }
  }
}

int main() {
  widen_all<Bf16>();
  widen_all<Fp16>();
  // All upper halves, with all lower ones next to which the rounding changes, and others.
  const uint32_t lower[] = {0, 1, 0xfff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x3001, 0x7fff, 0x8000, 0x8001, 0xffff};
  for (uint32_t upper = 0; upper < 0x10000; ++upper) {
    for (uint32_t low : lower) {
      for (int lane = 0; lane < kBlock; lane += kBlock - 1) {  // one number alone, and all of a block
        uint32_t patterns[kBlock];
        for (int i = 0; i < kBlock; ++i) patterns[i] = lane == 0 ? (upper << 16 | low) + 0x9e3779b9u * (uint32_t)i : 0;
        patterns[lane] = upper << 16 | low;
        narrow_all<Bf16>(patterns);
        narrow_all<Fp16>(patterns);
      }
    }
  }
  std::printf("%ld", wrong);
}
"""


def test_conversions(output_of: OutputOf) -> None:
    assert output_of(CONVERSIONS) == "0"


@pytest.mark.parametrize("isa", list(ISA_FLAGS)[1:])
def test_conversions_of_instruction_sets(isa: str, tmp_path: Path) -> None:
    if not runs(isa):
        pytest.skip(f"this machine does not run {isa}")
    assert compile_and_run("this machine", tmp_path, CONVERSIONS, *ISA_FLAGS[isa]) == "0"


# Takes a step of every rule with every mixture of dtypes, in rows and transposed, plainly and with all that an Update
# can ask for. Prints a digest of all streams.
KERNELS = """
#include <cstdio>
#include <cstring>
#include <vector>
#include "cpu/kernels.cpp"
using namespace dracopt;
static uint64_t digest = 1;
static uint32_t seed = 1;

struct Shape { int64_t rows, columns; };

static void step(const RuleEntry& rule, int states, int arithmetic, const Dtype* dtypes, Shape shape, Update update) {
  std::vector<unsigned char> memory[kMaxStreams];
  Segment segment{};
  Layout layout{2, {shape.rows, shape.columns}, {}};
  segment.numel = shape.rows * shape.columns;
  for (int k = 0; k < kFirstState + states; ++k) {
    const bool transposed = shape.rows > 1 && k == kGrad;
    layout.strides[k][0] = transposed ? 1 : shape.columns;
    layout.strides[k][1] = transposed ? shape.rows : 1;
    segment.dtypes[k] = dtypes[k < kFirstState ? k : kFirstState];
    segment.dense[k] = !transposed;
    const int64_t misplaced = k * itemsize(segment.dtypes[k]);
    memory[k].resize(static_cast<size_t>(segment.numel * itemsize(segment.dtypes[k]) + misplaced));
    segment.data[k] = memory[k].data() + misplaced;
    as_stored(segment.data[k], segment.dtypes[k], [&](auto* data) {
      for (int64_t i = 0; i < segment.numel; ++i) {
        seed = seed * 1664525 + 1013904223;
        float number = static_cast<float>(static_cast<int32_t>(seed) >> 8) * 0x1p-23f;
        if (i % 50 == 49) number *= i % 100 == 49 ? 0x1p-64f : 0x1p-130f;  // with a subnormal square, or result
        data[i] = narrow<std::remove_pointer_t<decltype(data)>>(k < kFirstState ? number : number * number);
      }
    });
  }
  segment.layout = shape.rows > 1 ? &layout : nullptr;
  const double hyperparameters[kMaxHyperparameters] = {0.01, 0.9, rule.index == 2 ? 0.1 : 0.99, 1e-8, 0.1, 0.5, 1};
  StateScalar scalars[kMaxStateScalars] = {{5, true}, {0.7, true}};
  PowerMemo powers{};
  Scalars prepared;
  rule.prepare[arithmetic](scalars, false, hyperparameters, powers, &prepared);
  update.scalars = &prepared;
  update.derive();
  segment.update = &update;
  rule.update[arithmetic][states](segment, 0, segment.numel / 2);
  rule.update[arithmetic][states](segment, segment.numel / 2, segment.numel);
  for (const auto& stream : memory) {
    for (unsigned char byte : stream) digest = (digest ^ byte) * 1099511628211u;
  }
}

int main() {
  const Dtype all[] = {Dtype::fp32, Dtype::fp64, Dtype::bf16, Dtype::fp16};
  const Update updates[] = {{nullptr, nullptr, 1, 1, false, false}, {nullptr, nullptr, 3, 0.37, true, true}};
  for (size_t r = 0; r < isa_kernels.rule_count; ++r) {
    for (int states = 0; states <= kMaxStates; ++states) {
      for (Dtype param : all) {
        for (Dtype grad : all) {
          for (Dtype state : all) {
            const Dtype dtypes[] = {param, grad, state};
            const int arithmetic = param == Dtype::fp64 || grad == Dtype::fp64 || state == Dtype::fp64;
            if (isa_kernels.rules[r].update[arithmetic][states] == nullptr) continue;
            for (const Update& update : updates) {
              for (Shape shape : {Shape{1, 517}, {70, 81}}) {
                step(isa_kernels.rules[r], states, arithmetic, dtypes, shape, update);
              }
            }
          }
        }
      }
    }
  }
  std::printf("%016llx", static_cast<unsigned long long>(digest));
}
"""
AS_BUILT = ["-O3", "-fno-math-errno", "-fno-trapping-math"]


def test_kernels_give_the_same_bits(output_of: OutputOf, tmp_path: Path) -> None:
    plain = compile_and_run("this machine", tmp_path, KERNELS)
    assert output_of(KERNELS, *AS_BUILT) == plain
    assert plain != f"{1:016x}"


@pytest.mark.parametrize("isa", list(ISA_FLAGS)[1:])
def test_kernels_of_instruction_sets_give_the_same_bits(isa: str, tmp_path: Path) -> None:
    if not runs(isa):
        pytest.skip(f"this machine does not run {isa}")
    plain = compile_and_run("this machine", tmp_path, KERNELS)
    assert compile_and_run("this machine", tmp_path, KERNELS, *AS_BUILT, *ISA_FLAGS[isa]) == plain


# Launches must share out all tensors, and blocks all of their tiles. No memory is allocated: the largest has 2^42
# elements.
LAUNCHES = """
#include <cstdio>
#include <initializer_list>
#include <memory>
#include <vector>
#include "cuda/update.h"
using namespace dracopt;
using namespace dracopt::cuda;
static long faults = 0;

static void check_ranges(int64_t numel) {
  for (int lanes : {0, 4, 8}) {
    for (int head = 0; head < (lanes == 0 ? 1 : lanes); ++head) {
      const int64_t tiles = Filled().tiles_of(numel);
      for (int64_t t : {int64_t(0), int64_t(1), tiles / 2, tiles - 2, tiles - 1}) {
        if (t < 0 || t >= tiles) continue;
        const Range r = range_of(t, numel, head, lanes);
        const int64_t end = r.begin + r.end;
        if (r.end == 0 && r.begin >= numel) continue;  // the tile before has taken the last few
        faults += !(0 <= r.first && r.first <= r.last && r.last <= r.end && end <= numel);
        if (t == 0) {
          faults += r.begin != 0;
        } else if (r.end > 0) {
          const Range before = range_of(t - 1, numel, head, lanes);
          faults += r.begin != before.begin + before.end;
        }
        faults += t == tiles - 1 ? r.end > 0 && end != numel : r.end < kTile && end != numel;
        faults += r.end > kTile + 8;
        if (lanes == 0) {
          faults += r.first != r.last;
        } else {
          faults += (r.last - r.first) % lanes != 0 || (r.first < r.last && (r.begin + r.first - head) % lanes != 0);
          faults += t > 0 && r.first != 0;               // only a tensor's first elements
          faults += r.last != r.end && end != numel;     // and its last ones
          faults += r.end - r.last >= lanes || r.first > head;
        }
      }
    }
  }
}

// Returns the number of launches.
static size_t fill(const std::vector<int64_t>& sizes, size_t slot, size_t tensors_in_a_group) {
  struct Launch { Filled filled; std::vector<uint32_t> first_tiles; std::vector<int64_t> sizes; };
  std::vector<Launch> launches(1);
  for (size_t i = 0; i < sizes.size(); ++i) {
    for (;;) {
      Launch& launch = launches.back();
      const int64_t first = launch.filled.tiles;
      const bool has_slot = !launch.sizes.empty() && i % tensors_in_a_group != 0;
      if (launch.filled.add(sizes[i], has_slot ? 0 : slot)) {
        launch.first_tiles.push_back(uint32_t(first));
        launch.sizes.push_back(sizes[i]);
        break;
      }
      faults += launch.sizes.empty();
      launches.emplace_back();
    }
  }
  auto arguments = std::make_unique<Arguments>();
  for (const Launch& launch : launches) {
    faults += launch.filled.tensors + launch.filled.slot_words > kArgumentWords;
    faults += launch.filled.tensors != launch.sizes.size() || launch.filled.tiles >= int64_t(1) << 31;
    arguments->first_tiles = launch.first_tiles.data();
    arguments->count = uint32_t(launch.sizes.size());
    for (size_t row = 0; row < launch.sizes.size(); ++row) {
      const int64_t tiles = Filled().tiles_of(launch.sizes[row]);
      for (int64_t t : {int64_t(0), int64_t(1), tiles / 2, tiles - 1}) {
        if (t >= tiles) continue;
        const Tile tile = tile_of(*arguments, uint32_t(launch.first_tiles[row] + t), [](const auto& holds) {
          uint32_t count = 0;
          for (uint32_t thread = 0; thread < kThreads; ++thread) count += holds(thread);
          return count;
        });
        faults += tile.row != row || tile.number != t;
      }
      const int64_t next = row + 1 < launch.sizes.size() ? launch.first_tiles[row + 1] : launch.filled.tiles;
      faults += next != launch.first_tiles[row] + tiles;
    }
  }
  return launches.size();
}

int main() {
  const int64_t large = int64_t(1) << 31;
  for (int64_t numel : {int64_t(0), int64_t(1), int64_t(3), int64_t(7), int64_t(8), int64_t(9), kTile - 1, kTile,
                        kTile + 1, kTile + 7, 2 * kTile, 3 * kTile + 5, large - 1, large, large + 77, large << 11}) {
    check_ranges(numel);
  }
  for (size_t count : {1, 2, 3, 30, 465, 3900, 4000, 10000}) {
    for (size_t empty = 0; empty < (count < 40 ? count : 1); ++empty) {
      std::vector<int64_t> sizes(count, kTile + 1);
      sizes[empty] = 0;
      fill(sizes, 5, 1 + count / 3);
      std::vector<int64_t> mostly_empty(count, 0);
      mostly_empty[empty] = 3 * kTile;
      fill(mostly_empty, 5, count);
    }
  }
  fill({large + 3, 0, large << 9, 5, large << 11, large << 11, 0}, 5, 7);
  std::printf("%zu", fill(std::vector<int64_t>(465, 3), 5, 1));            // a group each
  std::printf(" %zu", fill(std::vector<int64_t>(3900, 3), 5, 130));        // 30 groups
  std::printf(" %zu", fill(std::vector<int64_t>(kArgumentWords - 5, 3), 5, 10000));  // just fits
  std::printf(" %zu", fill(std::vector<int64_t>(kArgumentWords - 4, 3), 5, 10000));  // just does not
  std::printf(" %zu", fill(std::vector<int64_t>(10000, 3), 5, 100));
  std::printf(" %zu", fill(std::vector<int64_t>(10000, 3), 5, 1));         // 681 of 6 words each, and one word left
  std::printf(" %zu", fill({large << 11, large << 11, 1}, 5, 10));         // more blocks than a launch can have
  std::printf(" %ld", faults);
}
"""


def test_launches_hold_every_tile_once(output_of: OutputOf) -> None:
    *launches, faults = output_of(LAUNCHES).split()
    assert faults == "0"
    assert launches == ["1", "1", "1", "2", "3", "15", "2"]


FAST_MATH = """
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include "cuda/fast_math.h"
using namespace dracopt;
using namespace dracopt::cuda;
static long wrong = 0, exact = 0, asked = 0;

static void compare(FastMath math, float fast, float plain) {
  math.require_numbers(1, fast);
  ++asked;
  exact += math.exact;
  wrong += math.exact && std::memcmp(&fast, &plain, 4) != 0;
}

static void root_over(float x, float d) {
  FastMath math;
  const float fast = math.root_over(x, Divisor<float>::of(d));
  compare(math, fast, PlainMath().root_over(x, Divisor<float>::of(d)));
}

static void quotient(float x, float d) {
  FastMath math, by_constant;
  const float fast = math.quotient(x, d), constant = by_constant.quotient(x, Divisor<float>::of(d));
  compare(math, fast, x / d);
  compare(by_constant, constant, x / d);
}

static float of_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }

int main() {
  std::mt19937 random(1);
  const float special[] = {0.0f, -0.0f, 1e-45f, -1e-45f, 1e-38f, 0x1p-126f, 0x1p-125f, 0x1p-101f, 0x1p-100f, 0x1p-81f,
                           -0x1p-80f, 0x1p-41f, 0x1p-40f, 1.0f, -1.0f, 0x1p40f, 0x1.000002p40f, 0x1p100f, 0x1p126f,
                           3e38f, INFINITY, -INFINITY, NAN};
  for (float x : special) {
    for (float d : special) {
      quotient(x, d);
      root_over(x, d);
    }
  }
  for (uint32_t i = 0; i < 1000000; ++i) {  // of all sizes
    root_over(of_bits(random() & 0x7fffffffu), of_bits(random() % 0x00800000u | 0x3f000000u));
    quotient(of_bits(random()), of_bits(random() & 0x7fffffffu));
    // Below the normal numbers, close to the middle between two numbers.
    const float d = of_bits(random() % 0x00800000u + 0x5e000000u);
    quotient(static_cast<float>(d * 0x1p-149 * (random() % 1000 + 0.5)), d);
  }
  const long before = exact, asked_before = asked;
  for (uint32_t i = 0; i < 1000000; ++i) {
    const uint32_t sign = random() & 0x80000000u;
    const float large = of_bits(random() % 0x14000001u + 0x3f800000u);
    const float small = of_bits(random() % 0x3f000000u + 0x00800000u);
    quotient(of_bits(sign | (random() % 0x50000000u + 0x17800000u)), large);  // from 2^-80; by 1 to 2^40
    quotient(of_bits(sign | (random() % 0x28000000u + 0x17800000u)), small);  // up to 1; by the smallest to 1
    root_over(of_bits(random() % 0x6e000000u + 0x0d800000u), large);          // from 2^-100
  }
  for (float zero : {0.0f, -0.0f}) {  // of parameters that no gradient has reached yet
    root_over(zero, 0.5f);
    quotient(zero, 1e-8f);
  }
  for (uint32_t significand = 0; significand < 1u << 23; ++significand) {
    for (uint32_t exponent : {127u, 128u}) root_over(of_bits(exponent << 23 | significand), 1.0f);
    // Numerators whose quotients lie close to the middle between two numbers.
    const float d = of_bits(127u << 23 | significand);
    const double middle = 1 + (2.0 * (random() & 0x7fffffu) + 1) * 0x1p-24;
    quotient(static_cast<float>(middle * d), d);
  }
  wrong += exact - before != asked - asked_before;  // none of these is left to PlainMath
  std::printf("%ld", wrong);
}
"""


def test_fast_math(output_of: OutputOf) -> None:
    """All significands in two binades, all exponents and special numbers give the bits of IEEE's operations, or none.

    The host makes the estimates here. ``benchmarks/kernels/check.cpp`` compares all roots and reciprocals, and 34
    billion quotients, with a GPU's own estimates. test_cuda_build.py counts the steps of FastMath and of the compiler.
    """
    assert output_of(FAST_MATH) == "0"


MASTERS = """
#include <cstdio>
#include <initializer_list>
#include "core/master.h"
using namespace dracopt;
int main() {
  unsigned long long changed = 0, other_params = 0, far = 0, lost = 0, not_nan = 0, ties = 0, wrong_pairs = 0;
  for (unsigned long long all = 0; all < 1ull << 32; ++all) {
    const auto bits = static_cast<uint32_t>(all);
    const float master = float_of(bits);
    // All pairs of halves belong to a master, or else the parameter is the master.
    const float upper = float_of(bits & 0xffff0000u), joined = join_master(upper, bits & 0xffffu);
    const bool is_pair = joined != joined || split_master(joined) == bits || bits_of(joined) == bits_of(upper);
    wrong_pairs += !is_pair || (upper == upper) != (joined == joined);
    const uint32_t halves = split_master(master);
    const Bf16 param = round_master(master, Bf16());
    const float again = join_master(widen(param), halves & 0xffffu);
    other_params += param.bits != halves >> 16;
    if (master != master) {
      not_nan += again == again || widen(param) == widen(param) || halves != 0x7fc00000u;
      for (float zero : {0.0f, -0.0f}) lost += bits_of(current_master(zero, master, Bf16())) != bits_of(zero);
      continue;
    }
    changed += bits_of(again) != bits;
    lost += bits_of(current_master(widen(param), master, Bf16())) != bits;
    const uint16_t even = narrow<Bf16>(master).bits;
    const bool is_tie = (bits & 0xffffu) == 0x8000u;
    ties += is_tie;
    far += is_tie ? param.bits != static_cast<uint16_t>((bits >> 16) + 1) : param.bits != even;
    // A parameter that rounds ties to even has kept its master as well, and the next one has not.
    lost += bits_of(current_master(widen(Bf16{even}), master, Bf16())) != bits;
    const float neighbour = widen(Bf16{static_cast<uint16_t>(param.bits ^ 2)});
    lost += bits_of(current_master(neighbour, master, Bf16())) != bits_of(neighbour);
  }
  std::printf("%llu %llu %llu %llu %llu %llu %llu", changed, other_params, far, lost, not_nan, wrong_pairs, ties);
}
"""


def test_all_masters_are_what_their_halves_say(tmp_path: Path) -> None:
    """Every fp32 number comes back from its halves, and a bf16 parameter tells whether it was rounded from a master."""
    flags = ["-O3", *ISA_FLAGS[max((isa for isa in ISA_FLAGS if runs(isa)), key=list(ISA_FLAGS).index)]]
    found = compile_and_run("this machine", tmp_path, MASTERS, *flags)
    ties = 2**16 - 2**8  # a half of each number that is not infinite or NaN
    assert found == f"0 0 0 0 0 0 {ties}"


RANDOM = """
#include <cstdio>
#include <cstring>
#include <vector>
#include "cpu/rounding.h"
using namespace dracopt;
static long faults = 0;

static void check_words(uint32_t counter, uint64_t key, const uint32_t (&expected)[4]) {
  uint32_t words[4] = {counter, counter, counter, counter};
  philox(words, key);
  faults += std::memcmp(words, expected, sizeof(words)) != 0;
}

// Blocks of any number give the bits of single elements, wherever a run begins.
static void check_runs() {
  for (int64_t first : {int64_t(0), int64_t(5), int64_t(1) << 35, (int64_t(1) << 35) - 13}) {
    for (int64_t count : {1, 2, 7, 8, 9, 63, 64, 65, 200, 256}) {
      const Rounding rounding{0x123456789abcdef0u, 77, 3, 1, first, nullptr};
      RandomBits<kMostBits> room;
      const Bits* const bits = random_run(rounding, 2, first, count, room.words);
      for (int64_t i = 0; i < count; ++i) faults += bits[i] != random_bits(rounding, 2, first + i);
    }
  }
}

// All roundings of a number, by all random bits. Their mean is the number, except for what is cut off.
template <typename Stored>
static void check_mean(float x, double cut) {
  double sum = 0;
  const float low = widen(Stored{static_cast<uint16_t>(round_at_random(x, 0, Stored()) >> 16)});
  const float high = widen(Stored{static_cast<uint16_t>(round_at_random(x, 0xffff, Stored()) >> 16)});
  for (uint32_t random = 0; random < 65536; ++random) {
    const float rounded = widen(Stored{static_cast<uint16_t>(round_at_random(x, random, Stored()) >> 16)});
    faults += rounded != low && rounded != high;
    sum += rounded;
  }
  const double error = sum / 65536 - x;
  faults += error * error > cut * cut;
  faults += widen(narrow<Stored>(low)) != low || (low == x) != (high == x);
}

int main() {
  check_words(0, 0, {0x5f6fb709u, 0x0d893f64u, 0x4f121f81u, 0x4f730a48u});
  check_words(0xffffffffu, ~uint64_t(0), {0x5207ddc2u, 0x45165e59u, 0x4d8ee751u, 0x8c52f662u});
  check_runs();
  for (float x : {1.0f, 1.001f, -1.001f, 3.14159f, 1e-3f, -7.77e-5f, 6.1e4f, 0.0f, 2.5f}) {
    check_mean<Bf16>(x, 0);
    check_mean<Fp16>(x, 0);
  }
  for (float x : {6e-5f, -3.3e-5f, 5.9604645e-8f, 4e-8f, 1e-7f, -1e-9f}) check_mean<Fp16>(x, 0x1p-40);
  for (float x : {1e-40f, -3e-39f, 1.2e38f}) check_mean<Bf16>(x, 0);
  for (uint32_t bits = 0; bits < 65536; ++bits) {  // what a dtype has stays as it is
    for (uint32_t random : {0u, 1u, 0x8000u, 0xffffu}) {
      const float bf16 = widen(Bf16{static_cast<uint16_t>(bits)}), fp16 = widen(Fp16{static_cast<uint16_t>(bits)});
      faults += bf16 == bf16 && round_at_random(bf16, random, Dtype::bf16) != bits;
      faults += fp16 == fp16 && round_at_random(fp16, random, Dtype::fp16) != bits;
      const float nan = widen(Bf16{round_at_random(bf16, random, Dtype::bf16)});
      const float nan16 = widen(Fp16{round_at_random(fp16, random, Dtype::fp16)});
      faults += (bf16 != bf16 && nan == nan) || (fp16 != fp16 && nan16 == nan16);
    }
  }
  std::printf("%ld", faults);
}
"""


def test_random_bits_and_rounding_at_random(output_of: OutputOf) -> None:
    """The generator gives the known answers of Random123, and the mean of all roundings is the number."""
    assert output_of(RANDOM, "-Wno-psabi") == "0"


@pytest.mark.parametrize("isa", [isa for isa in ISA_FLAGS if isa != "baseline"])
def test_random_bits_of_instruction_sets(isa: str, tmp_path: Path) -> None:
    if not runs(isa):
        pytest.skip(f"this machine does not run {isa}")
    assert compile_and_run("this machine", tmp_path, RANDOM, *ISA_FLAGS[isa]) == "0"
