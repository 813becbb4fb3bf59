"""What nvcc made of the update kernel, read from the compiled library itself. No GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest

from dracopt_ext import _C
from dracopt_ext.backend import BUILD_INFO, NATIVE

MODULE = NATIVE / "libdracopt_kernels.so"
ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]

pytestmark = pytest.mark.skipif(not _C.cuda_architectures(), reason=f"no CUDA kernels: {BUILD_INFO.get('no_cuda')}")


def find_cuobjdump() -> str | None:
    try:
        found = [file for file in files("nvidia-cuda-cuobjdump") or [] if file.name == "cuobjdump"]
    except PackageNotFoundError:
        found = []
    return str(found[0].locate()) if found else shutil.which("cuobjdump")


def cuobjdump(*options: str) -> str:
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    # It starts nvdisasm, which lies beside it.
    environment = {"PATH": f"{Path(tool).parent}:/usr/bin:/bin"}
    return subprocess.run([tool, *options, MODULE], env=environment, capture_output=True, text=True, check=True).stdout


def test_every_architecture_is_there() -> None:
    assert re.findall(r"\.sm_(\d+)\.cubin", cuobjdump("-lelf")) == [str(arch) for arch in ARCHITECTURES]
    assert re.findall(r"\.sm_(\d+)\.ptx", cuobjdump("-lptx")) == [str(ARCHITECTURES[0])]
    assert _C.cuda_architectures() == [10 * arch for arch in ARCHITECTURES]


def test_nothing_lies_in_local_memory() -> None:
    """Neither spilled registers nor arrays that are indexed at run time."""
    kernels = re.findall(r"Function (\S*step\S*):\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", cuobjdump("-res-usage"))
    assert len(kernels) == 6 * len(ARCHITECTURES)  # three rules, two arithmetics
    for name, registers, stack, local in kernels:
        assert (stack, local) == ("0", "0"), name
        # Two blocks of 256 threads at once, so that one computes while the other waits; one in fp64.
        assert int(registers) <= (128 if "Ef" in name else 255), name


@cache
def kernels_of(architecture: int) -> list[tuple[str, str]]:
    """Names, as "Adam-f" for fp32, and machine code."""
    kernels = []
    for part in cuobjdump("-sass", "-arch", f"sm_{architecture}").split("Function : ")[1:]:
        name, code = part.split("\n", 1)
        found = re.search(r"step.*device\d+([A-Za-z]+)E([fd])E", name)
        if found:
            kernels.append(("-".join(found.groups()), code))
    return kernels


STATES = {"Sgd": (0, 1), "Adam": (2, 3), "NAdam": (2, 2)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_streams_move_16_bytes_at_a_time(architecture: int) -> None:
    """Two vectors of each stream are loaded at once, and stored but for the gradient's, for each number of states: in
    the loop over tensors in the arithmetic's own dtype, and in the one over those that mix."""
    kernels = dict(kernels_of(architecture))
    assert set(kernels) == {f"{rule}-{dtype}" for rule in STATES for dtype in "fd"}
    for kernel, code in kernels.items():
        least, most = STATES[kernel.split("-")[0]]
        numbers = range(least, most + 1)
        loads, stores = (len(re.findall(rf"{move}(?:\.E)?\.128", code)) for move in ("LDG", "STG"))
        assert (loads, stores) == (2 * 2 * sum(2 + n for n in numbers), 2 * 2 * sum(1 + n for n in numbers)), kernel
        assert not re.search(r"\b(LDL|STL)\b", code), kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loads_wait_together(architecture: int) -> None:
    """In the loop over tensors in fp32, no square root stands between the loads of all streams, two vectors of each."""
    for kernel, code in kernels_of(architecture):
        if kernel.endswith("-f"):
            runs = [len(re.findall(r"LDG(?:\.E)?\.128", part)) for part in re.split(r"STG|MUFU|FFMA", code)]
            assert max(runs) == 2 * (2 + STATES[kernel.split("-")[0]][1]), kernel


def test_nothing_is_contracted_or_approximated() -> None:
    """Every operation names its rounding, which forbids the assembler to fuse it with another one."""
    operations = set(re.findall(r"\b((?:mul|add|sub|fma|div|sqrt|mad|rcp)\.[a-z.]*f(?:32|64))\b", cuobjdump("-ptx")))
    assert {"fma.rn.f32", "div.rn.f32", "sqrt.rn.f32", "div.rn.f64", "sqrt.rn.f64"} <= operations
    assert all(".rn." in operation for operation in operations), operations
