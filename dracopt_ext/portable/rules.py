"""What a plan knows of the update rules; their mathematics is the kernels'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .momentum import momentum


class Rule(NamedTuple):
    """Its names are those of csrc/rules."""

    name: str
    group_keys: tuple[str, ...]
    """Of the parameter group; decay rates are two numbers each."""
    hyperparameters: int
    """Numbers that ``group_keys`` yield."""
    carried_keys: tuple[str, ...]
    """Scalars of the parameter's state; the step count is the first."""
    state_keys: tuple[str, ...]
    """Streams of the parameter's state."""
    states: Callable[[Sequence[float]], int]
    """How many of them there are, by the hyperparameters."""
    factors: Callable[..., tuple[float, ...]] = lambda step, hyperparameters: ()
    """What the carried scalars after the step count are multiplied by, where the host holds them."""


_MOMENTS = ("exp_avg", "exp_avg_sq")
_ADAM_KEYS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "decoupled_weight_decay")
_NADAM_KEYS = ("lr", "betas", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay")
_SGD_KEYS = ("lr", "momentum", "dampening", "weight_decay", "nesterov")

RULES = {
    rule.name: rule
    for rule in (
        Rule("adam", _ADAM_KEYS, 7, ("step",), (*_MOMENTS, "max_exp_avg_sq"), lambda h: 3 if h[5] != 0 else 2),
        Rule(
            "nadam",
            _NADAM_KEYS,
            7,
            ("step", "mu_product"),
            _MOMENTS,
            lambda h: 2,
            lambda step, h: (momentum(step, h[1], h[5]),),
        ),
        Rule("sgd", _SGD_KEYS, 5, (), ("momentum_buffer",), lambda h: 1 if h[1] != 0 else 0),
    )
}
