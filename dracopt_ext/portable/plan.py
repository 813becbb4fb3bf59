"""One optimizer step: reads what Python holds now, refuses what is wrong, and lets kernels update the rest.

What csrc/bindings/step_plan.cpp does, with the same answers (but that asking for an address ends a lazy clone, which
that one leaves to torch), in Python, so that it needs no compiler. Every step compares all tensors (addresses, dtypes,
shapes, strides, sizes of storages) with those of the step before, and makes the kernels' tables anew when they differ.
No tensor is held from step to step.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..containers import NotPlainError, is_plain_flag, is_plain_state
from ..foreign import SHARES_MEMORY, UNDER_MODE, Foreign, form_of, is_under_mode
from ..reference import DECAY_RATES, FLAGS, are_modest, check_finite, in_fp64
from .layouts import extent_of, is_expanded, make_layout, may_overlap_itself
from .rules import RULES, Rule
from .words import DTYPES, FIRST, FP32_ADDRESS, FP64_ADDRESS, MAX_CARRIED, MAX_STATES, Launch, number_bits

Index = tuple[int, int]
Run = tuple[int, int, int]
Scaler = tuple[Tensor | None, Tensor | None]
Todo = tuple[list[Run], list[Foreign], bool, bool]

GPU = "cuda"
"""The type of GPUs, NVIDIA's and AMD's alike."""

_PLAIN = (Tensor, torch.nn.Parameter)
_NATIVE = (*DTYPES, torch.complex64, torch.complex128)
_NO_STATE: dict[str, Any] = {}
_MISALIGNED = "addresses that are no multiples of an element's size"
_MAX_STEP = 2.0**53  # beyond it a double no longer counts


def _guards_of(tensors: list[Any]) -> Any:
    """What tells by its ``check`` whether tensors are as these; None if torch, whose own it is, has it no longer."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return guards if guards.check(*tensors) else None
    except (ImportError, TypeError, AttributeError):
        return None


def is_capturing(device: torch.device) -> bool:
    """Is a graph being captured from a GPU's current stream?"""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class Group:
    """A parameter group as this step finds it."""

    def __init__(self, index: int, values: dict[str, Any], rule: Rule) -> None:
        self.index = index
        self.values = values
        if type(values) is not dict or type(values.get("params")) is not list:
            raise NotPlainError
        self.params: list[Tensor] = values["params"]
        self.maximize = _flag(values.get("maximize"))
        self.fused = _flag(values.get("fused"))
        self.capturable = _flag(values.get("capturable"))
        self.foreign = "differentiable=True" if _flag(values.get("differentiable")) else None
        self.read: list[tuple[int, int]] = []  # the addresses over which hyperparameters that are tensors extend
        self.device: torch.device | None = None  # of the hyperparameters that are tensors on a GPU
        self.numbers: list[float] = []
        self._flags = 0  # of a recipe
        self._addresses: dict[int, int] = {}  # of numbers on the GPU
        for key in rule.group_keys:
            if key not in values:
                raise KeyError(f"{self._name(key)} is missing")
            value = values[key]
            if key in FLAGS:
                self.numbers.append(float(_flag(value)))
            elif key not in DECAY_RATES:
                self._append(key, value, is_decay_rate=False)
            elif type(value) not in (tuple, list):
                raise NotPlainError
            elif len(value) != 2:
                raise ValueError(f"{self._name(key)} must be 2 numbers, not {len(value)}")
            else:
                for number in value:
                    self._append(key, number, is_decay_rate=True)
        words = number_bits(*self.numbers)
        self.recipe = self._flags, *(self._addresses.get(k, word) for k, word in enumerate(words))
        self.is_modest = are_modest(self.hyperparameters(rule).values())
        self.states = rule.states(self.numbers)
        self.facts = (
            *(index, self.states, self.maximize, self.fused, self.capturable, self.foreign, self.device),
            *self.read,
        )

    def hyperparameters(self, rule: Rule) -> dict[str, Any]:
        """The numbers by their keys."""
        numbers = iter(self.numbers)
        return {key: (next(numbers), next(numbers)) if key in DECAY_RATES else next(numbers) for key in rule.group_keys}

    def _name(self, key: str) -> str:
        return f"param_groups[{self.index}][{key!r}]"

    def _append(self, key: str, number: Any, is_decay_rate: bool) -> None:
        value = number
        if isinstance(number, Tensor):
            value = self._number_in(key, number)
            if value is None:
                return
        if not isinstance(value, (float, int)):
            raise NotPlainError
        try:
            value = float(value)
        except OverflowError:
            raise ValueError(f"{self._name(key)} is too large for a float") from None
        if not math.isfinite(value) or (is_decay_rate and not 0 <= value < 1):
            must = "at least 0 and less than 1" if is_decay_rate else "finite"
            raise ValueError(f"{self._name(key)} is {number!r}; it must be {must}")
        self.numbers.append(value)

    def _number_in(self, key: str, tensor: Tensor) -> float | None:
        """The number that the host is to read; None if the kernel does."""
        if type(tensor) in _PLAIN and tensor.numel() != 1:
            raise ValueError(f"{self._name(key)} must be a tensor of one element, not of shape {list(tensor.shape)}")
        is_plain = _why_not_plain(tensor) is None and tensor.dtype in DTYPES
        if is_plain and _lacks_memory(tensor):
            raise ValueError(f"{self._name(key)} is a tensor whose storage was freed")
        if is_plain and tensor.device.type == "cpu":
            self.read.append(_range_of(tensor))
            return tensor.item()
        known_here = self.device in (None, tensor.device) and tensor.dtype in (torch.float32, torch.float64)
        if not is_plain or tensor.device.type != GPU or not known_here or _is_misaligned(tensor):
            self.foreign = "hyperparameters that are tensors on another device or of another dtype"
            self.numbers.append(math.nan)  # only torch reads it
            return None
        self.read.append(_range_of(tensor))
        self.device = tensor.device
        k = len(self.numbers)
        self._flags |= 1 << k + (FP32_ADDRESS if tensor.dtype == torch.float32 else FP64_ADDRESS)
        self._addresses[k] = tensor.data_ptr()
        self.numbers.append(math.nan)  # only the kernel sees it
        return None


class Located(NamedTuple):
    """A parameter that has a gradient, and what was found of its state."""

    group: Group
    number: int  # in the group
    param: Tensor
    grad: Tensor
    entries: dict[str, Any]  # the state's
    carried: list[Any]  # by the rule's carried_keys, None where absent
    states: list[Any]  # by the rule's state_keys

    @property
    def where(self) -> Index:
        return self.group.index, self.number

    @property
    def written(self) -> tuple[Any, ...]:
        """What a step changes; None in the place of what is absent."""
        return self.param, *self.carried, *self.states

    def describe(self) -> str:
        names = self.group.values.get("param_names")
        name = f"{names[self.number]!r}, " if names else ""
        return f"parameter {self.number} of group {self.group.index} ({name}shape {list(self.param.shape)})"


def _lacks_memory(tensor: Tensor) -> bool:
    """Has the storage become too small, as resize_(0) makes it?"""
    extent = extent_of(tensor)
    return extent > 0 and (tensor.storage_offset() + extent) * tensor.itemsize > tensor.untyped_storage().nbytes()


def _is_misaligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % _real(tensor).itemsize != 0


def _flag(value: Any) -> bool:
    if not is_plain_flag(value):
        raise NotPlainError
    return bool(value)


def _why_not_plain(tensor: Tensor) -> str | None:
    if type(tensor) not in _PLAIN:
        return "tensor subclasses"
    if tensor.layout is not torch.strided:
        return "sparse tensors"
    if tensor.is_conj() or tensor.is_neg() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "lazily transformed tensors"
    return None


Numbers = tuple[float | None, ...]


def _numbers_on_host(located: Located) -> Numbers:
    """The carried scalars that the host holds, None in the place of the others."""
    return tuple([value.item() if value.is_cpu else None for value in located.carried])


def _is_step(number: float | None) -> bool:
    return number is None or (0 <= number < _MAX_STEP and number.is_integer())


def _range_of(tensor: Tensor) -> tuple[int, int]:
    """The addresses over which a tensor extends."""
    return tensor.data_ptr(), tensor.data_ptr() + extent_of(tensor) * tensor.itemsize


def _real(tensor: Tensor) -> torch.dtype:
    return tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype


_ADVICE_ON_STATES = "Delete this parameter's state to start it afresh"


def _dtype_of(tensor: Tensor) -> str:
    """As torch's own errors have it: Long, ComplexFloat."""
    return tensor.type().split(".")[-1].removesuffix("Tensor")


def _check_tensor(tensor: Tensor, param: Tensor, name: str, advice: str) -> None:
    """Raise for what cannot be the gradient or a moment of a parameter, which is plain."""
    if type(tensor) not in _PLAIN:
        return
    if tensor.device != param.device:
        raise ValueError(f"{name} is on another device, {tensor.device}. {advice}")
    if tensor.shape != param.shape:
        raise ValueError(f"{name} has another shape, {list(tensor.shape)}. {advice}")
    if tensor.dtype not in _NATIVE or tensor.is_complex() != param.is_complex():
        raise ValueError(f"{name} has a dtype that does not fit, {_dtype_of(tensor)}. {advice}")


def _check_scalar(tensor: Tensor, param: Tensor, name: str, advice: str) -> None:
    """Raise for what cannot be a scalar that the state of a parameter carries."""
    if tensor.device.type != "cpu" and tensor.device != param.device:
        raise ValueError(f"{name} is on another device, {tensor.device}. {advice}")
    if tensor.numel() != 1:
        raise ValueError(f"{name} has another shape, {list(tensor.shape)}. {advice}")


def _freed(tensor: Tensor) -> str:
    nbytes = tensor.untyped_storage().nbytes()
    return f"lies in a storage that is too small for it, of {nbytes} bytes: it was freed or resized"


class WrittenMemory:
    """The memory that a step writes, as ranges of addresses with the number of their owner."""

    def __init__(self, ranges: Iterable[tuple[int, int, int]]) -> None:
        self._ranges = sorted(r for r in ranges if r[1] > r[0])
        self._begins = [begin for begin, _, _ in self._ranges]
        self._reach = list(accumulate((end for _, end, _ in self._ranges), max))

    def shared(self) -> set[int]:
        """The owners of ranges that overlap another."""
        found: set[int] = set()
        furthest = 0, -1
        for begin, end, owner in self._ranges:
            if begin < furthest[0]:
                found |= {owner, furthest[1]}
            furthest = max(furthest, (end, owner))
        return found

    def shared_with(self, of_reader: tuple[int, int], reader: int) -> set[int]:
        """The owners of what overlaps a range that is read, and its reader."""
        begin, end = of_reader
        found: set[int] = set()
        i = bisect_left(self._begins, end)
        while begin < end and i > 0 and self._reach[i - 1] > begin:
            i -= 1
            if self._ranges[i][1] > begin:
                found |= {reader, self._ranges[i][2]}
        return found


class Kernels(Protocol):
    """What a plan is for."""

    launch: type[Launch]

    def why_not(self, device: torch.device) -> str | None:
        """Which tensors a device's are that are not served; None if they are."""


class StepPlan:
    """Belongs to one optimizer; called as the compiled module's class of this name is.

    Args:
        rule: a name in :data:`dracopt_ext.portable.rules.RULES`.
        optimizer: the name of the class, for errors.
        kernels: what updates the tensors.
    """

    def __init__(self, rule: str, optimizer: str, kernels: Kernels) -> None:
        self._rule = RULES[rule]
        self._optimizer = optimizer
        self._kernels = kernels
        # The groups, tensors, addresses and sizes of storages for which the launches are right. torch's guards keep
        # dtypes, devices, shapes, strides and whatever else tells tensors apart, but no tensor.
        self._facts: list[tuple[Any, ...]] | None = None
        self._guards: Any = None
        self._addresses: list[int] = []
        self._nbytes: list[int] = []
        self._launches: list[tuple[Launch, list[int]]] = []  # with the places of their tensors in the list of all
        self._written = WrittenMemory(())
        self._gradients: list[int] = []  # their addresses, found to be in order
        self._captured: list[Any] = []  # what graphs refer to
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
        stepped: Collection[Index] = (),
    ) -> Any:
        """Step every parameter that has a gradient; the contract is that of csrc/bindings/step_plan.h."""
        try:
            if type(param_groups) is not list or not is_plain_state(state):
                return NotImplemented
            under_mode = is_under_mode()
            # Its operations are not those that a mode is for.
            with torch._C._DisableTorchDispatch() if under_mode else nullcontext():
                return self._step(param_groups, state, grad_scale, scaler, created, set(stepped), under_mode)
        except NotPlainError:
            return NotImplemented

    def _step(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, Any],
        grad_scale: float,
        scaler: Scaler,
        created: Collection[Run] | None,
        stepped: set[Index],
        under_mode: bool,
    ) -> Todo | None:
        self.updated, self.launches = {}, 0
        groups = [Group(index, values, self._rule) for index, values in enumerate(param_groups)]
        located, tensors, facts = self._locate(groups, state, stepped)
        ready = located
        missing: list[Located] = []
        foreign: list[tuple[Located, str]] = []
        numbers: list[Numbers] = []
        # Kept until the end: another thread may give the tensors other memory while kernels run.
        storages: list[Any] = []
        known = not under_mode and self._facts is not None and facts == self._facts and self._guards.check(*tensors)
        if known:
            storages = [tensor.untyped_storage() for p in located for tensor in (p.grad, *p.written)]
            known = self._lie_as_before(located, storages)
        if known:
            numbers = [_numbers_on_host(p) for p in located]
            known = all(_is_step(of_p[0]) for of_p in numbers if of_p)
        if not known:
            ready, missing, foreign, written = self._examine(located, groups)
            if under_mode:
                foreign += [(p, UNDER_MODE) for p in (*ready, *missing)]
                ready, missing = [], []
            storages = [tensor.untyped_storage() for p in ready for tensor in (p.grad, *p.written)]
            numbers = [_numbers_on_host(p) for p in ready]
        capturing = self._check_capture(ready, missing, foreign)
        host_decides = scaler != (None, None) and self._host_decides(ready, missing, foreign)
        if missing or foreign or host_decides:
            if created is not None:
                raise RuntimeError("parameters or states have changed while step() was creating states")
            others = [self._foreign(p, reason, grad_scale) for p, reason in foreign]
            runs = [(group, number, number + 1) for group, number in (p.where for p in missing)]
            return runs, others, host_decides, not (ready or missing)
        self._check_finite(ready, numbers)
        factors = self._factors(ready, numbers)
        if not known:
            self._facts = None
            self._launches = self._arrange(ready)
            self._written = written
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
        self._run(ready, numbers, grad_scale, scaler, first, capturing)
        # A graph writes the tables of its capture when it is replayed: no other step may count on them.
        if not known and not capturing and self._guards is not None:
            self._facts = facts
        self._record(ready, numbers, factors)
        return None

    def _locate(
        self, groups: list[Group], state: dict[Tensor, Any], stepped: Collection[Index]
    ) -> tuple[list[Located], list[Any], list[tuple[Any, ...]]]:
        """The parameters that have a gradient and were not stepped yet, all their tensors, and where they stand."""
        rule = self._rule
        located: list[Located] = []
        tensors: list[Any] = []
        facts: list[tuple[Any, ...]] = []
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
                entries = state.get(p, _NO_STATE)
                if type(entries) is not dict:
                    raise NotPlainError
                carried = [entries.get(key) for key in rule.carried_keys]
                states = [entries.get(key) for key in state_keys]
                located.append(Located(group, number, p, grad, entries, carried, states))
                tensors += (p, grad, *carried, *states)
                numbers.append(number)
            facts.append((*group.facts, *numbers))
        return located, tensors, facts

    def _lie_as_before(self, located: list[Located], storages: list[Any]) -> bool:
        """The tensors are as before. Are the launches right, too, and the gradients in order?"""
        if [tensor.data_ptr() for p in located for tensor in p.written] != self._addresses:
            return False
        # A storage may have been freed, and come to lie where it was, but smaller.
        if [storage.nbytes() for storage in storages] != self._nbytes:
            return False
        gradients = [p.grad.data_ptr() for p in located]
        if gradients != self._gradients:
            if any(_lacks_memory(p.grad) or _is_misaligned(p.grad) for p in located):
                return False
            if any(self._written.shared_with(_range_of(p.grad), i) for i, p in enumerate(located)):
                return False
            self._gradients = gradients
        return True

    def _examine(
        self, located: list[Located], groups: list[Group]
    ) -> tuple[list[Located], list[Located], list[tuple[Located, str]], WrittenMemory]:
        """Sorts what was found: in order, without a state as yet, none for the kernel; raises for what is wrong."""
        ready: list[Located] = []
        missing: list[Located] = []
        foreign: list[tuple[Located, str]] = []
        for p in located:
            reason = self._why_foreign(p)
            if reason is not None:
                foreign.append((p, reason))
            elif None in p.carried or any(value is None for value in p.states):
                missing.append(p)
            else:
                ready.append(p)
        shared, written = self._sharing_memory(ready, missing, foreign, groups)
        foreign += [(p, SHARES_MEMORY) for p in (*ready, *missing) if p.where in shared]
        ready, missing = ([p for p in part if p.where not in shared] for part in (ready, missing))
        return ready, missing, foreign, written

    def _why_foreign(self, located: Located) -> str | None:
        """Why the kernel does not serve a parameter; raises for what is wrong."""
        group, p, grad = located.group, located.param, located.grad
        if group.foreign is not None:
            return group.foreign
        if (reason := _why_not_plain(p)) is not None:
            return reason
        if (reason := self._kernels.why_not(p.device)) is not None:
            return reason
        if p.device.type == "cpu" and group.capturable and not group.fused:
            return "capturable=True"  # torch takes it there only together with fused, where it means nothing
        if group.device not in (None, p.device):
            return "hyperparameters on another device"
        if is_expanded(p):
            raise ValueError(
                f"{located.describe()} is expanded: several of its elements share one memory location, so it cannot be "
                "updated in place. Optimize a clone() of it instead"
            )
        if may_overlap_itself(p):
            return "strides by which elements may share memory"
        if p.dtype not in _NATIVE:
            return "these dtypes"
        if p.is_complex() and group.fused:
            return "complex parameters with fused=True"
        if p.is_inference() and not torch.is_inference_mode_enabled():
            return "inference tensors"
        advice = "Set .grad to None, or to a tensor like the parameter"
        _check_tensor(grad, p, f"the gradient of {located.describe()}", advice)
        if (reason := _why_not_plain(grad)) is not None:
            return reason
        reason = self._why_state_is_foreign(located)
        if reason is None:
            self._check_memory(located)
            streams = (p, grad, *(value for value in located.states if value is not None))
            if any(tensor.numel() > 0 and _is_misaligned(tensor) for tensor in streams):
                return _MISALIGNED
        return reason

    def _why_state_is_foreign(self, located: Located) -> str | None:
        group, p = located.group, located.param
        keys = (*self._rule.carried_keys, *self._rule.state_keys[: group.states])
        values = (*located.carried, *located.states)
        for key, value in zip(keys, values, strict=True):
            if value is None:
                # As in torch, a rule that carries scalars creates its state as a whole: a part of it is a mistake.
                if self._rule.carried_keys and located.entries:
                    raise KeyError(
                        f"the state of {located.describe()} has no {key!r}. Was an option such as amsgrad switched on "
                        "after the first step? Delete this parameter's state to start it afresh"
                    )
                return None
        on_gpu = group.device is not None
        for k, (key, value) in enumerate(zip(keys, values, strict=True)):
            name, advice = f"the state {key!r} of {located.describe()}", _ADVICE_ON_STATES
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} is no tensor but a {type(value).__name__}. {advice}")
            if type(value) not in _PLAIN:
                return "states that are tensor subclasses"
            if key in self._rule.state_keys:
                _check_tensor(value, p, name, advice)
            else:
                _check_scalar(value, p, name, advice)
            if (reason := _why_not_plain(value)) is not None:
                return reason
            if key in self._rule.state_keys:
                if is_expanded(value):
                    raise ValueError(f"{name} is expanded: several of its elements share one memory location. {advice}")
                if may_overlap_itself(value):
                    return "strides by which elements may share memory"
                continue
            if value.dtype not in (torch.float32, torch.float64):
                return "scalars of a state in this dtype"
            if _lacks_memory(value):
                raise ValueError(f"{name} {_freed(value)}. {advice}")
            if _is_misaligned(value):
                return _MISALIGNED
            if value.device.type != "cpu":
                on_gpu = True
            elif k > 0 and on_gpu:  # the host moves it on by what it cannot read then
                return "a state on the CPU beside numbers on the GPU that it depends on"
            elif k == 0 and not _is_step(value.item()):
                return "step counts that are not natural numbers"
        return None

    def _foreign(self, located: Located, reason: str, grad_scale: float) -> Foreign:
        new = any(value is None for value in (*located.carried, *located.states))
        may_fuse = located.group.fused and reason is not SHARES_MEMORY
        with torch._C.DisableTorchFunctionSubclass():
            form = form_of(
                *(located.param, located.grad, located.carried, located.states),
                new=new,
                may_fuse=may_fuse,
                grad_scale=grad_scale,
            )
        return (*located.where, reason, form)

    def _check_memory(self, located: Located) -> None:
        tensors = {
            located.describe(): (located.param, "Give it its memory back before the step"),
            f"the gradient of {located.describe()}": (
                located.grad,
                "Set .grad to None, or to a tensor like the parameter",
            ),
        }
        for key, value in zip(self._rule.state_keys, located.states, strict=False):
            tensors[f"the state {key!r} of {located.describe()}"] = value, _ADVICE_ON_STATES
        for name, (tensor, advice) in tensors.items():
            if tensor is not None and _lacks_memory(tensor):
                raise ValueError(f"{name} {_freed(tensor)}. {advice}")

    def _sharing_memory(
        self,
        ready: list[Located],
        missing: list[Located],
        foreign: list[tuple[Located, str]],
        groups: list[Group],
    ) -> tuple[set[Index], WrittenMemory]:
        """Element for element in parallel is wrong for tensors that share memory: torch is to take them one by one."""
        searched = [*ready, *missing]
        others = [p for p, _ in foreign if _why_not_plain(p.param) is None]
        ranges = [(*_range_of(t), i) for i, p in enumerate(searched) for t in p.written if t is not None]
        ranges += [(*_range_of(p.param), len(searched)) for p in others]
        written = WrittenMemory(ranges)
        shared = written.shared()
        for i, p in enumerate([*searched, *others]):
            if _why_not_plain(p.grad) is None:
                owner = min(i, len(searched))
                shared |= written.shared_with(_range_of(p.grad), owner)
        # torch's later groups see the new value of a hyperparameter that is updated like a parameter.
        first_group = len(searched) + 1
        for group in groups:
            for of_number in group.read:
                shared |= written.shared_with(of_number, first_group + group.index)
        aside = {p.where for i, p in enumerate(searched) if i in shared or first_group + p.group.index in shared}
        return aside, written

    def _check_capture(self, ready: list[Located], missing: list[Located], foreign: list[tuple[Located, str]]) -> bool:
        """A graph does again in every replay what the device did, but not what the host did."""
        if not any(is_capturing(device) for device in {p.param.device for p in (*ready, *missing)}):
            return False
        on_cpu = [p for p, _ in foreign if p.param.device.type == "cpu"]
        for p in (*ready, *missing, *on_cpu):
            if self._rule.carried_keys and not p.group.capturable:  # in torch's words
                raise RuntimeError(
                    f"Attempting CUDA graph capture of step() for an instance of {self._optimizer} but param_groups' "
                    "capturable is False."
                )
            why = None
            if p.param.device.type != GPU:
                why = "is not on the GPU"
            elif any(p is other for other in missing):
                why = "has no state yet. Take a step before the capture"
            for key, value in zip(self._rule.carried_keys, p.carried, strict=True):
                if why is None and value.device.type == "cpu":
                    why = f"has its state {key!r} on the CPU. Move it to the GPU"
            if why is not None:
                raise RuntimeError(f"step() cannot be captured in a CUDA graph: {p.describe()} {why}")
        return True

    def _host_decides(self, ready: list[Located], missing: list[Located], foreign: list[tuple[Located, str]]) -> bool:
        """After an overflow nothing may be done. The kernel sees to that, but cannot for what the host does."""
        counts_on_gpu = all(
            self._rule.carried_keys and (p.group.fused or p.group.capturable) and p.param.device.type == GPU
            for p in missing
        )
        on_host = any(p.param.device.type == "cpu" or any(v.device.type == "cpu" for v in p.carried) for p in ready)
        return bool(foreign) or not counts_on_gpu or on_host

    def _arrange(self, ready: list[Located]) -> list[tuple[Launch, list[int]]]:
        launches: dict[Any, tuple[Launch, list[int]]] = {}
        for i, p in enumerate(ready):
            streams = [p.param, p.grad, *p.states]
            # One launch serves parameters with and without the last states.
            absent = (DTYPES[_real(p.param)],) * (len(self._rule.state_keys) - len(p.states))
            dtypes = (*(DTYPES[_real(tensor)] for tensor in streams), *absent)
            key = p.param.device, dtypes
            if key not in launches:
                launches[key] = self._kernels.launch(self._rule, p.param.device, dtypes), []
            launch, members = launches[key]
            members.append(i)
            launch.add(
                p.param.numel() * (2 if p.param.is_complex() else 1),
                make_layout(streams, 2 + MAX_STATES),
                p.group.maximize,
                p.carried,
                [tensor.data_ptr() for tensor in (p.param, *p.states)],
            )
        return list(launches.values())

    def _run(
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
                p, first = ready[i], not self._rule.carried_keys and ready[i].where in created
                key = p.group.index, first, numbers[i]
                if key not in recipes:
                    carried = number_bits(*(number or 0.0 for number in numbers[i]))
                    padding = [0] * (MAX_CARRIED - len(carried))
                    flags, *words = p.group.recipe
                    recipes[key] = (flags | first << FIRST, *words, *carried, *padding)
                of_launch.append(recipes[key])
            referred = launch.run([self._gradients[i] for i in members], of_launch, grad_scale, *scaler)
            if capturing:
                self._captured.append(referred)
            self.launches += 1
            device = ready[members[0]].param.device.type
            self.updated[device] = self.updated.get(device, 0) + len(members)

    def _check_finite(self, ready: list[Located], numbers: list[Numbers]) -> None:
        """Refuse what makes an update infinite, where the host has all numbers of it."""
        keys = self._rule.carried_keys
        for p, of_p in zip(ready, numbers, strict=True):
            if p.group.device is not None or None in of_p or (p.group.is_modest and are_modest(of_p[1:], 1.0)):
                continue
            values = p.group.hyperparameters(self._rule)
            double = in_fp64(p.param, p.grad, dict(zip(self._rule.state_keys, p.states, strict=False)))
            carried = dict(zip(keys, p.carried, strict=True))
            check_finite(self._rule.name, values, carried, double, p.group.index, p.describe)

    def _factors(self, ready: list[Located], numbers: list[Numbers]) -> list[tuple[float, ...]]:
        """What the host multiplies carried scalars after the step count by; nothing for those of a GPU."""
        if len(self._rule.carried_keys) < 2:
            return []
        factors: list[tuple[float, ...]] = []
        for p, (step, *others) in zip(ready, numbers, strict=True):
            if step is None or None in others:
                factors.append(())
                continue
            step += 1
            if p.carried[0].dtype == torch.float32:
                (step,) = struct.unpack("f", struct.pack("f", step))
            factors.append(self._rule.factors(step, p.group.numbers))
        return factors

    def _record(self, ready: list[Located], numbers: list[Numbers], factors: list[tuple[float, ...]]) -> None:
        """What a step leaves beside the data: versions, as torch's in-place operations count them, and the host's."""
        updated = [tensor for p in ready for tensor in (p.param, *p.states)]
        for k in range(len(self._rule.carried_keys)):
            updated += [p.carried[k] for p, of_p in zip(ready, numbers, strict=True) if of_p[k] is None]
            on_host = [i for i, of_p in enumerate(numbers) if of_p[k] is not None]
            if not on_host:
                continue
            tensors = [ready[i].carried[k] for i in on_host]
            with torch.inference_mode():  # in which tensors of both kinds may be changed
                if k == 0:
                    torch._foreach_add_(tensors, 1)
                else:
                    torch._foreach_mul_(tensors, [factors[i][k - 1] for i in on_host])
        increment_version([tensor for tensor in updated if not tensor.is_inference()])
