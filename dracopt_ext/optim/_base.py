"""The base class of all optimizers: step(), two options, and checkpoints that keep them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT, StateDict

from .. import backend as backend_module
from .. import reference
from ..containers import Group
from ._step import STATE_DTYPES, Engine, Kind, Step, describe, engine_of


class FusedOptimizer(torch.optim.Optimizer):
    """Mixed in before a ``torch.optim`` class: keeps its constructor, state and checkpoints, and replaces its step.

    A subclass names its kind. Which engine runs is decided parameter by parameter in each step: the native kernels
    where they can, torch's own implementation for the rest.

    Users' subclasses must not meet our names. All that is not torch's begins with ``_dracopt``, except ``backend``,
    ``state_dtype`` and ``last_backend``.
    """

    _dracopt_kind: ClassVar[Kind]
    _dracopt_engine: Engine  # engine_of() finds it, or makes it where the constructor was passed by

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        # For a subclass that calls super(Adam, self).__init__(params, defaults), which with torch's Adam means this.
        torch.optim.Optimizer.__init__(self, params, defaults)

    @property
    def backend(self) -> Any:
        """The backend that was asked for; None if each step may choose.

        A value that is none of ours (a subclass's own ``self.backend = "nccl"``) is kept and means nothing to us.
        """
        return self.__dict__.get("backend", engine_of(self).backend)

    @backend.setter
    def backend(self, value: Any) -> None:
        if value is None or (isinstance(value, str) and value in backend_module.NAMES):
            engine_of(self).backend = backend_module.resolve(value)
            self.__dict__.pop("backend", None)
        else:
            self.__dict__["backend"] = value

    @property
    def state_dtype(self) -> Any:
        """The dtype of the moments that are created or loaded from now on; None if it is each parameter's.

        A value that is none of ours is kept and means nothing to us.
        """
        return self.__dict__.get("state_dtype", engine_of(self).state_dtype)

    @state_dtype.setter
    def state_dtype(self, value: Any) -> None:
        if value is None or (isinstance(value, torch.dtype) and value in STATE_DTYPES):
            for index in range(len(self.__dict__.get("param_groups", ()))):
                _check_state_dtype(self, value, index)
            engine_of(self).state_dtype = value
            self.__dict__.pop("state_dtype", None)
        else:
            self.__dict__["state_dtype"] = value

    @property
    def last_backend(self) -> dict[str, frozenset[str]]:
        """What updated parameters in the last step, by device type.

        ``native``, ``triton``, ``reference`` or ``torch`` (torch's own implementation, where ours does not serve the
        parameter). Empty before the first step and after one that updated nothing; but a GPU's kernels have run, too,
        when they found an overflow, which the host does not know.
        """
        engine = engine_of(self)
        ran = {device: set(names) for device, names in engine.others_ran.items()}
        for name, plan in engine.plans_ran:
            for device in plan.updated:
                ran.setdefault(device, set()).add(name)
        return {device: frozenset(names) for device, names in ran.items()}

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        try:
            _check_state_dtype(self, engine_of(self).state_dtype, len(self.param_groups) - 1)
        except ValueError:
            self.param_groups.pop()
            raise

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
        Step(self).run()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        # torch drops all attributes, for hooks among them may not pickle. These are what the user asked for.
        kept: dict[str, Any] = {"_dracopt_engine": copy.copy(engine_of(self))}
        if "_step_supports_amp_scaling" in self.__dict__:
            kept["_step_supports_amp_scaling"] = self.__dict__["_step_supports_amp_scaling"]
        return {**super().__getstate__(), **kept}

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
            self.register_load_state_dict_post_hook(lambda _: _take_over(self, saved), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()


def _check_state_dtype(optimizer: FusedOptimizer, state_dtype: torch.dtype | None, group_index: int) -> None:
    if state_dtype is None:
        return
    for index, p in enumerate(optimizer.param_groups[group_index]["params"]):
        if p.is_complex():
            raise ValueError(
                f"state_dtype={state_dtype} serves real parameters only, but "
                f"{describe(optimizer.param_groups, group_index, index)} is {p.dtype}; give complex parameters an "
                "optimizer of their own"
            )


def _take_over(optimizer: FusedOptimizer, saved: StateDict) -> None:
    """Replace the tensors that torch has just loaded from ``saved`` by copies in the dtypes that we keep."""
    state_dtype = engine_of(optimizer).state_dtype
    ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for saved_id, p in zip(ids, params, strict=True):
        for name, value in saved["state"].get(saved_id, {}).items():
            loaded = optimizer.state[p][name]
            if not isinstance(value, Tensor) or not isinstance(loaded, Tensor):
                continue
            dtype = loaded.dtype
            if name in reference.MOMENTS and state_dtype is not None:
                dtype = state_dtype
            elif name in reference.CARRIED and name != "step":
                dtype = value.dtype if value.dtype == torch.float64 else torch.float32
            if loaded is value or loaded.dtype != dtype:
                optimizer.state[p][name] = value.to(device=loaded.device, dtype=dtype, copy=True)
