"""The commands of `benchmarks/` run from end to end."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cases import SUITES

ROOT = Path(__file__).parents[1]


def run(module: str, out: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{module}" if module else "benchmarks", "--quick", "--out", out]
    env = {**os.environ, "MPLCONFIGDIR": str(out / "matplotlib")}
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_benchmarks_append_to_the_csv_and_draw(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = []
    for _ in range(2):
        table = run("", tmp_path, "--peers")
        assert "| **dracopt** |" in table
        with (tmp_path / "cpu.csv").open(newline="") as file:
            rows.append(list(csv.DictReader(file)))
    assert rows[1][: len(rows[0])] == rows[0]
    assert len(rows[1]) == 2 * len(rows[0])
    measured = {(row["case"], row["peer"]) for row in rows[0]}
    for case in (case for suite in SUITES.values() for case in suite.cases):
        assert {(case.name, "dracopt"), (case.name, case.baseline or "dracopt")} <= measured
    assert {row["backend"] for row in rows[0] if row["peer"] == "dracopt"} == {"native"}
    assert (tmp_path / "cpu.png").stat().st_size > 10_000

    (tmp_path / "cpu.csv").write_text("other,columns\n")
    with pytest.raises(AssertionError, match="has other columns than this version writes"):
        run("", tmp_path, "--peers")


def test_training_on_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    output = run("train_digits", tmp_path)
    assert "ran on the backend: native (cpu)" in output
    accuracies = [float(found) for found in re.findall(r"AdamW\S*\s+([\d.]+)%", output)]
    assert len(accuracies) == 2
    assert min(accuracies) > 50  # of ten digits, after two epochs
    assert (tmp_path / "digits.png").stat().st_size > 10_000


def test_study_of_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    output = run("study_digits", tmp_path)
    with (tmp_path / "study.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == output.count(" ± ") // 2 - output.count("mean ± standard") // 2
    assert {"Learning rate", "Weight decay"} <= {row["study"] for row in rows}
