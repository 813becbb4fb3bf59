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
                    master=step.context.precision.master_of(p),
                    rounding=step.rounding_of(p),
                )
                step.note("reference", [p.device])


def _tensors_of(step: Step, p: Any) -> tuple[Tensor, Tensor, Any]:
    """Returns a parameter, its gradient and its state, or local parts of these if rounding depends on their places."""
    grad, state = p.grad, step.optimizer.state[p]
    if not hasattr(p, "placements") or not step.context.precision.rounds(p):
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
        index = step.find(group["params"][0])[0]
        for key in ("maximize", *rule.kinds):
            if key not in group:
                raise KeyError(f"param_groups[{index}][{key!r}] is missing: was a checkpoint of another class loaded?")
            for value in group[key] if isinstance(group[key], tuple) else [group[key]]:
                if isinstance(value, Tensor) and value.numel() != 1:
                    raise ValueError(
                        f"param_groups[{index}][{key!r}] must be a tensor of one element, not of shape "
                        f"{list(value.shape)}"
                    )
        numbers = reference.numbers(rule.name, group)
        for key, value in numbers.items():
            _check_number(f"param_groups[{index}][{key!r}]", value)
        for p in group["params"]:
            state = _check_tensors(step, p, group)
            scalars = {name: state[name] for name in reference.STATE_SCALARS if name in state}
            in_fp64 = reference.in_fp64(p, p.grad, state)
            in_fp64 |= not state and torch.float64 in step.context.precision.dtypes()
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
    master = step.context.precision.master_of(p)
    needed = [*rule.state_scalars, *rule.moments_of(group)]
    # A master is created with the state, or beside what another class has saved.
    if master is not None and step.kind.lacks_state({}, group):
        needed.append(master)
    for name in needed:
        if state and state.get(name) is None:
            raise KeyError(
                f"the state of {step.describe(p)} has no {name!r}. Was an option such as amsgrad switched on after the "
                "first step? Delete this parameter's state to start it afresh"
            )
    found = {name: state.get(name) for name in needed}
    if master is not None:
        found[master] = entries.get(master)
    tensors: list[tuple[str | None, Any]] = [(None, grad), *found.items()]
    for key, tensor in tensors:
        fault = None if tensor is None else _fault_of(step, p, tensor, key)
        if fault is None:
            continue
        if key is None:
            raise ValueError(
                f"the gradient of {step.describe(p)} {fault}. Set .grad to None, or to a tensor like the parameter"
            )
        raise ValueError(
            f"the state {key!r} of {step.describe(p)} {fault}. Delete this parameter's state to start it afresh"
        )
    for name, tensor in found.items():
        moved = name not in rule.state_scalars and getattr(tensor, "placements", None) != getattr(p, "placements", None)
        if tensor is not None and moved and step.context.precision.rounds(p):
            raise RuntimeError(f"the state {name!r} of {step.describe(p)} is placed in another way than the parameter")
    return state


def _fault_of(step: Step, p: Tensor, tensor: Any, name: str | None) -> str | None:
    """Says what is wrong about a state, or about the gradient if ``name`` is None; returns None if nothing is."""
    if not isinstance(tensor, Tensor):
        return f"must be a Tensor, not {type(tensor).__name__}"
    precision = step.context.precision
    is_scalar, is_master = name in step.kind.rule.state_scalars, name is not None and name == precision.master_of(p)
    if tensor.numel() != 1 if is_scalar else tensor.shape != p.shape:
        return f"has another shape, {list(tensor.shape)}"
    fits = is_scalar or (tensor.is_complex() if p.is_complex() else tensor.is_floating_point())
    if not fits or (is_master and tensor.dtype != precision.master_dtype()):
        return f"has a dtype that does not fit, {tensor.dtype}"
    if tensor.device != p.device and not (is_scalar and tensor.device.type == "cpu"):
        return f"is on another device, {tensor.device}"
    if tensor.layout != torch.strided:
        return f"must be dense, not {tensor.layout}"
    repeats = any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if repeats and tensor.numel() > 0 and name is not None:
        return "is expanded: several of its elements share one memory location"
    mesh = getattr(tensor, "device_mesh", None)
    if not is_scalar and mesh != getattr(p, "device_mesh", None) and not _may_mix(p, tensor):
        return "is not distributed" if mesh is None else f"is distributed over {mesh}"
    return None


def _may_mix(p: Tensor, tensor: Tensor) -> bool:
    """Says whether torch takes one of these for a replicated tensor, because it is a plain one."""
    one = next((t for t in (p, tensor) if not hasattr(t, "device_mesh")), None)
    return one is not None and (one.numel() == 1 or torch._C._get_dtensor_allow_implicit_replication())
