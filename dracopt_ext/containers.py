"""Turns parameter groups and states, whatever their types, into plain lists, dicts, numbers and flags.

A plan reads exact lists, dicts and strings, Python's own numbers, and tensors, without their methods. Any other object
may have methods of its own. This module reads such an object through its methods, into objects that a plan can read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .reference import MOMENTS, STATE_SCALARS
from .rule import DECAY_RATES, FLAG, MASTER_KEYS

Group = dict[str, Any]


_FLAGS = ("maximize", "fused", "differentiable", "capturable")
_TEXT = (str, bytes, bytearray)


def is_plain_dict(mapping: Any) -> bool:
    """Says whether an object is a dict in which no key has methods of its own."""
    return type(mapping) is dict and all(type(key) is str for key in mapping)


def plain_groups(
    param_groups: Any, defaults: Mapping[str, Any], hyperparameters: Mapping[str, str] | None = None
) -> list[Group]:
    """Returns the groups as dicts, with ``params`` in lists, pairs such as ``betas`` in tuples, and plain numbers.

    Args:
        param_groups: the groups of an optimizer.
        defaults: has the keys that a group may hold without listing them.
        hyperparameters: the kinds of the rule's hyperparameters, by key. With None, these and all flags stay as they
            are.

    Raises:
        TypeError, ValueError: an object is one that torch could not read either, or an iterator, which would be empty
            in the next step. Errors of an object's own methods pass through, except a TypeError, ValueError or
            OverflowError by which an object says that it is no number.
    """
    if iter(param_groups) is param_groups:
        raise TypeError(f"param_groups must be a list of dicts or another sequence, not {type(param_groups).__name__}")
    groups = []
    for index, group in enumerate(param_groups):
        name = f"param_groups[{index}]"
        plain = _as_dict(group, name, ("params", *defaults))
        if plain is not group:
            plain.update({key: group[key] for key in ("params", *defaults) if key not in plain and _knows(group, key)})
        changed: Group = {}
        if type(plain.get("params")) is not list:
            changed["params"] = _as_list(plain.get("params"), f"{name}['params']")
        kinds = {} if hyperparameters is None else {**dict.fromkeys(_FLAGS, FLAG), **hyperparameters}
        for key, kind in kinds.items():
            if key not in plain:
                continue
            value = plain[key]
            if kind == FLAG:
                changed[key] = value if value is None else bool(value)
            elif kind == DECAY_RATES:
                numbers = as_tuple(value, f"{name}[{key!r}]")
                changed[key] = tuple([as_number(number, f"{name}[{key!r}]") for number in numbers])
            else:
                changed[key] = as_number(value, f"{name}[{key!r}]")
        groups.append({**plain, **changed})
    return groups


def plain_state(groups: list[Group], state: Any) -> dict[Tensor, dict[str, Any]]:
    """Returns the states of the groups' parameters that have one, by parameter."""
    plain = {}
    for group_index, group in enumerate(groups):
        for index, p in enumerate(group["params"]):
            if isinstance(p, Tensor) and p in state:
                plain[p] = _as_dict(
                    state[p],
                    f"the state of parameter {index} of group {group_index}",
                    (*STATE_SCALARS, *MOMENTS, *MASTER_KEYS),
                )
    return plain


def entries_of(state: Any, p: Tensor) -> Any:
    """Returns a parameter's state, or an empty one if the parameter has none."""
    if p in state:
        return state[p]
    return {}


def describe(groups: Any, group_index: int, index: int) -> str:
    """Names a parameter for errors: by its indices, its name if it has one, its shape, and where it is distributed."""
    group = groups[group_index]
    name = f"{group['param_names'][index]!r}, " if group.get("param_names") else ""
    p = group["params"][index]
    is_distributed = hasattr(p, "device_mesh") and hasattr(p, "placements")
    where = f" over {p.device_mesh} by {p.placements}" if is_distributed else ""
    return f"parameter {index} of group {group_index} ({name}shape {list(p.shape)}{where})"


def restore(state: Any, p: Tensor, entries: dict[str, Any] | None) -> None:
    """Gives a parameter's state these entries and no others; removes the state if they are None."""
    if entries is None and p not in state:
        return
    now = state[p]
    for key in [key for key in now.keys() if key not in (entries or {})]:  # noqa: SIM118
        del now[key]
    for key, value in (entries or {}).items():
        now[key] = value
    if entries is None:
        del state[p]


def _as_dict(mapping: Any, name: str, ours: Iterable[str]) -> dict[str, Any]:
    """Returns a mapping as a plain dict. ``ours`` are the keys that we read."""
    if is_plain_dict(mapping):
        return mapping  # type: ignore[no-any-return]
    if not (hasattr(mapping, "keys") and hasattr(mapping, "__getitem__")):
        raise TypeError(f"{name} must be a dict or another mapping, not {type(mapping).__name__}")
    keys = list(mapping.keys())  # a mapping need not iterate over its keys
    plain = {key: mapping[key] for key in keys if type(key) is str}
    if len(plain) < len(keys):  # another key may be equal to one of ours
        plain.update({key: mapping[key] for key in ours if key not in plain and key in mapping})
    return plain


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


def as_tuple(numbers: Any, name: str) -> tuple[Any, ...]:
    """Returns a pair of numbers as a tuple. Raises TypeError, naming it, if it is not iterable, or an iterator."""
    try:
        if iter(numbers) is not numbers:  # an iterator would be empty the next time
            return tuple(numbers)
    except TypeError:
        pass
    raise TypeError(f"{name} must be 2 numbers, not a {type(numbers).__name__}")


def as_number(value: Any, name: str) -> float | Tensor:
    """Returns what stands for a number as a float, and a Tensor as it is.

    Raises:
        TypeError: it is no number. The error calls it ``name``.
        ValueError: it is too large for a float.
    """
    if isinstance(value, (float, Tensor)):
        return value
    try:
        if isinstance(value, _TEXT):  # float() would read text
            raise TypeError
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} is too large for a float") from error
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, not {type(value).__name__}") from error
