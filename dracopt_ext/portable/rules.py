"""Describes the update rules to a plan. Their mathematics is in the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..reference import hyperparameters
from .momentum import momentum


class Rule(NamedTuple):
    """A rule, with the names that csrc/rules gives."""

    name: str
    group_keys: tuple[str, ...]
    """Keys of the parameter group; decay rates are two numbers each."""
    numbers: int
    """How many numbers ``group_keys`` yield."""
    state_scalar_keys: tuple[str, ...]
    """Keys of the state scalars; the step count is the first."""
    state_keys: tuple[str, ...]
    """Keys of the state's tensors."""
    states: Callable[[Sequence[float]], int]
    """Returns how many of ``state_keys`` a state has, from the hyperparameters."""
    factors: Callable[..., tuple[float, ...]] = lambda step, hyperparameters: ()
    """Returns the factors of the state scalars after the step count, if the host holds them."""


_MOMENTS = ("exp_avg", "exp_avg_sq")

RULES = {
    rule.name: rule
    for rule in (
        Rule(
            "adam",
            hyperparameters("adam"),
            7,
            ("step",),
            (*_MOMENTS, "max_exp_avg_sq"),
            lambda h: 3 if h[5] != 0 else 2,
        ),
        Rule(
            "nadam",
            hyperparameters("nadam"),
            7,
            ("step", "mu_product"),
            _MOMENTS,
            lambda h: 2,
            lambda step, h: (momentum(step, h[1], h[5]),),
        ),
        Rule("sgd", hyperparameters("sgd"), 5, (), ("momentum_buffer",), lambda h: 1 if h[1] != 0 else 0),
    )
}
