"""What the native kernels do not serve is stepped by torch's own implementation, to the bit, and said; where even torch
is wrong or would modify something before it raises, we are not and do not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dracopt_ext

from .cases import Case, snapshot

TORCH = {"cpu": frozenset({"torch"})}
NATIVE = {"cpu": frozenset({"native"})}
BOTH = {"cpu": frozenset({"native", "torch"})}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


CASES = [
    Case("SGD", {"lr": 0.1, "momentum": 0.9}),
    Case("Adam", {"lr": 0.01}),
    Case("AdamW", {"lr": 0.01}),
    Case("NAdam", {"lr": 0.01}),
]

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def stepped(make: Callable[..., Any], tensors: list[tuple[Tensor, Tensor]], steps: int = 3, **options: Any) -> Any:
    # A detached alias keeps the strides that clone() would tidy up.
    params = [nn.Parameter(torch.empty_strided(v.size(), v.stride(), dtype=v.dtype).copy_(v)) for v, _ in tensors]
    optimizer = make(params, **options)
    for _ in range(steps):
        for p, (_, grad) in zip(params, tensors, strict=True):
            p.grad = grad.detach()
        optimizer.step()
    return optimizer


def assert_equal(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    ours, theirs = snapshot(a), snapshot(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.dtype == theirs[name].dtype


@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
def test_sparse_gradients() -> None:
    sparse = torch.tensor([0.0, 2.0, 0.0]).to_sparse()
    tensors = [(random(3), sparse)]
    ours = stepped(dracopt_ext.SGD, tensors, lr=0.1)
    assert ours.last_backend == TORCH
    assert_equal(ours, stepped(torch.optim.SGD, tensors, lr=0.1))


@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
def test_differentiable() -> None:
    lr = torch.tensor(0.5, requires_grad=True)
    p = torch.ones(3, requires_grad=True)
    q = p.clone()
    optimizer = dracopt_ext.SGD([q.detach().requires_grad_()], lr=lr, differentiable=True)
    (leaf,) = optimizer.param_groups[0]["params"]
    moved = leaf.clone()
    optimizer.param_groups[0]["params"][0] = moved
    moved.grad = torch.full((3,), 2.0)
    optimizer.step()
    moved.sum().backward()
    assert lr.grad == -6.0
    assert optimizer.last_backend == TORCH


@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
@pytest.mark.parametrize("overlap", ["same", "shifted", "gradient"])
def test_parameters_that_share_memory(overlap: str) -> None:
    """Stepped by torch, one after the other; the search is repeated when addresses change."""
    found = []
    for make in (dracopt_ext.SGD, torch.optim.SGD):
        base = torch.arange(96.0)
        a = nn.Parameter(base[:64])
        b = nn.Parameter(base[:64] if overlap == "same" else base[32:] if overlap == "shifted" else torch.ones(64))
        c = nn.Parameter(torch.ones(64))
        optimizer = make([a, b, c], lr=0.5)
        for step in range(4):
            a.grad, b.grad, c.grad = torch.ones(64), torch.full((64,), 2.0), torch.ones(64)
            if overlap == "gradient" and step > 1:
                b.grad = base[:64]
            optimizer.step()
            if make is dracopt_ext.SGD:
                apart = overlap == "gradient" and step < 2
                assert optimizer.last_backend == (NATIVE if apart else BOTH)
        found.append(optimizer)
    assert_equal(*found)


@every_case
@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("twice", [False, True])
def test_sharing_memory_from_the_first_step(case: Case, twice: bool) -> None:
    """Their states are torch's to create: a momentum buffer of ours would be uninitialised."""
    found = []
    for make in (case.ours, case.torchs):
        base = torch.arange(96.0)
        a, c = nn.Parameter(base[:64]), nn.Parameter(torch.ones(64))
        b = a if twice else nn.Parameter(base[32:])
        optimizer = make([a, c, b], **case.options)
        for _ in range(3):
            a.grad, b.grad, c.grad = torch.ones(64), torch.full((64,), 2.0), torch.ones(64)
            optimizer.step()
        if make is case.ours:
            assert optimizer.last_backend == BOTH
        found.append((a.detach().clone(), b.detach().clone(), c.detach().clone()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
def test_tensor_subclasses() -> None:
    class Tagged(torch.Tensor):
        pass

    p = torch.ones(5).as_subclass(Tagged).requires_grad_()
    p.grad = torch.ones(5)
    optimizer = dracopt_ext.SGD([p], lr=1.0)
    optimizer.step()
    assert optimizer.last_backend == TORCH
    assert (p == 0).all()


def test_meta_parameters() -> None:
    p = nn.Parameter(torch.ones(4, device="meta"))
    optimizer = dracopt_ext.AdamW([p], fused=True)
    p.grad = torch.ones(4, device="meta")
    with (
        pytest.warns(RuntimeWarning, match="tensors on a device without native kernels"),
        pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"),
    ):
        optimizer.step()
    assert not optimizer.state


def test_the_fallback_warns_once_with_the_reason() -> None:
    message = "^SGD leaves sparse tensors to torch's own implementation, which is slower$"
    sparse = [(random(3), torch.tensor([0.0, 2.0, 0.0]).to_sparse())]
    with pytest.warns(RuntimeWarning, match=message) as caught:
        stepped(dracopt_ext.SGD, sparse, steps=2, lr=0.1)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(dracopt_ext.SGD, sparse, lr=0.1)


def one_that_torch_steps(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """For its elements might share memory: the strides do not tell."""
    return nn.Parameter(torch.as_strided(torch.ones(64, dtype=dtype), (4, 4), (2, 3)))


@every_case
@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
def test_torchs_fused_kernels_are_never_used_on_the_cpu(case: Case) -> None:
    """They take every stride for 1. These elements share nothing, but only a closer look than ours would tell."""
    buffer = torch.zeros(16)
    p = nn.Parameter(buffer.as_strided((2, 4), (5, 3)))
    optimizer = case.ours([p], **case.options, **case.fused)
    p.grad = torch.ones(2, 4)
    optimizer.step()
    assert optimizer.last_backend == TORCH  # type: ignore[attr-defined]
    assert (p != 0).all()
    assert int((buffer != 0).sum()) == 8


@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
def test_unscaling_for_what_torch_steps() -> None:
    p, q = nn.Parameter(torch.ones(64)), one_that_torch_steps()
    optimizer = dracopt_ext.SGD([p, q], lr=0.5, fused=True)
    p.grad, q.grad = torch.full((64,), 8.0), torch.zeros(4, 4)
    q.grad[0, 0] = 8.0
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    optimizer.step()
    assert optimizer.last_backend == BOTH
    assert (p == 0).all()
    assert q[0, 0] == 0
    assert q.grad[0, 0] == 8.0
    assert (p.grad == 8.0).all()


@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
def test_unscaling_fp16_for_what_torch_steps_is_refused_in_its_words() -> None:
    p = one_that_torch_steps(torch.float16)
    p.grad = torch.ones(4, 4, dtype=torch.float16)
    optimizer = dracopt_ext.Adam([p], fused=True)
    optimizer.grad_scale = torch.tensor(2.0)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        optimizer.step()
    assert not optimizer.state


# The reference


@every_case
def test_the_reference_serves_low_precision(case: Case) -> None:
    """In fp32 arithmetic, rounded to the storage dtype once a step."""
    value, grad = random(512).bfloat16(), random(513)[:512].bfloat16()
    low = stepped(case.ours, [(value, grad)], steps=1, **case.options, backend="reference")
    high = stepped(case.ours, [(value.float(), grad.float())], steps=1, **case.options)
    assert low.last_backend == {"cpu": frozenset({"reference"})}
    assert torch.equal(low.param_groups[0]["params"][0], high.param_groups[0]["params"][0].bfloat16())


def test_the_reference_refuses_what_it_does_not_serve() -> None:
    with pytest.raises(RuntimeError, match=r"takes dense tensors only, not a torch.sparse_coo gradient of .* \[3\]"):
        stepped(dracopt_ext.SGD, [(random(3), torch.ones(3).to_sparse())], backend="reference")
    with pytest.raises(RuntimeError, match="serves neither differentiable=True nor capturable=True"):
        stepped(dracopt_ext.SGD, [(random(3), random(3))], differentiable=True, backend="reference")
