"""Steps that clip the gradients by their global norm, and the functions that clip gradients in place."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import random
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn import utils

import dracopt_ext
from dracopt_ext import _C, reference
from dracopt_ext.clip_grad import global_norm

from .cases import (
    CASES,
    DTYPES,
    FAULTS,
    RULE_CASES,
    SIZES,
    STORAGE,
    UNFUSED_ULPS,
    WHOLE_BLOCKS,
    Case,
    NoOp,
    assert_close,
    assert_same_bits,
    classes,
    inputs,
    snapshot,
    train,
)
from .test_layouts import LAYOUTS, Buffers

NATIVE = {"cpu": frozenset({"native"})}
FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
ROUNDINGS = 10 * 2.0**-53
"""The most by which a norm is off, relatively: see csrc/core/squares.h."""
CHUNKS = [511, 512, 513, 1024, 4095, 4096, 4097, 4096 + 511, 4096 + 513, 3 * 4096 + 5]
FOR_THREADS = 4 * 2**20
"""Elements of which three threads get a part, whatever their dtype."""

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_rule = pytest.mark.parametrize("case", RULE_CASES, ids=str)
every_fault = pytest.mark.parametrize("fault", FAULTS)


def with_gradients(*gradients: Tensor) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.ones_like(gradient)) for gradient in gradients]
    for p, gradient in zip(params, gradients, strict=True):
        p.grad_dtype = gradient.dtype
        p.grad = gradient
    return params


def squares_of(*gradients: Tensor) -> float:
    total, _, others = _C.sum_of_squares(list(gradients), False)
    assert not others
    return float(total)


# ---- the sum of squares


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_sum_of_squares_is_the_references(dtype: torch.dtype) -> None:
    """The bits are those of the specification: in any dtype, for any size and with any number of threads."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in (*SIZES, *CHUNKS)]
    for some in ([tensor] for tensor in tensors):
        found, expected = squares_of(*some), reference.sum_of_squares(some)
        # The reference does not fuse multiplications and additions in fp64.
        assert found == expected if dtype != FP64 else found == pytest.approx(expected, rel=16 * 2.0**-53)
    many = tensors * (FOR_THREADS // sum(map(torch.numel, tensors)) + 1)
    torch.set_num_threads(1)
    total = squares_of(*many)
    assert dtype == FP64 or total == reference.sum_of_squares(many)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert squares_of(*random.Random(threads).sample(many, len(many))) == total


def test_sum_is_exact_beyond_chunks() -> None:
    """The sum of tensors of one element is the exact sum of the squares, rounded once, for all sizes of numbers."""
    numbers = random.Random(0)
    for spread in (1, 30, 250, 500):
        values = [numbers.random() * 2.0 ** numbers.randint(-spread, spread) for _ in range(500)]
        assert squares_of(*(torch.tensor([value], dtype=FP64) for value in values)) == math.fsum(x * x for x in values)
    # The last number decides how a tie is rounded.
    tie = [torch.tensor([x], dtype=FP64) for x in (1.0, 2.0**-27, 2.0**-27)]
    assert squares_of(*tie) == 1
    assert squares_of(*tie, torch.tensor([2.0**-100], dtype=FP64)) == 1 + 2.0**-52
    assert squares_of(torch.tensor([5e-324, 1.5e-161], dtype=FP64)) == 1.5e-161**2
    assert squares_of(torch.tensor([1e154], dtype=FP64), torch.tensor([1e154], dtype=FP64)) == math.inf
    assert squares_of() == squares_of(torch.zeros(0)) == squares_of(torch.zeros(7)) == 0


def test_sum_of_a_billion_equal_values_does_not_drift() -> None:
    value = torch.tensor(0.1)
    many = value.expand(2**30)
    exact = 2**30 * value.double().item() ** 2
    assert abs(squares_of(many) / exact - 1) <= 2 * ROUNDINGS
    assert abs(dracopt_ext.get_total_norm([many]).item() - math.sqrt(exact)) <= 2**-24 * math.sqrt(exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64, torch.complex64], ids=str)
def test_sum_of_any_layout(layout: str, dtype: torch.dtype) -> None:
    tensor = torch.randn(6, 5, 8, 7, dtype=dtype)
    view = Buffers(LAYOUTS[layout])(tensor)
    exact = tensor.to(torch.complex128 if dtype.is_complex else FP64).abs().square().sum().item()
    assert squares_of(view) == pytest.approx(exact, rel=16 * 2.0**-53)


@pytest.mark.parametrize("place", [0, 100, 4095, 4096, 9999])
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_sum_is_not_finite(place: int, dtype: torch.dtype) -> None:
    for value, expected in ((math.inf, math.inf), (-math.inf, math.inf), (math.nan, math.nan)):
        tensor = torch.ones(10_000).to(dtype)
        tensor[place] = value
        found = squares_of(torch.ones(3), tensor)
        assert found == expected or (math.isnan(found) and math.isnan(expected))
        assert math.isnan(squares_of(tensor, torch.tensor([math.nan])))


# ---- steps


class Clipped:
    """Takes torch's way: ``clip_grad_norm_`` in place, and then the step."""

    def __init__(self, make: Any, max_norm: float) -> None:
        self.make, self.max_norm = make, max_norm

    def __call__(self, params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.make(params, **options)
        optimizer.register_step_pre_hook(lambda *_: utils.clip_grad_norm_(params, self.max_norm) and None)
        return optimizer


LARGEST = 120.0
"""The gradients of the first step are longer than this, and shrink."""


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_torch(case: Case, dtype: torch.dtype) -> None:
    """Some of the steps clip. torch rounds the norm and the coefficient to the gradients' dtype, each by an ulp."""
    given = inputs(WHOLE_BLOCKS, dtype, 5)
    norms = [utils.get_total_norm(step).item() for step in given[1]]
    largest = norms[1] * 1.01
    assert norms[0] > largest > norms[1]
    ours = train(case.ours, {**case.options, "max_grad_norm": largest, "backend": "native"}, *given)
    assert_close(ours, train(Clipped(case.torchs, largest), case.options, *given), 5 * (UNFUSED_ULPS + 8))


@every_rule
@every_fault
def test_agrees_with_torch_bites(case: Case, fault: type[NoOp]) -> None:
    given = inputs(WHOLE_BLOCKS, FP32, 5)
    wrong = train(fault(case.ours), {**case.options, "max_grad_norm": 10.0}, *given)
    with pytest.raises(AssertionError, match="ulps"):
        assert_close(wrong, train(Clipped(case.torchs, 10.0), case.options, *given), 5 * (UNFUSED_ULPS + 8))


@every_rule
@pytest.mark.parametrize("wrong_norm", [10.1, math.inf])
def test_agreement_needs_the_right_norm(case: Case, wrong_norm: float) -> None:
    """Neither a step that does not clip nor one with a slightly wrong norm passes."""
    given = inputs(WHOLE_BLOCKS, FP32, 5)
    wrong = train(case.ours, {**case.options, "max_grad_norm": wrong_norm}, *given)
    with pytest.raises(AssertionError, match="ulps"):
        assert_close(wrong, train(Clipped(case.torchs, 10.0), case.options, *given), 5 * (UNFUSED_ULPS + 8))


@every_case
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_bits_of_the_reference(case: Case, dtype: torch.dtype) -> None:
    """Moments in the parameter's dtype; in 16 bits, whole pairs and single numbers have a loop of their own."""
    initial, gradients = inputs([*SIZES, 4097], FP32, 3)
    given = [x.to(dtype) for x in initial], [[g.to(dtype) for g in step] for step in gradients]
    for largest in (1.0, 1e9):
        options = {**case.options, "max_grad_norm": largest}
        ours = train(case.ours, {**options, "backend": "native"}, *given)
        theirs = train(case.ours, {**options, "backend": "reference"}, *given)
        if dtype == FP64:
            assert_close(ours, theirs, 3 * UNFUSED_ULPS)
        else:
            assert_same_bits(ours, theirs)


@every_rule
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("largest", [math.inf, 1e9])
def test_changes_nothing_unless_needed(case: Case, dtype: torch.dtype, largest: float) -> None:
    initial, gradients = inputs([*SIZES, 4097], FP32, 3)
    given = [x.to(dtype) for x in initial], [[g.to(dtype) for g in step] for step in gradients]
    clipped = train(case.ours, {**case.options, "max_grad_norm": largest}, *given)
    assert_same_bits(clipped, train(case.ours, case.options, *given))


@every_rule
@pytest.mark.parametrize("numel", [100_000, FOR_THREADS])
def test_threads_change_no_bit(case: Case, numel: int) -> None:
    """The GIL is held while a short step takes place, and released in a long one."""
    given = inputs([numel, *CHUNKS], FP32, 2)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(train(case.ours, {**case.options, "max_grad_norm": 1.0}, *given))
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


@every_rule
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(case: Case, layout: str) -> None:
    """A gradient counts in the order of its own memory, so only its own layout may change the norm's last bits."""
    values = torch.randn(2, 6, 5, 8, 7).unbind()
    given = [values[0]], [[values[1]], [values[0]]]
    place = Buffers(LAYOUTS[layout])
    options = {**case.options, "max_grad_norm": 1.0}
    ours = train(case.ours, options, *given, place=place)
    place.assert_nothing_else_was_written()
    plain = train(case.ours, options, *given)
    assert_close(ours, plain, 2)


def test_norm_of_all_groups_and_dtypes() -> None:
    gradients = [torch.randn(300).to(dtype) for dtype in STORAGE]
    params = with_gradients(*gradients, torch.randn(5, dtype=torch.complex64))
    optimizer = dracopt_ext.SGD([{"params": [p]} for p in params], lr=1.0, max_grad_norm=2.0)
    optimizer.step()
    exact = math.sqrt(sum(p.grad.to(torch.complex128).abs().square().sum().item() for p in params))  # type: ignore[union-attr]
    norm = optimizer.grad_norm
    assert (norm.dtype, norm.shape, norm.device.type) == (FP64, (), "cpu")
    assert norm.item() == pytest.approx(exact, rel=ROUNDINGS)
    for p in params:
        expected = 1 - p.grad.to(torch.complex128) * 2.0 / (exact + 1e-6)  # type: ignore[union-attr]
        torch.testing.assert_close(p.detach().to(torch.complex128), expected, rtol=0, atol=4 * torch.finfo(p.dtype).eps)
    assert optimizer.last_backend == NATIVE


def test_gradients_are_not_written() -> None:
    params = with_gradients(torch.randn(100), torch.randn(5000))
    before = [p.grad.clone() for p in params]  # type: ignore[union-attr]
    versions = [p.grad._version for p in params]  # type: ignore[union-attr]
    dracopt_ext.AdamW(params, max_grad_norm=0.1).step()
    for p, grad, version in zip(params, before, versions, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, grad)
        assert p.grad._version == version


def test_each_step_has_a_norm_of_its_own() -> None:
    (p,) = with_gradients(torch.full((4,), 3.0))
    optimizer = dracopt_ext.SGD([p], max_grad_norm=1.0)
    assert optimizer.grad_norm is None
    optimizer.step()
    first = optimizer.grad_norm
    assert p.grad is not None
    p.grad *= 2
    optimizer.step()
    assert (first.item(), optimizer.grad_norm.item()) == (6.0, 12.0)
    p.grad = None
    optimizer.step()
    assert optimizer.grad_norm.item() == 0
    assert dracopt_ext.SGD([nn.Parameter(torch.ones(2))], max_grad_norm=0.0).step() is None


def test_largest_norm_may_change_between_steps() -> None:
    given = inputs(WHOLE_BLOCKS, FP32, 4)
    params = [nn.Parameter(value.clone()) for value in given[0]]
    theirs = [nn.Parameter(value.clone()) for value in given[0]]
    ours, torchs = dracopt_ext.AdamW(params), torch.optim.AdamW(theirs)
    for largest, step in zip((None, 5.0, 0.25, None), given[1], strict=True):
        ours.max_grad_norm = largest
        for p, q, grad in zip(params, theirs, step, strict=True):
            p.grad, q.grad = grad.clone(), grad.clone()
        if largest is not None:
            utils.clip_grad_norm_(theirs, largest)
        ours.step()
        torchs.step()
    assert_close(snapshot(ours), snapshot(torchs), 4 * (UNFUSED_ULPS + 8))


@every_rule
def test_zero_and_not_a_number(case: Case) -> None:
    """A largest norm of zero leaves no gradient. A norm that is no number makes all gradients such, as in torch."""
    for value, largest in ((1.0, 0.0), (math.nan, 1.0), (math.inf, 1.0), (math.inf, math.inf), (0.0, 1.0)):
        gradient = torch.ones(64)
        gradient[3] = value
        given = [torch.ones(64)], [[gradient]]
        ours = train(case.ours, {**case.options, "max_grad_norm": largest}, *given)
        torchs = train(Clipped(case.torchs, largest), case.options, *given)
        torch.testing.assert_close(ours, torchs, equal_nan=True)


def test_what_torch_steps_counts_too() -> None:
    """torch steps two parameters that share memory, and ours steps the third, all with one coefficient."""
    found = []
    for make in (dracopt_ext.AdamW, Clipped(torch.optim.AdamW, 0.5)):
        memory = torch.ones(64)
        params = [nn.Parameter(memory[:40]), nn.Parameter(memory[20:]), nn.Parameter(torch.ones(9))]
        optimizer = make(params, **({"max_grad_norm": 0.5} if make is dracopt_ext.AdamW else {}))
        for step in inputs([40, 44, 9], FP32, 3)[1]:
            for p, grad in zip(params, step, strict=True):
                p.grad = grad.clone()
            with warnings.catch_warnings(action="ignore"):
                optimizer.step()
        found.append(snapshot(optimizer))
        if make is dracopt_ext.AdamW:
            assert optimizer.last_backend == {"cpu": frozenset({"torch", "native"})}
    assert_close(found[0], found[1], 3 * (UNFUSED_ULPS + 8))


@pytest.mark.parametrize("name", classes())
def test_sparse_gradients(name: str) -> None:
    """torch's norm does not take sparse gradients. Nothing changes."""
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    (p,) = with_gradients(torch.ones(3))
    optimizer = getattr(dracopt_ext, name)([p, embedding.weight], max_grad_norm=1.0)
    with pytest.raises(NotImplementedError, match="linalg_vector_norm"):
        optimizer.step()
    assert (p == 1).all()
    assert not optimizer.state


@pytest.mark.filterwarnings("ignore:.* leaves parameters to the reference:RuntimeWarning")
def test_without_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dracopt_ext.backend.NATIVE_REASON", "switched off")
    for case in RULE_CASES:
        given = inputs(WHOLE_BLOCKS, FP32, 3)
        ours = train(case.ours, {**case.options, "max_grad_norm": 5.0}, *given)
        assert_close(ours, train(Clipped(case.torchs, 5.0), case.options, *given), 3 * (UNFUSED_ULPS + 8))


# ---- options


@pytest.mark.parametrize("name", classes())
def test_wrong_norms(name: str) -> None:
    make = getattr(dracopt_ext, name)
    p = nn.Parameter(torch.ones(2))
    for wrong in (-1.0, math.nan, -math.inf):
        with pytest.raises(ValueError, match=r"max_grad_norm is .*; it must be at least 0"):
            make([p], max_grad_norm=wrong)
        optimizer = make([p], max_grad_norm=3)
        with pytest.raises(ValueError, match=r"max_grad_norm is .*; it must be at least 0"):
            optimizer.max_grad_norm = wrong
        assert optimizer.max_grad_norm == 3.0
    with pytest.raises((TypeError, ValueError)):
        make([p], max_grad_norm="large")
    assert make([p]).max_grad_norm is None
    assert make([p], max_grad_norm=0).max_grad_norm == 0
    assert make([p], max_grad_norm=torch.tensor(2.0)).max_grad_norm == 2


def test_copies_keep_the_options() -> None:
    optimizer = dracopt_ext.AdamW([nn.Parameter(torch.ones(2))], max_grad_norm=3.0, error_if_nonfinite=True)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (copied.max_grad_norm, copied.error_if_nonfinite) == (3.0, True)
    other = dracopt_ext.AdamW([nn.Parameter(torch.ones(2))])
    other.load_state_dict(optimizer.state_dict())
    assert other.max_grad_norm is None


@every_rule
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("max_norm", [1.0, None])
def test_error_if_nonfinite(case: Case, value: float, trained: bool, max_norm: float | None) -> None:
    """Nothing changes, states are not created, and the next step goes on."""
    params = with_gradients(torch.ones(5), torch.ones(7))
    optimizer = case.ours(params, **case.options, max_grad_norm=max_norm, error_if_nonfinite=True)
    if trained:
        optimizer.step()
    before = snapshot(optimizer)
    assert params[1].grad is not None
    params[1].grad[2] = value
    with pytest.raises(
        RuntimeError, match="non-finite" + (", so it cannot be clipped" if max_norm else ". To disable")
    ):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)
    params[1].grad[2] = 1.0
    optimizer.step()
    assert optimizer.last_backend == NATIVE
    assert not torch.equal(snapshot(optimizer)["0.0"], before["0.0"])


def test_subclass_that_overrides_what_only_torch_calls() -> None:
    class Own(dracopt_ext.AdamW):
        def _init_group(self, *args: Any) -> Any:
            return super()._init_group(*args)

    for option in ({"max_grad_norm": 1.0}, {"error_if_nonfinite": True}):
        (name, value), *_ = option.items()
        with pytest.raises(RuntimeError, match=f"{name}={value} is not for Own, which overrides _init_group"):
            Own(with_gradients(torch.ones(2)), **option).step()


@every_rule
def test_error_if_nonfinite_alone_clips_nothing(case: Case) -> None:
    given = inputs(SIZES, FP32, 3)
    ours = train(case.ours, {**case.options, "error_if_nonfinite": True}, *given)
    expected = train(case.ours, {**case.options, "backend": "reference"}, *given)
    assert_same_bits(ours, expected)
    for fault in FAULTS:
        with pytest.raises(AssertionError, match="elements differ"):
            assert_same_bits(train(fault(case.ours), {**case.options, "error_if_nonfinite": True}, *given), expected)


# ---- GradScaler


SCALERS = [torch.amp.GradScaler, dracopt_ext.GradScaler]
every_scaler = pytest.mark.parametrize("scaler_class", SCALERS)


@every_rule
@every_scaler
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("overflows", [(), (0,), (2,), (0, 3)])
def test_grad_scaler(case: Case, scaler_class: Any, fused: bool | None, overflows: tuple[int, ...]) -> None:
    """An overflow in any step changes nothing. Otherwise the step is that of unscaled gradients."""
    if case.algorithm == "NAdam" and fused:
        pytest.skip("torch's NAdam has no such option")
    options = {**case.options, **({} if fused is None else {"fused": True})}
    initial, gradients = inputs([1, 64, 5000], FP32, 5)
    params = [nn.Parameter(value.clone()) for value in initial]
    others = [nn.Parameter(value.clone()) for value in initial]
    scaled = case.ours(params, **options, max_grad_norm=20.0)
    plain = case.ours(others, **case.options, max_grad_norm=20.0)
    scaler = scaler_class("cpu", init_scale=1024.0)
    for number, step in enumerate(gradients):
        before, scale = snapshot(scaled), scaler.get_scale()
        for p, q, grad in zip(params, others, step, strict=True):
            scaler.scale(torch.ones(()))  # a backward would do this first
            p.grad, q.grad = grad * scale, grad.clone()
        if number in overflows:
            params[1].grad[3] = math.inf  # type: ignore[index]
        scaler.step(scaled)
        scaler.update()
        if number in overflows:
            assert_same_bits(snapshot(scaled), before)
            assert scaler.get_scale() == scale / 2
            assert scaled.last_backend == {} or fused is None
        else:
            plain.step()
            assert scaler.get_scale() == scale
            assert scaled.grad_norm.item() == plain.grad_norm.item()
    assert_same_bits(snapshot(scaled), snapshot(plain))


@every_scaler
def test_unscaled_once(scaler_class: Any) -> None:
    (p,) = with_gradients(torch.full((4,), 32.0))
    optimizer = dracopt_ext.SGD([p], lr=1.0, fused=True, max_grad_norm=2.0)
    scaler = scaler_class("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.grad_norm.item() == 8.0
    torch.testing.assert_close(p.detach(), torch.zeros(4))


def test_our_scaler_takes_no_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted(*_: Any) -> None:
        raise AssertionError("torch's check is another pass")

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", unwanted)
    (p,) = with_gradients(torch.full((4,), 32.0))
    optimizer = dracopt_ext.SGD([p], lr=1.0, fused=True, max_grad_norm=2.0)
    for _ in range(2):
        scaler = dracopt_ext.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(p.detach(), torch.full((4,), -1.0))


def test_our_scaler_serves_other_optimizers() -> None:
    for make in (torch.optim.AdamW, dracopt_ext.AdamW):
        for fused in (None, True):
            (p,) = with_gradients(torch.full((4,), math.inf))
            optimizer = make([p], fused=fused)
            scaler = dracopt_ext.GradScaler("cpu", init_scale=8.0)
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
            assert (p == 1).all()
            assert scaler.get_scale() == 4.0


@every_scaler
def test_error_if_nonfinite_leaves_an_overflow_to_the_scaler(scaler_class: Any) -> None:
    (p,) = with_gradients(torch.full((4,), math.inf))
    optimizer = dracopt_ext.AdamW([p], fused=True, max_grad_norm=2.0, error_if_nonfinite=True)
    scaler = scaler_class("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert not optimizer.state


def test_large_numbers_are_no_overflow() -> None:
    """The squares of these fp64 gradients are infinite, but they are not."""
    (p,) = with_gradients(torch.full((4,), 1e200, dtype=FP64))
    optimizer = dracopt_ext.SGD([p], lr=1.0, fused=True, max_grad_norm=2.0)
    scaler = dracopt_ext.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 8.0
    assert (p == 1).all()  # as in torch, where the norm is infinite and the coefficient zero


# ---- functions


def gradients_for(dtypes: tuple[torch.dtype, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = itertools.cycle((1, 64, 1000, 4097, 33))
    return [torch.randn(next(sizes), generator=generator).to(dtype) for dtype in dtypes * 3]


MIXTURES = [(FP32,), (BF16,), (FP16,), (FP64,), (FP32, BF16), (BF16, FP16), (FP64, FP32), (torch.complex64, FP32)]


@pytest.mark.parametrize("dtypes", MIXTURES, ids=str)
@pytest.mark.parametrize("foreach", [None, False, True])
def test_clip_grad_norm(dtypes: tuple[torch.dtype, ...], foreach: bool | None) -> None:
    ours, theirs = (with_gradients(*gradients_for(dtypes)) for _ in range(2))
    found = dracopt_ext.clip_grad_norm_(ours, 1.5, foreach=foreach)
    expected = utils.clip_grad_norm_(theirs, 1.5, foreach=foreach)
    exact = math.sqrt(sum(g.to(torch.complex128).abs().square().sum().item() for g in gradients_for(dtypes)))
    assert found.dtype == expected.dtype
    assert found.item() == pytest.approx(exact, rel=torch.finfo(found.dtype).eps)
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)  # torch rounds the norm of each tensor to its dtype
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=8 * eps, atol=0)


@pytest.mark.parametrize("norm_type", [1.0, 2, "inf", math.inf, 3.5, 0.0])
def test_norm_types(norm_type: Any) -> None:
    ours, theirs = (with_gradients(*gradients_for((FP32,))) for _ in range(2))
    torch.testing.assert_close(
        dracopt_ext.clip_grad_norm_(ours, 0.5, norm_type), utils.clip_grad_norm_(theirs, 0.5, float(norm_type))
    )
    torch.testing.assert_close([p.grad for p in ours], [q.grad for q in theirs])
    gradients = [p.grad for p in theirs]
    torch.testing.assert_close(
        dracopt_ext.get_total_norm(gradients, norm_type),  # type: ignore[arg-type]
        utils.get_total_norm(gradients, float(norm_type)),  # type: ignore[arg-type]
    )


def test_clip_grads_with_norm_has_torchs_bits() -> None:
    torch.set_num_threads(3)
    large = torch.randn(FOR_THREADS)
    ours, theirs = (with_gradients(*gradients_for((FP32, BF16, FP64)), large.clone()) for _ in range(2))
    for norm in (torch.tensor(7.0), torch.tensor(3.0, dtype=FP64), torch.tensor(0.1)):
        dracopt_ext.clip_grads_with_norm_(ours, 0.5, norm)
        utils.clip_grads_with_norm_(theirs, 0.5, norm)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=torch.finfo(q.dtype).eps, atol=0)


@pytest.mark.parametrize("value", [0.5, 0.0, math.inf, -0.25])
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_clip_grad_value(value: float, dtype: torch.dtype) -> None:
    gradients = [*gradients_for((dtype,)), torch.tensor([math.nan, math.inf, -math.inf, -0.0]).to(dtype)]
    ours, theirs = (with_gradients(*(g.clone() for g in gradients)) for _ in range(2))
    assert dracopt_ext.clip_grad_value_(ours, value) is None
    utils.clip_grad_value_(theirs, value)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)


def test_functions_take_a_tensor_an_iterator_and_nothing() -> None:
    (p,) = with_gradients(torch.full((4,), 3.0))
    assert dracopt_ext.clip_grad_norm_(p, 100.0).item() == 6.0
    assert dracopt_ext.clip_grad_norm_(iter([p, nn.Parameter(torch.ones(2))]), 3.0).item() == 6.0
    torch.testing.assert_close(p.grad, torch.full((4,), 1.5))
    assert dracopt_ext.get_total_norm(torch.ones(4)).item() == 2.0
    for nothing in ([], [nn.Parameter(torch.ones(2))]):
        norm = dracopt_ext.clip_grad_norm_(nothing, 1.0)
        assert (norm.item(), norm.dtype) == (0.0, FP32)
    with pytest.warns(UserWarning, match="empty generator"):
        dracopt_ext.clip_grad_norm_((q for q in []), 1.0)
    dracopt_ext.clip_grad_value_(p, 0.5)
    assert (p.grad == 0.5).all()
    dracopt_ext.clip_grads_with_norm_(p, 0.5, torch.tensor(1.0))
    torch.testing.assert_close(p.grad, torch.full((4,), 0.25))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_functions_raise_if_nonfinite(value: float) -> None:
    (p,) = with_gradients(torch.tensor([1.0, value]))
    for function in (dracopt_ext.clip_grad_norm_, utils.clip_grad_norm_):
        with pytest.raises(RuntimeError, match="non-finite, so it cannot be clipped"):
            function([p], 1.0, error_if_nonfinite=True)
    assert p.grad is not None
    assert p.grad[0] == 1
    ours, theirs = (with_gradients(torch.tensor([1.0, value])) for _ in range(2))
    dracopt_ext.clip_grad_norm_(ours, 1.0)
    utils.clip_grad_norm_(theirs, 1.0)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_functions_in_any_layout(layout: str) -> None:
    for function in (dracopt_ext.clip_grad_norm_, dracopt_ext.clip_grad_value_):
        place = Buffers(LAYOUTS[layout])
        gradient = torch.randn(6, 5, 8, 7)
        ours, theirs = with_gradients(place(gradient)), with_gradients(gradient.clone())
        function(ours, 0.5)
        getattr(utils, function.__name__)(theirs, 0.5)
        torch.testing.assert_close(ours[0].grad, theirs[0].grad)
        place.assert_nothing_else_was_written()


def test_functions_count_a_change() -> None:
    """A backward through a graph that saved a gradient must raise, as after torch's functions."""
    for function, expected in ((dracopt_ext.clip_grad_norm_, 1), (dracopt_ext.clip_grad_value_, 1)):
        (p,) = with_gradients(torch.full((4,), 3.0))
        assert p.grad is not None
        version = p.grad._version
        function([p], 1.0)
        assert p.grad._version == version + expected


def test_functions_and_shared_memory() -> None:
    """One gradient of two parameters is scaled twice, and an expanded one raises, as in torch.

    Threads would scale them at once, so the kernels leave them.
    """
    memory = torch.ones(64)
    shared = [memory[:40], memory[20:], memory[:40]]
    assert len(_C.multiply_gradients([*shared, torch.ones(3)], False, 2.0)) == 3
    assert (memory == 1).all()
    for functions in (
        (dracopt_ext.clip_grad_norm_, utils.clip_grad_norm_),
        (dracopt_ext.clip_grad_value_, utils.clip_grad_value_),
    ):
        found = []
        for function in functions:
            memory = torch.full((100,), 3.0)
            params = with_gradients(memory[:64], memory[32:96], memory[:64], torch.ones(3))
            function(params, 2.0)
            found.append((memory, params[3].grad))
        torch.testing.assert_close(*found)
    for function in (dracopt_ext.clip_grad_norm_, utils.clip_grad_norm_):
        (p,) = with_gradients(torch.ones(1).expand(4))
        with pytest.raises(RuntimeError, match="single memory location"):
            function([p], 1.0)


def test_default_device() -> None:
    gradient = torch.full((4,), 2.0)
    (p,) = with_gradients(torch.full((4,), 2.0))
    with torch.device("meta"):
        assert dracopt_ext.clip_grad_norm_([], 1.0).shape == ()
        assert global_norm([]).shape == ()
        norm = dracopt_ext.clip_grad_norm_([p], 1.0)
        assert global_norm([gradient]).is_cpu
    assert norm.item() == 4
    torch.testing.assert_close(p.grad, torch.full((4,), 0.5))


def test_functions_raise_where_torchs_do() -> None:
    """Nothing has changed then."""
    for library in (dracopt_ext, utils):
        (p,) = with_gradients(torch.full((1000,), 6e4, dtype=FP16))
        with pytest.raises(RuntimeError, match="non-finite"):  # the norm is infinite in fp16
            library.clip_grad_norm_([p], 1.0, error_if_nonfinite=True)
        assert p.grad is not None
        assert (p.grad == 6e4).all()
        params = with_gradients(torch.ones(3), torch.ones(3, dtype=torch.complex64))
        with pytest.raises(NotImplementedError):
            library.clip_grad_value_(params, 0.5)
        with pytest.raises(TypeError):
            library.clip_grads_with_norm_(params, 0.5, 3.0)
    (p,) = with_gradients(torch.ones(3))
    dracopt_ext.clip_grad_value_([p], math.nan)
    assert p.grad is not None
    assert p.grad.isnan().all()


# ---- what the program may do meanwhile

REPLACED = """
import threading, torch, dracopt_ext
torch.set_num_threads(2)
p = torch.nn.Parameter(torch.ones(2**23))
p.grad = torch.ones_like(p)
optimizer = dracopt_ext.AdamW([p], max_grad_norm=1.0)
optimizer.step()
state, over = optimizer.state[p], False

def replace():
    while not over:
        for name in ("step", "exp_avg"):
            state[name] = state[name].clone()
        torch.utils.swap_tensors(state["exp_avg_sq"], state["exp_avg_sq"].clone())
        p.grad = p.grad.clone()

thread = threading.Thread(target=replace)
thread.start()
for number in range(12):
    optimizer.step(zero_grad=number % 2 == 1)
over = True
thread.join()
assert (p < 1).all() and p.isfinite().all()
"""


def test_objects_that_another_thread_takes_away() -> None:
    """The norm of long gradients is found without the GIL, and the step still counts what it has found."""
    subprocess.run([sys.executable, "-c", REPLACED], check=True)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        p = nn.Parameter(torch.ones(3))
        optimizer = dracopt_ext.SGD([p], max_grad_norm=1.0)
        optimizer.step()
    assert isinstance(optimizer.grad_norm, FakeTensor)
    assert optimizer.grad_norm.shape == ()


def scaled(optimizer: Any, gradient: float) -> Any:
    scaler = dracopt_ext.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    optimizer.param_groups[0]["params"][0].grad = torch.full((4,), gradient)
    return scaler


def test_a_hook_that_stops_the_clipping() -> None:
    """The scaler has left the check to the step, which makes it all the same."""
    p = nn.Parameter(torch.ones(4))
    optimizer = dracopt_ext.SGD([p], lr=1.0, fused=True, max_grad_norm=1.0)
    optimizer.register_step_pre_hook(lambda *_: setattr(optimizer, "max_grad_norm", None))
    scaler = scaled(optimizer, math.inf)
    scaler.step(optimizer)
    scaler.update()
    assert (p == 1).all()
    assert scaler.get_scale() == 4.0


def test_a_step_that_failed_leaves_no_check_behind() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = dracopt_ext.SGD([p], lr=1.0, fused=True, max_grad_norm=1.0, error_if_nonfinite=True)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = optimizer.register_step_pre_hook(fail)
    scaler = scaled(optimizer, math.inf)
    with pytest.raises(KeyboardInterrupt):
        scaler.step(optimizer)
    hook.remove()
    del optimizer.found_inf, optimizer.grad_scale
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.step()


def test_iterators_are_refused_as_they_are() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = dracopt_ext.SGD([p], max_grad_norm=1.0)
    optimizer.param_groups[0]["params"] = params = iter([p, p])
    with pytest.raises(TypeError, match="sequence"):
        optimizer.step()
    assert len(list(params)) == 2
