"""torch's own implementation steps what the native kernels do not serve, to the bit, and a warning says so. Ours is
right even where torch is wrong, and modifies nothing before an error where torch would."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dracopt_ext

from .cases import Case, assert_same_bits, classes, snapshot

TORCH = {"cpu": frozenset({"torch"})}
NATIVE = {"cpu": frozenset({"native"})}
BOTH = {"cpu": frozenset({"native", "torch"})}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


CASES = [Case(name, {"lr": 0.1, "momentum": 0.9} if name == "SGD" else {"lr": 0.01}) for name in classes(in_torch=True)]

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
    """torch steps these parameters one after the other. The search is repeated when addresses change."""
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
    """torch must create the states of these parameters: a momentum buffer of ours would be uninitialized."""
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
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
        optimizer.step()
    assert not optimizer.state


def test_a_learning_rate_comes_back_to_memory_that_is_written_now() -> None:
    """A search that found nothing says nothing about tensors that were not read at the time."""
    buffer = torch.full((5,), 0.1)
    p = nn.Parameter(torch.ones(4))
    optimizer = dracopt_ext.SGD([p], lr=buffer[:1].view(()), backend="native")
    for lr, data in ((None, None), (0.1, buffer[:4]), (buffer[:1].view(()), None)):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] if lr is None else lr
        p.data = p.data if data is None else data
        p.grad = torch.ones(4) if p.grad is None else p.grad
        if lr is not None and data is None:
            with pytest.raises(RuntimeError, match="does not serve tensors that share memory"):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.last_backend == NATIVE


def test_the_fallback_warns_once_with_the_reason() -> None:
    message = r"^SGD leaves sparse tensors to torch's own implementation \(or to the reference.*\), which is slower$"
    sparse = [(random(3), torch.tensor([0.0, 2.0, 0.0]).to_sparse())]
    with pytest.warns(RuntimeWarning, match=message) as caught:
        stepped(dracopt_ext.SGD, sparse, steps=2, lr=0.1)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(dracopt_ext.SGD, sparse, lr=0.1)


def one_that_torch_steps(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A parameter whose elements might share memory: the strides do not tell."""
    return nn.Parameter(torch.as_strided(torch.ones(64, dtype=dtype), (4, 4), (2, 3)))


@every_case
@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
def test_torchs_fused_kernels_are_not_used_where_strides_have_gaps(case: Case) -> None:
    """torch's fused kernels take every stride for 1. Our check is too coarse to see that these share nothing."""
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


REFERENCE = {"cpu": frozenset({"reference"})}


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
def test_unscaling_16_bits_for_what_torch_steps(case: Case, dtype: torch.dtype) -> None:
    """torch would round the quotient to 16 bits, or refuse. The reference does what the kernels do."""
    grad = random(4, 4).to(dtype)
    found = []
    for p in (one_that_torch_steps(dtype), nn.Parameter(torch.ones(4, 4, dtype=dtype))):
        with torch.no_grad():
            p.fill_(1)
        optimizer = case.ours([p], **case.options, **case.fused)
        p.grad = torch.zeros(4, 4, dtype=dtype)
        p.grad[1, 1] = grad[1, 1]
        optimizer.grad_scale = torch.tensor(3.0)  # type: ignore[attr-defined]
        optimizer.step()
        found.append((p.detach()[1, 1], optimizer.last_backend))  # type: ignore[attr-defined]
    assert torch.equal(found[0][0], found[1][0])
    assert [ran for _, ran in found] == [REFERENCE, NATIVE]


@pytest.mark.parametrize("case", [case for case in CASES if case.algorithm != "SGD"], ids=str)
@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
def test_mixed_dtypes_for_what_torch_steps(case: Case) -> None:
    """The model is in bf16, its states are in fp32, and one parameter is lazily cloned. torch would raise after it had
    counted a step."""
    found = []
    for lazy in (True, False):
        p, q = (nn.Parameter(random(8)) for _ in range(2))
        optimizer = case.ours([p, q], **case.options)
        for step in range(3):
            if step == 1:
                p.data, q.data = p.data.bfloat16(), q.data.bfloat16()
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
            kept = torch._lazy_clone(p.detach()) if lazy and step == 2 else None
            optimizer.step()
            del kept
        assert (optimizer.last_backend != NATIVE) == lazy  # type: ignore[attr-defined]
        found.append(snapshot(optimizer))
    assert_same_bits(*found)


@every_case
@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
def test_conjugated_gradients(case: Case) -> None:
    """An ordinary backward leaves conjugated gradients. torch's Adam raises."""
    z = nn.Parameter(random(4, dtype=torch.complex64))
    w = random(5, dtype=torch.complex64)[:4]
    found = []
    for resolve in (False, True):
        p = nn.Parameter(z.detach().clone())
        (p.conj() * w).real.sum().backward()
        if resolve:
            p.grad = p.grad.resolve_conj()
        optimizer = case.ours([p], **case.options)
        optimizer.step()
        found.append(snapshot(optimizer))
    assert_same_bits(*found)


# Order of parameters that share memory: that of the list


@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
def test_a_gradient_inside_a_parameter_that_encloses_another() -> None:
    buffer = torch.ones(100)
    c, a, b = nn.Parameter(torch.zeros(10)), nn.Parameter(buffer[:]), nn.Parameter(buffer[10:20])
    c.grad, a.grad, b.grad = buffer[50:60], torch.ones(100), torch.ones(10)
    optimizer = dracopt_ext.SGD([c, a, b], lr=0.5)
    optimizer.step()
    assert optimizer.last_backend == TORCH
    assert (c == -0.5).all()


@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
@pytest.mark.parametrize("first", ["the native one", "torch's"])
def test_a_gradient_inside_a_parameter_that_torch_steps(first: str) -> None:
    a, c = nn.Parameter(torch.ones(10)), nn.Parameter(torch.zeros(10))
    c.grad, a.grad = a.data, torch.ones(10).to_sparse()
    optimizer = dracopt_ext.SGD([c, a] if first == "the native one" else [a, c], lr=0.5)
    optimizer.step()
    assert (c == (-0.5 if first == "the native one" else -0.25)).all()


@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
def test_the_search_is_repeated_when_parameters_change_places() -> None:
    """When torch takes over a parameter in between, the others must be compared with those formerly at their places."""
    params = [nn.Parameter(torch.zeros(8)) for _ in range(3)]
    optimizer = dracopt_ext.SGD(params, lr=1.0)
    p, q, r = params
    grads = [torch.ones(8) for _ in params]
    p.grad, q.grad, r.grad = grads
    optimizer.step()
    p.data = r.data
    r.grad = None
    optimizer.step()
    p.grad, q.grad, r.grad = grads[0], torch.ones(8).to_sparse(), grads[2]
    optimizer.step()
    assert optimizer.last_backend == TORCH


# The reference


@every_case
def test_the_reference_serves_low_precision(case: Case) -> None:
    """The reference computes in fp32 and rounds to the storage dtype once a step."""
    value, grad = random(512).bfloat16(), random(513)[:512].bfloat16()
    low = stepped(case.ours, [(value, grad)], steps=1, **case.options, backend="reference")
    high = stepped(case.ours, [(value.float(), grad.float())], steps=1, **case.options)
    assert low.last_backend == {"cpu": frozenset({"reference"})}
    assert torch.equal(low.param_groups[0]["params"][0], high.param_groups[0]["params"][0].bfloat16())


def test_the_reference_refuses_what_it_does_not_serve() -> None:
    with pytest.raises(RuntimeError, match=r"takes dense tensors only, not the torch.sparse_coo gradient of .* \[3\]"):
        stepped(dracopt_ext.SGD, [(random(3), torch.ones(3).to_sparse())], backend="reference")
    with pytest.raises(RuntimeError, match="serves neither differentiable nor capturable groups"):
        stepped(dracopt_ext.SGD, [(random(3), random(3))], differentiable=True, backend="reference")


def test_the_reference_takes_counts_of_any_dtype() -> None:
    """Plans leave counts in int64 to Python, and a checkpoint may hold such counts."""
    found = []
    for dtype, backend in ((torch.int64, "reference"), (torch.float32, "native")):
        p = nn.Parameter(torch.linspace(0.1, 1, 1000).bfloat16())
        optimizer = dracopt_ext.AdamW([p], lr=0.1, state_dtype=torch.float32, backend=backend)
        for _ in range(3):
            p.grad = torch.full_like(p, 0.5)
            optimizer.step()
            optimizer.state[p]["step"] = optimizer.state[p]["step"].to(dtype)
        found.append(p.detach())
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:Adam leaves parameters .* to the reference")
@pytest.mark.parametrize("backend", ["reference", None])
def test_the_reference_changes_nothing_before_it_raises(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is chosen by name, or by `state_dtype` if nothing is compiled."""
    if backend is None:
        monkeypatch.setattr("dracopt_ext.backend.NATIVE_REASON", "switched off")
    params = [nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    optimizer = dracopt_ext.Adam(params, backend=backend, state_dtype=torch.float64)
    for p in params:
        p.grad = torch.ones(3, 4)
    optimizer.step()
    assert optimizer.last_backend == {"cpu": frozenset({"reference"})}
    before = snapshot(optimizer)
    group, state = optimizer.param_groups[0], optimizer.state[params[1]]
    good = state["exp_avg"]
    where = r"parameter 1 of group 0 \(shape \[3, 4\]\)"
    wrong: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: group.update(lr=float("nan")), ValueError, r"param_groups\[0\]\['lr'\] is nan; it must be finite"),
        (lambda: group.update(betas=(0.5, 1.0)), ValueError, r"\['betas'\] is 1.0; it must be at least 0"),
        (lambda: group.update(amsgrad=True), KeyError, "the state of parameter 0 .* has no 'max_exp_avg_sq'"),
        (
            lambda: state.update(exp_avg=torch.ones(4)),
            ValueError,
            rf"state 'exp_avg' of {where} has another shape, \[4\]",
        ),
        (lambda: setattr(params[1].grad, "data", torch.ones(4)), ValueError, f"the gradient of {where} has another sh"),
    ]
    for change, error, message in wrong:
        change()
        with pytest.raises(error, match=message):
            optimizer.step()
        group.update(lr=1e-3, betas=(0.9, 0.999), amsgrad=False)
        state["exp_avg"] = good
        params[1].grad = torch.ones(3, 4)
        after = snapshot(optimizer)
        assert_same_bits(after, before)
    optimizer.step()
    assert optimizer.last_backend == REFERENCE
