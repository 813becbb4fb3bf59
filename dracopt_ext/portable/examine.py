"""Sorts the parameters of a step into ready, without a state, and unsupported; raises if something is wrong."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..todo import SHARES_MEMORY, Index
from .layouts import is_expanded, may_overlap_itself
from .located import (
    MISALIGNED,
    NATIVE,
    PLAIN,
    Group,
    Located,
    is_misaligned,
    is_step,
    lacks_memory,
    range_of,
    why_not_plain,
)
from .packed import PackedLaunch
from .rules import Rule

ADVICE_ON_STATES = "Delete this parameter's state to start it afresh"


def _dtype_of(tensor: Tensor) -> str:
    """Names a dtype as torch's own errors do: Long, ComplexFloat."""
    return tensor.type().split(".")[-1].removesuffix("Tensor")


def check_tensor(tensor: Tensor, param: Tensor, name: str, advice: str) -> None:
    """Raises if a plain tensor cannot be the gradient or a moment of a plain parameter."""
    if type(tensor) not in PLAIN:
        return
    if tensor.device != param.device:
        raise ValueError(f"{name} is on another device, {tensor.device}. {advice}")
    if tensor.shape != param.shape:
        raise ValueError(f"{name} has another shape, {list(tensor.shape)}. {advice}")
    if tensor.dtype not in NATIVE or tensor.is_complex() != param.is_complex():
        raise ValueError(f"{name} has a dtype that does not fit, {_dtype_of(tensor)}. {advice}")


def check_scalar(tensor: Tensor, param: Tensor, name: str, advice: str) -> None:
    """Raises if a tensor cannot be a state scalar of a parameter."""
    if tensor.device.type != "cpu" and tensor.device != param.device:
        raise ValueError(f"{name} is on another device, {tensor.device}. {advice}")
    if tensor.numel() != 1:
        raise ValueError(f"{name} has another shape, {list(tensor.shape)}. {advice}")


def freed(tensor: Tensor) -> str:
    nbytes = tensor.untyped_storage().nbytes()
    return f"lies in a storage that is too small for it, of {nbytes} bytes: it was freed or resized"


class WrittenMemory:
    """The memory that a step writes, as ranges of addresses, each with the number of its owner."""

    def __init__(self, ranges: Iterable[tuple[int, int, int]]) -> None:
        self._ranges = sorted(r for r in ranges if r[1] > r[0])
        self._begins = [begin for begin, _, _ in self._ranges]
        self._reach = list(accumulate((end for _, end, _ in self._ranges), max))

    def shared(self) -> set[int]:
        """Returns the owners of ranges that overlap another range."""
        found: set[int] = set()
        furthest = 0, -1
        for begin, end, owner in self._ranges:
            if begin < furthest[0]:
                found |= {owner, furthest[1]}
            furthest = max(furthest, (end, owner))
        return found

    def shared_with(self, of_reader: tuple[int, int], reader: int) -> set[int]:
        """Returns the owners of ranges that overlap a range that is read, together with its reader."""
        begin, end = of_reader
        found: set[int] = set()
        i = bisect_left(self._begins, end)
        while begin < end and i > 0 and self._reach[i - 1] > begin:
            i -= 1
            if self._ranges[i][1] > begin:
                found |= {reader, self._ranges[i][2]}
        return found


class PlanBackend(Protocol):
    """The backend whose kernels a plan uses."""

    launch_type: type[PackedLaunch]

    def why_not(self, device: torch.device) -> str | None:
        """Says why tensors on a device are not served; None if they are."""


class Examined(NamedTuple):
    """The parameters of a step, sorted by what must happen to them."""

    ready: list[Located]
    missing: list[Located]
    """Parameters whose state must be created."""
    unsupported: list[tuple[Located, str]]
    """Parameters that no kernel serves, with the reason."""
    written: WrittenMemory


class Examiner:
    """Examines parameters for one rule and the kernels of one backend."""

    def __init__(self, rule: Rule, backend: PlanBackend) -> None:
        self._rule = rule
        self._backend = backend

    def examine(self, located: list[Located], groups: list[Group], passed_over: list[Tensor]) -> Examined:
        """Sorts the parameters, or raises if something is wrong."""
        ready: list[Located] = []
        missing: list[Located] = []
        unsupported: list[tuple[Located, str]] = []
        for p in located:
            reason = self._why_unsupported(p)
            if reason is not None:
                unsupported.append((p, reason))
            elif None in p.state_scalars or any(value is None for value in p.states):
                missing.append(p)
            else:
                ready.append(p)
        shared, written = self._sharing_memory(ready, missing, unsupported, groups, passed_over)
        unsupported += [(p, SHARES_MEMORY) for p in (*ready, *missing) if p.where in shared]
        ready, missing = ([p for p in part if p.where not in shared] for part in (ready, missing))
        return Examined(ready, missing, unsupported, written)

    def _why_unsupported(self, located: Located) -> str | None:
        """Says why the kernel does not serve a parameter; raises if something is wrong."""
        group, p, grad = located.group, located.param, located.grad
        if group.unsupported is not None:
            return group.unsupported
        if (reason := why_not_plain(p)) is not None:
            return reason
        if (reason := self._backend.why_not(p.device)) is not None:
            return reason
        if p.device.type == "cpu" and group.capturable and not group.fused:
            return "capturable=True"  # on the CPU torch takes capturable only with fused, where it means nothing
        if group.device not in (None, p.device):
            return "hyperparameters on another device"
        if is_expanded(p):
            raise ValueError(
                f"{located.describe()} is expanded: several of its elements share one memory location, so it cannot be "
                "updated in place. Optimize a clone() of it instead"
            )
        if may_overlap_itself(p):
            return "strides by which elements may share memory"
        if p.dtype not in NATIVE:
            return "these dtypes"
        if p.is_complex() and group.fused:
            return "complex parameters with fused=True"
        if p.is_inference() and not torch.is_inference_mode_enabled():
            return "inference tensors"
        advice = "Set .grad to None, or to a tensor like the parameter"
        check_tensor(grad, p, f"the gradient of {located.describe()}", advice)
        if (reason := why_not_plain(grad)) is not None:
            return reason
        reason = self._why_state_is_unsupported(located)
        if reason is None:
            self._check_memory(located)
            streams = (p, grad, *(value for value in located.states if value is not None))
            if any(tensor.numel() > 0 and is_misaligned(tensor) for tensor in streams):
                return MISALIGNED
        return reason

    def _why_state_is_unsupported(self, located: Located) -> str | None:
        group, p = located.group, located.param
        keys = (*self._rule.state_scalar_keys, *self._rule.state_keys[: group.states])
        values = (*located.state_scalars, *located.states)
        for key, value in zip(keys, values, strict=True):
            if value is None:
                # A rule with state scalars creates its state as a whole, as torch does: a partial state is a mistake.
                if self._rule.state_scalar_keys and located.entries:
                    raise KeyError(
                        f"the state of {located.describe()} has no {key!r}. Was an option such as amsgrad switched on "
                        "after the first step? Delete this parameter's state to start it afresh"
                    )
                return None
        on_gpu = group.device is not None
        for k, (key, value) in enumerate(zip(keys, values, strict=True)):
            name, advice = f"the state {key!r} of {located.describe()}", ADVICE_ON_STATES
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} is no tensor but a {type(value).__name__}. {advice}")
            if type(value) not in PLAIN:
                return "states that are tensor subclasses"
            if key in self._rule.state_keys:
                check_tensor(value, p, name, advice)
            else:
                check_scalar(value, p, name, advice)
            if (reason := why_not_plain(value)) is not None:
                return reason
            if key in self._rule.state_keys:
                if is_expanded(value):
                    raise ValueError(f"{name} is expanded: several of its elements share one memory location. {advice}")
                if may_overlap_itself(value):
                    return "strides by which elements may share memory"
                continue
            if value.dtype not in (torch.float32, torch.float64):
                return "scalars of a state in this dtype"
            if lacks_memory(value):
                raise ValueError(f"{name} {freed(value)}. {advice}")
            if is_misaligned(value):
                return MISALIGNED
            if value.device.type != "cpu":
                on_gpu = True
            elif k > 0 and on_gpu:  # the host advances the scalar by numbers that only the GPU has
                return "a state on the CPU beside numbers on the GPU that it depends on"
            elif k == 0 and not is_step(value.item()):
                return "step counts that are not natural numbers"
        return None

    def _check_memory(self, located: Located) -> None:
        tensors = {
            located.describe(): (located.param, "Give it its memory back before the step"),
            f"the gradient of {located.describe()}": (
                located.grad,
                "Set .grad to None, or to a tensor like the parameter",
            ),
        }
        for key, value in zip(self._rule.state_keys, located.states, strict=False):
            tensors[f"the state {key!r} of {located.describe()}"] = value, ADVICE_ON_STATES
        for name, (tensor, advice) in tensors.items():
            if tensor is not None and lacks_memory(tensor):
                raise ValueError(f"{name} {freed(tensor)}. {advice}")

    def _sharing_memory(
        self,
        ready: list[Located],
        missing: list[Located],
        unsupported: list[tuple[Located, str]],
        groups: list[Group],
        passed_over: list[Tensor],
    ) -> tuple[set[Index], WrittenMemory]:
        """Finds parameters that share memory. torch must step these in turn; kernels work on elements in parallel."""
        searched = [*ready, *missing]
        others = [p for p, _ in unsupported if why_not_plain(p.param) is None]
        ranges = [(*range_of(t), i) for i, p in enumerate(searched) for t in p.written if t is not None]
        ranges += [(*range_of(p.param), len(searched)) for p in others]
        if any(group.reads_host for group in groups):
            ranges += [(*range_of(p), len(searched)) for p in passed_over if why_not_plain(p) is None]
        written = WrittenMemory(ranges)
        shared = written.shared()
        for i, p in enumerate([*searched, *others]):
            if why_not_plain(p.grad) is None:
                owner = min(i, len(searched))
                shared |= written.shared_with(range_of(p.grad), owner)
        # In torch, later groups see the new value of a hyperparameter that is updated like a parameter.
        first_group = len(searched) + 1
        for group in groups:
            for of_number in group.read:
                shared |= written.shared_with(of_number, first_group + group.index)
        aside = {p.where for i, p in enumerate(searched) if i in shared or first_group + p.group.index in shared}
        return aside, written
