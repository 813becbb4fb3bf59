"""Tests what ``benchmarks/gpu.sh`` and the programs of ``benchmarks/kernels`` print, keep and refuse without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dracopt_ext.rule import RULES

ROOT = Path(__file__).parents[1]

# PYTHON stands for a Python that has our kernels and a GPU, TOOL for all other programs. The environment controls both:
# FAILING names a part that fails, SLOW a part that does not end.
PYTHON = """#!/bin/bash
case "$*" in
  *"-m pytest"*) part=tests ;;
  *--show*) cat "$OUT/gpu.csv"; exit ;;
  *"-m benchmarks"*) part=benchmarks; echo "one row" >>"$OUT/gpu.csv" ;;
  *) exit 0 ;;
esac
echo "this is $part"
[ "${SLOW:-}" != "$part" ] || sleep 60
[ "${FAILING:-}" != "$part" ] || { echo "$part went wrong"; exit 1; }
"""
TOOL = """#!/bin/bash
name=$(basename "$0")
echo "this is $name"
[ "${FAILING:-}" != "$name" ] || { echo "$name went wrong"; exit 1; }
"""


def gpu(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {"OUT": str(folder / "results"), "PYTHON": sys.executable, **environment}
    return subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def with_everything(tmp_path: Path) -> dict[str, str]:
    """An environment in which each tool is present and simulated."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"python": PYTHON, **dict.fromkeys(["nvidia-smi", "ncu", "compute-sanitizer"], TOOL)}.items():
        (tools / name).write_text(text)
    for name in ("check", "sweep"):
        (tools / name).write_text(TOOL)
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return {"PYTHON": str(tools / "python"), "PROGRAMS": str(tools), "PATH": f"{tools}:{os.environ['PATH']}"}


def summary(folder: Path) -> dict[str, str]:
    lines = (folder / "results" / "summary.txt").read_text().splitlines()
    return {line.split()[0]: re.sub(r", \d+ s$", "", line.split(maxsplit=1)[1]) for line in lines}


SMOKE = ["build", "programs", "check", "capture", "sweep", "tests", "benchmarks"]
FULL = ["build", "programs", "check", "sweep", "sanitizer", "tests", "any_torch", "benchmarks", "profile"]


@pytest.mark.parametrize(("stage", "parts"), [("smoke", SMOKE), ("full", FULL)])
def test_all_parts_run(tmp_path: Path, with_everything: dict[str, str], stage: str, parts: list[str]) -> None:
    done = gpu(tmp_path, stage, **with_everything)
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path) == dict.fromkeys(parts, "passed")
    printed = done.stdout.splitlines()
    assert [line for line in printed if ": at most " in line] == printed[: len(parts)]  # before anything else
    assert printed[-1] == "one row"  # the table comes last
    assert len(list((tmp_path / "results").iterdir())) <= 8


@pytest.mark.parametrize("failing", ["tests", "sweep", "compute-sanitizer"])
def test_a_part_that_fails_keeps_none_of_the_others_from_running(
    tmp_path: Path, with_everything: dict[str, str], failing: str
) -> None:
    done = gpu(tmp_path, "full", FAILING=failing, **with_everything)
    assert done.returncode == 1
    found = summary(tmp_path)
    parts = {"compute-sanitizer": ["sanitizer"], "tests": ["tests", "any_torch"]}.get(failing, [failing])
    assert all(found.pop(part).startswith("FAILED with 1: ") for part in parts)
    assert found == dict.fromkeys([name for name in FULL if name not in parts], "passed")


def test_what_was_measured_before_a_limit_is_kept(tmp_path: Path, with_everything: dict[str, str]) -> None:
    done = gpu(tmp_path, "full", SLOW="benchmarks", LIMIT="3", **with_everything)
    assert done.returncode == 1
    assert summary(tmp_path)["benchmarks"] == "FAILED: not done after 3 s"
    assert summary(tmp_path)["profile"] == "passed"
    assert done.stdout.splitlines()[-1] == "one row"


def test_tools_that_are_missing(tmp_path: Path, with_everything: dict[str, str]) -> None:
    for name in ("ncu", "compute-sanitizer"):
        (tmp_path / "tools" / name).unlink()
    path = f"{tmp_path / 'tools'}:/usr/bin:/bin"
    if any(shutil.which(name, path=path) for name in ("ncu", "compute-sanitizer")):
        pytest.skip("they are there")
    done = gpu(tmp_path, "full", **{**with_everything, "PATH": path})
    assert done.returncode == 2
    found = summary(tmp_path)
    assert found["profile"] == "cannot run: ncu is not on the path"
    assert found["sanitizer"] == "cannot run: compute-sanitizer is not on the path"
    assert found["tests"] == found["benchmarks"] == "passed"


def test_without_a_gpu(tmp_path: Path) -> None:
    """One line for each part says what is missing."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = gpu(tmp_path, "smoke", PROGRAMS=str(tmp_path / "none"), PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin")
    assert done.returncode == 2, done.stdout + done.stderr
    found = summary(tmp_path)
    for part in ("tests", "benchmarks"):
        assert re.match(
            "cannot run: (this torch .* was built without CUDA|torch finds no GPU|compiled without CUDA kernels|"
            "CUDA driver version is insufficient)",
            found[part],
        )
    assert found["sweep"].startswith("cannot run: ")


def test_without_torch(tmp_path: Path, with_everything: dict[str, str]) -> None:
    python = tmp_path / "tools" / "python"
    python.write_text(f'#!/bin/bash\nexec "{sys.executable}" -S "$@"\n')  # without installed packages
    done = gpu(tmp_path, "smoke", **with_everything)
    assert summary(tmp_path)["tests"] == summary(tmp_path)["benchmarks"] == "cannot run: No module named 'torch'"
    assert summary(tmp_path)["check"] == "passed"
    assert done.returncode == 1  # the build fails


def test_arguments(tmp_path: Path) -> None:
    for arguments, environment, complaint in (
        ([], {}, "one stage"),
        (["smoke", "full"], {}, "one stage"),
        (["most"], {}, "there is no stage 'most'"),
        (["smoke"], {"OUT": ""}, "OUT names the folder for the results"),
        (["smoke"], {"OUT": "/dev/null/x"}, "/dev/null/x cannot be made"),
    ):
        done = gpu(tmp_path, *arguments, **environment)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == f"usage: OUT=folder benchmarks/gpu.sh smoke|full: {complaint}"


def build(out: Path, *arguments: str) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "kernels" / "build.py", "--out", out, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr


def test_check_on_the_host(tmp_path: Path) -> None:
    """The program that the sanitizer watches on a GPU runs here with the simulation's launcher."""
    build(tmp_path, "--host")
    done = subprocess.run([tmp_path / "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("right") == 40 + 4 * len(RULES)  # each rule in two dtypes, with counts in two places


@pytest.mark.gpu
def test_check_on_a_gpu() -> None:
    """FastMath agrees with IEEE's instructions: all roots and reciprocals, 34 billion quotients, and whole updates."""
    program = ROOT / os.environ.get("PROGRAMS", "build/kernels") / "check"
    if not program.exists():
        pytest.skip(f"needs {program}, which benchmarks/kernels/build.py makes")
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reciprocal" in done.stdout, f"{program} was built for the host"


@pytest.mark.long
def test_programs_for_a_gpu(tmp_path: Path) -> None:
    """The programs compile, and report a missing GPU."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    build(tmp_path, "--architecture", "sm_90", "--variants", "project")
    if torch.cuda.is_available():
        return
    for program in ("check", "sweep"):
        done = subprocess.run([tmp_path / program], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("no GPU: ")
