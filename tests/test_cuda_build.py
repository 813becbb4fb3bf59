"""Tests the update kernel's machine code, read from the compiled library itself. No GPU is needed."""

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
from dracopt_ext.rule import RULES

MODULE = NATIVE / "libdracopt_kernels.so"
SOURCES = Path(__file__).parents[1] / "csrc"
ARCHITECTURES = [75, 80, 90, 100, 120]

pytestmark = pytest.mark.skipif(not _C.cuda_architectures(), reason=f"no CUDA kernels: {BUILD_INFO.get('no_cuda')}")


def find_cuobjdump() -> str | None:
    try:
        found = [file for file in files("nvidia-cuda-cuobjdump") or [] if file.name == "cuobjdump"]
    except PackageNotFoundError:
        found = []
    return str(found[0].locate()) if found else shutil.which("cuobjdump")


def cuobjdump(*options: str, library: Path = MODULE) -> str:
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    # cuobjdump starts nvdisasm, which lies in the same folder.
    environment = {"PATH": f"{Path(tool).parent}:/usr/bin:/bin"}
    return subprocess.run([tool, *options, library], env=environment, capture_output=True, text=True, check=True).stdout


def test_every_architecture_is_there() -> None:
    assert re.findall(r"\.sm_(\d+)\.cubin", cuobjdump("-lelf")) == [str(arch) for arch in ARCHITECTURES]
    assert re.findall(r"\.sm_(\d+)\.ptx", cuobjdump("-lptx")) == ["87"]
    assert _C.cuda_architectures() == [10 * arch for arch in ARCHITECTURES]


def test_nothing_lies_in_local_memory() -> None:
    """No register is spilled, and no array is indexed at run time."""
    kernels = re.findall(r"Function (\S*step\S*):\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", cuobjdump("-res-usage"))
    assert len(kernels) == 2 * len(RULES) * len(ARCHITECTURES)  # two arithmetics
    for name, registers, stack, local in kernels:
        assert (stack, local) == ("0", "0"), name
        # Six blocks of 128 threads must fit at once, so that some compute while the others wait; two in fp64.
        assert int(registers) <= (80 if "Ef" in name else 255), name


@cache
def kernels_of(architecture: int) -> list[tuple[str, str]]:
    """Returns names, such as "adam-f" for fp32, and machine code."""
    kernels = []
    for part in cuobjdump("-sass", "-arch", f"sm_{architecture}").split("Function : ")[1:]:
        name, code = part.split("\n", 1)
        found = re.search(r"step.*device\d+([A-Za-z]+)E([fd])E", name)
        if found:
            kernels.append((f"{found[1].lower()}-{found[2]}", code))
    return kernels


STATES = {name: (list(rule.moments.values()).count(None), len(rule.moments)) for name, rule in RULES.items()}
"""By rule, the least and the largest number of states."""


def vectors(dtype: str, own: int, states: int) -> int:
    """Counts the vectors that all loops move for ``states`` states beside ``own`` streams: parameter and gradient."""
    if dtype == "d":
        return (1 + 2) * (own + states)  # a loop in fp64, and one for any mixture, where fp64 takes two
    plain = half = own + states
    anyhow = plain + 1  # of masters
    mixed = own + 2 * states  # a vector of 16-bit numbers has as many elements as two of fp32
    bf16 = fp16 = mixed + (half if states else 0)  # without states the two loops are the same
    split = mixed + 1
    # Three states leave no registers for whole masters or random bits.
    more = 0 if states == 3 else (mixed + 2) + bf16
    return plain + bf16 + fp16 + split + more + anyhow


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_streams_move_16_bytes_at_a_time(architecture: int) -> None:
    """Each loop loads vectors of all streams and stores all except the gradient's, for each number of states."""
    kernels = dict(kernels_of(architecture))
    assert set(kernels) == {f"{rule}-{dtype}" for rule in STATES for dtype in "fd"}
    for kernel, code in kernels.items():
        rule, dtype = kernel.split("-")
        least, most = STATES[rule]
        numbers = range(least, most + 1)
        loads, stores = (len(re.findall(rf"{move}(?:\.E)?\.128", code)) for move in ("LDG", "STG"))
        expected = [sum(vectors(dtype, own, n) for n in numbers) for own in (2, 1)]
        assert [loads, stores] == expected, kernel
        assert not re.search(r"\b(LDL|STL)\b", code), kernel


Instruction = tuple[int, str]
"""An instruction's address and text."""


def target_of(instruction: Instruction) -> int:
    found = re.search(r"\bBRA(?:\.U)? .*\b0x([0-9a-f]+)", instruction[1])
    return int(found[1], 16) if found else -1


def is_vector(move: str, instruction: Instruction) -> bool:
    return re.search(rf"\b{move}(?:\.E)?\.128", instruction[1]) is not None


def loops_of(code: str) -> list[list[Instruction]]:
    """Finds the loops over vectors whose dtypes are known beforehand. Other loops also move single numbers."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]+?) *;", code)
    instructions = [(int(address, 16), text) for address, text in found]
    loops = []
    for end, instruction in enumerate(instructions):
        if 0 <= target_of(instruction) <= instruction[0]:
            loop = [each for each in instructions[: end + 1] if each[0] >= target_of(instruction)]
            if any(is_vector("STG", each) for each in loop) and not any(" LD.E" in f" {each[1]}" for each in loop):
                loops.append(loop)
    return loops


def fast_path(loop: list[Instruction]) -> int:
    """Counts the instructions of an ordinary turn: a turn that takes all branches past other instructions, except past
    stores."""
    count = at = 0
    while at < len(loop):
        count += 1
        passed = [i for i in range(at + 1, len(loop)) if loop[i][0] < target_of(loop[at])]
        forward = at + 1 + len(passed) < len(loop) and not any(is_vector("STG", loop[i]) for i in passed)
        at += 1 + len(passed) * forward
    return count


def makes_random_bits(loop: list[Instruction]) -> bool:
    return any("0x2daee0ad" in text or "0xd2511f53" in text for _, text in loop)  # one of Philox's factors


LIMITS = {
    (4, 4, False): 38,  # fp32
    (8, 6, False): 40,  # 16 bits with fp32 states
    (8, 4, False): 44,  # all in 16 bits
    (8, 7, False): 46,  # bf16 with fp32 states and split masters
    (8, 8, False): 46,  # the same with masters in fp32; or 16 bits with three fp32 states
    (8, 6, True): 52,  # bf16 with fp32 states, rounded at random
    (8, 4, True): 56,  # all in bf16, rounded at random
}
"""The most instructions for an element of AdamW. A key holds the number of elements in a turn of the loop, the vectors
that the turn loads, and whether it makes random bits."""
LOOPS = [(4, 4, False), (8, 4, False), (8, 4, False), (8, 4, True), (8, 6, False), (8, 6, False), (8, 6, True)]
LOOPS += [(8, 7, False), *[(8, 8, False)] * 3]


@pytest.mark.parametrize("architecture", [architecture for architecture in ARCHITECTURES if architecture >= 80])
def test_few_instructions_for_an_element(architecture: int) -> None:
    """The limits hold on the path that nearly all elements take. More would make the machine the bound, not memory."""
    counts = []
    for loop in loops_of(dict(kernels_of(architecture))["adam-f"]):
        elements = sum("MUFU.RSQ" in text for _, text in loop)
        form = elements, sum(is_vector("LDG", each) for each in loop), makes_random_bits(loop)
        if form in LIMITS:  # other loops have three states
            counts.append((form, fast_path(loop) / elements))
    assert sorted(form for form, _ in counts) == LOOPS
    assert all(count <= LIMITS[form] for form, count in counts), counts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loads_wait_together(architecture: int) -> None:
    """No root stands between the loads of a turn. In rules without roots, no arithmetic stands between loads.

    The exceptions are loops for which 80 registers do not suffice: amsgrad in 16 bits with fp32 states, which loads
    eight vectors, or nine with split masters, and random bits beside fp32 states.
    """
    triton_rules = pytest.importorskip("dracopt_ext.triton_kernels.rules").RULES
    for kernel, code in kernels_of(architecture):
        if kernel.endswith("-d"):
            continue
        arithmetic = "MUFU" if triton_rules[kernel.removesuffix("-f")].divides else "FFMA"
        for loop in loops_of(code):
            first = next(i for i, (_, text) in enumerate(loop) if arithmetic in text)
            early, loads = (sum(is_vector("LDG", each) for each in part) for part in (loop[:first], loop))
            least = 4 if makes_random_bits(loop) and loads == 6 else {8: 5, 9: 7}.get(loads, loads)
            assert early >= least, (kernel, early, loads)


def test_nothing_is_contracted_or_approximated() -> None:
    """Every operation names its rounding, which forbids the assembler to fuse it with another one. The PTX is for
    future GPUs and has none of the estimates of today's."""
    names = r"\b((?:mul|add|sub|fma|div|sqrt|mad|rcp|rsqrt)\.[a-z.]*f(?:32|64))\b"
    operations = set(re.findall(names, cuobjdump("-ptx")))
    assert {"fma.rn.f32", "div.rn.f32", "sqrt.rn.f32", "div.rn.f64", "sqrt.rn.f64"} <= operations
    assert all(".rn." in operation for operation in operations), operations


IEEE_AND_FAST = """
#include "cuda/fast_math.h"
using namespace dracopt;
__global__ void ieee_quotient(float* x, const float* d) { x[0] = x[0] / d[0]; }
__global__ void ieee_root(float* x) { x[0] = dracopt::sqrt(x[0]); }
__global__ void fast_quotient(float* x, const float* d) { x[0] = cuda::FastMath().quotient(x[0], d[0]); }
__global__ void fast_root_over(float* x, const float* d) {
  x[0] = cuda::FastMath().root_over(x[0], Divisor<float>{d[0], d[1]});
}
"""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fast_math_has_the_steps_of_the_compiler(architecture: int, tmp_path: Path) -> None:
    """FastMath takes as many steps from the same estimate to the exact result as this nvcc's IEEE operations."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    (tmp_path / "steps.cu").write_text(IEEE_AND_FAST)
    flags = ["-std=c++20", "--fmad=false", "-DDRACOPT_ISA=device", f"-I{SOURCES}", f"-arch=sm_{architecture}"]
    subprocess.run([nvcc, *flags, "-cubin", "-o", "steps.cubin", "steps.cu"], cwd=tmp_path, check=True)
    steps: dict[str, tuple[list[str], int]] = {}
    for part in cuobjdump("-sass", library=tmp_path / "steps.cubin").split("Function : ")[1:]:
        before_the_end = part.split("EXIT")[0]
        found = re.search(r"(ieee|fast)_(quotient|root_over|root)", part.split()[0])
        assert found is not None
        estimates = re.findall(r"MUFU\.\w+", before_the_end)
        steps[found[0]] = estimates, len(re.findall(r"\b(?:FMUL|FFMA)\b", before_the_end))
    assert steps["ieee_root"] == (["MUFU.RSQ"], 4)
    assert steps["ieee_quotient"] == (["MUFU.RCP"], 5)
    assert steps["fast_quotient"] == steps["ieee_quotient"]
    by_a_known_reciprocal = 3  # a quotient without its first two steps
    assert steps["fast_root_over"] == (["MUFU.RSQ"], 4 + by_a_known_reciprocal)
