"""Tests installation with and without a compiler and torch, and the messages that a user then sees. Every wheel is
installed into a folder of its own and used from outside the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = [
    "csrc",
    "dracopt_ext",
    "triton_kernels",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "MANIFEST.in",
]

COMPILER = os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "c++").split()[0]
NO_COMPILER = {"CXX": "/nowhere/c++"}

# The program must not find the tests' own editable installation.
ALONE = "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in str(finder).lower()]\n"

OVERVIEW = "import runpy; runpy.run_module('dracopt_ext', run_name='__main__')"

NO_KERNELS = "dracopt_ext lets torch step all parameters, because it has no kernels for them"

USE = """
import torch, dracopt_ext as optim
p = torch.nn.Parameter(torch.ones(8))
optimizer = optim.AdamW([p], lr=0.1)
for _ in range(2):
    optimizer.zero_grad()
    p.sum().backward()
    optimizer.step()
print(optim.__file__)
print(optimizer.last_backend, round(p[0].item(), 3))
try:
    optim.SGD([p], backend="native")
except RuntimeError as error:
    print(error)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, without build outputs."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("native", "_build_info.py", "__pycache__", "triton_kernels")
            shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tmp_path / "tree" / name)
    return tmp_path / "tree"


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which torch cannot be imported."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/torch.py").write_text("raise ImportError('hidden')\n")
    return {"PYTHONPATH": str(tmp_path / "hidden")}


def python(*arguments: str | Path, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True
    )


def build(tree: Path, env: dict[str, str] | None = None, *options: str) -> Path:
    """Builds the tree with pip and returns the wheel."""
    command = ["-m", "pip", "wheel", "-q", "--no-deps", "-w", "wheels", *(options or ["--no-build-isolation"]), "."]
    run = python(*command, cwd=tree, env=env)
    assert run.returncode == 0, run.stderr
    (wheel,) = (tree / "wheels").glob("*.whl")
    return wheel


def install(wheel: Path) -> Path:
    """Installs the wheel and returns the folder that holds it."""
    target = wheel.parent / "installed"
    run = python("-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel, cwd=wheel.parent)
    assert run.returncode == 0, run.stderr
    return target


def use(target: Path, program: str = USE, env: dict[str, str] | None = None) -> tuple[list[str], list[str]]:
    """Runs a program with the installed package; returns its lines of output and of errors."""
    env = {"PYTHONPATH": str(target), "PYTHONWARNINGS": "default", **(env or {})}
    run = python("-c", ALONE + program, cwd=target.parent, env=env)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines(), run.stderr.splitlines()


def assert_pure(wheel: Path, reason: str) -> Path:
    """The wheel is pure; the package works through torch and gives the reason once."""
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    target = install(wheel)
    output, errors = use(target)
    assert output[0].startswith(str(target))
    assert output[1] == "{'cpu': frozenset({'torch'})} 0.798"
    assert output[2] == f"backend='native' is not available: {reason}"
    assert len([line for line in errors if "RuntimeWarning" in line]) == 1
    assert f"RuntimeWarning: {NO_KERNELS}: {reason}" in errors[0]
    return target


@pytest.mark.long
def test_compiled_wheel(tree: Path) -> None:
    """A user's ``pip install .`` builds in pip's isolated environment, against the torch that is installed."""
    wheel = build(tree, {"CUDA_HOME": "/nowhere"}, "--use-pep517")
    names = zipfile.ZipFile(wheel).namelist()
    assert "any" not in wheel.name
    assert {"dracopt_ext/py.typed", "dracopt_ext/_C.pyi", "dracopt_ext/optim/_base.py"} <= set(names)
    assert not [name for name in names if name.startswith(("csrc", "tests", "benchmarks", "triton_kernels"))]
    assert len([name for name in names if name.startswith("dracopt_ext/native/")]) == 3  # the kernels, two bindings
    assert "dracopt_ext/triton_kernels/kernel.py" in names

    target = install(wheel)
    output, errors = use(target)
    assert output[0].startswith(str(target))
    assert output[1:] == ["{'cpu': frozenset({'native'})} 0.798"]
    assert errors == []


def failing_nvcc(folder: Path) -> Path:
    """A toolkit whose nvcc answers what the build asks first, and compiles nothing."""
    for name in ("bin", "lib"):
        (folder / name).mkdir(parents=True)
    (folder / "lib/libcudart_static.a").touch()
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        f"--dryrun) echo '\"-L{folder}/lib\"' >&2 ;;\n--list-gpu-arch) echo compute_90 ;;\n*) exit 7 ;;\nesac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


@pytest.mark.long
def test_wheel_for_versions_of_torch(tree: Path, tmp_path: Path) -> None:
    """wheels.py builds such a wheel from headers. Its user meets every situation in turn; nvcc fails in the build."""
    headers = tmp_path / "headers/torch"
    headers.mkdir(parents=True)
    for name in ("include", "version.py"):
        (headers / name).symlink_to(Path(torch.__file__).parent / name)
    nvcc = failing_nvcc(tmp_path / "toolkit")
    target = install(build(tree, {"DRACOPT_TORCH_HEADERS": str(headers.parent), "CUDA_HOME": str(nvcc.parents[1])}))
    native, version = target / "dracopt_ext/native", torch.__version__.split("+")[0]
    (module,) = native.glob("torch_*/_C*.so")
    assert module.parent.name == "torch_{}_{}".format(*torch.__version__.split(".")[:2])

    without_compiler = {"PATH": "/nowhere", **NO_COMPILER}
    output, errors = use(target, env=without_compiler)
    assert output[0].startswith(str(target))
    assert output[1:] == ["{'cpu': frozenset({'native'})} 0.798"]
    assert errors == []
    overview, _ = use(target, OVERVIEW, {"DRACOPT_ISA": "baseline"})
    assert any("CPU ISA     baseline" in line for line in overview)
    reason = f"compiled without CUDA kernels: {nvcc} failed; its output is among the build's"
    assert f"native:cuda not available: {reason}" in overview

    # torch was upgraded, and no compiler can build a binding for it.
    other = "import torch; torch.__version__ = '{}'\n"
    output, errors = use(target, other.format("2.99.0") + USE, without_compiler)
    assert output[1:] == ["{'cpu': frozenset({'native'})} 0.798"]
    assert errors == []
    overview, _ = use(target, other.format("2.99.0") + OVERVIEW, without_compiler)
    assert "binding     any_torch" in overview

    # That torch has objects of another kind.
    unknown = "torch._C._dispatch_keys = lambda tensor: torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)\n"
    output, errors = use(target, other.format("2.99.0") + unknown + USE, without_compiler)
    assert output[1] == "{'cpu': frozenset({'torch'})} 0.798"
    (warning,) = (line for line in errors if "Warning" in line)
    assert (
        f"{NO_KERNELS}: compiled for torch {version}, not for the installed 2.99.0 (torch 2.99.0 keeps its" in warning
    )
    assert "in a clone of the repository: DRACOPT_BUILD=force pip install --force-reinstall --no-deps ." in warning

    # torch is older than the oldest version that is served.
    output, errors = use(target, other.format("2.9.1") + USE)
    assert output[1] == "{'cpu': frozenset({'torch'})} 0.798"
    (warning,) = (line for line in errors if "Warning" in line)
    assert warning.endswith(f"{NO_KERNELS}: torch 2.9.1 is older than 2.10")

    # The binding does not load.
    source = tmp_path / "broken.c"
    source.write_text("extern int nowhere(void); void* PyInit__C(void) { nowhere(); return 0; }\n")
    subprocess.run([COMPILER, "-x", "c", "-shared", "-fPIC", "-Wl,-z,now", source, "-o", module], check=True)
    output, errors = use(target)
    assert output[1] == "{'cpu': frozenset({'torch'})} 0.798"
    (warning,) = (line for line in errors if "Warning" in line)
    assert "what was compiled does not load: " in warning
    assert "undefined symbol: nowhere" in warning
    assert "undefined symbol: nowhere" in use(target, "import dracopt_ext; print(dracopt_ext.backends())")[0][0]

    # No binding fits this Python. Then the kernels themselves are missing, too.
    module.unlink()
    output, errors = use(target)
    assert output[1] == "{'cpu': frozenset({'torch'})} 0.798"
    assert f"what was compiled does not load: {module.parent} has no module for this Python" in errors[0]
    (native / "libdracopt_kernels.so").unlink()
    output, errors = use(target, other.format("2.99.0") + USE)
    assert output[1] == "{'cpu': frozenset({'torch'})} 0.798"
    assert "cannot open shared object file" in errors[0]


@pytest.mark.long
def test_no_compiler(tree: Path) -> None:
    target = assert_pure(build(tree, NO_COMPILER), "no C++ compiler was found (/nowhere/c++)")
    output, _ = use(target, OVERVIEW)
    assert "compiled    nothing" in output
    assert "native:cpu  not available: no C++ compiler was found (/nowhere/c++)" in output


def test_triton_needs_the_compiled_module(tree: Path) -> None:
    target = install(build(tree, {"DRACOPT_BUILD": "pure"}))
    program = "import dracopt_ext; print(dracopt_ext.backends()['triton'])"
    output, _ = use(target, program, {"TRITON_INTERPRET": "1"})
    assert output == ["the compiled module, which plans Triton's steps, is missing: DRACOPT_BUILD=pure"]


@pytest.mark.parametrize(("mode", "reason"), [("auto", "torch is not installed"), ("pure", "DRACOPT_BUILD=pure")])
def test_why_nothing_is_compiled(tree: Path, without_torch: dict[str, str], mode: str, reason: str) -> None:
    run = python("setup.py", "-q", "build_ext", "--inplace", cwd=tree, env={**without_torch, "DRACOPT_BUILD": mode})
    assert run.returncode == 0, run.stderr
    assert f"building without compiled kernels: {reason}\n" in run.stderr
    assert repr(reason) in (tree / "dracopt_ext/_build_info.py").read_text()


@pytest.mark.long
def test_compilation_fails(tree: Path) -> None:
    """A failed compilation yields a pure wheel, without the modules of an earlier build."""
    tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for folder in (tree, tree / f"build/lib.{tag}"):
        stale = folder / "dracopt_ext/native/torch_2_13"
        stale.mkdir(parents=True)
        (stale / "_C.stale.so").write_bytes(b"")
    with (tree / "csrc/cpu/kernels.cpp").open("a") as source:
        source.write("no C++\n")
    wheel = build(tree)
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    _, errors = use(install(wheel))
    assert "compilation failed: CompileError" in errors[0]

    # A build in place writes its outcome into the sources.
    python("setup.py", "-q", "build_ext", "--inplace", cwd=tree)
    assert "compilation failed: CompileError" in (tree / "dracopt_ext/_build_info.py").read_text()
    assert not (tree / "dracopt_ext/native").exists()


def test_force_fails_rather_than_falls_back(tree: Path) -> None:
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "."]
    run = python(*command, cwd=tree, env={**NO_COMPILER, "DRACOPT_BUILD": "force"})
    assert run.returncode != 0
    assert "DRACOPT_BUILD=force: no C++ compiler was found (/nowhere/c++)" in run.stdout + run.stderr


def test_build_asks_for_torch_only_where_none_is_found(tree: Path, without_torch: dict[str, str]) -> None:
    program = "from setuptools import build_meta; print(build_meta.get_requires_for_build_wheel())"
    assert python("-c", program, cwd=tree).stdout.splitlines()[-1] == "[]"
    assert "torch>=2.10" in python("-c", program, cwd=tree, env=without_torch).stdout
    own = {**without_torch, "DRACOPT_TORCH": "torch==2.13.0"}
    assert "torch==2.13.0" in python("-c", program, cwd=tree, env=own).stdout
    assert "torch" not in python("-c", program, cwd=tree, env={**without_torch, **NO_COMPILER}).stdout.splitlines()[-1]


def test_source_distribution_is_complete(tree: Path) -> None:
    program = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    run = python("-c", program, cwd=tree, env={"DRACOPT_BUILD": "pure"})
    assert run.returncode == 0, run.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[-1] for name in opened.getnames()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")} <= names
    assert not [name for name in names if name.startswith("tests") or name.endswith(("_build_info.py", ".so"))]
    assert {"setup.py", "pyproject.toml", "LICENSE", "CHANGELOG.md", "triton_kernels/kernel.py"} <= names


def test_architectures_that_are_no_numbers(tree: Path) -> None:
    environment = {**os.environ, "DRACOPT_CUDA_ARCHITECTURES": "80;sm_90"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=tree, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "DRACOPT_CUDA_ARCHITECTURES is '80 sm_90'; give it numbers such as 90 or 80,90" in done.stderr
