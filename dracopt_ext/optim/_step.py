"""Takes one step of one optimizer: decides which engine updates which parameter."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import backend as backend_module
from .. import reference
from ..clip_grad import zero_gradients
from ..containers import Group, plain_groups, plain_state, restore
from ..todo import NEW, Clipping, Index, Run, Scaler, Todo
from . import _by_reference, _by_torch, _clipped, _scaled
from ._engine import engine_of

if TYPE_CHECKING:
    from .._C import StepPlan
    from ._base import FusedOptimizer


class Step:
    """One step. The kernels update what they serve; torch's own implementation, or the reference, updates the rest."""

    __slots__ = ("are_plain", "engine", "groups", "is_odd", "kind", "optimizer", "options")

    def __init__(self, optimizer: FusedOptimizer, *, zeroes: bool = False, groups: list[Group] | None = None) -> None:
        """With ``zeroes`` the gradients are zero after the step."""
        self.optimizer = optimizer
        self.kind = optimizer._dracopt_kind
        self.engine = engine_of(optimizer)
        self.groups: list[Group] = optimizer.param_groups if groups is None else groups
        # The plan's options, of csrc/bindings/step_plan.h. They are few, because each takes time to pass.
        self.options: dict[str, Any] = {"zeroes": True} if zeroes else {}
        self.are_plain = False  # whether a plan is known to read these groups
        self.is_odd = False  # whether the state is known to be one that no plan reads

    @property
    def coefficient(self) -> Any:
        """A number, or a tensor on a GPU, that multiplies the gradients after their division by the scale."""
        return self.options.get("coefficient", 1.0)

    @coefficient.setter
    def coefficient(self, value: float | Tensor) -> None:
        self.options["coefficient"] = value

    def take(self) -> None:
        """Updates every parameter that has a gradient."""
        engine, process = self.engine, os.getpid()
        if engine.running.setdefault(process, self) is not self:
            raise RuntimeError(
                "step() of this optimizer is already running, in another thread or in code that this step has called; "
                "give each thread an optimizer of its own"
            )
        try:
            engine.plan_ran = None
            engine.others_ran = {}
            self._take()
            if "zeroes" in self.options and (engine.plan_ran is None or not engine.plan_ran.zeroed):
                zero_gradients([p for group in self.groups for p in group["params"]])
        finally:
            del engine.running[process]

    def _take(self) -> None:
        method = self.kind.overridden(self.optimizer)
        if method is not None:
            _by_torch.step_overridden(self, method)
            return
        found_inf = getattr(self.optimizer, "found_inf", None)
        grad_scale = getattr(self.optimizer, "grad_scale", None)
        max_norm = self.engine.max_grad_norm
        overflow, self.engine.overflow = self.engine.overflow, None
        if found_inf is None:
            overflow = None  # left behind by a step that failed
        if max_norm is not None or overflow is not None:
            max_norm = math.inf if max_norm is None else max_norm
            _clipped.update_clipped(self, max_norm, found_inf, grad_scale, overflow)
        elif found_inf is None and grad_scale is None:
            self.update()
        else:
            _scaled.update_scaled(self, found_inf, grad_scale)

    def update(self, grad_scale: float = 1.0) -> None:
        """Updates every parameter that has a gradient, which is divided by ``grad_scale``."""
        if self.engine.backend == "reference":
            _by_reference.update_all(self, grad_scale)
        elif self.update_by_kernels(grad_scale) is not None:
            _by_torch.update_all(self, grad_scale)

    def update_by_kernels(
        self, grad_scale: float = 1.0, scaler: Scaler = (None, None), clipping: Clipping | None = None
    ) -> Todo | None:
        """Updates every parameter that has a gradient, by kernels if they serve it. Kernels also read ``scaler``.

        Returns None when all is done. If there are no kernels, or the host must read ``scaler`` or find the norm first,
        does nothing and returns what must be done.
        """
        plan = self._plan()
        if plan is None:
            return Todo([], [], host_decides=True, nothing_left=True)
        options = self.options if clipping is None else {**self.options, "clipping": clipping}
        todo = self._run(plan, grad_scale, scaler, options)
        if todo is None or todo.host_decides:
            return todo
        self._update_in_turn(plan, todo, grad_scale, scaler, options)
        return None

    def _update_in_turn(
        self, plan: StepPlan, todo: Todo, grad_scale: float, scaler: Scaler, options: dict[str, Any]
    ) -> None:
        """Creates the missing states, lets torch step what is unsupported, and then the plan what is left."""
        unsupported = todo.unsupported
        if self.engine.backend is not None:
            for group_index, index, reason, _ in unsupported:
                raise RuntimeError(
                    f"backend={self.engine.backend!r} does not serve {reason}: "
                    f"{describe(self.groups, group_index, index)}. Leave `backend` at None, so that each parameter is "
                    "stepped by what serves it"
                )
        created = self.select(todo.missing)
        new = self.select([(g, i, i + 1) for g, i, _, form in unsupported if form & NEW])
        options = {**options, "created": todo.missing, "stepped": [parameter[:2] for parameter in unsupported]}
        with self.restored_on_error(created + new):
            with torch.no_grad():
                for group in created:
                    self.create_moments(group)
            if unsupported and not todo.nothing_left:
                # The plan raises before torch changes anything.
                self._run(plan, grad_scale, scaler, {**options, "only_looks": True})
            _by_torch.update(self, unsupported, grad_scale)
            if not todo.nothing_left:
                self._run(plan, grad_scale, scaler, options)
        for reason in {reason: None for _, _, reason, _ in unsupported}:
            backend_module.warn_once(
                f"{type(self.optimizer).__name__} leaves {reason} to torch's own implementation (or to the reference, "
                "where dtypes mix), which is slower"
            )

    def _plan(self) -> StepPlan | None:
        """Returns the plan for the backends that may serve this step; None without a compiled module."""
        if backend_module.NATIVE_REASON is not None:
            return None
        asked_for = self.engine.backend
        key = (
            asked_for != "triton",
            asked_for == "triton" or (asked_for is None and backend_module.triton_serves_gpus()),
        )
        plan = self.engine.plans.get(key)
        if plan is None:
            plan = backend_module.step_plan(self.kind.rule, type(self.optimizer).__name__, *key)
            self.engine.plans[key] = plan
        return plan

    def _run(self, plan: StepPlan, grad_scale: float, scaler: Scaler, options: dict[str, Any]) -> Todo | None:
        """Lets a plan step the parameters.

        Returns None when that is done, or else what must be done first.
        """
        state = self.optimizer.state
        todo = NotImplemented
        if not self.is_odd:
            todo = plan.step(self.groups, state, grad_scale, scaler, **options)
            if todo is NotImplemented and not self.are_plain:
                self.make_plain()
                todo = plan.step(self.groups, state, grad_scale, scaler, **options)
        if todo is NotImplemented:
            self.is_odd = True
            self.make_plain()
            todo = plan.step(self.groups, plain_state(self.groups, state), grad_scale, scaler, **options)
        if todo is None:
            self.engine.plan_ran = plan
            return None
        return Todo(*todo)

    def make_plain(self) -> None:
        """Replaces the groups by ones that a plan reads."""
        if not self.are_plain:
            optimizer = self.optimizer
            self.groups = plain_groups(self.groups, optimizer.defaults, self.kind.hyperparameters)
            self.are_plain = True

    def create_moments(self, group: Group) -> None:
        """Creates the state of ``group["params"]`` in the dtype that was asked for."""
        state_dtype = self.engine.state_dtype
        if state_dtype is None:
            self.kind.create_state(self.optimizer, group)
            return
        for p in group["params"]:  # one by one, so that no more than one parameter's moments exist twice
            self.kind.create_state(self.optimizer, {**group, "params": [p]})
            state = self.optimizer.state[p]
            state.update({name: state[name].to(state_dtype) for name in reference.MOMENTS if name in state})

    def note(self, engine: str, devices: Iterable[torch.device]) -> None:
        """Notes for ``last_backend`` that torch or the reference has updated parameters on these devices."""
        for device in devices:
            self.engine.others_ran.setdefault(device.type, set()).add(engine)

    def with_gradients(self) -> list[Group]:
        """Returns the groups with only the parameters that have a gradient, without groups that have none."""
        self.make_plain()
        groups = []
        for group in self.groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                groups.append({**group, "params": params})
        return groups

    def select(self, runs: list[Run]) -> list[Group]:
        """Returns the groups with only the parameters in these runs, in their order."""
        groups = self.groups
        chosen: dict[int, list[Tensor]] = {}
        for group_index, begin, end in sorted(runs):
            chosen.setdefault(group_index, []).extend(groups[group_index]["params"][begin:end])
        return [{**groups[g], "params": params} for g, params in chosen.items()]

    @contextmanager
    def restored_on_error(self, groups: list[Group]) -> Iterator[None]:
        """Restores the entries of these parameters' states if the block raises."""
        state = self.optimizer.state
        params = [p for group in groups for p in group["params"]]
        before: dict[int, dict[str, Any]] = {}  # by the index in ``params``, if the parameter has a state
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

    def find(self, p: Tensor) -> Index:
        """Returns the index of a parameter's group, and its own index in the group."""
        places = ((g, i) for g, group in enumerate(self.groups) for i, q in enumerate(group["params"]) if q is p)
        return next(places)

    def describe(self, p: Tensor) -> str:
        """Names a parameter for errors."""
        return describe(self.groups, *self.find(p))


def describe(groups: Any, group_index: int, index: int) -> str:
    """Names a parameter for errors."""
    group = groups[group_index]
    name = f"{group['param_names'][index]!r}, " if group.get("param_names") else ""
    p = group["params"][index]
    is_distributed = hasattr(p, "device_mesh") and hasattr(p, "placements")
    where = f" over {p.device_mesh} by {p.placements}" if is_distributed else ""
    return f"parameter {index} of group {group_index} ({name}shape {list(p.shape)}{where})"
