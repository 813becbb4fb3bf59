"""The rules' scalars, compiled on their own: no torch is needed to test a rule."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "c++").split()[0]

PROGRAM = """
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


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")
def test_bias_corrections_are_those_of_libm_up_to_a_million_steps(tmp_path: Path) -> None:
    (tmp_path / "power.cpp").write_text(PROGRAM)
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
    subprocess.run([COMPILER, *flags, "power.cpp", "-o", "power"], cwd=tmp_path, check=True)
    run = subprocess.run([tmp_path / "power"], capture_output=True, text=True, check=True)
    assert run.stdout == "0 0", "powers that round to another fp32 scalar; those more than an ulp off"
