"""Takes one optimizer step: reads what Python holds now, refuses what is wrong, and lets kernels update the rest.

This plan is csrc/bindings/step_plan.cpp in Python, with the same answers, and needs no compiler. One difference: asking
for an address ends a lazy clone here, while the compiled plan leaves lazy clones to torch. Every step compares all
tensors (addresses, dtypes, shapes, strides, sizes of storages) with those of the step before. If they differ, the step
makes the kernels' tables again. No tensor is held from step to step.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import devices
from ..containers import NotPlainError, is_plain_state
from ..reference import are_modest, check_finite, in_fp64
from ..todo import SHARES_MEMORY, UNDER_MODE, Index, Run, Scaler, Todo, Unsupported, form_of, is_under_mode
from .examine import Examined, Examiner, PlanBackend, WrittenMemory
from .layouts import make_layout
from .located import (
    PLAIN,
    Group,
    Located,
    Numbers,
    is_misaligned,
    is_step,
    lacks_memory,
    numbers_on_host,
    range_of,
    real,
)
from .packed import DTYPES, FIRST, MAX_STATE_SCALARS, MAX_STATES, PackedLaunch, number_bits
from .rules import RULES

_NO_STATE: dict[str, Any] = {}


def _guards_of(tensors: list[Any]) -> Any:
    """Returns a guard of torch whose ``check`` compares tensors with these; None if torch no longer has such guards."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return guards if guards.check(*tensors) else None
    except (ImportError, TypeError, AttributeError):
        return None


def is_capturing(device: torch.device) -> bool:
    """Says whether a graph is being captured from a GPU's current stream."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class StepPlan:
    """Belongs to one optimizer and is called like the compiled module's class of this name.

    Args:
        rule: a name in :data:`dracopt_ext.portable.rules.RULES`.
        optimizer: the name of the optimizer's class, for errors.
        plan_backend: the backend whose kernels update the tensors.
    """

    def __init__(self, rule: str, optimizer: str, plan_backend: PlanBackend) -> None:
        self._rule = RULES[rule]
        self._optimizer = optimizer
        self._plan_backend = plan_backend
        self._examiner = Examiner(self._rule, plan_backend)
        # The launches are right for these groups, tensors, addresses and sizes of storages. torch's guards hold dtypes,
        # devices, shapes, strides and whatever else tells tensors apart, but no tensor.
        self._facts: list[tuple[Any, ...]] | None = None
        self._guards: Any = None
        self._addresses: list[int] = []
        self._nbytes: list[int] = []
        self._launches: list[tuple[PackedLaunch, list[int]]] = []  # with the indices of their tensors among all
        self._written = WrittenMemory(())
        self._gradients: list[int] = []  # addresses of gradients that passed all checks
        self._captured: list[Any] = []  # objects that captured graphs refer to
        self.updated: dict[str, int] = {}
        """How many parameters the last call updated, by type of device."""
        self.launches = 0
        """How many launches of the kernel the last call made."""

    def step(
        self,
        param_groups: Any,
        state: Any,
        grad_scale: float = 1.0,
        scaler: Scaler = (None, None),
        created: Collection[Run] | None = None,
        stepped: Collection[Index] | None = None,
        only_on: str | None = None,
        not_on: str | None = None,
        only_looks: bool = False,
    ) -> Any:
        """Steps every parameter that has a gradient, by the contract of csrc/bindings/step_plan.h."""
        self.updated, self.launches = {}, 0
        try:
            if type(param_groups) is not list or not is_plain_state(state):
                return NotImplemented
            under_mode = is_under_mode()
            # The plan's own operations must stay hidden from a mode.
            with torch._C._DisableTorchDispatch() if under_mode else nullcontext():
                groups = [Group(index, values, self._rule) for index, values in enumerate(param_groups)]
                located = self._locate(groups, state, set(stepped or ()), only_on, not_on)
                return self._step(groups, *located, grad_scale, scaler, created, only_looks, under_mode)
        except NotPlainError:
            return NotImplemented

    def _step(
        self,
        groups: list[Group],
        located: list[Located],
        tensors: list[Any],
        facts: list[tuple[Any, ...]],
        passed_over: list[Tensor],
        grad_scale: float,
        scaler: Scaler,
        created: Collection[Run] | None,
        only_looks: bool,
        under_mode: bool,
    ) -> Todo | None:
        found = Examined(located, [], [], self._written)
        numbers: list[Numbers] = []
        # The storages live until the end, because another thread may give tensors other memory while kernels run.
        storages: list[Any] = []
        # Nothing is remembered of another plan's memory, in which a learning rate may lie.
        is_alone = not passed_over or not any(group.reads_host for group in groups)
        known = is_alone and not under_mode and facts == self._facts and self._guards.check(*tensors)
        if known:
            storages = [tensor.untyped_storage() for p in located for tensor in (p.grad, *p.written)]
            known = self._lie_as_before(located, storages)
        if known:
            numbers = [numbers_on_host(p) for p in located]
            known = all(is_step(of_p[0]) for of_p in numbers if of_p)
        if not known:
            found = self._examiner.examine(located, groups, passed_over)
            if under_mode:
                set_aside = [(p, UNDER_MODE) for p in (*found.ready, *found.missing)]
                found = Examined([], [], found.unsupported + set_aside, found.written)
            storages = [tensor.untyped_storage() for p in found.ready for tensor in (p.grad, *p.written)]
            numbers = [numbers_on_host(p) for p in found.ready]
        capturing = self._check_capture(found, groups)
        host_decides = scaler != (None, None) and self._host_decides(found)
        is_blocked = bool(found.missing or found.unsupported or host_decides)
        if is_blocked and created is not None:
            raise RuntimeError("parameters or states have changed while step() was creating states")
        ready = found.ready
        if not is_blocked:
            self._check_finite(ready, numbers)
        if only_looks or is_blocked:
            others = [self._unsupported(p, reason, grad_scale) for p, reason in found.unsupported]
            runs = [(group, number, number + 1) for group, number in (p.where for p in found.missing)]
            return Todo(runs, others, host_decides, nothing_left=not (found.ready or found.missing))
        factors = self._factors(ready, numbers)
        if not known:
            self._facts = None
            self._launches = self._arrange(ready)
            self._written = found.written
            self._gradients = [p.grad.data_ptr() for p in ready]
            self._guards = _guards_of(tensors)
            self._addresses = [tensor.data_ptr() for p in located for tensor in p.written]
            self._nbytes = [storage.nbytes() for storage in storages]
        if capturing and not all(launch.is_loaded for launch, _ in self._launches):
            raise RuntimeError(
                "step() cannot be captured in a CUDA graph: Triton has yet to compile its kernel. Take a step before "
                "the capture"
            )
        first = {(group, i) for group, begin, end in created or () for i in range(begin, end)}
        self._launch_all(ready, numbers, grad_scale, scaler, first, capturing)
        # A graph writes the tables of its capture when it is replayed, so no other step may rely on them.
        if not known and not capturing and self._guards is not None:
            self._facts = facts
        self._record(ready, numbers, factors)
        return None

    def _locate(
        self,
        groups: list[Group],
        state: dict[Tensor, Any],
        stepped: Collection[Index],
        only_on: str | None,
        not_on: str | None,
    ) -> tuple[list[Located], list[Any], list[tuple[Any, ...]], list[Tensor]]:
        """Returns the plan's parameters that have a gradient and were not stepped yet, with their tensors and facts."""
        rule, shares = self._rule, only_on is not None or not_on is not None
        located: list[Located] = []
        tensors: list[Any] = []
        facts: list[tuple[Any, ...]] = []
        passed_over: list[Tensor] = []  # another plan's
        for group in groups:
            state_keys = rule.state_keys[: group.states]
            numbers = []
            for number, p in enumerate(group.params):
                if not isinstance(p, Tensor):
                    name = f"param_groups[{group.index}]['params'][{number}]"
                    raise TypeError(f"{name} must be a Tensor, not {type(p).__name__}")
                grad = p.grad
                if grad is None or (stepped and (group.index, number) in stepped):
                    continue
                if shares:
                    # A subclass may compute its device in Python, so it is never asked and counts as on no device.
                    device_type = p.device.type if type(p) in PLAIN else ""
                    if device_type == not_on or only_on not in (None, device_type):
                        passed_over.append(p)
                        continue
                entries = state.get(p, _NO_STATE)
                if type(entries) is not dict:
                    raise NotPlainError
                state_scalars = [entries.get(key) for key in rule.state_scalar_keys]
                states = [entries.get(key) for key in state_keys]
                located.append(Located(group, number, p, grad, entries, state_scalars, states))
                tensors += (p, grad, *state_scalars, *states)
                numbers.append(number)
            facts.append((*group.facts, *numbers))
        return located, tensors, facts, passed_over

    def _lie_as_before(self, located: list[Located], storages: list[Any]) -> bool:
        """Says whether the launches are right for tensors that the guards know, and whether the gradients are valid."""
        if [tensor.data_ptr() for p in located for tensor in p.written] != self._addresses:
            return False
        # A storage may have been freed and allocated again in the same place, but smaller.
        if [storage.nbytes() for storage in storages] != self._nbytes:
            return False
        gradients = [p.grad.data_ptr() for p in located]
        if gradients != self._gradients:
            if any(lacks_memory(p.grad) or is_misaligned(p.grad) for p in located):
                return False
            if any(self._written.shared_with(range_of(p.grad), i) for i, p in enumerate(located)):
                return False
            self._gradients = gradients
        return True

    def _unsupported(self, located: Located, reason: str, grad_scale: float) -> Unsupported:
        new = any(value is None for value in (*located.state_scalars, *located.states))
        may_fuse = located.group.fused and reason is not SHARES_MEMORY
        with torch._C.DisableTorchFunctionSubclass():
            form = form_of(
                *(located.param, located.grad, located.state_scalars, located.states),
                new=new,
                may_fuse=may_fuse,
                grad_scale=grad_scale,
            )
        return (*located.where, reason, form)

    def _check_capture(self, found: Examined, groups: list[Group]) -> bool:
        """Says whether a graph is being captured; raises if the host has work, which a replay would not repeat."""
        in_order = [*found.ready, *found.missing]
        if not any(is_capturing(device) for device in {p.param.device for p in in_order}):
            return False
        looked_at = {p.where for p in (*in_order, *(p for p, _ in found.unsupported))}
        on_cpu = [p for p, _ in found.unsupported if p.param.device.type == "cpu"]
        for group in groups:  # adds the parameters on the CPU that another plan steps
            on_cpu += [
                Located(group, number, p, p.grad, {}, [], [])
                for number, p in enumerate(group.params)
                if p.grad is not None and p.device.type == "cpu" and (group.index, number) not in looked_at
            ]
        for p in (*in_order, *on_cpu):
            if self._rule.state_scalar_keys and not p.group.capturable:  # the error is torch's
                raise RuntimeError(
                    f"Attempting CUDA graph capture of step() for an instance of {self._optimizer} but param_groups' "
                    "capturable is False."
                )
            why = None
            if p.param.device.type != devices.GPU:
                why = "is not on the GPU"
            elif any(p is other for other in found.missing):
                why = "has no state yet. Take a step before the capture"
            for key, value in zip(self._rule.state_scalar_keys, p.state_scalars, strict=False):
                if why is None and value.device.type == "cpu":
                    why = f"has its state {key!r} on the CPU. Move it to the GPU"
            if why is not None:
                raise RuntimeError(f"step() cannot be captured in a CUDA graph: {p.describe()} {why}")
        return True

    def _host_decides(self, found: Examined) -> bool:
        """Says whether the host must read the scaler: after an overflow, a kernel cannot stop what the host does."""
        counts_on_gpu = all(
            self._rule.state_scalar_keys
            and (p.group.fused or p.group.capturable)
            and p.param.device.type == devices.GPU
            for p in found.missing
        )
        on_host = any(
            p.param.device.type == "cpu" or any(v.device.type == "cpu" for v in p.state_scalars) for p in found.ready
        )
        return bool(found.unsupported) or not counts_on_gpu or on_host

    def _arrange(self, ready: list[Located]) -> list[tuple[PackedLaunch, list[int]]]:
        launches: dict[Any, tuple[PackedLaunch, list[int]]] = {}
        for i, p in enumerate(ready):
            streams = [p.param, p.grad, *p.states]
            # One launch serves parameters with and without the last states.
            absent = (DTYPES[real(p.param)],) * (len(self._rule.state_keys) - len(p.states))
            dtypes = (*(DTYPES[real(tensor)] for tensor in streams), *absent)
            key = p.param.device, dtypes
            if key not in launches:
                launches[key] = self._plan_backend.launch_type(self._rule, p.param.device, dtypes), []
            launch, members = launches[key]
            members.append(i)
            launch.add(
                p.param.numel() * (2 if p.param.is_complex() else 1),
                make_layout(streams, 2 + MAX_STATES),
                p.group.maximize,
                p.state_scalars,
                [tensor.data_ptr() for tensor in (p.param, *p.states)],
            )
        return list(launches.values())

    def _launch_all(
        self,
        ready: list[Located],
        numbers: list[Numbers],
        grad_scale: float,
        scaler: Scaler,
        created: Collection[Index],
        capturing: bool,
    ) -> None:
        recipes: dict[Any, tuple[int, ...]] = {}
        for launch, members in self._launches:
            of_launch = []
            for i in members:
                p, first = ready[i], not self._rule.state_scalar_keys and ready[i].where in created
                key = p.group.index, first, numbers[i]
                if key not in recipes:
                    state_scalars = number_bits(*(number or 0.0 for number in numbers[i]))
                    padding = [0] * (MAX_STATE_SCALARS - len(state_scalars))
                    flags, *words = p.group.recipe
                    recipes[key] = (flags | first << FIRST, *words, *state_scalars, *padding)
                of_launch.append(recipes[key])
            referred = launch.launch([self._gradients[i] for i in members], of_launch, grad_scale, *scaler)
            if capturing:
                self._captured.append(referred)
            self.launches += 1
            device = ready[members[0]].param.device.type
            self.updated[device] = self.updated.get(device, 0) + len(members)

    def _check_finite(self, ready: list[Located], numbers: list[Numbers]) -> None:
        """Refuses numbers that make an update infinite, if the host has all of them."""
        keys = self._rule.state_scalar_keys
        for p, of_p in zip(ready, numbers, strict=True):
            if p.group.device is not None or None in of_p or (p.group.is_modest and are_modest(of_p[1:], 1.0)):
                continue
            values = p.group.hyperparameters(self._rule)
            double = in_fp64(p.param, p.grad, dict(zip(self._rule.state_keys, p.states, strict=False)))
            state_scalars = dict(zip(keys, p.state_scalars, strict=True))
            check_finite(self._rule.name, values, state_scalars, double, p.group.index, p.describe)

    def _factors(self, ready: list[Located], numbers: list[Numbers]) -> list[tuple[float, ...]]:
        """Returns the factors of the state scalars after the step count; none for a state with scalars on a GPU."""
        if len(self._rule.state_scalar_keys) < 2:
            return []
        factors: list[tuple[float, ...]] = []
        for p, (step, *others) in zip(ready, numbers, strict=True):
            if step is None or None in others:
                factors.append(())
                continue
            step += 1
            if p.state_scalars[0].dtype == torch.float32:
                (step,) = struct.unpack("f", struct.pack("f", step))
            factors.append(self._rule.factors(step, p.group.numbers))
        return factors

    def _record(self, ready: list[Located], numbers: list[Numbers], factors: list[tuple[float, ...]]) -> None:
        """Counts versions as torch's in-place operations do, and advances the state scalars on the host."""
        updated = [tensor for p in ready for tensor in (p.param, *p.states)]
        for k in range(len(self._rule.state_scalar_keys)):
            updated += [p.state_scalars[k] for p, of_p in zip(ready, numbers, strict=True) if of_p[k] is None]
            on_host = [i for i, of_p in enumerate(numbers) if of_p[k] is not None]
            if not on_host:
                continue
            tensors = [ready[i].state_scalars[k] for i in on_host]
            with torch.inference_mode():  # this mode may change inference tensors and all others
                if k == 0:
                    torch._foreach_add_(tensors, 1)
                else:
                    torch._foreach_mul_(tensors, [factors[i][k - 1] for i in on_host])
        increment_version([tensor for tensor in updated if not tensor.is_inference()])
