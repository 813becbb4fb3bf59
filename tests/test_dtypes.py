"""Tests every mixture of storage dtypes. The arithmetic is fp32's, or fp64's if a tensor is in fp64. Each number is
rounded once, when it is stored."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dracopt_ext

from .cases import (
    BY_RULE,
    FAULTS,
    RULE_CASES,
    SIZES,
    STORAGE,
    Case,
    NoOp,
    Snapshot,
    assert_close,
    assert_same_bits,
    classes,
    inputs,
    train,
)

NATIVE = {"cpu": frozenset({"native"})}
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

Form = tuple[torch.dtype, torch.dtype, torch.dtype]
"""The dtypes of parameter, gradient and moments."""
FORMS: list[Form] = list(itertools.product(STORAGE, STORAGE, STORAGE))
PAIRWISE: list[Form] = [form for form in FORMS if sum(map(STORAGE.index, form)) % len(STORAGE) == 0]
"""A quarter of all forms, in which any two streams have every combination of dtypes."""


def name_of(form: Form) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in form)


every_rule = pytest.mark.parametrize("case", RULE_CASES, ids=str)
every_form = pytest.mark.parametrize("form", FORMS, ids=name_of)
every_fault = pytest.mark.parametrize("fault", FAULTS)


def stored(form: Form, sizes: list[int], steps: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    param, grad, _ = form
    initial, gradients = inputs(sizes, FP32, steps)
    return [t.to(param) for t in initial], [[t.to(grad) for t in step] for step in gradients]


def trained(make: Any, case: Case, form: Form, backend: str | None, sizes: list[int], steps: int = 3) -> Snapshot:
    return train(make, {**case.options, "state_dtype": form[2], "backend": backend}, *stored(form, sizes, steps))


# The limit for one step in fp64, where the reference rounds its multiply-adds twice. Numbers stored in a smaller dtype
# may fall on the other side of a rounding.
FP64_ULPS = 2 * 6 * 0.5


@every_rule
@every_form
def test_reference(case: Case, form: Form) -> None:
    if FP64 in form:
        ours = trained(case.ours, case, form, "native", SIZES, steps=1)
        theirs = trained(case.ours, case, form, "reference", SIZES, steps=1)
        for name in ours:
            assert_close({name: ours[name]}, {name: theirs[name]}, FP64_ULPS if ours[name].dtype == FP64 else 1.0)
    else:
        ours = trained(case.ours, case, form, "native", SIZES)
        assert_same_bits(ours, trained(case.ours, case, form, "reference", SIZES))
    assert {tensor.dtype for name, tensor in ours.items() if name.endswith(("avg", "sq", "buffer"))} == {form[2]}


# 1% of an update is less than the last place of a parameter in bf16 or fp16. These forms have a stream in fp32.
@every_rule
@every_fault
@pytest.mark.parametrize("form", [(FP32, BF16, FP16), (FP32, FP16, BF16), (FP32, FP32, FP32)], ids=name_of)
def test_reference_bites(case: Case, form: Form, fault: type[NoOp]) -> None:
    theirs = trained(case.ours, case, form, "reference", SIZES)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(trained(fault(case.ours), case, form, "native", SIZES), theirs)


@every_rule
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_low_precision_bites_on_a_no_op(case: Case, dtype: torch.dtype) -> None:
    form = (dtype, dtype, dtype)
    theirs = trained(case.ours, case, form, "reference", SIZES)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(trained(NoOp(case.ours), case, form, "native", SIZES), theirs)


@every_rule
@pytest.mark.parametrize("form", [(BF16, BF16, BF16), (BF16, BF16, FP32), (FP16, FP16, FP32)], ids=name_of)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_splits(case: Case, form: Form, threads: int) -> None:
    """A large tensor gives the same bits as its elements in pieces."""
    (whole,), steps = stored(form, [70_001], 2)
    options = {**case.options, "state_dtype": form[2]}
    lengths = [1, 31, 32, 33, 1000, 68_904]
    torch.set_num_threads(threads)
    together = train(case.ours, options, [whole], steps)
    torch.set_num_threads(1)
    pieces = train(case.ours, options, whole.split(lengths), [grad.split(lengths) for (grad,) in steps])
    for name in (name for name in together if together[name].dim() > 0):
        rest = name.removeprefix("0.0")
        joined = torch.cat([pieces[f"0.{i}{rest}"] for i in range(len(lengths))])
        assert_same_bits({name: joined}, {name: together[name]})


def test_mixtures_in_one_optimizer() -> None:
    """Each parameter is updated as if it were alone."""
    case = BY_RULE["adam"]
    params, alone = [], []
    for param, grad, _ in FORMS:
        (value,), ((gradient,),) = stored((param, grad, param), [100], 1)
        alone.append(train(case.ours, case.options, [value], [[gradient]]))
        params.append(nn.Parameter(value.clone()))
        params[-1].grad_dtype = grad
        params[-1].grad = gradient
    optimizer = case.ours(params, **case.options)
    optimizer.step()
    assert optimizer.last_backend == NATIVE  # type: ignore[attr-defined]
    for p, single in zip(params, alone, strict=True):
        assert_same_bits({"0.0": p.detach()}, {"0.0": single["0.0"]})


# Conversions


def added_to_zero(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes ``0 + 1 * grad`` in a parameter of another dtype: ``grad`` is read, widened, narrowed and stored."""
    p = nn.Parameter(torch.zeros(grad.shape, dtype=dtype))
    p.grad_dtype = grad.dtype
    p.grad = grad
    optimizer = dracopt_ext.SGD([p], lr=1.0, maximize=True)
    optimizer.step()
    assert optimizer.last_backend == NATIVE
    return p.detach()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("wide", [FP32, FP64], ids=str)
def test_every_16_bit_number_is_read_right(dtype: torch.dtype, wide: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    expected = numbers.to(wide) + 0.0  # 0 + -0 is 0
    assert_same_bits({"": added_to_zero(numbers, wide)}, {"": expected})


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("wide", [FP32, FP64], ids=str)
def test_every_rounding_to_16_bits_is_right(dtype: torch.dtype, wide: torch.dtype) -> None:
    """Rounds every number, every midpoint and its neighbours, numbers that are too large, infinities and NaNs."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    middles = (numbers[1:].double() + numbers[:-1].double()).div(2).float()
    largest = torch.finfo(dtype).max
    beyond = torch.tensor([largest * (1 + 2**-12), 3e38, float("inf"), float("nan"), 1e-40, 65519.9, 65520.0, 65536.0])
    given = torch.cat(
        [
            numbers,
            middles,
            middles.nextafter(torch.tensor(float("inf"))),
            middles.nextafter(torch.tensor(-float("inf"))),
            beyond,
            -beyond,
            torch.tensor([0x7FFFFFFF, 0x7F800001, 0x7FFF8000], dtype=torch.int32).view(FP32),  # NaNs of all kinds
        ]
    )
    assert_same_bits({"": added_to_zero(given.to(wide), dtype)}, {"": (given.to(wide) + 0.0).to(dtype)})


# state_dtype


@pytest.mark.parametrize("name", classes())
@pytest.mark.parametrize("state_dtype", [None, *STORAGE], ids=str)
def test_state_dtype(name: str, state_dtype: torch.dtype | None) -> None:
    options: dict[str, Any] = {"momentum": 0.9} if name == "SGD" else {}
    p = nn.Parameter(torch.ones(64, dtype=BF16))
    p.grad = torch.ones(64, dtype=BF16)
    optimizer = getattr(dracopt_ext, name)([p], state_dtype=state_dtype, **options)
    optimizer.step()
    assert optimizer.last_backend == NATIVE
    moments = {key: value for key, value in optimizer.state[p].items() if key not in ("step", "mu_product")}
    assert moments
    assert {value.dtype for value in moments.values()} == {state_dtype or BF16}
    assert "state_dtype" not in optimizer.param_groups[0]


@pytest.mark.parametrize("wrong", [torch.int32, torch.complex64, "float32", torch.float8_e4m3fn], ids=str)
def test_state_dtype_that_is_none(wrong: Any) -> None:
    with pytest.raises(
        ValueError, match=r"state_dtype=.* is none of torch\.float64, torch\.float32, torch\.bfloat16, torch\.f"
    ):
        dracopt_ext.AdamW([nn.Parameter(torch.ones(2))], state_dtype=wrong)


@pytest.mark.parametrize("name", classes())
def test_state_dtype_of_complex_parameters_is_refused(name: str) -> None:
    real, p = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, dtype=torch.complex64))
    message = r"serves real parameters only, but parameter 1 of group 0 \('z', shape \[4\]\) is torch.complex64"
    with pytest.raises(ValueError, match=message):
        getattr(dracopt_ext, name)([("x", real), ("z", p)], state_dtype=FP32)
    optimizer = getattr(dracopt_ext, name)([real], state_dtype=FP32)
    with pytest.raises(ValueError, match="parameter 0 of group 1"):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1


# Tensor hyperparameters


@pytest.mark.parametrize("case", RULE_CASES, ids=str)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_tensor_lr_is_read_each_step(case: Case, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rates = [0.25, 0.125, 0.5]
    found = []
    for as_tensor in (True, False):
        lr = torch.full(shape, rates[0], dtype=dtype)
        (value,), steps = inputs([100], FP32, 3)
        p = nn.Parameter(value)
        optimizer = case.ours([p], **{**case.options, "lr": lr if as_tensor else rates[0]})
        for rate, (grad,) in zip(rates, steps, strict=True):
            if as_tensor:
                lr.fill_(rate)
            else:
                optimizer.param_groups[0]["lr"] = rate
            p.grad = grad
            optimizer.step()
        assert optimizer.last_backend == NATIVE  # type: ignore[attr-defined]
        found.append(p.detach())
    assert torch.equal(*found)


def test_tensor_lr_agrees_with_torch_and_keeps_its_identity() -> None:
    (value,), ((grad,),) = inputs([64], FP32, 1)
    found = []
    for module in (dracopt_ext, torch.optim):
        lr = torch.tensor(0.1)
        p = nn.Parameter(value.clone())
        p.grad = grad
        optimizer = module.Adam([p], lr=lr, fused=True)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] is lr
        found.append(p.detach())
    assert torch.equal(*found)


def test_schedulers_fill_a_tensor_lr() -> None:
    lr = torch.tensor(1.0)
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    optimizer = dracopt_ext.SGD([p], lr=lr)
    scheduler = dracopt_ext.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert lr == 0.125
    assert (p == -(1 + 0.5 + 0.25)).all()


def test_tensor_betas() -> None:
    (value,), steps = inputs([64], FP32, 3)
    assert_same_bits(
        *(
            train(dracopt_ext.AdamW, {"betas": betas, "backend": "native"}, [value], steps)
            for betas in ((torch.tensor(0.75), torch.tensor(0.5)), (0.75, 0.5))
        )
    )


# GradScaler: the kernels divide


@pytest.mark.parametrize("case", RULE_CASES, ids=str)
@pytest.mark.parametrize(
    "form", [(FP32, FP32, FP32), (BF16, BF16, BF16), (FP16, FP16, FP32), (FP64, FP64, FP64)], ids=name_of
)
def test_grad_scale_is_divided_by(case: Case, form: Form) -> None:
    """A scale, be it a power of two (exact) or not, acts as if the gradient had been divided before."""
    for scale in (1024.0, 3.0):
        found = []
        arithmetic = FP64 if form[0] == FP64 else FP32
        (value,), ((grad,),) = stored(form, [1000], 1)
        for given in (grad, grad.to(arithmetic) / scale):
            p = nn.Parameter(value.clone())
            p.grad_dtype = given.dtype
            p.grad = given.clone()
            optimizer = case.ours([p], **{**case.options, "state_dtype": form[2], "backend": "native"})
            if given is grad:
                optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
            optimizer.step()
            assert torch.equal(p.grad, given)
            found.append({"p": p.detach(), **{k: v for k, v in optimizer.state[p].items() if v.dim() > 0}})
        assert_same_bits(*found)


@pytest.mark.parametrize("name", classes(fused=True))
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_grad_scaler_in_low_precision(name: str, dtype: torch.dtype) -> None:
    """An overflow in the first step of the loop changes nothing, creates no state and halves the scale."""
    options: dict[str, Any] = {"momentum": 0.9} if name == "SGD" else {}
    p, q = nn.Parameter(torch.ones(64, dtype=dtype)), nn.Parameter(torch.ones(64, dtype=dtype))
    scaled = getattr(dracopt_ext, name)([p], lr=0.125, fused=True, **options)
    plain = getattr(dracopt_ext, name)([q], lr=0.125, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    for step in range(4):
        scaler.scale(torch.ones(()))
        grad = torch.linspace(-1, 1, 64, dtype=dtype) / (step + 1)
        p.grad = grad * scaler.get_scale()
        if step == 0:
            p.grad[7] = float("inf")
        else:
            q.grad = grad
            plain.step()
        scaler.step(scaled)
        scaler.update()
        if step == 0:
            assert not scaled.state
            assert (p == 1).all()
            assert scaler.get_scale() == 32.0
        else:
            assert scaled.last_backend == NATIVE
        assert torch.equal(p, q)


def test_grad_scaler_after_unscale() -> None:
    """The scaler passes no scale after ``unscale_``, so gradients are not divided twice."""
    p = nn.Parameter(torch.zeros(4))
    optimizer = dracopt_ext.SGD([p], lr=1.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    p.grad = torch.full((4,), 16.0)
    scaler.unscale_(optimizer)
    assert (p.grad == 2).all()
    torch.nn.utils.clip_grad_norm_([p], 2.0)
    scaler.step(optimizer)
    torch.testing.assert_close(p.detach(), torch.full((4,), -1.0))


# Without the compiled module


@pytest.mark.parametrize("case", RULE_CASES, ids=str)
def test_state_dtype_without_compiled_kernels(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch cannot mix dtypes like this. The reference can."""
    form = (BF16, BF16, FP32)
    expected = trained(case.ours, case, form, "native", SIZES)
    monkeypatch.setattr("dracopt_ext.backend.NATIVE_REASON", "switched off")
    with pytest.warns(RuntimeWarning, match="leaves parameters .*to the reference implementation"):
        found = trained(case.ours, case, form, None, SIZES)
    assert_same_bits(found, expected)


def test_state_dtype_of_the_parameters_without_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch can have it, and is faster than the reference."""
    monkeypatch.setattr("dracopt_ext.backend.NATIVE_REASON", "switched off")
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = dracopt_ext.AdamW([p], state_dtype=FP32)
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
        assert optimizer.last_backend == {"cpu": frozenset({"torch"})}
