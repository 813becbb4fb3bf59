"""One step of one optimizer: which engine updates which parameter, and what torch must do itself."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused

from .. import backend as backend_module
from .. import reference
from ..backend import GPU, warn_once
from ..containers import Group, entries_of, plain_groups, plain_state, restore
from ..foreign import FUSABLE, MIXED, NEW, SPARSE, Foreign, form_of

if TYPE_CHECKING:
    from ._base import FusedOptimizer

Index = tuple[int, int]
"""The index of a group, and that of a parameter in it."""
Run = tuple[int, int, int]
"""The index of a group, that of a parameter in it, and that after the last of a run of neighbours."""
Scaler = tuple[Tensor | None, Tensor | None]
"""GradScaler's tensors found_inf and grad_scale."""


class StepPlan(Protocol):
    """A plan steps an optimizer by one backend's kernels: see csrc/bindings/step_plan.h and portable/plan.py."""

    def step(
        self,
        param_groups: Any,
        state: Any,
        grad_scale: float = 1.0,
        scaler: Scaler = (None, None),
        created: list[Run] | None = None,
        stepped: list[Index] = ...,
    ) -> Any: ...
    @property
    def updated(self) -> dict[str, int]: ...
    @property
    def launches(self) -> int: ...


class Kind:
    """One of the four classes: what tells it from the others.

    Args:
        rule: name of the update rule, in the compiled module and in :data:`dracopt_ext.reference.RULES`.
        torch_class: the class of torch that it replaces.
        sparse_error: what torch says of a sparse gradient that this class, or this class with ``fused=True``, does not
            take.
    """

    counts_steps = True
    """A parameter's state counts its steps, and is zero before the first; else the first step fills it."""
    keeps_fused = True
    """torch's fused kernels for the CPU are right for this class, if they are right for the tensors."""

    def __init__(self, rule: str, torch_class: Any, sparse_error: str) -> None:
        self.rule = rule
        self.torch_class = torch_class
        self.sparse_error = sparse_error
        self.torch_step = inspect.unwrap(torch_class.step)
        """torch's step for this class, bare of hooks and decorators."""
        self.hyperparameters = reference.hyperparameters(rule)
        """The keys of a parameter group that the rule reads."""
        used = ((name, getattr(torch_class, name, None)) for name in self.torch_step.__code__.co_names)
        self.methods: dict[str, Any] = {name: method for name, method in used if callable(method)}
        """The methods of torch's class that its step calls, and ours does not."""
        self.originals = {name: inspect.unwrap(method) for name, method in self.methods.items()}

    def overridden(self, optimizer: FusedOptimizer) -> str | None:
        """A method that only torch's step calls, and that an optimizer has of its own."""
        own, of_class = optimizer.__dict__, type(optimizer)
        for name, method in self.methods.items():
            if name in own:
                return name
            found = getattr(of_class, name)
            if found is not method:
                if not _wraps(found, self.originals[name]):
                    return name
                self.methods[name] = found  # torch.compile wraps the methods of torch's classes
        return None

    def lacks_state(self, entries: Any, group: Group) -> bool:
        """Must a parameter's state be created before it is stepped?"""
        return not entries

    def create_state(self, optimizer: FusedOptimizer, group: Group) -> None:
        """Create the state of ``group["params"]``, all of which have a gradient and none of which has a state."""
        self.torch_class._init_group(optimizer, group, [], [], [], [], [], [])


def _wraps(function: Any, original: Any) -> bool:
    """Is a function the original, in no wrappers but torch's?"""
    while function is not original:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(_TORCH) or not hasattr(function, "__wrapped__"):
            return False
        function = function.__wrapped__
    return True


_TORCH = os.path.join(os.path.dirname(torch.__file__), "")


class Engine:
    """Belongs to one optimizer: what its user asked for, its plans, and what ran in its last step."""

    def __init__(self, backend: str | None = None, state_dtype: torch.dtype | None = None) -> None:
        if state_dtype not in STATE_DTYPES:
            names = ", ".join(map(str, STATE_DTYPES[1:]))
            raise ValueError(f"state_dtype={state_dtype!r} is none of {names}; None stands for the parameter's own")
        self.__setstate__((backend_module.resolve(backend), state_dtype))

    def __getstate__(self) -> tuple[str | None, torch.dtype | None]:
        return self.backend, self.state_dtype

    def __setstate__(self, asked_for: tuple[str | None, torch.dtype | None]) -> None:
        self.backend, self.state_dtype = asked_for
        # By the backend that a plan is for, and the one that was asked for: those that were needed so far. They stay,
        # because captured graphs refer to their tables.
        self.plans: dict[tuple[str, str | None], StepPlan] = {}
        self.plans_ran: list[tuple[str, StepPlan]] = []  # in the last step, with their backends
        self.others_ran: dict[str, set[str]] = {}  # by device type, what ran beside the plans in the last step
        # The step that is running, by process: a child that is forked meanwhile inherits only its parent's.
        self.running: dict[int, Step] = {}


STATE_DTYPES = (None, torch.float64, torch.float32, torch.bfloat16, torch.float16)


def give_engine(optimizer: FusedOptimizer, backend: str | None, state_dtype: torch.dtype | None) -> None:
    """Our constructors call this before torch's. An option that is None here keeps what a subclass has set before."""
    before: Engine | None = optimizer.__dict__.get("_dracopt_engine")
    if before is not None:
        backend, state_dtype = backend or before.backend, state_dtype or before.state_dtype
    optimizer._dracopt_engine = Engine(backend, state_dtype)


def engine_of(optimizer: FusedOptimizer) -> Engine:
    """An optimizer's engine; one that asks for nothing, if its constructor was passed by."""
    engine: Engine | None = optimizer.__dict__.get("_dracopt_engine")
    if engine is None:
        engine = optimizer._dracopt_engine = Engine()
    return engine


class Part(NamedTuple):
    """A backend's part of a step, which it does once states are created."""

    backend: str
    missing: list[Run]
    """Parameters that have no state yet."""
    stepped: list[Index]
    """Parameters that are others' part."""


class Step:
    """One step. The kernels update what they serve; torch's own implementation, or the reference, updates the rest."""

    __slots__ = ("are_plain", "engine", "groups", "is_odd", "kind", "optimizer")

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self.optimizer = optimizer
        self.kind = optimizer._dracopt_kind
        self.engine = engine_of(optimizer)
        self.groups: list[Group] = optimizer.param_groups
        self.are_plain = False  # these groups are known to be what a plan reads
        self.is_odd = False  # the state is known not to be

    def run(self) -> None:
        """Update every parameter that has a gradient."""
        engine, process = self.engine, os.getpid()
        if engine.running.setdefault(process, self) is not self:
            raise RuntimeError(
                "step() of this optimizer is already running, in another thread or in code that this step has called; "
                "give each thread an optimizer of its own"
            )
        try:
            engine.plans_ran = []
            engine.others_ran = {}
            self._run()
        finally:
            del engine.running[process]

    def _run(self) -> None:
        method = self.kind.overridden(self.optimizer)
        if method is not None:
            self._step_as_torch(method)
            return
        found_inf = getattr(self.optimizer, "found_inf", None)
        grad_scale = getattr(self.optimizer, "grad_scale", None)
        if found_inf is None and grad_scale is None:
            self._update()
        else:
            self._update_scaled(found_inf, grad_scale)

    def _step_as_torch(self, method: str) -> None:
        """The step of a subclass that has a method of its own, which torch's step calls and ours would pass by."""
        name = type(self.optimizer).__name__
        for option in ("backend", "state_dtype"):
            value = getattr(self.engine, option)
            if value is not None:
                raise RuntimeError(
                    f"{option}={value!r} is not for {name}, which overrides {method}: only torch's own step calls "
                    f"that. Leave `{option}` at None"
                )
        warn_once(
            f"{name} overrides {method}, which only torch's own step calls: it is stepped by torch's own "
            "implementation, which is slower"
        )
        # It raises for iterators, which this would exhaust. Numbers may be anything that the method takes.
        self.groups = plain_groups(self.optimizer.param_groups, self.optimizer.defaults)
        with torch._C.DisableTorchFunctionSubclass():
            params = [p for group in self.groups for p in group["params"] if p.grad is not None]
            devices = set(map(attrgetter("device"), params))
        with torch.set_grad_enabled(bool(self.optimizer.defaults.get("differentiable"))):
            self.kind.torch_step(self.optimizer)
        self._note("torch", devices)

    def _update_scaled(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """A step to which torch.amp.GradScaler has left the division by its scale and the check for overflow."""
        foreign: int | None = None
        if self.engine.backend != "reference" and self._backends() and _all_on_gpu(found_inf, grad_scale):
            foreign = self._update(scaler=(found_inf, grad_scale))
            if foreign is None:
                return  # the kernels have read both: nobody waits
        groups = self._with_gradients()
        params = [p for group in groups for p in group["params"]]
        torch_may = self.engine.backend is None and self.engine.state_dtype is None and foreign in (None, len(params))
        if torch_may and params and all(p.device.type != "cpu" for p in params):
            self._step_by_torch(groups, scaled=True)  # its fused kernels read both as well
            self._note("torch", {p.device for p in params})
        elif found_inf is None or not found_inf.item():
            self._update(1.0 if grad_scale is None else grad_scale.item())

    def _update(self, grad_scale: float = 1.0, scaler: Scaler = (None, None)) -> int | None:
        """Update every parameter that has a gradient, which is divided by ``grad_scale``.

        ``scaler`` is for the kernels to read. If the host must read it after all, does nothing and returns the number
        of parameters that the kernels do not serve; else None.
        """
        if self.engine.backend == "reference":
            groups = self._with_gradients()
            self._check_for_reference(groups)
            self._step_by_reference(groups, grad_scale)
            return None
        backends = self._backends()
        if not backends:
            others = self._others(grad_scale)
            with self._restored_on_error(self._select([(g, i, i + 1) for g, i, _, form in others if form & NEW])):
                self._update_by_torch(others, grad_scale)
            return None
        parts: list[Part] = []
        foreign: list[Foreign] = []
        for name in backends:
            # It runs only if it serves all parameters.
            todo = self._run_plan(name, grad_scale, scaler)
            if todo is None:
                return None
            missing, others, host_decides, all_foreign = todo
            if host_decides:
                return len(others)
            if not all_foreign:
                parts.append(Part(name, missing, [other[:2] for other in others]))
            # Triton has a GPU's parameters, the native backend beside it the CPU's.
            if len(backends) == 1:
                foreign = others
                break
            mine = [other for other in others if name == backends[-1] or self._is_on_gpu(*other[:2])]
            foreign += mine if name == backends[0] else [other for other in mine if not self._is_on_gpu(*other[:2])]
            if len(mine) == len(others):
                break
        self._update_in_parts(parts, foreign, grad_scale, scaler)
        return None

    def _backends(self) -> list[str]:
        """The backends with plans that this step is to ask, in this order: one, or Triton's and the native one."""
        if self.engine.backend is not None:
            return [self.engine.backend]
        native = [] if backend_module.NATIVE_REASON is not None else ["native"]
        if backend_module.triton_serves_gpus() and any(self._is_on_gpu(*where) for where in self._indices()):
            return ["triton", *native]
        return native

    def _run_plan(self, name: str, *more: Any) -> Any:
        """Let a backend's plan step; what it returns is described in csrc/bindings/step_plan.h."""
        key = name, self.engine.backend
        plan = self.engine.plans.get(key)
        if plan is None:
            class_name = type(self.optimizer).__name__
            plan = backend_module.step_plan(name, self.kind.rule, class_name, self.engine.backend)
            self.engine.plans[key] = plan
        state = self.optimizer.state
        todo = NotImplemented
        if not self.is_odd:
            todo = plan.step(self.groups, state, *more)
            if todo is NotImplemented and not self.are_plain:
                self._make_plain()
                todo = plan.step(self.groups, state, *more)
        if todo is NotImplemented:
            self.is_odd = True
            self._make_plain()
            todo = plan.step(self.groups, plain_state(self.groups, state), *more)
        if todo is None:
            self.engine.plans_ran.append((name, plan))
        return todo

    def _make_plain(self) -> None:
        if not self.are_plain:
            optimizer = self.optimizer
            self.groups = plain_groups(optimizer.param_groups, optimizer.defaults, self.kind.hyperparameters)
            self.are_plain = True

    def _indices(self) -> list[Index]:
        """The indices of all groups and the parameters in them."""
        self._make_plain()
        return [(g, i) for g, group in enumerate(self.groups) for i in range(len(group["params"]))]

    def _is_on_gpu(self, group_index: int, index: int) -> bool:
        p = self.groups[group_index]["params"][index]
        return isinstance(p, Tensor) and p.device.type == GPU

    def _update_in_parts(self, parts: list[Part], foreign: list[Foreign], grad_scale: float, scaler: Scaler) -> None:
        """A step before which states are to be created, or of which torch is to do a part."""
        if self.engine.backend is not None:
            for group_index, index, reason, _ in foreign:
                raise RuntimeError(
                    f"backend={self.engine.backend!r} does not serve {reason}: {self._describe(group_index, index)}. "
                    "Leave `backend` at None, so that each parameter is stepped by what serves it"
                )
        for reason in {reason: None for _, _, reason, _ in foreign}:
            warn_once(
                f"{type(self.optimizer).__name__} leaves {reason} to torch's own implementation (or to the reference, "
                "where dtypes mix), which is slower"
            )
        created = [group for part in parts for group in self._select(part.missing)]
        new = self._select([(g, i, i + 1) for g, i, _, form in foreign if form & NEW])
        with self._restored_on_error(created + new):
            with torch.no_grad():
                for group in created:
                    self._create_moments(group)
            self._update_by_torch(foreign, grad_scale)
            for part in parts:
                self._run_plan(part.backend, grad_scale, scaler, part.missing, part.stepped)

    def _create_moments(self, group: Group) -> None:
        """Create the state of ``group["params"]`` in the dtype that was asked for."""
        state_dtype = self.engine.state_dtype
        if state_dtype is None:
            self.kind.create_state(self.optimizer, group)
            return
        for p in group["params"]:  # one by one, so that no more than one parameter's moments are there twice
            self.kind.create_state(self.optimizer, {**group, "params": [p]})
            state = self.optimizer.state[p]
            state.update({name: state[name].to(state_dtype) for name in reference.MOMENTS if name in state})

    def _others(self, grad_scale: float) -> list[Foreign]:
        """All parameters that have a gradient, where there is no plan to look at them."""
        self._make_plain()
        others = []
        state = self.optimizer.state
        with torch._C.DisableTorchFunctionSubclass():
            for g, group in enumerate(self.groups):
                fused = bool(group.get("fused"))
                for i, p in enumerate(group["params"]):
                    if p.grad is None:
                        continue
                    entries = entries_of(state, p)
                    carried = [entries[name] for name in reference.CARRIED if name in entries]
                    moments = [entries[name] for name in reference.MOMENTS if name in entries]
                    new = self.kind.lacks_state(entries, group)
                    form = form_of(p, p.grad, carried, moments, new=new, may_fuse=fused, grad_scale=grad_scale)
                    others.append((g, i, "", form))
        return others

    def _update_by_torch(self, others: list[Foreign], grad_scale: float) -> None:
        """Step these with torch's own implementation; or, where that cannot, with the reference."""
        by_torch: list[Group] = []
        by_reference: list[Group] = []
        devices: set[torch.device] = set()
        with torch._C.DisableTorchFunctionSubclass():
            for g, members in groupby(sorted(others), itemgetter(0)):
                group = self.groups[g]
                as_it_is, unfused, mixed = self._sort_for_torch(group, members)
                devices.update(map(attrgetter("device"), (*as_it_is, *unfused)))
                by_torch += [{**group, "params": as_it_is}] if as_it_is else []
                by_torch += [{**group, "params": unfused, "fused": None}] if unfused else []
                by_reference += [{**group, "params": mixed}] if mixed else []
        self._check_for_reference(by_reference)
        if by_torch:
            with self._unscaled(by_torch, grad_scale):
                self._step_by_torch(by_torch)
            self._note("torch", devices)
        self._step_by_reference(by_reference, grad_scale)

    def _sort_for_torch(
        self, group: Group, members: Iterator[Foreign]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Those that torch steps as their group is; those that it steps without ``fused``; and the reference's.

        Raises what torch would only raise after it has changed something.
        """
        as_it_is: list[Tensor] = []
        unfused: list[Tensor] = []
        mixed: list[Tensor] = []
        fused = group.get("fused")
        keeps_fused = self.kind.keeps_fused
        refuses_sparse = fused or self.kind.counts_steps
        keeps_state_dtype = self.engine.state_dtype is not None
        may_mix = not group.get("differentiable")
        params = group["params"]
        for _, i, _, form in members:
            p = params[i]
            if form & SPARSE and refuses_sparse:
                raise RuntimeError(self.kind.sparse_error)
            if keeps_state_dtype or (form & MIXED and may_mix):
                mixed.append(p)
                continue
            if not fused:
                as_it_is.append(p)
            elif form & FUSABLE:
                (as_it_is if keeps_fused else unfused).append(p)
            else:
                _device_dtype_check_for_fused(p)
                # On the CPU torch's fused kernels are wrong for some dtypes and strides; its other code is not.
                (unfused if p.device.type == "cpu" else as_it_is).append(p)
        return as_it_is, unfused, mixed

    def _note(self, engine: str, devices: Iterable[torch.device]) -> None:
        """For ``last_backend``: torch or the reference has updated parameters there."""
        for device in devices:
            self.engine.others_ran.setdefault(device.type, set()).add(engine)

    def _step_by_torch(self, groups: list[Group], *, scaled: bool = False) -> None:
        """Let torch step these groups, which it unscales itself if they are ``scaled``."""
        # torch's step works on an optimizer's groups: give it one that shares everything else with this one.
        view = object.__new__(self.kind.torch_class)
        view.__dict__.update(self.optimizer.__dict__, state=self.optimizer.state, param_groups=groups)
        if not scaled:
            view.grad_scale = view.found_inf = None
        with torch.set_grad_enabled(bool(self.optimizer.defaults.get("differentiable"))):
            self.kind.torch_step(view)

    @contextmanager
    def _unscaled(self, groups: list[Group], grad_scale: float) -> Iterator[None]:
        """For the time of the block these parameters have gradients that are divided by ``grad_scale``."""
        if grad_scale == 1:
            yield
            return
        params = [p for group in groups for p in group["params"]]
        scaled = [p.grad for p in params]
        try:
            for p in params:
                p.grad = p.grad / grad_scale
            yield
        finally:
            for p, grad in zip(params, scaled, strict=True):
                p.grad = grad

    def _step_by_reference(self, groups: list[Group], grad_scale: float) -> None:
        if not groups:
            return
        state = self.optimizer.state
        with torch.no_grad(), self._restored_on_error(groups):
            for group in groups:
                for p in group["params"]:
                    new = self.kind.lacks_state(entries_of(state, p), group)
                    if new:
                        self._create_moments({**group, "params": [p]})
                    reference.update(
                        self.kind.rule,
                        p,
                        p.grad,
                        state[p],
                        group,
                        maximize=group["maximize"],
                        grad_scale=grad_scale,
                        first=new and not self.kind.counts_steps,
                    )
                    self._note("reference", [p.device])

    def _check_for_reference(self, groups: list[Group]) -> None:
        """Raise for what the compiled kernels would refuse, and for what the reference does not serve."""
        for group in groups:
            if group.get("differentiable") or (group.get("capturable") and not group.get("fused")):
                raise RuntimeError("the reference implementation serves neither differentiable nor capturable groups")
            numbers = reference.numbers(self.kind.rule, group)
            index = self._find(group["params"][0])[0]
            for key, value in numbers.items():
                where = f"param_groups[{index}][{key!r}]"
                rates = isinstance(value, tuple)
                if rates and len(value) != 2:
                    raise ValueError(f"{where} must be 2 numbers, not {len(value)}")
                for number in value if rates else [value]:
                    if not math.isfinite(number) or (rates and not 0 <= number < 1):
                        must = "at least 0 and less than 1" if rates else "finite"
                        raise ValueError(f"{where} is {number}; it must be {must}")
            for p in group["params"]:
                state = self._check_tensors_for_reference(p, group)
                carried = {name: state[name] for name in reference.CARRIED if name in state}
                in_fp64 = reference.in_fp64(p, p.grad, state)
                in_fp64 |= not state and self.engine.state_dtype == torch.float64
                describe_parameter = partial(self._describe_parameter, p)
                reference.check_finite(self.kind.rule, numbers, carried, in_fp64, index, describe_parameter)

    def _check_tensors_for_reference(self, p: Tensor, group: Group) -> Any:
        """Returns the parameter's state, which is empty if it has yet to be created."""
        grad = p.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"the reference implementation takes dense tensors only, not the {grad.layout} gradient of "
                f"{self._describe(*self._find(p))}"
            )
        entries = entries_of(self.optimizer.state, p)
        state = {} if self.kind.lacks_state(entries, group) else entries
        if state and group.get("amsgrad") and "max_exp_avg_sq" not in state:
            raise KeyError(f"the state of {self._describe(*self._find(p))} has no 'max_exp_avg_sq'")
        for name in ("the gradient", *reference.MOMENTS):
            tensor = grad if name == "the gradient" else state.get(name)
            if tensor is not None and tensor.shape != p.shape:
                raise ValueError(f"{name} of {self._describe(*self._find(p))} has another shape, {list(tensor.shape)}")
        return state

    def _with_gradients(self) -> list[Group]:
        """The groups with only those parameters that have a gradient, without the groups that have none."""
        self._make_plain()
        groups = []
        for group in self.groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                groups.append({**group, "params": params})
        return groups

    def _select(self, runs: list[Run]) -> list[Group]:
        """The groups with only the parameters in these runs, in their order."""
        groups = self.groups
        chosen: dict[int, list[Tensor]] = {}
        for group_index, begin, end in sorted(runs):
            chosen.setdefault(group_index, []).extend(groups[group_index]["params"][begin:end])
        return [{**groups[g], "params": params} for g, params in chosen.items()]

    @contextmanager
    def _restored_on_error(self, groups: list[Group]) -> Iterator[None]:
        """Should the block raise, these parameters' states hold the entries that they hold now."""
        state = self.optimizer.state
        params = [p for group in groups for p in group["params"]]
        before: dict[int, dict[str, Any]] = {}  # by the place of a parameter that has a state
        for i, p in enumerate(params):
            if p in state:
                entries = state[p]
                before[i] = {key: entries[key] for key in entries.keys()}  # noqa: SIM118
        try:
            yield
        except BaseException:
            for i, p in enumerate(params):
                with suppress(Exception):  # A container may refuse deletion. The block's own error is the one to show.
                    restore(state, p, before.get(i))
            raise

    def _find(self, p: Tensor) -> Index:
        """The index of a parameter's group, and its own in it."""
        places = ((g, i) for g, group in enumerate(self.groups) for i, q in enumerate(group["params"]) if q is p)
        return next(places)

    def _describe(self, group_index: int, index: int) -> str:
        return describe(self.groups, group_index, index)

    def _describe_parameter(self, p: Tensor) -> str:
        return self._describe(*self._find(p))


def describe(groups: Any, group_index: int, index: int) -> str:
    """A parameter as errors name it."""
    group = groups[group_index]
    name = f"{group['param_names'][index]!r}, " if group.get("param_names") else ""
    return f"parameter {index} of group {group_index} ({name}shape {list(group['params'][index].shape)})"


def _all_on_gpu(*numbers: Tensor | None) -> bool:
    """Whether these are fp32 scalars that a kernel can read, as far as they are there."""
    return all(x is None or (x.device.type == GPU and x.dtype == torch.float32 and x.numel() == 1) for x in numbers)
