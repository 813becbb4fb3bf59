"""Tests the rules' scalars, the numbering of strided elements and the sharing of work, compiled on their own. No torch
is needed, and no tensor is allocated, however many elements it has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "c++").split()[0]

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")


def output_of(program: str, folder: Path) -> str:
    (folder / "program.cpp").write_text(program)
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    subprocess.run([COMPILER, *flags, "program.cpp", "-o", "program"], cwd=folder, check=True)
    return subprocess.run([folder / "program"], capture_output=True, text=True, check=True).stdout


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


def test_bias_corrections_are_those_of_libm_up_to_a_million_steps(tmp_path: Path) -> None:
    assert output_of(POWERS, tmp_path) == "0 0", "powers that round to another fp32 scalar; those more than an ulp off"


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


def test_nadams_momenta_are_those_of_libm_up_to_a_million_steps(tmp_path: Path) -> None:
    assert output_of(MOMENTA, tmp_path) == "0 0 1 1", "other fp32 scalars; more than an ulp off; exponential; its ends"


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


def test_work_is_shared_without_gap_or_overlap_beyond_two_to_the_31(tmp_path: Path) -> None:
    assert output_of(SHARING, tmp_path) == "0"


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


def test_layouts_join_what_all_streams_traverse_as_one(tmp_path: Path) -> None:
    giga = 2**30
    assert output_of(LAYOUTS, tmp_path).splitlines() == [
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


def test_offsets_beyond_two_to_the_31(tmp_path: Path) -> None:
    big = 2**32
    assert output_of(EXTREMES, tmp_path).split() == [f"{2 + (big - 2) * 5}+5x2", "3+5x2"]


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


def test_launches_hold_every_tile_once(tmp_path: Path) -> None:
    *launches, faults = output_of(LAUNCHES, tmp_path).split()
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


def test_fast_math(tmp_path: Path) -> None:
    """All significands in two binades, all exponents and special numbers give the bits of IEEE's operations, or none.

    The host makes the estimates here. ``benchmarks/kernels/check.cpp`` compares all roots and reciprocals, and 34
    billion quotients, with a GPU's own estimates. test_cuda_build.py counts the steps of FastMath and of the compiler.
    """
    assert output_of(FAST_MATH, tmp_path) == "0"
