"""Says in which dtypes an optimizer keeps its moments, and what becomes of the bits that parameters in 16 bits lose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import reference
from ..containers import describe, entries_of
from ..rule import MASTER_KEYS

if TYPE_CHECKING:
    from ._base import FusedOptimizer
    from ._step import Step

StateDtype = torch.dtype | Mapping[str, torch.dtype] | None
"""The dtype of all moments, or dtypes by the moments' names. None, or a missing name, stands for the parameter's."""

SHORT = (torch.bfloat16, torch.float16)
STATE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MASTERS = dict(zip(("fp32", "split16"), MASTER_KEYS, strict=True))
"""The forms of masters, with the names of their states."""
ROUNDING_STEPS = "rounding_steps"
"""The key of a parameter group that counts its steps, by which streams are rounded at random."""


@dataclass(frozen=True)
class Precision:
    """A precision is what the user asked for. The optimizers' docstrings describe the fields."""

    state_dtype: StateDtype = None
    master_weights: str | None = None
    stochastic_rounding: bool | str = False
    rounding_seed: int = 0

    def check(self, moments: Iterable[str]) -> None:
        """Raises ValueError for an option that cannot be right. ``moments`` are the names that the class has."""
        dtypes = self.state_dtype
        if isinstance(dtypes, Mapping):
            for name in dtypes:
                if name not in moments:
                    raise ValueError(f"state_dtype has the key {name!r}; the moments are {', '.join(moments)}")
        for dtype in dtypes.values() if isinstance(dtypes, Mapping) else (dtypes,):
            if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in STATE_DTYPES):
                names = ", ".join(map(str, STATE_DTYPES))
                raise ValueError(f"state_dtype={dtypes!r} is none of {names}; None stands for the parameter's own")
        if self.master_weights not in (None, *MASTERS):
            raise ValueError(f"master_weights={self.master_weights!r} is none of None, 'fp32' and 'split16'")
        if not isinstance(self.stochastic_rounding, bool) and self.stochastic_rounding != "all":
            raise ValueError(f"stochastic_rounding={self.stochastic_rounding!r} is none of False, True and 'all'")
        if self.stochastic_rounding is True and self.master_weights is not None:
            raise ValueError(
                "stochastic_rounding=True has nothing to do beside master_weights, which keep what rounding takes. "
                "Leave one of them out, or round the moments in 16 bits by stochastic_rounding='all'"
            )
        if not isinstance(self.rounding_seed, int):
            raise TypeError(f"rounding_seed must be an int, not {type(self.rounding_seed).__name__}")
        if not 0 <= self.rounding_seed < 2**64:
            raise ValueError(f"rounding_seed is {self.rounding_seed}; it must be at least 0 and less than 2^64")

    def dtype_of(self, moment: str) -> torch.dtype | None:
        """Returns the dtype of a moment; None stands for the parameter's."""
        return self.state_dtype.get(moment) if isinstance(self.state_dtype, Mapping) else self.state_dtype

    def dtypes(self) -> set[torch.dtype]:
        """Returns the dtypes that were asked for."""
        return {dtype for name in reference.MOMENTS if (dtype := self.dtype_of(name)) is not None}

    def master_of(self, p: Tensor) -> str | None:
        """Returns the name of the state that holds a parameter's master; None if the parameter has none."""
        return MASTERS[self.master_weights] if self.master_weights is not None and is_short(p) else None

    def rounds(self, p: Tensor) -> bool:
        """Says whether a parameter's update does more about rounding than torch's."""
        if self.stochastic_rounding == "all":
            moments = [self.dtype_of(name) or p.dtype for name in reference.MOMENTS]
            return any(dtype in SHORT for dtype in (p.dtype, *moments))
        return self.master_of(p) is not None or bool(self.stochastic_rounding and is_short(p))

    def new_master(self, p: Tensor) -> Tensor:
        """Returns the state of a parameter that is its own master so far."""
        if self.master_weights == "fp32":
            return p.detach().to(torch.float32, copy=True)
        return torch.zeros_like(p, requires_grad=False)

    def master_dtype(self) -> torch.dtype:
        return torch.float32 if self.master_weights == "fp32" else torch.bfloat16


def is_short(p: Tensor) -> bool:
    return p.dtype in SHORT


def check_group(optimizer: FusedOptimizer, precision: Precision, group_index: int) -> None:
    """Raises ValueError if a parameter of the group cannot have what was asked for."""
    for index, p in enumerate(optimizer.param_groups[group_index]["params"]):
        if p.is_complex() and precision.dtypes():
            _refuse(optimizer, group_index, index, f"state_dtype={precision.state_dtype} serves real parameters only")
        if precision.master_weights is not None and not p.is_floating_point():
            masters = f"master_weights={precision.master_weights!r}"
            _refuse(optimizer, group_index, index, f"{masters} serves real floating-point parameters only")
        if precision.master_weights == "split16" and p.dtype == torch.float16:
            what = (
                "master_weights='split16' serves bf16 only, whose numbers are the upper halves of fp32's; fp16 takes "
            )
            _refuse(optimizer, group_index, index, what + "master_weights='fp32'")


def _refuse(
    optimizer: FusedOptimizer, group_index: int, index: int, what: str, remedy: str = "give it an optimizer of its own"
) -> None:
    p = optimizer.param_groups[group_index]["params"][index]
    raise ValueError(f"{what}, but {describe(optimizer.param_groups, group_index, index)} is {p.dtype}; {remedy}")


def check_use(optimizer: FusedOptimizer, precision: Precision) -> None:
    """Raises ValueError if an option has nothing to do for any of the parameters."""
    shorts = [is_short(p) for group in optimizer.param_groups for p in group["params"]]
    if any(shorts) or not shorts:
        return
    serves_moments = precision.stochastic_rounding == "all" and any(d.itemsize == 2 for d in precision.dtypes())
    for option in ("master_weights", "stochastic_rounding"):
        value = getattr(precision, option)
        if value and not (option == "stochastic_rounding" and serves_moments):
            remedy = f"convert the model first, or leave `{option}` out"
            _refuse(optimizer, 0, 0, f"{option}={value!r} is for parameters in bf16 or fp16", remedy)


def master_params(optimizer: FusedOptimizer, precision: Precision) -> list[Tensor]:
    """Returns what the parameters are rounded from."""
    masters = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            entries = entries_of(optimizer.state, p)
            name = precision.master_of(p)
            if name is None:
                masters.append(p)
            elif name not in entries.keys():  # noqa: SIM118
                masters.append(p.detach().to(torch.float32, copy=True))
            else:
                masters.append(_like(p, reference.current_master(_local(p.detach()), _local(entries[name]))))
    return masters


def to_split(master: Tensor, p: Tensor) -> Tensor:
    """Turns an fp32 master into the lower half of a bf16 parameter's master.

    Other libraries round ties to even. Then the nearest number is taken that rounds to the parameter by our rule, which
    is less by one unit in the last place.
    """
    bits, of_param = (_local(t).to(torch.float32).view(torch.int32) for t in (master, p.detach()))
    is_odd_tie = bits - of_param == 0x8000
    rest = torch.where(is_odd_tie, 0x7FFF, (bits & 0xFFFF ^ 0x8000) - 0x8000)
    return _like(p, rest.to(torch.int16).view(torch.bfloat16))


# ---- distributed tensors: each process treats the elements that it holds


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _like(p: Any, local: Tensor) -> Tensor:
    """Returns a local tensor as one that is distributed like a parameter."""
    if not hasattr(p, "to_local"):
        return local
    from torch.distributed.tensor import DTensor

    whole: Tensor = DTensor.from_local(
        local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return whole


def steps_of(group: Any) -> int:
    """Returns a group's count of steps, by which streams are rounded at random."""
    try:
        return int(group[ROUNDING_STEPS])
    except KeyError:
        return 0


def advance(group: Any, steps: int) -> None:
    group[ROUNDING_STEPS] = steps_of(group) + steps


Shard = tuple[int, int, int, list[int]]
"""A parameter's group index and own index, the number of the shard's first element in the whole tensor, and the whole
tensor's strides."""


def at_random(step: Step) -> tuple[int, bool, list[int], int, list[Shard]]:
    """Describes to a plan how this step rounds at random; see csrc/bindings/step_plan.h."""
    precision = step.context.precision
    steps = [steps_of(group) % 2**32 for group in step.groups]
    shards = []
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for g, group in enumerate(step.groups):
            for i, p in enumerate(group["params"]):
                if hasattr(p, "placements"):
                    shards.append((g, i, *step.context.place_of_shard(p)))
    return precision.rounding_seed, precision.stochastic_rounding == "all", steps, step.first_param, shards


def place_of_shard(p: Any) -> tuple[int, list[int]]:
    """Returns the number of a shard's first element in the whole tensor, and the whole tensor's strides."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    strides = list(p.stride())
    return sum(offset * stride for offset, stride in zip(offsets, strides, strict=False)), strides
