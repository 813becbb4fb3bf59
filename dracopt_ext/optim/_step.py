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
from ..containers import Group, describe, entries_of, plain_groups, plain_state, restore
from ..todo import NEW, Clipping, Index, Run, Scaler, Todo
from . import _by_reference, _by_torch, _clipped, _scaled
from ._context import context_of
from ._precision import Precision, at_random, is_short

if TYPE_CHECKING:
    from .._C import StepPlan
    from ._base import FusedOptimizer


class Step:
    """One step. The kernels update what they serve; torch's own implementation, or the reference, updates the rest."""

    __slots__ = ("are_plain", "context", "first_param", "groups", "is_odd", "kind", "optimizer", "options")

    def __init__(
        self,
        optimizer: FusedOptimizer,
        *,
        zeroes: bool = False,
        groups: list[Group] | None = None,
        first_param: int = 0,
    ) -> None:
        """With ``zeroes`` the gradients are zero after the step.

        ``groups`` replaces the optimizer's. ``first_param`` is then the index of the first parameter.
        """
        self.optimizer = optimizer
        self.kind = optimizer._dracopt_kind
        self.context = context_of(optimizer)
        self.groups: list[Group] = optimizer.param_groups if groups is None else groups
        # The plan's options, of csrc/bindings/step_plan.h. They are few, because each takes time to pass.
        self.options: dict[str, Any] = {"zeroes": True} if zeroes else {}
        self.first_param = first_param
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
        context, process = self.context, os.getpid()
        if context.running.setdefault(process, self) is not self:
            raise RuntimeError(
                "step() of this optimizer is already running, in another thread or in code that this step has called; "
                "give each thread an optimizer of its own"
            )
        try:
            context.plan_ran = None
            context.others_ran = {}
            if context.precision.stochastic_rounding:
                self.options["at_random"] = at_random(self)
            self._take()
            if "zeroes" in self.options and (context.plan_ran is None or not context.plan_ran.zeroed):
                zero_gradients([p for group in self.groups for p in group["params"]])
        finally:
            del context.running[process]

    def _take(self) -> None:
        method = self.kind.overridden(self.optimizer)
        if method is not None:
            _by_torch.step_overridden(self, method)
            return
        found_inf = getattr(self.optimizer, "found_inf", None)
        grad_scale = getattr(self.optimizer, "grad_scale", None)
        max_norm = self.context.max_grad_norm
        overflow, self.context.overflow = self.context.overflow, None
        if found_inf is None:
            overflow = None  # left behind by a step that failed
        raises = self.context.error_if_nonfinite and found_inf is None
        if max_norm is not None or overflow is not None or raises:
            max_norm = math.inf if max_norm is None else max_norm
            _clipped.update_clipped(self, max_norm, found_inf, grad_scale, overflow)
        elif found_inf is None and grad_scale is None:
            self.update()
        else:
            _scaled.update_scaled(self, found_inf, grad_scale)

    def update(self, grad_scale: float = 1.0) -> None:
        """Updates every parameter that has a gradient, which is divided by ``grad_scale``."""
        if self.context.backend == "reference":
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
        if self.context.backend is not None:
            for group_index, index, reason, _ in unsupported:
                raise RuntimeError(
                    f"backend={self.context.backend!r} does not serve {reason}: "
                    f"{describe(self.groups, group_index, index)}. Leave `backend` at None, so that each parameter is "
                    "stepped by what serves it"
                )
        created = self.select(todo.missing)
        new = self.select([(g, i, i + 1) for g, i, _, form in unsupported if form & NEW])
        options = {**options, "created": todo.missing, "stepped": [parameter[:2] for parameter in unsupported]}
        with self.restored_on_error(created + new):
            with torch.no_grad():
                for group in created:
                    self.create_state(group)
            if unsupported and not todo.nothing_left:
                # The plan raises before torch changes anything.
                self._run(plan, grad_scale, scaler, {**options, "only_looks": True})
            _by_torch.update(self, unsupported, grad_scale)
            if not todo.nothing_left:
                self._run(plan, grad_scale, scaler, options)
        for reason in {reason: None for _, _, reason, _ in unsupported}:
            torchs = "torch's own implementation (or to the reference, where dtypes mix)"
            other = "the reference implementation" if self.kind.torch_step is None else torchs
            backend_module.warn_once(f"{type(self.optimizer).__name__} leaves {reason} to {other}, which is slower")

    def _plan(self) -> StepPlan | None:
        """Returns the plan for the backends that may serve this step; None without a compiled module."""
        if backend_module.NATIVE_REASON is not None:
            return None
        asked_for = self.context.backend
        key = (
            asked_for != "triton",
            asked_for == "triton" or (asked_for is None and backend_module.triton_serves_gpus()),
        )
        plan = self.context.plans.get(key)
        if plan is None:
            masters = self.context.precision.master_weights
            plan = backend_module.step_plan(self.kind.rule.name, type(self.optimizer).__name__, *key, masters)
            self.context.plans[key] = plan
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
            self.context.plan_ran = plan
            return None
        return Todo(*todo)

    def make_plain(self) -> None:
        """Replaces the groups by ones that a plan reads."""
        if not self.are_plain:
            optimizer = self.optimizer
            self.groups = plain_groups(self.groups, optimizer.defaults, self.kind.rule.kinds)
            self.are_plain = True

    def create_state(self, group: Group) -> None:
        """Creates what the states of ``group["params"]`` lack, in the dtypes that were asked for."""
        precision, states = self.context.precision, self.optimizer.state
        if precision == Precision():
            self.kind.create_state(self.optimizer, group)
            return
        for p in group["params"]:  # one by one, so that no more than one parameter's moments exist twice
            state = states[p]
            master = precision.master_of(p)
            kept = state.pop(master) if master is not None and master in state else None
            if self.kind.lacks_state(state, group):
                self.kind.create_state(self.optimizer, {**group, "params": [p]})
            for name in self.kind.rule.moments:
                dtype = precision.dtype_of(name)
                if dtype is not None and name in state and state[name] is not None:
                    state[name] = state[name].to(dtype)
            if master is not None:
                state[master] = precision.new_master(p) if kept is None else kept

    def lacks_state(self, p: Tensor, group: Group) -> bool:
        """Says whether a parameter's state must be created before the step, as a whole or in part."""
        entries = entries_of(self.optimizer.state, p)
        master = self.context.precision.master_of(p)
        return self.kind.lacks_state(entries, group) or (master is not None and master not in entries)

    def note(self, backend: str, devices: Iterable[torch.device]) -> None:
        """Notes for ``last_backend`` that torch or the reference has updated parameters on these devices."""
        for device in devices:
            self.context.others_ran.setdefault(device.type, set()).add(backend)

    def with_gradients(self) -> list[Group]:
        """Returns the groups with only the parameters that have a gradient, without groups that have none."""
        self.make_plain()
        groups = []
        for group_index, group in enumerate(self.groups):
            for index, p in enumerate(group["params"]):
                if not isinstance(p, Tensor):
                    where = f"param_groups[{group_index}]['params'][{index}]"
                    raise TypeError(f"{where} must be a Tensor, not {type(p).__name__}")
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

    def rounding_of(self, p: Tensor) -> reference.Rounding | None:
        """Returns how the reference rounds at random; None if it rounds to nearest."""
        if "at_random" not in self.options:
            return None
        seed, states, steps, first_param, shards = self.options["at_random"]
        if not (states or is_short(p)):
            return None
        g, i = self.find(p)
        index = first_param + i + sum(len(group["params"]) for group in self.groups[:g])
        shard = next((shard[2:] for shard in shards if shard[:2] == (g, i)), (0, None))
        return reference.Rounding(seed, steps[g], index, states, *shard)

    def find(self, p: Tensor) -> Index:
        """Returns the index of a parameter's group, and its own index in the group."""
        places = ((g, i) for g, group in enumerate(self.groups) for i, q in enumerate(group["params"]) if q is p)
        return next(places)

    def describe(self, p: Tensor) -> str:
        """Names a parameter for errors."""
        return describe(self.groups, *self.find(p))
