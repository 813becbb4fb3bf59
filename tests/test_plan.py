"""The contract of a plan: see csrc/bindings/step_plan.h."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dracopt_ext
from dracopt_ext import backend as backend_module

from .cases import assert_same_bits, snapshot


def make(*params: Tensor, **options: Any) -> tuple[Any, Any]:
    """Returns an optimizer that has taken a step, with gradients for the next one, and a plan for it."""
    optimizer = dracopt_ext.AdamW(params, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer, backend_module.step_plan("adam", "AdamW", native=True, triton=False)


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


def test_what_was_updated_where() -> None:
    optimizer, plan = make(nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4)))
    before = snapshot(optimizer)
    assert plan.step(optimizer.param_groups, optimizer.state) is None
    assert plan.updated == {("cpu", "native"): 2}
    assert plan.launches == 0
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(snapshot(optimizer), before)
