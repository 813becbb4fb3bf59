"""Describes how the optimizer classes differ."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch.optim.optimizer import _device_dtype_check_for_fused

from .. import backend
from ..containers import Group
from ..rule import MASTER_KEYS, RULES, differences
from ._context import DEFAULTS, Options

if TYPE_CHECKING:
    from ._base import FusedOptimizer

_TORCH = os.path.join(os.path.dirname(torch.__file__), "")

if backend._C is not None and (_found := differences(backend._C.rules())):
    raise ImportError("; ".join(_found) + ". If the sources agree, run `make build`")


class Kind:
    """Describes an optimizer class, whose attribute it is.

    Args:
        rule: the name of its update rule, in :data:`dracopt_ext.rule.RULES`.
        torch_class: the class of torch that it replaces; None (default) if torch has none.
        takes_sparse: torch's class takes sparse gradients, except with ``fused=True`` (default False).
        sparse_error: the error for a sparse gradient that the class does not take, in torch's words if torch has any
            (default "NAME does not support sparse gradients").
        keeps_fused: torch's fused kernels for the CPU are right for this class, if they are right for the tensors
            (default True).
    """

    def __init__(
        self,
        rule: str,
        torch_class: Any = None,
        *,
        takes_sparse: bool = False,
        sparse_error: str = "{} does not support sparse gradients",
        keeps_fused: bool = True,
    ) -> None:
        if rule not in RULES:
            raise TypeError(f"no rule is named {rule!r}; dracopt_ext/reference.py has {', '.join(RULES)}")
        self.rule = RULES[rule]
        self.torch_class = torch_class
        self.takes_sparse = takes_sparse
        self.sparse_error = sparse_error
        self.keeps_fused = keeps_fused
        self.torch_step = None if torch_class is None else inspect.unwrap(torch_class.step)
        """torch's step for this class, without hooks and decorators."""
        names = () if self.torch_step is None else self.torch_step.__code__.co_names
        used = ((name, getattr(torch_class, name, None)) for name in names)
        self.methods: dict[str, Any] = {name: method for name, method in used if callable(method)}
        """The methods that torch's step calls on its class, and ours does not."""
        self.originals = {name: inspect.unwrap(method) for name, method in self.methods.items()}

    def belong_to(self, owner: type[FusedOptimizer]) -> None:
        """Becomes the kind of a class. Lists all options in the signature of its constructor, for those who read it.

        Raises:
            TypeError: the constructor does not take all hyperparameters of the rule, or not our options.
        """
        self.sparse_error = self.sparse_error.format(owner.__name__)
        init: Any = owner.__init__
        signature = inspect.signature(init)
        parameters = dict(signature.parameters)
        rest = [name for name, parameter in parameters.items() if parameter.kind is parameter.VAR_KEYWORD]
        if not rest:
            raise TypeError(f"{owner.__name__}.__init__ must take **options, and pass them on")
        del parameters[rest[0]]
        if self.torch_class is None:
            for name in self.rule.kinds.keys() - parameters.keys():
                raise TypeError(f"{owner.__name__}.__init__ must take {name!r}, a hyperparameter of {self.rule.name!r}")
            of_base = inspect.signature(super(owner, owner).__init__).parameters.items()
            parameters.update((name, p) for name, p in of_base if p.kind is p.KEYWORD_ONLY)
        for name, annotation in get_type_hints(Options).items():
            parameters[name] = inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=DEFAULTS[name],  # type: ignore[literal-required]
                annotation=annotation,
            )
        init.__signature__ = signature.replace(parameters=list(parameters.values()))
        annotations = {name: p.annotation for name, p in parameters.items() if p.annotation is not p.empty}
        init.__annotations__ = {**annotations, "return": signature.return_annotation}

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
        if self.rule.state_scalars:
            return all(name in MASTER_KEYS for name in entries.keys())  # noqa: SIM118
        return any(entries.get(name) is None for name in self.rule.moments_of(group))

    def create_state(self, optimizer: FusedOptimizer, group: Group) -> None:
        """Creates what the states of ``group["params"]`` lack, with torch's dtypes and on torch's devices."""
        fused = bool(group.get("fused"))
        is_wide = torch.get_default_dtype() == torch.float64 and not fused
        dtype = torch.float64 if is_wide else torch.float32
        for p in group["params"]:
            if fused:
                _device_dtype_check_for_fused(p)
            state = optimizer.state[p]
            device = p.device if fused or group.get("capturable") else "cpu"
            for name, value in self.rule.state_scalars.items():
                state[name] = torch.full((), value, dtype=dtype, device=device)
            for name in self.rule.moments_of(group):
                if state.get(name) is None:
                    new = torch.empty_like if self.rule.first_step_fills else torch.zeros_like
                    state[name] = new(p, memory_format=torch.preserve_format)


def _wraps(function: Any, original: Any) -> bool:
    """Says whether a function is the original, in no wrappers except torch's."""
    while function is not original:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(_TORCH) or not hasattr(function, "__wrapped__"):
            return False
        function = function.__wrapped__
    return True
