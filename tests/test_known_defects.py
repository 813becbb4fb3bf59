"""One test for each known defect of other fused optimizers. The number in a name is the report's, in PyTorch's tracker
if no other is named."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dracopt_ext

from .cases import RULE_CASES, WHOLE_BLOCKS, Case, assert_same_bits, classes, inputs, snapshot, train

NATIVE = {"cpu": frozenset({"native"})}
CLASSES = classes()
every_rule = pytest.mark.parametrize("case", RULE_CASES, ids=str)
every_class = pytest.mark.parametrize("name", CLASSES)
low_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def one(name: str, value: Tensor, grad: Tensor, **options: Any) -> tuple[Any, nn.Parameter]:
    p = nn.Parameter(value)
    p.grad_dtype = grad.dtype
    p.grad = grad
    return getattr(dracopt_ext, name)([p], **options), p


# torch's fused CPU kernels


@low_precision
@pytest.mark.parametrize("size", [32, 37, 1024])
def test_191763_sgd_updates_every_element_in_low_precision(dtype: torch.dtype, size: int) -> None:
    optimizer, p = one("SGD", torch.ones(size, dtype=dtype), torch.ones(size, dtype=dtype), lr=0.5, fused=True)
    optimizer.step()
    assert (p == 0.5).all()


def test_overflow_on_the_first_step_leaves_no_uninitialised_buffer() -> None:
    optimizer, p = one("SGD", torch.ones(64), torch.ones(64), lr=0.5, momentum=0.5, fused=True)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert not optimizer.state
    del optimizer.found_inf
    optimizer.step()
    assert (optimizer.state[p]["momentum_buffer"] == 1).all()
    assert (p == 0.5).all()


def test_a_first_gradient_on_the_second_step() -> None:
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = dracopt_ext.SGD([p, q], lr=0.5, momentum=0.5, dampening=0.5, fused=True)
    p.grad = torch.ones(4)
    optimizer.step()
    q.grad = torch.ones(4)
    optimizer.step()
    assert (q == 0.5).all()  # undampened: its own first step


def test_elements_outside_a_view_with_gaps_are_not_overwritten() -> None:
    base = torch.ones(8, 8)
    optimizer, p = one("AdamW", base[:, ::2], torch.ones(8, 4), lr=0.5, fused=True)
    optimizer.step()
    assert (base[:, 1::2] == 1).all()
    assert (p != 1).all()


@pytest.mark.parametrize("kind", ["transposed", "channels_last"])
def test_a_gradient_of_other_strides_meets_the_right_elements(kind: str) -> None:
    grad = torch.arange(4.0 * 3 * 5 * 5).view(4, 3, 5, 5)
    placed = grad.to(memory_format=torch.channels_last) if kind == "channels_last" else grad.mT.contiguous().mT
    optimizer, p = one("SGD", torch.zeros(4, 3, 5, 5), placed, lr=1.0, fused=True)
    optimizer.step()
    assert torch.equal(p, -grad)
    assert optimizer.last_backend == NATIVE


def test_an_expanded_parameter_is_refused() -> None:
    p = torch.zeros(1).expand(64).requires_grad_()
    p.grad = torch.ones(64)
    with pytest.raises(ValueError, match="is expanded"):
        dracopt_ext.SGD([p], fused=True).step()


@every_class
def test_versions_are_bumped(name: str) -> None:
    optimizer, p = one(name, torch.ones(4), torch.ones(4), **({"momentum": 0.9} if name == "SGD" else {}))
    optimizer.step()
    versions = [p._version, *(value._version for value in optimizer.state[p].values())]
    optimizer.step()
    assert [p._version, *(value._version for value in optimizer.state[p].values())] == [v + 1 for v in versions]


@low_precision
def test_mixed_dtypes_do_not_raise(dtype: torch.dtype) -> None:
    for value, grad in ((torch.ones(4, dtype=dtype), torch.ones(4)), (torch.ones(4), torch.ones(4, dtype=dtype))):
        optimizer, p = one("AdamW", value, grad, lr=0.5, state_dtype=torch.float32, fused=True)
        optimizer.step()
        assert optimizer.last_backend == NATIVE
        assert (p != 1).all()


# AMP


def test_95781_a_scale_without_found_inf() -> None:
    optimizer, p = one("SGD", torch.ones(4), torch.full((4,), 8.0), lr=0.5, fused=True)
    optimizer.grad_scale = torch.tensor(8.0)
    optimizer.step()
    assert (p == 0.5).all()


def test_94060_gradients_are_not_unscaled_twice() -> None:
    optimizer, p = one("SGD", torch.ones(4), torch.full((4,), 8.0), lr=0.5, fused=True)
    optimizer.grad_scale = torch.tensor(8.0)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    optimizer.step()
    assert (p == 0).all()
    assert (p.grad == 8).all()


def test_123428_a_scale_of_the_users_own_is_multiplied_in() -> None:
    optimizer, p = one("SGD", torch.zeros(4), torch.full((4,), 64.0), lr=1.0, fused=True)
    optimizer.grad_scale = torch.tensor(4.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert (p == -1).all()
    assert not hasattr(optimizer, "found_inf")


@every_class
def test_step_takes_no_scaler(name: str) -> None:
    """GradScaler passes itself to a step() that has a parameter ``grad_scaler``."""
    assert list(inspect.signature(getattr(dracopt_ext, name).step).parameters) == ["self", "closure", "zero_grad"]


# Sizes and strides


@every_rule
def test_100701_a_full_batch_with_an_empty_tensor_in_its_last_place(case: Case) -> None:
    sizes = [*[3] * 130, 0]
    found = train(case.ours, {**case.options, "backend": "native"}, *inputs(sizes, torch.float32, 2))
    expected = train(case.ours, {**case.options, "backend": "reference"}, *inputs(sizes, torch.float32, 2))
    assert_same_bits(found, expected)


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025])
def test_deepspeed_1983_fp16_around_1024(size: int) -> None:
    case = Case("AdamW", {"lr": 0.1})
    given = [torch.ones(size, dtype=torch.float16)], [[torch.ones(size, dtype=torch.float16)]]
    found = train(case.ours, {**case.options, "backend": "native"}, *given)
    assert_same_bits(found, train(case.ours, {**case.options, "backend": "reference"}, *given))
    assert (found["0.0"] != 1).all()


def test_106951_strides_of_dimensions_of_one_element() -> None:
    """A 1x1 convolution in channels_last is contiguous, too, with other strides."""
    weight = torch.ones(8, 4, 1, 1).to(memory_format=torch.channels_last)
    grad = torch.arange(32.0).view(8, 4, 1, 1)
    optimizer, p = one("SGD", weight, grad, lr=1.0)
    optimizer.step()
    assert torch.equal(p, 1 - grad)


# Step counts and states


@low_precision
@pytest.mark.parametrize("name", classes(counts=True))
def test_torchao_4915_step_counts_go_on_beyond_256(name: str, dtype: torch.dtype) -> None:
    optimizer, p = one(name, torch.ones(4, dtype=dtype), torch.ones(4, dtype=dtype))
    optimizer.step()
    assert optimizer.state[p]["step"].dtype == torch.float32
    optimizer.state[p]["step"].fill_(256)
    optimizer.step()
    assert optimizer.state[p]["step"] == 257


def test_deepspeed_1823_every_tensor_counts_its_own_steps() -> None:
    params = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    optimizer = dracopt_ext.AdamW(params)
    for step in range(6):
        for i, p in enumerate(params):
            p.grad = torch.ones(4) if step % (i + 1) == 0 else None
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [6, 3, 2]


def test_78807_the_maximum_of_amsgrad_is_stored() -> None:
    optimizer, p = one("Adam", torch.ones(4), torch.full((4,), 8.0), amsgrad=True, betas=(0.9, 0.5))
    optimizer.step()
    largest = optimizer.state[p]["exp_avg_sq"].clone()
    p.grad = torch.zeros(4)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["max_exp_avg_sq"], largest)
    assert (optimizer.state[p]["exp_avg_sq"] < largest).all()


def test_bitsandbytes_2085_nesterov_and_dampening_are_not_ignored() -> None:
    found = []
    for options in ({}, {"nesterov": True}, {"dampening": 0.5}):
        optimizer, p = one("SGD", torch.zeros(4), torch.ones(4), lr=1.0, momentum=0.5, **options)
        for _ in range(2):
            optimizer.step()
        found.append(p[0].item())
    assert found == [-2.5, -3.25, -2.0]


@every_class
def test_nan_gradients_are_not_skipped(name: str) -> None:
    optimizer, p = one(name, torch.ones(64), torch.full((64,), float("nan")))
    optimizer.step()
    assert p.isnan().all()


@every_rule
def test_a_gradient_is_never_written(case: Case) -> None:
    grads = inputs([64, 100], torch.float32, 1)[1][0]
    params = [nn.Parameter(torch.ones(grad.numel())) for grad in grads]
    optimizer = case.ours(params, **case.options)
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()
    optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
    versions = [p.grad._version for p in params]
    optimizer.step()
    assert [p.grad._version for p in params] == versions
    assert all(torch.equal(p.grad, grad) for p, grad in zip(params, grads, strict=True))


# Defects that tests of others could not see


@every_rule
def test_91228_the_native_kernels_are_what_is_tested(case: Case) -> None:
    p = nn.Parameter(torch.ones(64))
    p.grad = torch.ones(64)
    optimizer = case.ours([p], **case.options)
    optimizer.step()
    assert optimizer.last_backend == NATIVE  # type: ignore[attr-defined]


@every_rule
def test_a_large_lr_and_many_steps_show_what_small_ones_hide(case: Case) -> None:
    """Twenty steps of size 0.1 must end at the same bits."""
    options = {**case.options, "lr": 0.1}
    given = inputs(WHOLE_BLOCKS, torch.float32, 20)
    ours = train(case.ours, options, *given)
    assert_same_bits(ours, train(case.ours, {**options, "backend": "reference"}, *given))
    case.assert_agree(ours, train(case.torchs, {**options, **case.fused}, *given), steps=20)


def test_parameters_in_groups_have_their_own_hyperparameters() -> None:
    rates = [0.5, 0.25, 0.125]
    params = [nn.Parameter(torch.zeros(4)) for _ in rates]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, rates, strict=True)]
    optimizer = dracopt_ext.SGD(groups)
    for p in params:
        p.grad = torch.ones(4)
    optimizer.step()
    assert [p[0].item() for p in params] == [-lr for lr in rates]
    assert snapshot(optimizer).keys() == {"0.0", "1.0", "2.0"}
