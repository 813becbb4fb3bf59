"""Loads checkpoints so that states keep their dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from .. import reference
from ..containers import describe
from ..rule import MASTER_KEYS
from ._context import context_of
from ._precision import Precision, to_split

if TYPE_CHECKING:
    from ._base import FusedOptimizer


WHOLE_MASTERS = ("master", "master_param")
"""The names of a whole master in a state: ours, and that of TransformerEngine."""
ALL_MASTERS = (*MASTER_KEYS, "master_param")


def _pairs(optimizer: FusedOptimizer, saved: StateDict) -> Iterator[tuple[int, int, Tensor, Any]]:
    """Yields the parameters with the indices of their groups and their own, and their saved states."""
    ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
    for g, group in enumerate(optimizer.param_groups):
        for i, (p, saved_id) in enumerate(zip(group["params"], ids, strict=False)):
            yield g, i, p, saved["state"].get(saved_id, {})


def _saved_master(precision: Precision, p: Tensor, entries: Any) -> str | None:
    """Returns the name of the entry from which a parameter's master is loaded; None if there is none."""
    name = precision.master_of(p)
    names = () if name is None else (name, *WHOLE_MASTERS)
    return next((name for name in names if name in entries), None)


def check_loaded(optimizer: FusedOptimizer, saved: StateDict) -> StateDict:
    """Raises ValueError if a master of a checkpoint cannot be that of its parameter. Returns the checkpoint."""
    precision = context_of(optimizer).precision
    for g, i, p, entries in _pairs(optimizer, saved):
        name, parameter = _saved_master(precision, p, entries), partial(describe, optimizer.param_groups, g, i)
        if name is None:
            if precision.master_of(p) == "master" and "master_remainder" in entries:
                raise ValueError(
                    f"the checkpoint has only the lower half of the master of {parameter()}. Load it with "
                    "master_weights='split16', or delete 'master_remainder' to begin from the parameter"
                )
            continue
        master, dtype = entries[name], torch.float32 if name in WHOLE_MASTERS else torch.bfloat16
        if not isinstance(master, Tensor):
            raise ValueError(f"{name!r} of {parameter()} must be a tensor, not {type(master).__name__}")
        if master.shape != p.shape:
            raise ValueError(f"{name!r} of {parameter()} has another shape, {list(master.shape)}")
        if master.dtype != dtype:
            raise ValueError(
                f"{name!r} of {parameter()} must be in {dtype}, not {master.dtype}. Delete it to begin from the "
                "parameter"
            )
    return saved


def without_masters(optimizer: FusedOptimizer, saved: StateDict) -> StateDict:
    """Returns what torch is to load: it would round masters, and takes no state that has nothing else."""
    precision = context_of(optimizer).precision
    state = dict(saved["state"])
    ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
    for (_, _, p, entries), saved_id in zip(_pairs(optimizer, saved), ids, strict=False):
        has_master = precision.master_of(p) is not None
        masters = [name for name in ALL_MASTERS if name in entries and (has_master or _is_ours(name, entries[name], p))]
        if masters:
            state[saved_id] = {name: value for name, value in entries.items() if name not in masters}
    return {**saved, "state": state}


def _is_ours(name: str, value: Any, p: Tensor) -> bool:
    """Says whether an entry is a master of ours, and not one that a user has given this name."""
    return name in MASTER_KEYS and isinstance(value, Tensor) and value.shape == p.shape


def take_over(optimizer: FusedOptimizer, saved: StateDict) -> None:
    """Replaces the tensors that torch has just loaded from ``saved`` by copies in the dtypes that we keep."""
    precision = context_of(optimizer).precision
    for _, _, p, entries in _pairs(optimizer, saved):
        for name, value in entries.items():
            loaded = None if name in ALL_MASTERS else optimizer.state[p][name]
            if not isinstance(value, Tensor) or not isinstance(loaded, Tensor):
                continue
            dtype = loaded.dtype
            if name in reference.MOMENTS:
                dtype = precision.dtype_of(name) or dtype
            elif name in reference.STATE_SCALARS and name != "step":
                dtype = value.dtype if value.dtype == torch.float64 else torch.float32
            if loaded is value or loaded.dtype != dtype:
                optimizer.state[p][name] = value.to(device=loaded.device, dtype=dtype, copy=True)
        master = precision.master_of(p)
        if entries and master is not None:
            optimizer.state[p][master] = _loaded_master(precision, p, entries)


def _loaded_master(precision: Precision, p: Tensor, entries: Any) -> Tensor:
    """Returns a parameter's master, or its lower half, from a checkpoint that may have either."""
    name = _saved_master(precision, p, entries)
    if name is None:
        return precision.new_master(p)
    master: Tensor = entries[name].to(device=p.device, copy=True)
    return to_split(master, p) if name in WHOLE_MASTERS and precision.master_weights == "split16" else master
