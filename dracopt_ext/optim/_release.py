"""Steps parameters inside of ``backward()`` and frees their gradients at once."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..clip_grad import is_distributed
from ..containers import Group, describe
from ..todo import Index
from ._context import context_of
from ._step import Step

if TYPE_CHECKING:
    from ._base import FusedOptimizer


class GradientRelease:
    """Keeps gradient release switched on until :meth:`remove` is called, or the ``with`` block ends."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        if optimizer.max_grad_norm is not None or optimizer.error_if_nonfinite:
            raise ValueError(CLIPPING)
        method = optimizer._dracopt_kind.overridden(optimizer)
        if method is not None:
            raise RuntimeError(
                f"{type(optimizer).__name__} overrides {method}, which torch's own step calls for all parameters at "
                "once: gradient release cannot step them one by one"
            )
        self._reference = weakref.ref(optimizer)  # the parameters' hooks must not keep the optimizer
        self._stepped: set[int] = set()  # parameters, by identity, since the last step()
        self._places: dict[int, Index] = {}  # of parameters, by identity
        self._hooks: list[Any] = []
        self._lock = threading.Lock()  # autograd has a thread for each device
        for index in range(len(optimizer.param_groups)):
            self.check(index)
        for index in range(len(optimizer.param_groups)):
            self.watch(index)

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Switches gradient release off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        optimizer = self._reference()
        if optimizer is not None and context_of(optimizer).release is self:
            context_of(optimizer).release = None

    def check(self, group_index: int) -> None:
        """Raises if a parameter of the group has a gradient already, or may have parts of one in other processes."""
        groups = self._groups()
        for index, p in enumerate(groups[group_index]["params"]):
            _refuse_processes(p)
            if p.grad is not None:
                raise ValueError(
                    f"{describe(groups, group_index, index)} has a gradient already, to which the next backward would "
                    "add: call step() and zero_grad() before release_gradients()"
                )

    def watch(self, group_index: int) -> None:
        """Steps the parameters of a group from now on when their gradients are complete."""
        for p in self._groups()[group_index]["params"]:
            if p.requires_grad:
                self._hooks.append(p.register_post_accumulate_grad_hook(self._step))

    def begin_again(self) -> None:
        """Notes that step() was called, after which each parameter may have a gradient again.

        Raises a RuntimeError under a GradScaler, because the gradients were stepped while they were scaled.
        """
        optimizer = self._reference()
        if any(getattr(optimizer, name, None) is not None for name in ("found_inf", "grad_scale")):
            raise RuntimeError(SCALED)
        self._stepped.clear()

    def _step(self, p: Tensor) -> None:
        """Steps one parameter, whose gradient is complete."""
        with self._lock:
            optimizer = self._reference()
            place = None if optimizer is None else self._place_of(p)
            if optimizer is None or place is None:
                return  # the program has dropped the optimizer, or taken the parameter out of it
            groups = optimizer.param_groups
            name = describe(groups, *place)
            _refuse_processes(p)
            if p.grad is None:
                raise RuntimeError(f"another optimizer has released the gradient of {name} already")
            if id(p) in self._stepped:
                raise RuntimeError(
                    f"{name} gets a second gradient since the last step(), and the first one is gone: gradient release "
                    "cannot accumulate. Call step() after each backward, or remove() what release_gradients() returned"
                )
            try:
                alone = {**groups[place[0]], "params": [p]}
                alone.pop("param_names", None)
                before = sum(len(group["params"]) for group in groups[: place[0]])
                Step(optimizer, groups=[alone], first_param=before + place[1]).take()
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                # The step has seen a group with one parameter.
                raise type(error)(f"gradient release of {name}: {error.args[0] if error.args else error}") from error
            self._stepped.add(id(p))
            p.grad = None

    def _groups(self) -> list[Group]:
        optimizer = self._reference()
        return [] if optimizer is None else optimizer.param_groups

    def _place_of(self, p: Tensor) -> Index | None:
        """Returns the indices of a parameter's group and of the parameter, which rarely change."""
        groups = self._groups()
        known = self._places.get(id(p))
        if known is not None:
            g, i = known
            if g < len(groups) and i < len(groups[g]["params"]) and groups[g]["params"][i] is p:
                return known
        for g, group in enumerate(groups):
            for i, q in enumerate(group["params"]):
                self._places[id(q)] = (g, i)
                if q is p:
                    return g, i
        return None


CLIPPING = (
    "gradient release steps a parameter before all gradients are there, but max_grad_norm and error_if_nonfinite need "
    "their global norm: use one of the two"
)
SCALED = (
    "gradient release has used gradients that GradScaler has yet to unscale: use one of the two (bf16 needs no scaler)"
)


def _refuse_processes(p: Tensor) -> None:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or is_distributed(p):
        return
    if distributed.get_world_size() > 1:
        raise RuntimeError(
            "gradient release would step a parameter before DistributedDataParallel, or other code, has averaged its "
            "gradient over the processes. Use fully_shard (FSDP2), whose gradients are complete, or no gradient release"
        )
