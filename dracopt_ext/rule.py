"""Declares the update rules: engines, optimizer classes, checkpoints and tests derive from this what they must know."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

NUMBER, DECAY_RATES, FLAG = "number", "decay_rates", "flag"
"""The kinds of hyperparameters. Decay rates are a pair of numbers, each at least 0 and less than 1."""
_KINDS = {"float": NUMBER, "tuple[float, float]": DECAY_RATES, "bool": FLAG}
"""The kind of a hyperparameter, by its annotation in the rule's function."""

Update = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Rule:
    """An update rule. csrc/rules must declare the same; :func:`differences` compares."""

    update: Update
    """Updates a tensor: see dracopt_ext/reference.py. The keyword-only arguments are the hyperparameters, in the order
    of csrc/rules. Each is annotated as ``float``, ``bool`` or, for decay rates, ``tuple[float, float]``."""
    moments: Mapping[str, str | None]
    """A state's entries that are tensors like the parameter, in the kernels' order. Each comes with the hyperparameter
    whose being 0 or false removes the moment; None if the state always has the moment."""
    state_scalars: Mapping[str, float]
    """A state's entries that the rule advances itself, with their values before the first step. The first of them is
    ``step``. If there are none, a missing moment is created, even beside others."""
    first_step_fills: bool
    """The first step fills the moments without reading them. Otherwise they begin as zeros."""

    def __post_init__(self) -> None:
        found = inspect.getfullargspec(self.update)
        for name in found.kwonlyargs:
            if found.annotations.get(name) not in _KINDS:
                raise TypeError(f"rule {self.name!r}: annotate {name!r} as one of {', '.join(_KINDS)}")
        for moment, switch in self.moments.items():
            if switch is not None and switch not in found.kwonlyargs:
                raise TypeError(f"rule {self.name!r}: the switch {switch!r} of {moment!r} is no hyperparameter")
        if self.state_scalars and next(iter(self.state_scalars)) != "step":
            raise TypeError(f"rule {self.name!r}: the first of the state scalars must be 'step', the count of steps")

    @property
    def name(self) -> str:
        return self.update.__name__

    @functools.cached_property
    def kinds(self) -> dict[str, str]:
        """The kinds of the hyperparameters, by the keys of the parameter group."""
        found = inspect.getfullargspec(self.update)
        return {name: _KINDS[found.annotations[name]] for name in found.kwonlyargs}

    def moments_of(self, group: Mapping[str, Any]) -> list[str]:
        """Returns the names of the moments that a parameter of this group has."""

        def is_on(switch: str) -> bool:
            value = group[switch]
            return bool(value) if self.kinds[switch] == FLAG else bool(value != 0)

        return [name for name, switch in self.moments.items() if switch is None or is_on(switch)]

    def stream_of(self, moment: str) -> int:
        """Returns the number of a moment's stream, by which its random bits differ from those of other streams."""
        return FIRST_STATE + list(self.moments).index(moment)


RULES: dict[str, Rule] = {}
"""All rules by name. :func:`declare_rule` adds them."""
PARAM, FIRST_STATE = 0, 2
"""The numbers of streams: the parameter and the first moment. The gradient is stream 1."""
MASTER_KEYS = ("master", "master_remainder")
"""A state's entries that may hold the parameter's master: the whole one, or its lower half."""


def declare_rule(
    *,
    moments: Mapping[str, str | None],
    state_scalars: Mapping[str, float] | None = None,
    first_step_fills: bool = False,
) -> Callable[[Update], Update]:
    """Declares the decorated function as a rule; the arguments are fields of :class:`Rule`.

    Raises:
        TypeError: the declaration is incomplete.
    """

    def declare(update: Update) -> Update:
        RULES[update.__name__] = Rule(update, moments, state_scalars or {}, first_step_fills)
        return update

    return declare


def differences(compiled: Mapping[str, Any]) -> list[str]:
    """Returns how the rules of the compiled module, as its ``rules()`` describes them, differ from these."""
    found = [f"csrc/rules/all.h does not list the rule {name!r}" for name in RULES.keys() - compiled.keys()]
    found += [f"dracopt_ext/reference.py has no rule {name!r}" for name in compiled.keys() - RULES.keys()]
    for name in RULES.keys() & compiled.keys():
        ours, theirs = RULES[name], compiled[name]
        for what, here, there in (
            ("hyperparameters", list(ours.kinds.items()), list(theirs.group_keys.items())),
            ("moments", list(ours.moments), list(theirs.state_keys)),
            ("state scalars", list(ours.state_scalars), list(theirs.state_scalar_keys)),
        ):
            if here != there:
                found.append(f"the {what} of {name!r} are {here} in dracopt_ext/reference.py and {there} in csrc/rules")
    return sorted(found)
