"""Checks properties that the sources and the compiled module promise."""

from __future__ import annotations

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dracopt_ext import _C
from dracopt_ext.backend import NATIVE

from .isa import ISA_FLAGS
from .mutants import MUTANTS

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
MODULE = Path(_C.__file__)
COMPILER = os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "c++").split()[0]

# These tables say who may include or import whom.
CPP_MAY_INCLUDE = {
    "core": {"core"},
    "rules": {"core", "rules"},
    "cpu": {"core", "rules", "cpu"},
    "cuda": {"core", "rules", "cuda"},
    "bindings": {"core", "cpu", "cuda", "bindings"},
}
MAY_INCLUDE_TORCH = {"tensor_of_one_torch.h", "tensor_of_any_torch.h", "runner.cpp"}
PYTHON_MAY_IMPORT: dict[str, set[str]] = {
    "rule": set(),
    "reference": {"rule"},
    "any_torch": {"devices"},
    "backend": {"any_torch"},
    "containers": {"reference", "rule"},
    "devices": set(),
    "todo": set(),
    "clip_grad": {"backend", "devices"},
    "grad_scaler": {"optim"},
    "optim": {"backend", "clip_grad", "containers", "devices", "todo", "reference", "rule"},
    "__init__": {"optim", "backend", "clip_grad", "grad_scaler"},
    "__main__": {"backend"},
    "_build_info": set(),
    # modules of triton_kernels, which backend imports when they are needed
    "arithmetic": set(),
    "rules": {"arithmetic"},
    "kernel": {"arithmetic"},
    "squares": {"arithmetic", "kernel"},
    "launcher": {"arithmetic", "kernel", "rules", "squares"},
}


@pytest.mark.parametrize("folder", CPP_MAY_INCLUDE)
def test_cpp_includes_run_one_way(folder: str) -> None:
    for source in (CSRC / folder).iterdir():
        text = source.read_text()
        for header in re.findall(r'#include "([^"]+)"', text):
            assert header.split("/")[0] in CPP_MAY_INCLUDE[folder], f"{source.name} includes {header}"
        for header in re.findall(r"#include <([^>]+)>", text):
            assert header.split("/")[0] not in ("pybind11", "Python.h") or folder == "bindings", source.name
            if header.split("/")[0] in ("torch", "ATen", "c10"):
                assert source.name in MAY_INCLUDE_TORCH, f"{source.name} includes {header}"


def test_kernels_include_nothing_that_defines_functions() -> None:
    """The linker would merge inline functions of the standard library across instruction sets."""
    allowed = {"cstddef", "cstdint", "type_traits"}
    for source in [
        *(CSRC / "core").iterdir(),
        *(CSRC / "rules").iterdir(),
        CSRC / "cpu/kernels.cpp",
        CSRC / "cpu/kernels.h",
    ]:
        assert set(re.findall(r"#include <([^>]+)>", source.read_text())) <= allowed, source.name


def test_python_imports_run_one_way() -> None:
    kernels = ROOT / "triton_kernels"
    for source in [*(ROOT / "dracopt_ext").glob("**/*.py"), *kernels.glob("*.py")]:
        if kernels in source.resolve().parents:
            package, source = kernels, source.resolve()
        else:
            package = ROOT / "dracopt_ext"
        parts = source.relative_to(package).parts
        own = parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == len(parts):  # relative to the package itself
                names = [node.module] if node.module else [alias.name for alias in node.names]
                modules = [name for name in names if (package / name).exists() or (package / f"{name}.py").exists()]
                assert set(modules) <= PYTHON_MAY_IMPORT[own], f"{source.name} imports {modules}"
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("dracopt_ext"):
                assert package == kernels, f"{source.name} imports {node.module}"
                assert node.module == "dracopt_ext._C", f"{source.name} imports {node.module}"


def test_mutants_fit_the_sources() -> None:
    """Mutants run for an hour. This test sees that each can be applied and names an existing test."""
    names = [mutant.name for mutant in MUTANTS]
    assert len(names) == len(set(names)) > 300
    for mutant in MUTANTS:
        assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, mutant.name
        file, function = mutant.found_by.split("::")
        assert f"def {function}(" in (ROOT / "tests" / f"{file}.py").read_text(), mutant.name


def test_one_translation_unit_has_the_whole_binding() -> None:
    included = re.findall(r'#include "bindings/(.+)"', (CSRC / "bindings/unity.cpp").read_text())
    assert included == sorted({source.name for source in CSRC.glob("bindings/*.cpp")} - {"unity.cpp"})


def test_no_tensor_of_a_user_is_held_by_the_plan() -> None:
    for name in ("step_plan", "inventory", "shared_memory", "updates", "runner"):
        header = (CSRC / f"bindings/{name}.h").read_text()
        assert "at::Tensor" not in header
        assert "py::object " not in header.replace("pybind11::object", "")


def test_compiled_kernels_are_small_in_a_wheel(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "wheel", "w", zipfile.ZIP_DEFLATED) as wheel:
        for path in NATIVE.glob("**/*.so"):
            wheel.write(path)
    for_a_rule = 512 if _C.cuda_architectures() else 256
    assert (tmp_path / "wheel").stat().st_size < len(_C.rules()) * for_a_rule * 1024


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("readelf") is None, reason="needs readelf")
def test_module_needs_no_openmp_of_its_own() -> None:
    needed = subprocess.run(["readelf", "-d", MODULE], capture_output=True, text=True, check=True).stdout
    assert "libc10" in needed
    assert not re.search(r"lib[gi]?omp", needed)


def test_flags_of_instruction_sets_are_the_builds() -> None:
    setup = (ROOT / "setup.py").read_text()
    begin, end = setup.index("ISA_FLAGS: dict"), setup.index("OPTIMIZED, LINKED =")
    found: dict[str, Any] = {"platform": platform}
    exec(setup[begin:end], found)
    assert found["ISA_FLAGS"] == ISA_FLAGS


@pytest.mark.skipif(shutil.which("nm") is None or shutil.which(COMPILER) is None, reason="needs nm and a compiler")
def test_instruction_sets_share_no_function(tmp_path: Path) -> None:
    """Every weak or global function of an object compiled for an instruction set carries that set in its name."""
    for isa, flags in ISA_FLAGS.items():
        command = [
            COMPILER,
            "-std=c++20",
            "-O1",
            "-fPIC",
            *flags,
            f"-DDRACOPT_ISA={isa}",
            "-Icsrc",
            "csrc/cpu/kernels.cpp",
        ]
        subprocess.run([*command, "-c", "-o", tmp_path / isa], cwd=ROOT, check=True)
        run = subprocess.run(["nm", "-C", "--defined-only", tmp_path / isa], capture_output=True, text=True, check=True)
        mergeable = [line for line in run.stdout.splitlines() if re.search(r" [A-Zuv] ", line) and " r " not in line]
        assert mergeable
        assert all(f" dracopt::{isa}::" in line for line in mergeable), mergeable


def test_import_brings_neither_triton_nor_dynamo() -> None:
    program = "import sys, torch; before = set(sys.modules); import dracopt_ext; print(*set(sys.modules) - before)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    new = run.stdout.split()
    assert "dracopt_ext._C" in new
    assert not [name for name in new if "triton" in name or name == "sympy" or name.startswith("torch._dynamo")]


def test_module_prints_what_runs() -> None:
    run = subprocess.run([sys.executable, "-m", "dracopt_ext"], capture_output=True, text=True, check=True)
    lines = dict(line.split(maxsplit=1) for line in run.stdout.splitlines())
    assert lines["native:cpu"] == "available"
    assert lines["triton"].split(":")[0] in ("available", "not available")
    assert _C.isa() in run.stdout
    assert run.stderr == ""
