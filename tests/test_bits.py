"""Kernels give the same bits however a tensor is split, wherever it lies, and on every instruction set and number of
threads. These are the bits of the reference and of torch's fused kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from dracopt_ext import backend
from dracopt_ext.reference import MOMENTS

from .cases import (
    CASES,
    DTYPES,
    FAULTS,
    FUSED_CASES,
    RULE_CASES,
    SIZES,
    UNFUSED_ULPS,
    WHOLE_BLOCKS,
    Case,
    NoOp,
    assert_close,
    assert_same_bits,
    inputs,
    train,
)
from .digest import digest
from .isa import ISA_FLAGS

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_fault = pytest.mark.parametrize("fault", FAULTS)


def by_reference(case: Case, sizes: list[int], dtype: torch.dtype, steps: int = 5) -> dict[str, Tensor]:
    return train(case.ours, {**case.options, "backend": "reference"}, *inputs(sizes, dtype, steps))


@every_case
def test_reference_in_fp32(case: Case) -> None:
    ours = train(case.ours, {**case.options, "backend": "native"}, *inputs(SIZES, torch.float32, 5))
    assert_same_bits(ours, by_reference(case, SIZES, torch.float32))


@every_case
@every_fault
def test_reference_in_fp32_bites(case: Case, fault: type[NoOp]) -> None:
    wrong = train(fault(case.ours), case.options, *inputs(SIZES, torch.float32, 5))
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(wrong, by_reference(case, SIZES, torch.float32))


# In fp64 the reference has no fused multiply-add and rounds products that the kernels do not round. A step has at most
# six such roundings, of half an ulp each, in terms no larger than the scale of the result. The limit is twice that
# because a step also finds errors of earlier steps in its states.
FP64_STEPS = 5
FP64_ULPS = 2 * 6 * 0.5 * FP64_STEPS


@every_case
def test_reference_in_fp64(case: Case) -> None:
    ours = train(case.ours, {**case.options, "backend": "native"}, *inputs(SIZES, torch.float64, FP64_STEPS))
    assert_close(ours, by_reference(case, SIZES, torch.float64, FP64_STEPS), FP64_ULPS)


@every_case
@every_fault
def test_reference_in_fp64_bites(case: Case, fault: type[NoOp]) -> None:
    wrong = train(fault(case.ours), case.options, *inputs(SIZES, torch.float64, FP64_STEPS))
    with pytest.raises(AssertionError, match="ulps"):
        assert_close(wrong, by_reference(case, SIZES, torch.float64, FP64_STEPS), FP64_ULPS)


every_fused_case = pytest.mark.parametrize("case", FUSED_CASES, ids=str)


@every_fused_case
@every_dtype
def test_torch_fused_on_whole_simd_blocks(case: Case, dtype: torch.dtype) -> None:
    given = inputs(WHOLE_BLOCKS, dtype, 10)
    ours = train(case.ours, case.options, *given)
    assert_same_bits(ours, train(case.torchs, {**case.options, "fused": True}, *given))


@every_fused_case
@every_dtype
@every_fault
def test_torch_fused_bites(case: Case, dtype: torch.dtype, fault: type[NoOp]) -> None:
    given = inputs(WHOLE_BLOCKS, dtype, 10)
    theirs = train(case.torchs, {**case.options, "fused": True}, *given)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(train(fault(case.ours), case.options, *given), theirs)


every_unfused_case = pytest.mark.parametrize("case", [case for case in CASES if not case.fused], ids=str)


@every_unfused_case
@every_dtype
@pytest.mark.parametrize("foreach", [False, True])
def test_torch_unfused(case: Case, dtype: torch.dtype, foreach: bool) -> None:
    given = inputs(SIZES, dtype, 5)
    theirs = train(case.torchs, {**case.options, "foreach": foreach}, *given)
    assert_close(train(case.ours, case.options, *given), theirs, 5 * UNFUSED_ULPS)


@every_unfused_case
@every_dtype
@every_fault
def test_torch_unfused_bites(case: Case, dtype: torch.dtype, fault: type[NoOp]) -> None:
    given = inputs(SIZES, dtype, 5)
    theirs = train(case.torchs, case.options, *given)
    with pytest.raises(AssertionError, match="ulps"):
        assert_close(train(fault(case.ours), case.options, *given), theirs, 5 * UNFUSED_ULPS)


def one_exact_step(case: Case) -> tuple[Any, dict[str, Tensor]]:
    """Returns the inputs of a step in fp32, and the result of the step in fp64."""
    initial, steps = inputs([4096], torch.float32, 1)
    in_double = [t.double() for t in initial], [[t.double() for t in step] for step in steps]
    return (initial, steps), train(case.ours, {**case.options, "backend": "reference"}, *in_double)


# A step has at most twelve operations. Each rounds by half an ulp of a term at most twice its result.
FP32_ULPS = 12


@every_case
def test_fp32_against_exact_arithmetic(case: Case) -> None:
    given, exact = one_exact_step(case)
    assert_close(train(case.ours, case.options, *given), exact, FP32_ULPS)


@every_case
@every_fault
def test_fp32_against_exact_arithmetic_bites(case: Case, fault: type[NoOp]) -> None:
    given, exact = one_exact_step(case)
    with pytest.raises(AssertionError, match="ulps"):
        assert_close(train(fault(case.ours), case.options, *given), exact, FP32_ULPS)


@every_case
@every_dtype
def test_splits(case: Case, dtype: torch.dtype) -> None:
    """One tensor gives the same bits as its elements in many tensors of odd lengths."""
    (whole,), steps = inputs([5000], dtype, 3)
    lengths = [1, 2, 3, 61, 64, 67, 129, 1000, 3673]
    together = train(case.ours, case.options, [whole], steps)
    pieces = train(case.ours, case.options, whole.split(lengths), [grad.split(lengths) for (grad,) in steps])
    for name in ("", *(f".{moment}" for moment in MOMENTS)):
        if f"0.0{name}" in together:
            joined = torch.cat([pieces[f"0.{i}{name}"] for i in range(len(lengths))])
            assert_same_bits({name: joined}, {name: together[f"0.0{name}"]})


@every_case
@every_dtype
@pytest.mark.parametrize("offset", [1, 3, 5])
def test_offsets_and_guards(case: Case, dtype: torch.dtype, offset: int) -> None:
    """Tensors that begin anywhere give the same bits, and nothing beside them is touched."""
    given = inputs([1, 17, 1000], dtype, 3)
    surroundings: list[tuple[Tensor, int]] = []

    def misplaced(tensor: Tensor) -> Tensor:
        buffer = torch.full((tensor.numel() + 2 * 64,), 7.5, dtype=dtype)
        surroundings.append((buffer, tensor.numel()))
        view = buffer[offset : offset + tensor.numel()]
        view.copy_(tensor)
        return view

    assert_same_bits(train(case.ours, case.options, *given, place=misplaced), train(case.ours, case.options, *given))
    for buffer, numel in surroundings:
        assert (buffer[:offset] == 7.5).all()
        assert (buffer[offset + numel :] == 7.5).all()


@pytest.mark.parametrize("case", RULE_CASES, ids=str)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 1e-42, -0.0])
def test_nan_in_every_stream(case: Case, special: float) -> None:
    """NaNs, infinities, subnormal numbers and zeros stand in the parameter, the gradient and the states."""
    initial, gradients = inputs([64], torch.float32, 3)
    initial[0][0] = gradients[1][0][1] = special
    streams = iter(range(2, 10))

    def place_state(state: Tensor) -> Tensor:
        state[next(streams)] = special
        return state

    found = train(case.ours, {**case.options, "backend": "native"}, initial, gradients, place_state=place_state)
    streams = iter(range(2, 10))
    expected = train(case.ours, {**case.options, "backend": "reference"}, initial, gradients, place_state=place_state)
    assert_same_bits(found, expected)


@every_case
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads(case: Case, threads: int) -> None:
    given = inputs([100_003, 5, 0, 70_001, *range(40)], torch.float32, 2)
    torch.set_num_threads(1)
    alone = train(case.ours, case.options, *given)
    torch.set_num_threads(threads)
    assert_same_bits(train(case.ours, case.options, *given), alone)


def test_a_step_that_releases_the_gil() -> None:
    """Large steps take a different path through the binding than small ones."""
    case = Case("AdamW", {"lr": 0.01})
    given = inputs([3_000_001, 5], torch.float32, 2)
    pieces = [given[0][0][:100], given[0][1]], [[a[:100], b] for a, b in given[1]]
    large = train(case.ours, case.options, *given)
    small = train(case.ours, case.options, *pieces)
    assert_same_bits({"a": large["0.0"][:100], "b": large["0.1"]}, {"a": small["0.0"], "b": small["0.1"]})
    assert large["0.0.step"] == 2


@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_instruction_sets(isa: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.digest"], env={**os.environ, "DRACOPT_ISA": isa}, capture_output=True, text=True
    )
    if "is not among what this machine runs" in run.stderr:
        pytest.skip(f"this machine does not run {isa}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [isa, digest()]
    assert backend.isa() in ISA_FLAGS
