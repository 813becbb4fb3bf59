"""The one step() that all optimizers share, and what surrounds it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import _device_dtype_check_for_fused

from .. import backend as backend_module
from .. import reference
from ..backend import _C, warn_once

if TYPE_CHECKING:
    from .._C import StepPlan

Group = dict[str, Any]


class FusedOptimizer(torch.optim.Optimizer):
    """Mixed in before a ``torch.optim`` class: keeps its constructor, state and checkpoints, and replaces its step.

    A subclass names its rule and says how the state of a parameter begins. Which engine runs is decided parameter by
    parameter in each step: the native kernels where they can, torch's own implementation for the rest.
    """

    _rule: ClassVar[str]
    """Name of the update rule, in the compiled module and in :data:`dracopt_ext.reference.RULES`."""
    _rule_keys: ClassVar[tuple[str, ...]]
    """The hyperparameters of a parameter group that the rule takes."""
    _counts_steps: ClassVar[bool]
    """Whether a parameter's state, with a step count, is there before its first update; else that update creates it."""
    _sparse_error: ClassVar[str]
    """What torch says of a sparse gradient that this class, or this class with ``fused=True``, does not take."""
    _torch_step: ClassVar[Callable[..., Any]]
    """torch's step for this class, bare of hooks and decorators."""

    backend: str | None
    """The backend that was asked for; None if each step may choose."""
    _plan: StepPlan | None = None
    _plan_ran: bool = False
    _others_ran: dict[str, set[str]]  # by device type, what ran beside the plan in the last step

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        torch_class: Any = next(base for base in cls.__mro__ if base.__module__.startswith("torch.optim"))
        cls._torch_step = staticmethod(inspect.unwrap(torch_class.step))

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        self.backend = backend_module.resolve(backend)
        self._others_ran = {}
        super().__init__(*args, **kwargs)

    def _create_state(self, group: Group) -> None:
        """Create the state of ``group["params"]``, all of which have a gradient and none of which has a state."""
        raise NotImplementedError

    @property
    def last_backend(self) -> dict[str, frozenset[str]]:
        """What updated parameters in the last step, by device type.

        ``native``, ``reference`` or ``torch`` (torch's own implementation, where ours does not serve the parameter).
        Empty before the first step and after one that updated nothing.
        """
        ran = {device: set(names) for device, names in self._others_ran.items()}
        if self._plan_ran and self._plan is not None and self._plan.updated > 0:
            ran.setdefault("cpu", set()).add("native")
        return {device: frozenset(names) for device, names in ran.items()}

    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss, which ``step`` then returns.

        Raises:
            ValueError, TypeError, KeyError: for a parameter, state or hyperparameter that cannot be right. Parameters,
                states and step counts are then as before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._others_ran = {}
        self._plan_ran = False
        if getattr(self, "found_inf", None) is None and getattr(self, "grad_scale", None) is None:
            self._update()
        else:
            self._update_unscaled()
        return loss

    def _update(self) -> None:
        if self.backend == "reference":
            self._update_by_reference()
        elif _C is None:
            self._update_by_torch(self._with_gradients())
        else:
            plan = self._plan
            if plan is None:
                plan = self._plan = _C.StepPlan(self._rule)
            todo = plan.step(self.param_groups, self.state)
            if todo is not None:
                self._update_in_parts(plan, *todo)
            self._plan_ran = True

    def _update_in_parts(
        self, plan: StepPlan, missing: list[tuple[int, int]], foreign: list[tuple[int, int, str]]
    ) -> None:
        """A step before which states are to be created, or of which torch is to do a part."""
        for group_index, index, reason in foreign:
            if self.backend == "native":
                raise RuntimeError(
                    f"backend='native' does not serve {reason}: {self._describe(group_index, index)}. "
                    "Leave `backend` at None to let torch's implementation step such parameters"
                )
            warn_once(f"{type(self).__name__} leaves {reason} to torch's own implementation, which is slower")
        stepped = [(group_index, index) for group_index, index, _ in foreign]
        created, others = self._select(missing), self._select(stepped)
        with self._restored_on_error(created + others):
            with torch.no_grad():
                for group in created:
                    self._create_state(group)
            self._update_by_torch(others)
            plan.step(self.param_groups, self.state, missing, stepped)

    def _update_by_torch(self, groups: list[Group]) -> None:
        """Step these groups with torch's own implementation."""
        groups = [self._for_torch(group) for group in groups]
        if not groups:
            return
        # torch's step works on an optimizer's groups: give it one that shares everything else with this one.
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__, param_groups=groups)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._torch_step(view)
        for group in groups:
            for p in group["params"]:
                self._others_ran.setdefault(p.device.type, set()).add("torch")

    def _for_torch(self, group: Group) -> Group:
        """The group as torch is to step it; raises what torch would only raise after it has changed something."""
        fused = group.get("fused")
        for p in group["params"]:
            if fused:
                _device_dtype_check_for_fused(p)
            if p.grad.is_sparse and (fused or self._counts_steps):
                raise RuntimeError(self._sparse_error)
        if fused and all(p.device.type == "cpu" for p in group["params"]):
            # torch's fused CPU kernels are wrong for some dtypes and strides; its other implementations are not.
            return {**group, "fused": None}
        return group

    def _update_by_reference(self) -> None:
        groups = self._with_gradients()
        for group in groups:
            tensors = any(isinstance(group[key], Tensor) for key in self._rule_keys)
            if tensors or group["differentiable"] or group.get("capturable"):
                raise RuntimeError(
                    "backend='reference' serves no hyperparameters that are tensors, nor differentiable or capturable"
                )
            for p in group["params"]:
                if p.grad.layout != torch.strided or not p.is_floating_point():
                    raise RuntimeError(
                        f"backend='reference' takes dense real tensors only, not a {p.dtype} parameter of shape "
                        f"{list(p.shape)} with a {p.grad.layout} gradient"
                    )
        with torch.no_grad(), self._restored_on_error(groups):
            for group in groups:
                hyperparameters = {key: group[key] for key in self._rule_keys}
                for p in group["params"]:
                    if self._counts_steps and not self.state[p]:
                        self._create_state({**group, "params": [p]})
                    grad = -p.grad if group["maximize"] else p.grad
                    reference.RULES[self._rule](p, grad, self.state[p], **hyperparameters)
                    self._others_ran.setdefault(p.device.type, set()).add("reference")

    def _update_unscaled(self) -> None:
        """A step to which torch.amp.GradScaler has left the division by its scale and the check for overflow."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        groups = self._with_gradients()
        params = [p for group in groups for p in group["params"]]
        if any(p.device.type != "cpu" for p in params):
            return self._update_by_torch(groups)
        if found_inf is not None and found_inf.item():
            return None
        if grad_scale is not None and any(p.grad.dtype == torch.float16 for p in params):
            raise ValueError("Attempting to unscale FP16 gradients.")
        scaled = [p.grad for p in params]
        attributes = dict(self.__dict__)
        try:
            self.grad_scale = self.found_inf = None
            if grad_scale is not None:
                for p in params:
                    p.grad = p.grad / grad_scale
            return self._update()
        finally:
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
                if name in attributes:
                    self.__dict__[name] = attributes[name]
            for p, grad in zip(params, scaled, strict=True):
                p.grad = grad

    def _with_gradients(self) -> list[Group]:
        """The groups with only those parameters that have a gradient, without the groups that have none."""
        groups = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                groups.append({**group, "params": params})
        return groups

    def _select(self, indices: list[tuple[int, int]]) -> list[Group]:
        """The groups with only the parameters at these (group, parameter) indices, in their order."""
        chosen: dict[int, list[int]] = {}
        for group_index, index in sorted(indices):
            chosen.setdefault(group_index, []).append(index)
        groups = self.param_groups
        return [{**groups[g], "params": [groups[g]["params"][i] for i in chosen[g]]} for g in chosen]

    @contextmanager
    def _restored_on_error(self, groups: list[Group]) -> Iterator[None]:
        """Should the block raise, these parameters' states hold the entries that they hold now."""
        before = [(p, dict(self.state[p]) if p in self.state else None) for group in groups for p in group["params"]]
        try:
            yield
        except BaseException:
            for p, entries in before:
                if entries is None:
                    self.state.pop(p, None)
                else:
                    self.state[p].clear()
                    self.state[p].update(entries)
            raise

    def _describe(self, group_index: int, index: int) -> str:
        group = self.param_groups[group_index]
        name = f"{group['param_names'][index]!r}, " if group.get("param_names") else ""
        return f"parameter {index} of group {group_index} ({name}shape {list(group['params'][index].shape)})"

    def __getstate__(self) -> dict[str, Any]:
        # torch drops all attributes, for hooks among them may not pickle. These two are what the user asked for.
        kept: dict[str, Any] = {}
        for name in ("backend", "_step_supports_amp_scaling"):
            if name in self.__dict__:
                kept[name] = self.__dict__[name]
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("backend", None)
        self.__dict__.setdefault("_others_ran", {})
        super().__setstate__(state)
