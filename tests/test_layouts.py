"""The bits do not depend on how the elements of a parameter, its gradient and its states lie in memory. Nothing between
or beside the elements is touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dracopt_ext

from .cases import (
    BY_RULE,
    FAULTS,
    RULE_CASES,
    UNFUSED_ULPS,
    Case,
    NoOp,
    Place,
    Snapshot,
    assert_close,
    assert_same_bits,
    inputs,
    train,
)

NATIVE = {"cpu": frozenset({"native"})}
SHAPE = (6, 5, 8, 7)
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64

GUARD = 7.5


class Buffers:
    """Places copies of tensors in larger buffers and can tell whether anything but the copies was written."""

    def __init__(self, view: Callable[[Tensor, torch.Size], Tensor]) -> None:
        self.view = view
        self.placed: list[tuple[Tensor, Tensor]] = []

    def buffer(self, tensor: Tensor) -> Tensor:
        return torch.full((8 * tensor.numel() + 1024,), GUARD, dtype=tensor.dtype)

    def __call__(self, tensor: Tensor) -> Tensor:
        buffer = self.buffer(tensor)
        view = self.view(buffer, tensor.shape).copy_(tensor)
        self.placed.append((buffer, view))
        return view

    def assert_nothing_else_was_written(self) -> None:
        assert self.placed
        for buffer, view in self.placed:
            view.detach().fill_(GUARD)
            assert (buffer == GUARD).all()


def strided(steps: tuple[int, ...], order: tuple[int, ...] | None = None, offset: int = 0) -> Callable[..., Tensor]:
    """Makes views of buffers with every ``steps[d]``-th place in dimension d; ``order`` lists the slowest first."""

    def view(buffer: Tensor, shape: torch.Size) -> Tensor:
        strides, stride = [0] * len(shape), 1
        for d in reversed(order or range(len(shape))):
            stride *= steps[d]
            strides[d] = stride
            stride *= shape[d]
        return buffer.as_strided(shape, strides, offset)

    return view


LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "contiguous": strided((1, 1, 1, 1)),
    "misaligned": strided((1, 1, 1, 1), offset=3),
    "every second element": strided((1, 1, 1, 2)),
    "gaps between rows": strided((1, 1, 2, 1), offset=1),
    "gaps everywhere": strided((2, 1, 2, 2), offset=5),
    "transposed": strided((1, 1, 1, 1), order=(3, 2, 1, 0)),
    "channels_last": strided((1, 1, 1, 1), order=(0, 2, 3, 1)),
    "channels_last with gaps": strided((1, 2, 1, 1), order=(0, 2, 3, 1)),
}

every_rule = pytest.mark.parametrize("case", RULE_CASES, ids=str)
every_fault = pytest.mark.parametrize("fault", FAULTS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def given(dtype: torch.dtype = FP32, shape: tuple[int, ...] = SHAPE, steps: int = 3) -> Any:
    size = int(torch.Size(shape).numel())
    (value,), gradients = inputs([size], FP32, steps)
    return [value.to(dtype).view(shape)], [[grad.to(dtype).view(shape)] for (grad,) in gradients]


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def placed(case: Case, dtype: torch.dtype, p: str, g: str, s: str, make: Any = None) -> Snapshot:
    """Trains with parameter, gradients and states in these layouts; asserts that nothing else is written."""
    buffers = [Buffers(LAYOUTS[name]) for name in (p, g, s)]
    found = train(make or case.ours, {**case.options, "backend": "native"}, *given(dtype), *buffers)
    for place in buffers:
        place.assert_nothing_else_was_written()
    return found


@every_rule
@every_layout
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
@pytest.mark.parametrize("where", ["parameter", "gradient", "states", "all", "all in another than the parameter"])
def test_one_layout(case: Case, layout: str, dtype: torch.dtype, where: str) -> None:
    p = layout if where in ("parameter", "all") else "channels_last" if where.startswith("all") else "contiguous"
    g = layout if where in ("gradient", "all", "all in another than the parameter") else "contiguous"
    s = layout if where in ("states", "all", "all in another than the parameter") else "contiguous"
    expected = train(case.ours, case.options, *given(dtype))
    assert_same_bits(placed(case, dtype, p, g, s), expected)


@every_layout
@every_fault
def test_one_layout_bites(layout: str, fault: type[NoOp]) -> None:
    case = BY_RULE["adam"]
    expected = train(case.ours, case.options, *given())
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(placed(case, FP32, layout, layout, layout, fault(case.ours)), expected)


@every_rule
def test_every_pair_of_layouts(case: Case) -> None:
    expected = train(case.ours, case.options, *given())
    for p in LAYOUTS:
        for g in LAYOUTS:
            assert_same_bits(placed(case, FP32, p, g, "transposed"), expected)


EXPANDED: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "one number": (lambda g: g.flatten()[0].expand(SHAPE), (1,)),
    "along the first dimension": (lambda g: g[:1].expand(SHAPE), (1, 5, 8, 7)),
    "along the last dimension": (lambda g: g[..., :1].expand(SHAPE), (6, 5, 8, 1)),
    "in the middle": (lambda g: g[:, :1].expand(SHAPE), (6, 1, 8, 7)),
}


@every_rule
@pytest.mark.parametrize("kind", EXPANDED)
def test_expanded_gradients_are_legal(case: Case, kind: str) -> None:
    """``sum().backward()`` makes expanded gradients."""
    expand = EXPANDED[kind][0]
    initial, gradients = given()
    spread = [[expand(grad) for grad in step] for step in gradients]
    options = {**case.options, "backend": "native"}
    found = train(case.ours, options, initial, spread, place_grad=lambda grad: grad)
    assert_same_bits(found, train(case.ours, case.options, initial, spread, place_grad=contiguous))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (0,), (3, 0, 2), (1, 7, 1), (5, 1, 3, 1)], ids=str)
@every_rule
def test_odd_shapes(case: Case, shape: tuple[int, ...]) -> None:
    """Scalars, empty tensors, and dimensions of one element, whose strides mean nothing."""
    expected = train(case.ours, {**case.options, "backend": "reference"}, *given(shape=shape))

    def odd_strides(tensor: Tensor) -> Tensor:
        strides = [99 if size == 1 else stride for size, stride in zip(shape, tensor.stride(), strict=True)]
        return torch.empty(tensor.numel() + 8, dtype=tensor.dtype).as_strided(shape, strides).copy_(tensor)

    options = {**case.options, "backend": "native"}
    assert_same_bits(train(case.ours, options, *given(shape=shape)), expected)
    assert_same_bits(train(case.ours, options, *given(shape=shape), odd_strides, contiguous), expected)
    assert_same_bits(train(case.ours, options, *given(shape=shape), contiguous, odd_strides), expected)


@every_rule
def test_empty_tensors_at_every_position(case: Case) -> None:
    sizes = [5, 64, 1, 300]
    whole = inputs(sizes, FP32, 2)
    expected = train(case.ours, case.options, *whole)
    for position in range(len(sizes) + 1):
        for empty in (torch.empty(0), torch.empty(4, 0), torch.empty(0, 3).t()):
            initial = [*whole[0][:position], empty, *whole[0][position:]]
            gradients = [[*step[:position], empty, *step[position:]] for step in whole[1]]
            found = train(case.ours, {**case.options, "backend": "native"}, initial, gradients)
            kept = [i for i in range(len(sizes) + 1) if i != position]
            for new, old in zip(kept, range(len(sizes)), strict=True):
                assert_same_bits({"": found[f"0.{new}"]}, {"": expected[f"0.{old}"]})


def test_many_dimensions() -> None:
    case = BY_RULE["adam"]
    (value,), gradients = inputs([2**12], FP32, 3)
    shape = (2, 1) * 12

    def reversed_dims(tensor: Tensor) -> Tensor:
        return contiguous(tensor.view(shape).permute(*reversed(range(24)))).permute(*reversed(range(24)))

    found = train(case.ours, {**case.options, "backend": "native"}, [value], gradients, reversed_dims)
    expected = train(case.ours, case.options, [value], gradients)
    assert_same_bits({k: v.reshape(-1) if v.dim() else v for k, v in found.items()}, expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_large_strided_tensors_are_split_between_threads(threads: int) -> None:
    case = BY_RULE["adam"]
    torch.set_num_threads(threads)
    expected = train(case.ours, case.options, *given(shape=(301, 333)))
    options = {**case.options, "backend": "native"}

    def transposed(tensor: Tensor) -> Tensor:
        return contiguous(tensor.t()).t()

    for place, place_grad in ((contiguous, transposed), (transposed, contiguous), (transposed, transposed)):
        assert_same_bits(train(case.ours, options, *given(shape=(301, 333)), place, place_grad), expected)


# Shapes of several patches, of which the last ones are cut off, and the order of their dimensions in memory
PATCHED = {
    "rows": ((401, 430), (1, 0)),
    "short rows": ((63, 300, 9), (0, 2, 1)),  # channels_last
    "long rows": ((2, 70, 200), (0, 2, 1)),
    "reversed": ((70, 3, 140), (2, 1, 0)),
}
LARGE = ["rows", "short rows"]  # enough for several threads

every_patch = pytest.mark.parametrize("patch", PATCHED)


def in_order(order: tuple[int, ...]) -> Place:
    """Makes copies that lie in memory in this order of dimensions, the slowest first."""
    back = tuple(order.index(d) for d in range(len(order)))
    return lambda tensor: contiguous(tensor.permute(order)).permute(back)


@every_rule
@pytest.mark.parametrize(("patch", "threads"), [*((patch, 1) for patch in PATCHED), *((patch, 3) for patch in LARGE)])
@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16, FP64], ids=str)
@pytest.mark.parametrize("where", ["parameter", "gradient", "states"])
def test_patches(case: Case, patch: str, dtype: torch.dtype, where: str, threads: int) -> None:
    """The gradient is divided before, because 3 has no exact reciprocal, and becomes zero in the last step."""
    shape, order = PATCHED[patch]
    torch.set_num_threads(threads)
    results = []
    for place in (contiguous, in_order(order)):
        p, g, s = (place if name == where else contiguous for name in ("parameter", "gradient", "states"))
        (value,), gradients = given(dtype, shape, steps=2)
        parameter = nn.Parameter(p(value))
        optimizer: Any = case.ours([parameter], **{**case.options, "backend": "native"})
        optimizer.grad_scale = torch.tensor(3.0)
        for number, (grad,) in enumerate(gradients):
            parameter.grad = g(grad)
            optimizer.step(zero_grad=number == 1)
            state = optimizer.state[parameter]
            state.update({name: s(value) for name, value in state.items() if value.dim() > 0})
        assert parameter.grad is not None
        assert not parameter.grad.any()
        results.append({"p": parameter.detach(), **{k: v for k, v in state.items() if v.dim() > 0}})
    assert_same_bits(*results)


@every_patch
@every_fault
def test_patches_bite(patch: str, fault: type[NoOp]) -> None:
    case = BY_RULE["adam"]
    shape, order = PATCHED[patch]
    expected = train(case.ours, case.options, *given(shape=shape))
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(
            train(fault(case.ours), case.options, *given(shape=shape), place_grad=in_order(order)), expected
        )


def test_dense_states_of_a_parameter_with_gaps() -> None:
    """The states that a step creates lie without gaps."""
    base = torch.ones(6, 8)
    p = nn.Parameter(base[:, ::2])
    p.grad = torch.ones(6, 4)
    optimizer = dracopt_ext.AdamW([p], lr=0.1, fused=True)
    optimizer.step()
    assert optimizer.last_backend == NATIVE
    assert (base[:, 1::2] == 1).all()
    assert (base[:, ::2] != 1).all()
    assert optimizer.state[p]["exp_avg"].is_contiguous()


def test_two_interleaved_parameters_go_to_torch() -> None:
    """The ends of both memories suggest an overlap. torch is slower, and right."""
    base = torch.zeros(64)
    even, odd = nn.Parameter(base[::2]), nn.Parameter(base[1::2])
    even.grad, odd.grad = torch.ones(32), torch.full((32,), 2.0)
    optimizer = dracopt_ext.SGD([even, odd], lr=1.0)
    with pytest.warns(RuntimeWarning, match="leaves tensors that share memory to torch"):
        optimizer.step()
    assert (base[::2] == -1).all()
    assert (base[1::2] == -2).all()


# Complex parameters: pairs of real numbers


def as_reals(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@every_rule
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("place", ["contiguous", "transposed", "gaps"])
def test_complex_parameters(case: Case, dtype: torch.dtype, place: str) -> None:
    real = FP32 if dtype == torch.complex64 else FP64
    initial, gradients = given(real, shape=(10, 6, 2))
    expected = train(case.ours, case.options, initial, gradients)
    places: dict[str, Place] = {
        "contiguous": contiguous,
        "transposed": lambda t: contiguous(t.t()).t(),
        "gaps": lambda t: torch.stack([t, t], dim=-1)[..., 1],
    }
    pairs = [torch.view_as_complex(t) for t in initial], [[torch.view_as_complex(t) for t in s] for s in gradients]
    for place_grad in (places[place], contiguous):
        found = train(case.ours, {**case.options, "backend": "native"}, *pairs, places[place], place_grad)
        assert_same_bits({name: as_reals(tensor) for name, tensor in found.items()}, expected)


@every_rule
@every_fault
def test_complex_parameters_as_torch(case: Case, fault: type[NoOp]) -> None:
    """torch has no fused kernel for complex numbers. Results must be closer than 1% of an update."""
    initial, gradients = given(shape=(32, 2))
    pairs = [torch.view_as_complex(t) for t in initial], [[torch.view_as_complex(t) for t in s] for s in gradients]

    def reals(found: Snapshot) -> Snapshot:
        return {name: as_reals(tensor) for name, tensor in found.items()}

    theirs = reals(train(case.torchs, case.options, *pairs))
    assert_close(reals(train(case.ours, case.options, *pairs)), theirs, 3 * UNFUSED_ULPS)
    with pytest.raises(AssertionError, match="ulps"):
        assert_close(reals(train(fault(case.ours), case.options, *pairs)), theirs, 3 * UNFUSED_ULPS)


@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
def test_complex_parameters_with_fused_raise_as_in_torch() -> None:
    errors = []
    for module in (dracopt_ext, torch.optim):
        p = nn.Parameter(torch.ones(4, dtype=torch.complex64))
        p.grad = torch.ones(4, dtype=torch.complex64)
        optimizer = module.Adam([p], fused=True)
        with pytest.raises(RuntimeError) as info:
            optimizer.step()
        errors.append(str(info.value))
    assert errors[0] == errors[1]


# More than 2^31 elements


def free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


@pytest.mark.skipif(free_memory() < 10 * 2**30, reason="needs 10 GiB of free memory")
def test_more_than_two_to_the_31_elements() -> None:
    numel = 2**31 + 77
    p = nn.Parameter(torch.zeros(numel, dtype=BF16))
    p.grad = torch.ones(1, dtype=BF16).expand(numel)
    optimizer = dracopt_ext.SGD([p], lr=0.5, backend="native")
    optimizer.step()
    assert (p.detach().view(torch.int16) == torch.tensor(-0.5, dtype=BF16).view(torch.int16)).all()
