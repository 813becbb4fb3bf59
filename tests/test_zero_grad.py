"""Gradients that are set to zero in place: by ``zero_grad``, and in the pass that updates."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dracopt_ext

from .cases import (
    BY_RULE,
    CASES,
    FAULTS,
    RULE_CASES,
    SIZES,
    STORAGE,
    Case,
    assert_same_bits,
    classes,
    inputs,
    snapshot,
)
from .test_clip import NATIVE, with_gradients
from .test_gpu import Gpu, OnGpu, gpu, with_count  # noqa: F401
from .test_gpu_clip import scale
from .test_layouts import LAYOUTS, Buffers

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_rule = pytest.mark.parametrize("case", RULE_CASES, ids=str)


def gradients_of(params: list[nn.Parameter]) -> list[Tensor]:
    found = [p.grad for p in params]
    assert all(grad is not None for grad in found)
    return found  # type: ignore[return-value]


def is_zero(params: list[nn.Parameter]) -> bool:
    """Says whether all gradients consist of zeros, by their bits."""
    return all((grad == 0).all() and not grad.signbit().any() for grad in gradients_of(params))


# ---- zero_grad


@pytest.mark.parametrize("name", classes())
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_zero_grad(name: str, dtype: torch.dtype) -> None:
    params = with_gradients(*(torch.randn(size).to(dtype) for size in SIZES))
    before = gradients_of(params)
    versions = [grad._version for grad in before]
    missing = nn.Parameter(torch.ones(3))
    optimizer = getattr(dracopt_ext, name)([*params, missing])
    optimizer.zero_grad(set_to_none=False)
    assert is_zero(params)
    assert missing.grad is None
    assert all(a is b for a, b in zip(before, gradients_of(params), strict=True))
    assert [grad._version for grad in before] == [version + 1 for version in versions]
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_grad_in_any_layout(layout: str) -> None:
    place = Buffers(LAYOUTS[layout])
    params = with_gradients(place(torch.randn(6, 5, 8, 7)))
    dracopt_ext.SGD(params).zero_grad(set_to_none=False)
    assert is_zero(params)
    place.assert_nothing_else_was_written()


def test_zero_grad_where_kernels_do_not_serve() -> None:
    """Sparse, shared and lazily cloned gradients become zero, too, and a gradient's graph goes."""
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    memory = torch.ones(64)
    shared = with_gradients(memory[:40], memory[20:60])
    lazy = torch.ones(5)._lazy_clone()
    others = with_gradients(lazy, torch.ones(1).expand(4).contiguous())
    p = nn.Parameter(torch.ones(3))
    optimizer = dracopt_ext.SGD([embedding.weight, *shared, *others, p])
    with warnings.catch_warnings(action="ignore"):
        (p**3).sum().backward(create_graph=True)
        optimizer.zero_grad(set_to_none=False)
    assert is_zero([*shared, *others, p])
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.is_sparse
    assert not embedding.weight.grad.to_dense().any()
    assert p.grad is not None
    assert not p.grad.requires_grad
    assert (memory[60:] == 1).all()


def test_zero_grad_without_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dracopt_ext.backend.NATIVE_REASON", "switched off")
    params = with_gradients(torch.ones(3), torch.ones(4, dtype=FP64))
    optimizer = dracopt_ext.SGD(params)
    optimizer.zero_grad(set_to_none=False)
    assert is_zero(params)
    gradients_of(params)[0].fill_(1.0)
    optimizer.step(zero_grad=True)
    assert is_zero(params)
    assert (params[0] < 1).all()


# ---- step(zero_grad=True)


def train_zeroing(case: Case, options: dict[str, Any], given: Any, place: Any = Tensor.clone, ours: Any = None) -> Any:
    """Trains with gradients that the step sets to zero, and returns the results after each step."""
    params = [nn.Parameter(place(value)) for value in given[0]]
    optimizer = (ours or case.ours)(params, **options)
    found = []
    for p, grad in zip(params, given[1][0], strict=True):
        p.grad_dtype = grad.dtype
        p.grad = place(grad)
    kept = gradients_of(params)
    for step in given[1]:
        for grad, value in zip(kept, step, strict=True):
            grad.copy_(value)
        optimizer.step(zero_grad=True)
        assert is_zero(params)
        assert all(a is b for a, b in zip(kept, gradients_of(params), strict=True))
        found.append({name: x.cpu() for name, x in snapshot(optimizer).items()})
    return found, optimizer


def train_plain(make: Any, options: dict[str, Any], given: Any) -> list[dict[str, Tensor]]:
    """Trains with new gradients in each step, and returns the results after each step."""
    params = [nn.Parameter(value.clone()) for value in given[0]]
    optimizer = make(params, **options)
    found = []
    for step in given[1]:
        for p, grad in zip(params, step, strict=True):
            p.grad_dtype = grad.dtype
            p.grad = grad.clone()
        optimizer.step()
        found.append(snapshot(optimizer))
    return found


def stored(dtype: torch.dtype, sizes: list[int]) -> Any:
    initial, gradients = inputs(sizes, FP32, 3)
    return [x.to(dtype) for x in initial], [[g.to(dtype) for g in step] for step in gradients]


@every_case
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_step_that_zeroes(case: Case, dtype: torch.dtype) -> None:
    """The update is that of a step that leaves the gradients alone."""
    given = stored(dtype, [*SIZES, 4097])
    found, optimizer = train_zeroing(case, {**case.options, "backend": "native"}, given)
    for a, b in zip(found, train_plain(case.ours, case.options, given), strict=True):
        assert_same_bits(a, b)
    if dtype == FP32:
        for a, b in zip(found, train_plain(case.torchs, case.options, given), strict=True):
            torch.testing.assert_close(a, b)
    assert optimizer._dracopt_context.plan_ran.zeroed


@every_rule
@pytest.mark.parametrize("fault", FAULTS)
def test_step_that_zeroes_bites(case: Case, fault: Any) -> None:
    given = stored(FP32, [64, 128])
    found, _ = train_zeroing(
        case, case.options, given, ours=lambda params, **options: Zeroing(fault(case.ours)(params, **options))
    )
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found[-1], train_plain(case.torchs, case.options, given)[-1])


class Zeroing:
    """Passes everything on to an optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


@every_rule
@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_that_zeroes_in_any_layout(case: Case, layout: str) -> None:
    values = torch.randn(3, 6, 5, 8, 7).unbind()
    given = [values[0]], [[values[1]], [values[2]]]
    place = Buffers(LAYOUTS[layout])
    found, _ = train_zeroing(case, case.options, given, place=place)
    place.assert_nothing_else_was_written()
    assert_same_bits(found[-1], train_plain(case.ours, case.options, given)[-1])


def part(memory: Tensor, begin: int, end: int) -> Tensor:
    """Returns a tensor in a part of the memory. To torch it is no view, so no graph can lead to it."""
    return torch.empty(0).set_(memory.untyped_storage(), begin, (end - begin,), (1,))


@pytest.mark.parametrize("kind", ["one gradient of two", "overlapping", "expanded"])
def test_shared_gradients_are_zeroed_after_the_step(kind: str) -> None:
    found = []
    for zeroes in (True, False):
        memory = torch.linspace(-1, 1, 64)
        views = {
            "one gradient of two": (part(memory, 0, 8),) * 2,
            "overlapping": (part(memory, 0, 8), part(memory, 4, 12)),
            "expanded": (memory[:1].expand(8), part(memory, 30, 38)),
        }
        params = with_gradients(*views[kind])
        optimizer = dracopt_ext.AdamW(params, lr=0.1)
        for _ in range(2):
            optimizer.step(zero_grad=zeroes)
            if zeroes:
                assert is_zero(params)
                assert not optimizer._dracopt_context.plan_ran.zeroed  # type: ignore[union-attr]
                memory.copy_(torch.linspace(-1, 1, 64))
        assert optimizer.last_backend == NATIVE
        found.append(snapshot(optimizer))
    assert_same_bits(*found)


def test_gradients_that_become_shared() -> None:
    """The step looks again where gradients have moved."""
    memory = torch.ones(64)
    params = with_gradients(part(memory, 0, 8), part(memory, 8, 16))
    optimizer = dracopt_ext.SGD(params, lr=1.0)
    optimizer.step(zero_grad=True)
    assert optimizer._dracopt_context.plan_ran.zeroed  # type: ignore[union-attr]
    memory.fill_(1.0)
    params[1].grad = part(memory, 4, 12)
    optimizer.step(zero_grad=True)
    assert is_zero(params)
    assert all((p == -1).all() for p in params)


def test_gradients_that_have_grown() -> None:
    """Gradients may begin where they began, and reach further."""
    memory = torch.ones(64)
    params = with_gradients(part(memory, 0, 4), part(memory, 4, 8))
    optimizer = dracopt_ext.SGD(params, lr=1.0)
    optimizer.step(zero_grad=True)
    memory.fill_(1.0)
    params[0].data, params[0].grad = torch.zeros(8), part(memory, 0, 8)
    optimizer.step(zero_grad=True)
    assert is_zero(params)
    assert all((p == -1).all() for p in params)


def test_gradients_with_a_graph_are_detached() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = dracopt_ext.SGD([p], lr=0.1)
    with warnings.catch_warnings(action="ignore"):
        (p**3).sum().backward(create_graph=True)
    optimizer.step(zero_grad=True)
    assert p.grad is not None
    assert not p.grad.requires_grad
    assert is_zero([p])


def test_overflow_leaves_zeros() -> None:
    (p,) = with_gradients(torch.full((5,), math.inf))
    optimizer = dracopt_ext.AdamW([p], fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer, zero_grad=True)
    scaler.update()
    assert is_zero([p])
    assert (p == 1).all()
    assert not optimizer.state


def test_error_leaves_the_gradients() -> None:
    p, q = with_gradients(torch.ones(3), torch.ones(3))
    optimizer = dracopt_ext.AdamW([p, q])
    optimizer.step()
    optimizer.state[q]["exp_avg"] = torch.ones(4)
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.step(zero_grad=True)
    assert (gradients_of([p, q])[0] == 1).all()


def test_what_torch_steps_is_zeroed() -> None:
    p = nn.Parameter(torch.ones(3).as_subclass(Special))
    p.grad = torch.ones(3)
    optimizer = dracopt_ext.SGD([p], lr=1.0)
    with pytest.warns(RuntimeWarning, match="tensor subclasses"):
        optimizer.step(zero_grad=True)
    assert is_zero([p])
    assert (p == 0).all()


class Special(Tensor):
    pass


# ---- on a GPU


@every_rule
@pytest.mark.parametrize("counts_on", ["host", "gpu"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_step_on_a_gpu(gpu: Gpu, case: Case, counts_on: str, dtype: torch.dtype) -> None:  # noqa: F811
    given = stored(dtype, [0, 1, 17, 1000, 4099])
    options = {**with_count(case, counts_on), "backend": gpu.backend}
    found, optimizer = train_zeroing(case, options, given, place=gpu)
    assert gpu.launches(optimizer) == 1
    assert_same_bits(found[-1], train_plain(case.ours, case.options, given)[-1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_on_a_gpu(gpu: Gpu, layout: str) -> None:  # noqa: F811
    values = torch.randn(3, 6, 5, 8, 7).unbind()
    given = [values[0]], [[values[1]], [values[2]]]
    place = OnGpu(gpu, LAYOUTS[layout])
    found, _ = train_zeroing(BY_RULE["adam"], BY_RULE["adam"].options, given, place=place)
    place.assert_nothing_else_was_written()
    assert_same_bits(found[-1], train_plain(BY_RULE["adam"].ours, BY_RULE["adam"].options, given)[-1])


WITH_MASTERS = {"master_weights": "fp32", "state_dtype": FP32}


@pytest.mark.parametrize("offsets", [(1, 1), (3, 2), (0, 1), (5, 7), (4, 4)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "more"), [(FP32, {}), (BF16, {}), (BF16, WITH_MASTERS)], ids=["fp32", "bf16", "masters"]
)
def test_misaligned_on_a_gpu(gpu: Gpu, offsets: tuple[int, int], dtype: torch.dtype, more: Any) -> None:  # noqa: F811
    """A block may only zero elements that no other block reads, so each begins where its tile does."""
    given = stored(dtype, [1, 9, 4095, 4097] if gpu.backend == "native" else [1, 9, 1000])
    options = {**BY_RULE["sgd"].options, **more}
    calls = iter(range(10**6))

    def shifted(tensor: Tensor) -> Tensor:
        offset = offsets[next(calls) // len(given[0]) % 2]
        return OnGpu(gpu, lambda buffer, shape: buffer[offset : offset + shape.numel()].view(shape))(tensor)

    # The vectors of most streams would decide where a tile begins: SGD has one state, which is aligned.
    found, _ = train_zeroing(BY_RULE["sgd"], options, given, place=shifted)
    assert_same_bits(found[-1], train_plain(BY_RULE["sgd"].ours, options, given)[-1])


@pytest.mark.parametrize("clips", [False, True])
def test_overflow_on_a_gpu_leaves_zeros(gpu: Gpu, clips: bool) -> None:  # noqa: F811
    """The host does not know of the overflow, and neither waits nor launches more."""
    case = BY_RULE["adam"]
    options = {**with_count(case, "gpu"), **({"max_grad_norm": 1.0} if clips else {})}
    params = [nn.Parameter(gpu(torch.ones(size))) for size in (5, 4099)]
    optimizer = case.ours(params, **options)
    for number in range(3):
        before = {name: x.cpu() for name, x in snapshot(optimizer).items()}
        for p in params:
            p.grad = gpu(torch.full(p.shape, 2.0 if number != 1 else math.inf))
        scale(optimizer, gpu, 2.0, delegates=clips)
        if not clips:
            optimizer.found_inf.fill_(number == 1)
        optimizer.step(zero_grad=True)
        assert gpu.launches(optimizer) == 1 + clips
        assert all(not p.grad.cpu().any() for p in params)  # type: ignore[union-attr]
        if number == 1:
            assert_same_bits({name: x.cpu() for name, x in snapshot(optimizer).items()}, before)
