"""The one step() that all optimizers share, and what surrounds it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import StateDict, _device_dtype_check_for_fused

from .. import backend as backend_module
from .. import reference
from ..backend import GPU, warn_once

Group = dict[str, Any]
Index = tuple[int, int]
"""Of a group, and of a parameter in it."""
Foreign = tuple[int, int, str]
"""The same of a parameter that a backend does not serve, and the reason."""
Scaler = tuple[Tensor | None, Tensor | None]


class StepPlan(Protocol):
    """What steps an optimizer by one backend's kernels: see csrc/bindings/step_plan.h and portable/plan.py."""

    def step(
        self,
        param_groups: list[Group],
        state: dict[Tensor, Any],
        grad_scale: float = 1.0,
        scaler: Scaler = (None, None),
        created: list[Index] | None = None,
        stepped: list[Index] = ...,
    ) -> tuple[list[Index], list[Foreign], bool] | None: ...
    @property
    def updated(self) -> dict[str, int]: ...
    @property
    def launches(self) -> int: ...


STATE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _all_on_gpu(*numbers: Tensor | None) -> bool:
    """Whether these are fp32 scalars that a kernel can read, as far as they are there."""
    return all(x is None or (x.device.type == GPU and x.dtype == torch.float32 and x.numel() == 1) for x in numbers)


class Part(NamedTuple):
    """Of a step: what one backend is to do once states are created."""

    backend: str
    missing: list[Index]
    """Parameters that have no state yet."""
    stepped: list[Index]
    """Parameters that are others' part."""


class FusedOptimizer(torch.optim.Optimizer):
    """Mixed in before a ``torch.optim`` class: keeps its constructor, state and checkpoints, and replaces its step.

    A subclass names its rule and says how the state of a parameter begins. Which engine runs is decided parameter by
    parameter in each step: the native kernels where they can, torch's own implementation for the rest.
    """

    _rule: ClassVar[str]
    """Name of the update rule, in the compiled module and in :data:`dracopt_ext.reference.RULES`."""
    _counts_steps: ClassVar[bool]
    """Whether a parameter's state counts its steps, and is zero before the first; else the first step fills it."""
    _sparse_error: ClassVar[str]
    """What torch says of a sparse gradient that this class, or this class with ``fused=True``, does not take."""
    _torch_step: ClassVar[Callable[..., Any]]
    """torch's step for this class, bare of hooks and decorators."""

    backend: str | None
    """The backend that was asked for; None if each step may choose."""
    state_dtype: torch.dtype | None
    """The dtype of the moments; None if it is each parameter's."""
    _plans: dict[str, StepPlan]  # by backend, those that were needed so far
    _plans_ran: list[str]  # in the last step
    _others_ran: dict[str, set[str]]  # by device type, what ran beside the plans in the last step

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        torch_class: Any = next(base for base in cls.__mro__ if base.__module__.startswith("torch.optim"))
        cls._torch_step = staticmethod(inspect.unwrap(torch_class.step))

    def __init__(
        self, *args: Any, backend: str | None = None, state_dtype: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        if state_dtype not in (None, *STATE_DTYPES):
            names = ", ".join(map(str, STATE_DTYPES))
            raise ValueError(f"state_dtype={state_dtype!r} is none of {names}; None stands for the parameter's own")
        self.backend = backend_module.resolve(backend)
        self.state_dtype = state_dtype
        self._forget_plans()
        super().__init__(*args, **kwargs)

    def _forget_plans(self) -> None:
        self._plans, self._plans_ran, self._others_ran = {}, [], {}

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        if self.state_dtype is None:
            return
        for index, p in enumerate(self.param_groups[-1]["params"]):
            if p.is_complex():
                parameter = self._describe(len(self.param_groups) - 1, index)
                self.param_groups.pop()
                raise ValueError(
                    f"state_dtype={self.state_dtype} serves real parameters only, but {parameter} is {p.dtype}; give "
                    "complex parameters an optimizer of their own"
                )

    def _create_state(self, group: Group) -> None:
        """Create the state of ``group["params"]``, all of which have a gradient and none of which has a state."""
        self._init_group(group, [], [], [], [], [], [])  # type: ignore[attr-defined]

    def _lacks_state(self, p: Tensor, group: Group) -> bool:
        return not self.state.get(p)

    @property
    def last_backend(self) -> dict[str, frozenset[str]]:
        """What updated parameters in the last step, by device type.

        ``native``, ``triton``, ``reference`` or ``torch`` (torch's own implementation, where ours does not serve the
        parameter). Empty before the first step and after one that updated nothing; but a GPU's kernels have run, too,
        when they found an overflow, which the host does not know.
        """
        ran = {device: set(names) for device, names in self._others_ran.items()}
        for name in self._plans_ran:
            for device in self._plans[name].updated:
                ran.setdefault(device, set()).add(name)
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
        self._plans_ran = []
        if getattr(self, "found_inf", None) is None and getattr(self, "grad_scale", None) is None:
            self._update()
        else:
            self._update_scaled(getattr(self, "found_inf", None), getattr(self, "grad_scale", None))
        return loss

    def _update_scaled(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """A step to which torch.amp.GradScaler has left the division by its scale and the check for overflow."""
        groups = self._with_gradients()
        params = [p for group in groups for p in group["params"]]
        foreign: int | None = len(params)
        if self.backend != "reference" and self._backends() and _all_on_gpu(found_inf, grad_scale):
            foreign = self._update(scaler=(found_inf, grad_scale))
            if foreign is None:
                return  # the kernels have read both: nobody waits
        torch_may = self.backend is None and self.state_dtype is None and foreign == len(params) > 0
        if torch_may and all(p.device.type != "cpu" for p in params):
            self._step_by_torch(groups)  # its fused kernels read both as well
        elif found_inf is None or not found_inf.item():
            self._update(1.0 if grad_scale is None else grad_scale.item())

    def _update(self, grad_scale: float = 1.0, scaler: Scaler = (None, None)) -> int | None:
        """Update every parameter that has a gradient, which is divided by ``grad_scale``.

        ``scaler`` holds GradScaler's tensors (found_inf, grad_scale) for the kernels to read. If the host must read
        them after all, does nothing and returns the number of parameters that the kernels do not serve; else None.
        """
        if self.backend == "reference":
            self._update_by_reference(self._with_gradients(), grad_scale)
            return None
        backends = self._backends()
        if not backends:
            self._update_by_torch(self._with_gradients(), grad_scale)
            return None
        parts: list[Part] = []
        foreign: list[Foreign] = []
        for name in backends:
            # It runs only if it serves all parameters.
            todo = self._plan(name).step(self.param_groups, self.state, grad_scale, scaler)
            if todo is None:
                self._plans_ran.append(name)
                return None
            missing, others, host_decides = todo
            if host_decides:
                return len(others)
            parts.append(Part(name, missing, [(group, index) for group, index, _ in others]))
            # Triton has a GPU's parameters, the native backend beside it the CPU's.
            mine = [other for other in others if name == backends[-1] or self._is_on_gpu(*other[:2])]
            foreign += mine if len(parts) == 1 else [other for other in mine if not self._is_on_gpu(*other[:2])]
            if len(mine) == len(others):
                break
        self._update_in_parts(parts, foreign, grad_scale, scaler)
        return None

    def _backends(self) -> list[str]:
        """The backends with plans that this step is to ask, in this order: one, or Triton's and the native one."""
        if self.backend is not None:
            return [self.backend]
        native = [] if backend_module.NATIVE_REASON is not None else ["native"]
        if backend_module.triton_serves_gpus() and any(self._is_on_gpu(*where) for where in self._indices()):
            return ["triton", *native]
        return native

    def _indices(self) -> list[Index]:
        """Of all groups and the parameters in them."""
        return [(g, i) for g, group in enumerate(self.param_groups) for i in range(len(group["params"]))]

    def _is_on_gpu(self, group_index: int, index: int) -> bool:
        p = self.param_groups[group_index]["params"][index]
        return isinstance(p, Tensor) and p.device.type == GPU

    def _plan(self, name: str) -> StepPlan:
        if name not in self._plans:
            self._plans[name] = backend_module.step_plan(name, self._rule, type(self).__name__, self.backend)
        return self._plans[name]

    def _update_in_parts(self, parts: list[Part], foreign: list[Foreign], grad_scale: float, scaler: Scaler) -> None:
        """A step before which states are to be created, or of which torch is to do a part."""
        for group_index, index, reason in foreign:
            if self.backend is not None:
                raise RuntimeError(
                    f"backend={self.backend!r} does not serve {reason}: {self._describe(group_index, index)}. "
                    "Leave `backend` at None, so that each parameter is stepped by what serves it"
                )
            warn_once(
                f"{type(self).__name__} leaves {reason} to torch's own implementation (or to the reference, where "
                "dtypes mix), which is slower"
            )
        others = self._select([(group_index, index) for group_index, index, _ in foreign])
        created = [group for part in parts for group in self._select(part.missing)]
        with self._restored_on_error(created + others):
            with torch.no_grad():
                for group in created:
                    self._create_moments(group)
            self._update_by_torch(others, grad_scale)
            for part in parts:
                self._plans[part.backend].step(
                    self.param_groups, self.state, grad_scale, scaler, part.missing, part.stepped
                )
                self._plans_ran.append(part.backend)

    def _create_moments(self, group: Group) -> None:
        """Create the state of ``group["params"]`` in the dtype that was asked for."""
        if self.state_dtype is None:
            self._create_state(group)
            return
        for p in group["params"]:  # one by one, so that no more than one parameter's moments are there twice
            self._create_state({**group, "params": [p]})
            state = self.state[p]
            state.update({name: state[name].to(self.state_dtype) for name in reference.MOMENTS if name in state})

    def _update_by_torch(self, groups: list[Group], grad_scale: float) -> None:
        """Step these groups with torch's own implementation; or, where that cannot, with the reference."""
        by_torch: list[Group] = []
        by_reference: list[Group] = []
        for group in groups:
            parts: tuple[list[Tensor], list[Tensor]] = [], []
            for p in group["params"]:
                mixes = not group["differentiable"] and self._mixes_dtypes(p, grad_scale)
                parts[mixes or self.state_dtype is not None].append(p)
            by_torch.append({**self._for_torch(group), "params": parts[0]})
            by_reference.append({**group, "params": parts[1]})
        by_torch, by_reference = ([g for g in part if g["params"]] for part in (by_torch, by_reference))
        self._check_for_reference(by_reference)
        with self._unscaled(by_torch, grad_scale):
            self._step_by_torch(by_torch, grad_scale=None, found_inf=None)
        self._step_by_reference(by_reference, grad_scale)

    def _mixes_dtypes(self, p: Tensor, grad_scale: float) -> bool:
        """Whether torch would refuse this parameter, or round what our kernels do not."""
        grad = p.grad
        if grad is None or grad.layout != torch.strided:
            return False
        moments = (value for name, value in self.state.get(p, {}).items() if name in reference.MOMENTS)
        return (
            grad.is_conj()
            or (grad_scale != 1 and grad.dtype in (torch.bfloat16, torch.float16))
            or any(tensor is not None and tensor.dtype != p.dtype for tensor in (grad, *moments))
        )

    def _step_by_torch(self, groups: list[Group], **attributes: Any) -> None:
        if not groups:
            return
        # torch's step works on an optimizer's groups: give it one that shares everything else with this one.
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__, param_groups=groups, **attributes)
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

    def _update_by_reference(self, groups: list[Group], grad_scale: float) -> None:
        self._check_for_reference(groups)
        self._step_by_reference(groups, grad_scale)

    def _step_by_reference(self, groups: list[Group], grad_scale: float) -> None:
        with torch.no_grad(), self._restored_on_error(groups):
            for group in groups:
                for p in group["params"]:
                    new = self._lacks_state(p, group)
                    if new:
                        self._create_moments({**group, "params": [p]})
                    reference.update(
                        self._rule,
                        p,
                        p.grad,
                        self.state[p],
                        group,
                        maximize=group["maximize"],
                        grad_scale=grad_scale,
                        first=new and not self._counts_steps,
                    )
                    self._others_ran.setdefault(p.device.type, set()).add("reference")

    def _check_for_reference(self, groups: list[Group]) -> None:
        """Raise for what the compiled kernels would refuse, and for what the reference does not serve."""
        for group in groups:
            if group["differentiable"] or (group.get("capturable") and not group.get("fused")):
                raise RuntimeError("the reference implementation serves neither differentiable nor capturable groups")
            for key in reference.hyperparameters(self._rule):
                rates = isinstance(group[key], (tuple, list))
                for number in map(float, group[key] if rates else [group[key]]):
                    if not math.isfinite(number) or (rates and not 0 <= number < 1):
                        where = f"param_groups[{self._find(group['params'][0])[0]}][{key!r}]"
                        must = "at least 0 and less than 1" if rates else "finite"
                        raise ValueError(f"{where} is {number}; it must be {must}")
            for p in group["params"]:
                self._check_tensors_for_reference(p, group)

    def _check_tensors_for_reference(self, p: Tensor, group: Group) -> None:
        grad = p.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"the reference implementation takes dense tensors only, not the {grad.layout} gradient of "
                f"{self._describe(*self._find(p))}"
            )
        state = {} if self._lacks_state(p, group) else self.state.get(p, {})
        if state and group.get("amsgrad") and "max_exp_avg_sq" not in state:
            raise KeyError(f"the state of {self._describe(*self._find(p))} has no 'max_exp_avg_sq'")
        for name in ("the gradient", *reference.MOMENTS):
            tensor = grad if name == "the gradient" else state.get(name)
            if tensor is not None and tensor.shape != p.shape:
                raise ValueError(f"{name} of {self._describe(*self._find(p))} has another shape, {list(tensor.shape)}")

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

    def _find(self, p: Tensor) -> tuple[int, int]:
        """The index of a parameter's group, and its own in it."""
        places = ((g, i) for g, group in enumerate(self.param_groups) for i, q in enumerate(group["params"]) if q is p)
        return next(places)

    def _describe(self, group_index: int, index: int) -> str:
        group = self.param_groups[group_index]
        name = f"{group['param_names'][index]!r}, " if group.get("param_names") else ""
        return f"parameter {index} of group {group_index} ({name}shape {list(group['params'][index].shape)})"

    def __getstate__(self) -> dict[str, Any]:
        # torch drops all attributes, for hooks among them may not pickle. These are what the user asked for.
        kept: dict[str, Any] = {}
        for name in ("backend", "state_dtype", "_step_supports_amp_scaling"):
            if name in self.__dict__:
                kept[name] = self.__dict__[name]
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("backend", None)
        self.__dict__.setdefault("state_dtype", None)
        self._forget_plans()
        super().__setstate__(state)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what :meth:`state_dict` returned, of this class or of torch's. Differs from torch's in three points:

        - The moments take the dtype ``state_dtype``, if that was given, else as in torch the parameter's.
        - NAdam's ``mu_product`` is not rounded to the parameter's dtype.
        - No tensor is shared with the dict.
        """
        saved: StateDict = {}
        handles = [
            # After the user's pre-hooks, which may have replaced the dict, and before the post-hooks.
            self.register_load_state_dict_pre_hook(lambda _, final: saved.update(final)),
            self.register_load_state_dict_post_hook(lambda _: self._take_over(saved), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _take_over(self, saved: StateDict) -> None:
        """Replace the tensors that torch has just loaded from ``saved`` by copies in the dtypes that we keep."""
        ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, p in zip(ids, params, strict=True):
            for name, value in saved["state"].get(saved_id, {}).items():
                loaded = self.state[p][name]
                if not isinstance(value, Tensor) or not isinstance(loaded, Tensor):
                    continue
                dtype = loaded.dtype
                if name in reference.MOMENTS and self.state_dtype is not None:
                    dtype = self.state_dtype
                elif name in reference.CARRIED and name != "step":
                    dtype = value.dtype if value.dtype == torch.float64 else torch.float32
                if loaded is value or loaded.dtype != dtype:
                    self.state[p][name] = value.to(device=loaded.device, dtype=dtype, copy=True)
