"""Steps parameters by the reference, and first refuses what the reference does not serve."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import reference
from ..containers import Group, entries_of

if TYPE_CHECKING:
    from ._step import Step


def update_all(step: Step, grad_scale: float) -> None:
    """Updates every parameter that has a gradient."""
    groups = step.with_gradients()
    check(step, groups)
    update(step, groups, grad_scale)


def update(step: Step, groups: list[Group], grad_scale: float) -> None:
    """Updates the parameters of these groups, which must have been checked."""
    if not groups:
        return
    state = step.optimizer.state
    with torch.no_grad(), step.restored_on_error(groups):
        for group in groups:
            for p in group["params"]:
                new = step.kind.lacks_state(entries_of(state, p), group)
                if step.lacks_state(p, group):
                    step.create_state({**group, "params": [p]})
                reference.update(
                    step.kind.rule.name,
                    *_tensors_of(step, p),
                    group,
                    maximize=group["maximize"],
                    grad_scale=grad_scale,
                    coefficient=step.coefficient,
                    first=new and step.kind.rule.first_step_fills,
                    master=step.engine.precision.master_of(p),
                    rounding=step.rounding_of(p),
                )
                step.note("reference", [p.device])


def _tensors_of(step: Step, p: Any) -> tuple[Tensor, Tensor, Any]:
    """Returns a parameter, its gradient and its state, or local parts of these if rounding depends on their places."""
    grad, state = p.grad, step.optimizer.state[p]
    if not hasattr(p, "placements") or not step.engine.precision.rounds(p):
        return p, grad, state
    local = {name: value.to_local() if hasattr(value, "to_local") else value for name, value in state.items()}
    return p.to_local(), grad.redistribute(placements=p.placements).to_local(), local


def check(step: Step, groups: list[Group]) -> None:
    """Raises for what the compiled kernels would refuse, and for what the reference does not serve."""
    rule = step.kind.rule
    for group in groups:
        is_capturable = rule.state_scalars and group.get("capturable") and not group.get("fused")
        if group.get("differentiable") or is_capturable:
            raise RuntimeError(
                f"the reference implementation, which steps parameters of {type(step.optimizer).__name__} here, serves "
                "neither differentiable nor capturable groups"
            )
        numbers = reference.numbers(rule.name, group)
        index = step.find(group["params"][0])[0]
        for key, value in numbers.items():
            _check_number(f"param_groups[{index}][{key!r}]", value)
        for p in group["params"]:
            state = _check_tensors(step, p, group)
            scalars = {name: state[name] for name in reference.STATE_SCALARS if name in state}
            in_fp64 = reference.in_fp64(p, p.grad, state)
            in_fp64 |= not state and torch.float64 in step.engine.precision.dtypes()
            reference.check_finite(rule.name, numbers, scalars, in_fp64, index, partial(step.describe, p))


def _check_number(where: str, value: Any) -> None:
    """Raises if a hyperparameter is wrong: a number, or the decay rates in a tuple."""
    rates = isinstance(value, tuple)
    if rates and len(value) != 2:
        raise ValueError(f"{where} must be 2 numbers, not {len(value)}")
    for number in value if rates else [value]:
        if not math.isfinite(number) or (rates and not 0 <= number < 1):
            must = "at least 0 and less than 1" if rates else "finite"
            raise ValueError(f"{where} is {number}; it must be {must}")


def _check_tensors(step: Step, p: Tensor, group: Group) -> Any:
    """Checks tensors and returns the parameter's state, which is empty if it has yet to be created."""
    grad = p.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"the reference implementation takes dense tensors only, not the {grad.layout} gradient of "
            f"{step.describe(p)}"
        )
    rule, entries = step.kind.rule, entries_of(step.optimizer.state, p)
    state = {} if step.kind.lacks_state(entries, group) else entries
    for name in (*rule.state_scalars, *rule.moments_of(group)):
        if state and name not in state:
            raise KeyError(f"the state of {step.describe(p)} has no {name!r}")
    master = step.engine.precision.master_of(p)
    if state and master is not None:
        _check_master(step, p, state, master, group)
    for name in ("the gradient", *rule.moments_of(group), *([master] if master is not None else [])):
        tensor = grad if name == "the gradient" else state.get(name)
        if tensor is not None and not isinstance(tensor, Tensor):
            raise ValueError(f"the state {name!r} of {step.describe(p)} is no tensor but a {type(tensor).__name__}")
        if tensor is not None and tensor.shape != p.shape:
            raise ValueError(f"{name} of {step.describe(p)} has another shape, {list(tensor.shape)}")
        if tensor is not None and not (tensor.is_complex() if p.is_complex() else tensor.is_floating_point()):
            raise ValueError(f"{name} of {step.describe(p)} has a dtype that does not fit, {tensor.dtype}")
        mesh = getattr(tensor, "device_mesh", None)
        if isinstance(tensor, Tensor) and mesh != getattr(p, "device_mesh", None) and not _may_mix(p, tensor):
            where = "not distributed" if mesh is None else f"distributed over {mesh}"
            raise ValueError(f"{name} of {step.describe(p)} is {where}")
        moved = name != "the gradient" and getattr(tensor, "placements", None) != getattr(p, "placements", None)
        if tensor is not None and moved and step.engine.precision.rounds(p):
            raise RuntimeError(f"the state {name!r} of {step.describe(p)} is placed in another way than the parameter")
    return state


def _check_master(step: Step, p: Tensor, state: Any, name: str, group: Group) -> None:
    master = state.get(name)
    if master is None:
        if step.kind.lacks_state({}, group):
            raise KeyError(f"the state of {step.describe(p)} has no {name!r}. Delete this state to start it afresh")
    elif not isinstance(master, Tensor):
        raise ValueError(f"the state {name!r} of {step.describe(p)} is no tensor but a {type(master).__name__}")
    elif master.dtype != step.engine.precision.master_dtype():
        raise ValueError(f"the state {name!r} of {step.describe(p)} has a dtype that does not fit, {master.dtype}")


def _may_mix(p: Tensor, tensor: Tensor) -> bool:
    """Says whether torch takes one of these for a replicated tensor, because it is a plain one."""
    one = next((t for t in (p, tensor) if not hasattr(t, "device_mesh")), None)
    return one is not None and (one.numel() == 1 or torch._C._get_dtensor_allow_implicit_replication())
