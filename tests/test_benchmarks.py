"""Tests that the commands of `benchmarks/` run from end to end."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.cases import SUITES
from benchmarks.measure import DEVICE, END_TO_END, FIRST, HOST, Result

ROOT = Path(__file__).parents[1]


def run(module: str, out: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{module}" if module else "benchmarks", "--quick", "--out", out]
    env = {**os.environ, "MPLCONFIGDIR": str(out / "matplotlib")}
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_benchmarks_append_to_the_csv_and_draw(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = []
    for _ in range(2):
        table = run(
            "", tmp_path, "--peers", "--suite", *(name for name, suite in SUITES.items() if suite.device == "cpu")
        )
        assert "| **dracopt** |" in table
        with (tmp_path / "cpu.csv").open(newline="") as file:
            rows.append(list(csv.DictReader(file)))
    assert rows[1][: len(rows[0])] == rows[0]
    assert len(rows[1]) == 2 * len(rows[0])
    measured = {(row["case"], row["peer"]) for row in rows[0]}
    for case in (case for suite in SUITES.values() if suite.device == "cpu" for case in suite.cases):
        assert {(case.name, "dracopt"), (case.name, case.baseline or "dracopt")} <= measured
    assert {row["backend"] for row in rows[0] if row["peer"] == "dracopt"} == {"native"}
    assert (tmp_path / "cpu.png").stat().st_size > 10_000

    (tmp_path / "cpu.csv").write_text("other,columns\n")
    with pytest.raises(AssertionError, match="has other columns than this version writes"):
        run("", tmp_path, "--peers")


@pytest.mark.gpu
def test_gpu_suite(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    table = run("", tmp_path, "--suite", "gpu")
    assert "| **dracopt** |" in table
    with (tmp_path / "gpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for peer in ("dracopt", "dracopt triton"):
        ours = [row for row in rows if row["peer"] == peer]
        assert {row["launches"] for row in ours} == {"1"}
        assert {row["backend"] for row in ours} == {"native" if peer == "dracopt" else "triton"}
        assert {row["clock"] for row in ours} == {"host", "device", "end to end", "first step"}
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


def test_report_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The report treats figures that only a GPU could have given."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    suite = SUITES["gpu"]
    milliseconds = {
        "dracopt": 2.0,
        "dracopt triton": 2.1,
        "dracopt sibling": 4.0,
        "torch fused": 4.0,
        "torch foreach": 8.0,
        "stream": 1.5,
    }
    results = [
        Result.of("gpu", case, peer, clock, 1, [milliseconds[peer] / 1e3] * 3, None)
        for case in suite.cases
        for peer in case.peers or suite.peers
        for clock in (HOST, DEVICE, END_TO_END, FIRST)
    ]
    rows = report.compare(results)
    for row in rows:
        large = row.result.peer == "dracopt" and row.result.case.name.startswith("AdamW, 1B")
        if row.result.peer == "dracopt" and row.result.case.baseline is not None:
            assert row.ratio == (4 if row.result.case.baseline == "torch foreach" else 2)
        assert row.share is None or row.result.clock == DEVICE
        if large and row.result.clock == DEVICE:
            assert row.share == 0.75
    for index in range(0, len(rows), 10):
        report.append_csv(tmp_path / "gpu.csv", rows[index : index + 10], {**report.environment("cuda"), "utc": "once"})
    main(["--show", str(tmp_path / "gpu.csv")])
    table = capsys.readouterr().out
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert table.count("| **dracopt** |") == len(suite.cases)
    assert "| AdamW, 1B in 300 tensors | **dracopt** | host | 1 | 2.00 |" in table
    short = (
        "| AdamW, 1B in 300 tensors | 2.00 ms (2.00) | fused 4.00 ms (4.00) | **2.00x** | 2.00x | 75.0% | 71.4% | 1 |"
    )
    assert f"{short} 2000 µs |" in table


def test_training_on_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    output = run("train_digits", tmp_path)
    assert "ran on the backend: native (cpu)" in output
    accuracies = [float(found) for found in re.findall(r"AdamW\S*\s+([\d.]+)%", output)]
    assert len(accuracies) == 2
    assert min(accuracies) > 50  # ten digits, two epochs
    assert (tmp_path / "digits.png").stat().st_size > 10_000


def test_study_of_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    output = run("study_digits", tmp_path)
    with (tmp_path / "study.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == output.count(" ± ") // 2 - output.count("mean ± standard") // 2
    assert {"Learning rate", "Weight decay"} <= {row["study"] for row in rows}


def test_study_of_precision(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    output = run("study_precision", tmp_path)
    assert output.count("| bf16 with master weights |") == 2
    assert (tmp_path / "precision.png").stat().st_size > 10_000
