"""Loads checkpoints so that states keep their dtypes."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from .. import reference
from ._engine import engine_of
from ._step import describe

if TYPE_CHECKING:
    from ._base import FusedOptimizer


def check_state_dtype(optimizer: FusedOptimizer, state_dtype: torch.dtype | None, group_index: int) -> None:
    """Raises ValueError if a parameter of the group cannot have moments of this dtype."""
    if state_dtype is None:
        return
    for index, p in enumerate(optimizer.param_groups[group_index]["params"]):
        if p.is_complex():
            raise ValueError(
                f"state_dtype={state_dtype} serves real parameters only, but "
                f"{describe(optimizer.param_groups, group_index, index)} is {p.dtype}; give complex parameters an "
                "optimizer of their own"
            )


def take_over(optimizer: FusedOptimizer, saved: StateDict) -> None:
    """Replaces the tensors that torch has just loaded from ``saved`` by copies in the dtypes that we keep."""
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
            elif name in reference.STATE_SCALARS and name != "step":
                dtype = value.dtype if value.dtype == torch.float64 else torch.float32
            if loaded is value or loaded.dtype != dtype:
                optimizer.state[p][name] = value.to(device=loaded.device, dtype=dtype, copy=True)
