"""Describes how the four classes differ."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

import torch

from .. import reference
from ..containers import Group

if TYPE_CHECKING:
    from ._base import FusedOptimizer

_TORCH = os.path.join(os.path.dirname(torch.__file__), "")


class Kind:
    """Describes one of the four classes.

    Args:
        rule: name of the update rule, in the compiled module and in :data:`dracopt_ext.reference.RULES`.
        torch_class: the class of torch that it replaces.
        sparse_error: torch's error for a sparse gradient that this class, or this class with ``fused=True``, does not
            take.
    """

    counts_steps = True
    """A parameter's state counts its steps, and is zero before the first. Otherwise the first step fills the state."""
    keeps_fused = True
    """torch's fused kernels for the CPU are right for this class, if they are right for the tensors."""

    def __init__(self, rule: str, torch_class: Any, sparse_error: str) -> None:
        self.rule = rule
        self.torch_class = torch_class
        self.sparse_error = sparse_error
        self.torch_step = inspect.unwrap(torch_class.step)
        """torch's step for this class, without hooks and decorators."""
        self.moments = reference.MOMENTS_OF[rule]
        """The names of the moments that a state may hold."""
        self.hyperparameters = reference.hyperparameters(rule)
        """The keys of a parameter group that the rule reads."""
        used = ((name, getattr(torch_class, name, None)) for name in self.torch_step.__code__.co_names)
        self.methods: dict[str, Any] = {name: method for name, method in used if callable(method)}
        """The methods that torch's step calls on its class, and ours does not."""
        self.originals = {name: inspect.unwrap(method) for name, method in self.methods.items()}

    def overridden(self, optimizer: FusedOptimizer) -> str | None:
        """Names a method that the optimizer overrides and only torch's step calls; None if there is none."""
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
        """Says whether the moments and scalars of a parameter must be created before the step."""
        return all(name in reference.MASTERS for name in entries.keys())  # noqa: SIM118

    def create_state(self, optimizer: FusedOptimizer, group: Group) -> None:
        """Creates the state of ``group["params"]``, all of which have a gradient and none of which has a state."""
        self.torch_class._init_group(optimizer, group, [], [], [], [], [], [])


def _wraps(function: Any, original: Any) -> bool:
    """Says whether a function is the original, in no wrappers except torch's."""
    while function is not original:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(_TORCH) or not hasattr(function, "__wrapped__"):
            return False
        function = function.__wrapped__
    return True
