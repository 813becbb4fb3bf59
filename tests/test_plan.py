"""The contract of a plan, whatever language it is written in: see csrc/bindings/step_plan.h."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dracopt_ext
from dracopt_ext import backend as backend_module

from .cases import assert_same_bits, snapshot


class Subclass(Tensor):
    """A tensor subclass, which no kernel serves."""


def make(*params: Tensor, **options: Any) -> tuple[Any, Any]:
    """Returns an optimizer that has taken a step, with gradients for the next one, and a plan for it."""
    optimizer = dracopt_ext.AdamW(params, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer, backend_module.step_plan("native", "adam", "AdamW", None)


def test_a_look_changes_nothing() -> None:
    optimizer, plan = make(nn.Parameter(torch.ones(3)))
    before = snapshot(optimizer)
    assert tuple(plan.step(optimizer.param_groups, optimizer.state, only_looks=True)) == ([], [], False, False)
    assert_same_bits(snapshot(optimizer), before)
    optimizer.state.clear()
    todo = plan.step(optimizer.param_groups, optimizer.state, only_looks=True)
    assert tuple(todo) == ([(0, 0, 1)], [], False, False)
    assert plan.updated == {}
    assert plan.launches == 0


def test_what_was_created_is_gone() -> None:
    optimizer, plan = make(nn.Parameter(torch.ones(3)))
    optimizer.state.clear()
    for only_looks in (False, True):
        with pytest.raises(RuntimeError, match="have changed while step\\(\\) was creating states"):
            plan.step(optimizer.param_groups, optimizer.state, created=[(0, 0, 1)], only_looks=only_looks)


@pytest.mark.parametrize("change", [{"lr": 1e300}, {"eps": float("inf")}])
def test_a_look_finds_what_is_wrong(change: dict[str, float]) -> None:
    optimizer, plan = make(nn.Parameter(torch.ones(3)))
    before = snapshot(optimizer)
    optimizer.param_groups[0].update(change)
    with pytest.raises(ValueError, match=rf"param_groups\[0\]\['{next(iter(change))}'\]"):
        plan.step(optimizer.param_groups, optimizer.state, only_looks=True)
    assert_same_bits(snapshot(optimizer), before)


@pytest.mark.parametrize(
    ("devices", "taken"),
    [({}, True), ({"only_on": "cpu"}, True), ({"not_on": "cuda"}, True), ({"only_on": "cuda"}, False)],
    ids=str,
)
def test_parameters_on_one_type_of_devices(devices: dict[str, str], taken: bool) -> None:
    optimizer, plan = make(nn.Parameter(torch.ones(3)))
    before = snapshot(optimizer)
    assert plan.step(optimizer.param_groups, optimizer.state, **devices) is None
    assert plan.updated == ({"cpu": 1} if taken else {})
    if taken:
        with pytest.raises(AssertionError, match="elements differ"):
            assert_same_bits(snapshot(optimizer), before)
    else:
        assert_same_bits(snapshot(optimizer), before)


def test_a_subclass_is_on_no_device() -> None:
    """A subclass may decide on its device in Python. Exactly one of two plans that share a step must take it."""
    p = nn.Parameter(torch.ones(3).as_subclass(Subclass))
    p.grad = torch.ones(3)
    optimizer = dracopt_ext.AdamW([p])
    plan = backend_module.step_plan("native", "adam", "AdamW", None)
    for devices, count in (({"only_on": "cpu"}, 0), ({"not_on": "cpu"}, 1)):
        _, unsupported, _, _ = plan.step(optimizer.param_groups, optimizer.state, **devices, only_looks=True)
        assert [reason for _, _, reason, _ in unsupported] == ["tensor subclasses"] * count
