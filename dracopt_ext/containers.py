"""Parameter groups and states in lists and dicts, whatever containers their user keeps them in.

A plan reads exact lists and dicts, past their methods. Any other container may answer by methods of its own: it is
read through them, into a list or dict that a plan can read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .reference import DECAY_RATES

Group = dict[str, Any]


class NotPlainError(Exception):
    """Raised inside of a plan that meets a container it does not read."""


def is_plain_state(state: Any) -> bool:
    """Is an optimizer's state one that a plan reads, apart from its entries?"""
    return type(state) in (dict, defaultdict)


def plain_groups(param_groups: Any, defaults: Mapping[str, Any]) -> list[Group]:
    """The parameter groups as dicts, with ``params`` in lists and pairs such as ``betas`` in tuples.

    ``defaults`` names the keys that a group may know without listing them.

    Raises:
        TypeError: for what torch could not read either, and for an iterator, which would be empty in the next step.
    """
    if iter(param_groups) is param_groups:
        raise TypeError(f"param_groups must be a list of dicts or another sequence, not {type(param_groups).__name__}")
    groups = []
    for index, group in enumerate(param_groups):
        name = f"param_groups[{index}]"
        plain = _as_dict(group, name)
        if plain is not group:
            plain.update({key: group[key] for key in ("params", *defaults) if key not in plain and _knows(group, key)})
        changed: Group = {}
        if type(plain.get("params")) is not list:
            changed["params"] = _as_list(plain.get("params"), f"{name}['params']")
        for key in DECAY_RATES:
            if key in plain and type(plain[key]) not in (tuple, list):
                changed[key] = _as_tuple(plain[key], f"{name}[{key!r}]")
        groups.append({**plain, **changed} if changed else plain)
    return groups


def plain_state(groups: list[Group], state: Any) -> dict[Tensor, dict[str, Any]]:
    """The states of these groups' parameters that have one, by parameter."""
    plain = {}
    for group_index, group in enumerate(groups):
        for index, p in enumerate(group["params"]):
            if isinstance(p, Tensor) and p in state:
                plain[p] = _as_dict(state[p], f"the state of parameter {index} of group {group_index}")
    return plain


def entries_of(state: Any, p: Tensor) -> Any:
    """A parameter's state; an empty one if there is none."""
    if p in state:
        return state[p]
    return {}


def restore(state: Any, p: Tensor, entries: dict[str, Any] | None) -> None:
    """Give a parameter's state these entries and no others; None if it had no state."""
    if entries is None and p not in state:
        return
    now = state[p]
    for key in [key for key in now.keys() if key not in (entries or {})]:  # noqa: SIM118
        del now[key]
    for key, value in (entries or {}).items():
        now[key] = value
    if entries is None:
        del state[p]


def _as_dict(mapping: Any, name: str) -> dict[Any, Any]:
    if type(mapping) is dict:
        return mapping
    if not (hasattr(mapping, "keys") and hasattr(mapping, "__getitem__")):
        raise TypeError(f"{name} must be a dict or another mapping, not {type(mapping).__name__}")
    return {key: mapping[key] for key in mapping.keys()}  # noqa: SIM118  (a mapping need not iterate over its keys)


def _knows(mapping: Any, key: str) -> bool:
    try:
        mapping[key]
    except KeyError:
        return False
    return True


def _as_list(params: Any, name: str) -> list[Any]:
    if isinstance(params, Tensor) or not isinstance(params, Iterable) or iter(params) is params:
        raise TypeError(f"{name} must be a list of tensors or another sequence, not {type(params).__name__}")
    return list(params)


def _as_tuple(numbers: Any, name: str) -> tuple[Any, ...]:
    try:
        return tuple(numbers)
    except TypeError:
        raise TypeError(f"{name} must be 2 numbers, not a {type(numbers).__name__}") from None
