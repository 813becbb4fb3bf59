"""Steps parameters by torch's own implementation, or by the reference if torch cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused

from .. import reference
from ..backend import warn_once
from ..containers import Group, entries_of, plain_groups
from ..todo import FUSABLE, MIXED, NEW, SPARSE, Unsupported, form_of
from . import _by_reference

if TYPE_CHECKING:
    from ._step import Step


def step_overridden(step: Step, method: str) -> None:
    """Steps a subclass that has overridden a method which torch's step calls and ours does not."""
    optimizer = step.optimizer
    name = type(optimizer).__name__
    context, precision = step.context, step.context.precision
    asked_for: dict[str, Any] = {"backend": context.backend, "max_grad_norm": context.max_grad_norm}
    asked_for |= {"error_if_nonfinite": context.error_if_nonfinite, **vars(precision)}
    for option, value in asked_for.items():
        if value is not None and value is not False and option != "rounding_seed":
            raise RuntimeError(
                f"{option}={value!r} is not for {name}, which overrides {method}: only torch's own step calls "
                f"that. Leave `{option}` out"
            )
    # The next line raises for iterators, which torch's step would exhaust. Numbers may be anything that torch takes.
    groups = plain_groups(optimizer.param_groups, optimizer.defaults)
    with torch._C.DisableTorchFunctionSubclass():
        params = [p for group in groups for p in group["params"] if p.grad is not None]
        devices = set(map(attrgetter("device"), params))
    assert step.kind.torch_step is not None  # otherwise there is no such method
    with torch.set_grad_enabled(bool(optimizer.defaults.get("differentiable"))):
        step.kind.torch_step(optimizer)
    step.note("torch", devices)
    warn_once(
        f"{name} overrides {method}, which only torch's own step calls: it is stepped by torch's own "
        "implementation, which is slower"
    )


def update_all(step: Step, grad_scale: float) -> None:
    """Updates every parameter that has a gradient, if there is no plan to look at them."""
    step.make_plain()
    state = step.optimizer.state
    all_of_them: list[Unsupported] = []
    with torch._C.DisableTorchFunctionSubclass():
        for g, group in enumerate(step.groups):
            fused = bool(group.get("fused"))
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                entries = entries_of(state, p)
                scalars = [entries[name] for name in reference.STATE_SCALARS if name in entries]
                moments = [entries[name] for name in reference.MOMENTS if name in entries]
                new = step.kind.lacks_state(entries, group)
                adjusts = grad_scale != 1 or step.coefficient != 1
                form = form_of(p, p.grad, scalars, moments, new=new, may_fuse=fused, adjusts=adjusts)
                all_of_them.append((g, i, "", form))
    with step.restored_on_error(step.select([(g, i, i + 1) for g, i, _, form in all_of_them if form & NEW])):
        uses_reference = update(step, all_of_them, grad_scale)
    if uses_reference:
        which = (
            "parameters" if step.kind.torch_step is None else "parameters whose gradients or states have other dtypes"
        )
        warn_once(
            f"{type(step.optimizer).__name__} leaves {which} to the reference implementation, which is much slower "
            "than compiled kernels"
        )


def update(step: Step, parameters: list[Unsupported], grad_scale: float) -> bool:
    """Steps these parameters by torch, or by the reference. Returns whether the reference had to step some."""
    by_torch: list[Group] = []
    by_reference: list[Group] = []
    devices: set[torch.device] = set()
    with torch._C.DisableTorchFunctionSubclass():
        for g, members in groupby(sorted(parameters), itemgetter(0)):
            group = step.groups[g]
            as_it_is, unfused, mixed = _sort_for_torch(step, group, members)
            devices.update(map(attrgetter("device"), (*as_it_is, *unfused)))
            by_torch += [{**group, "params": as_it_is}] if as_it_is else []
            by_torch += [{**group, "params": unfused, "fused": None}] if unfused else []
            by_reference += [{**group, "params": mixed}] if mixed else []
    _by_reference.check(step, by_reference)
    # torch raises for a capturable group on the CPU before it changes any of that group, so such groups come first.
    by_torch.sort(key=lambda group: not group.get("capturable"))
    if by_torch:
        with _adjusted(by_torch, grad_scale, step.coefficient):
            call_torch(step, by_torch)
        step.note("torch", devices)
    _by_reference.update(step, by_reference, grad_scale)
    return bool(by_reference)


def _sort_for_torch(
    step: Step, group: Group, members: Iterable[Unsupported]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Returns those that torch steps as their group is, those that torch steps without ``fused``, and the reference's.

    The reference steps all if torch has no such class. Raises early what torch would raise only after it has changed
    something.
    """
    as_it_is: list[Tensor] = []
    unfused: list[Tensor] = []
    mixed: list[Tensor] = []
    kind, precision = step.kind, step.context.precision
    dtypes = precision.dtypes()
    fused = group.get("fused")
    refuses_sparse = fused or not kind.takes_sparse
    may_mix = not group.get("differentiable")
    for _, i, _, form in members:
        p = group["params"][i]
        if form & SPARSE and refuses_sparse:
            raise RuntimeError(kind.sparse_error)
        # torch would give new moments, and those that a sparse gradient changes, the parameter's dtype.
        will_mix = form & (NEW | SPARSE) and dtypes - {p.dtype}
        if kind.torch_step is None or will_mix or precision.rounds(p) or (form & MIXED and (may_mix or dtypes)):
            mixed.append(p)
        elif not fused:
            as_it_is.append(p)
        elif form & FUSABLE:
            (as_it_is if kind.keeps_fused else unfused).append(p)
        else:
            _device_dtype_check_for_fused(p)
            # torch's fused kernels are wrong for some dtypes and strides on the CPU, and lose what they write into a
            # distributed moment of other placements. torch's other code is right.
            (unfused if p.device.type == "cpu" or hasattr(p, "device_mesh") else as_it_is).append(p)
    return as_it_is, unfused, mixed


def call_torch(step: Step, groups: list[Group], *, scaled: bool = False) -> None:
    """Lets torch step these groups. If they are ``scaled``, torch unscales the gradients itself."""
    # torch's step works on an optimizer's groups. This view shares everything else with the optimizer.
    optimizer = step.optimizer
    assert step.kind.torch_step is not None
    view = object.__new__(step.kind.torch_class)
    view.__dict__.update(optimizer.__dict__, state=optimizer.state, param_groups=groups)
    if not scaled:
        view.grad_scale = view.found_inf = None
    with torch.set_grad_enabled(bool(optimizer.defaults.get("differentiable"))):
        step.kind.torch_step(view)


@contextmanager
def _adjusted(groups: list[Group], grad_scale: float, coefficient: float) -> Iterator[None]:
    """Divides the gradients of these parameters by the scale and multiplies the quotients, until the block ends."""
    if grad_scale == coefficient == 1:
        yield
        return
    params = [p for group in groups for p in group["params"]]
    as_they_are = [p.grad for p in params]
    try:
        for p in params:
            quotient = p.grad if grad_scale == 1 else p.grad / grad_scale
            p.grad = quotient if coefficient == 1 else quotient * coefficient
        yield
    finally:
        for p, grad in zip(params, as_they_are, strict=True):
            p.grad = grad
