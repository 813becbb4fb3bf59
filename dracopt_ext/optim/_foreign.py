"""Translates checkpoints of other libraries that keep masters in fp32 into the form that torch's classes have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from ._precision import is_short

if TYPE_CHECKING:
    from ._base import FusedOptimizer

_WRAPPERS = (
    ("optimizer_state_dict", "fp32_from_fp16"),  # apex's FP16_Optimizer
    ("optimizer_state_dict", "fp32_groups_flat"),  # DeepSpeed's FP16_Optimizer
    ("optimizer", "fp32_from_fp16_params"),  # Megatron's Float16OptimizerWithFloat16Params
)
"""The keys of the inner optimizer's dict, and of its masters by group: a list of tensors, or one flat tensor."""


def translated(optimizer: FusedOptimizer, state_dict: StateDict) -> StateDict:
    """Returns a dict that torch's classes load.

    The masters of a wrapper become entries ``master`` of the states. A group's count of steps, which the fused
    optimizers of apex and TransformerEngine keep, becomes each parameter's.

    Raises:
        ValueError: there are not as many masters as parameters in 16 bits, or a flat tensor is too short.
    """
    for inner, masters in _WRAPPERS:
        if "param_groups" not in state_dict and inner in state_dict and masters in state_dict:
            state_dict = _unwrapped(optimizer, state_dict[inner], state_dict[masters])
    if not optimizer._dracopt_kind.rule.state_scalars:
        return state_dict
    groups, state = [], dict(state_dict["state"])
    for group in state_dict["param_groups"]:
        moment = next(iter(optimizer._dracopt_kind.rule.moments))
        lacking = [key for key in group["params"] if moment in state.get(key, {}) and "step" not in state[key]]
        if "step" not in group or not lacking:
            groups.append(group)
            continue
        groups.append({key: value for key, value in group.items() if key != "step"})
        state.update({key: {"step": torch.tensor(float(group["step"])), **state[key]} for key in lacking})
    return {**state_dict, "state": state, "param_groups": groups}


def _unwrapped(optimizer: FusedOptimizer, inner: StateDict, masters: Sequence[Any]) -> StateDict:
    for found, what in ((masters, "masters for"), (inner["param_groups"], "states for")):
        if len(found) != len(optimizer.param_groups):
            raise ValueError(f"the checkpoint has {what} {len(found)} groups, not {len(optimizer.param_groups)}")
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for index, (group, saved, of_group) in enumerate(
        zip(optimizer.param_groups, inner["param_groups"], masters, strict=True)
    ):
        first = sum(len(g["params"]) for g in groups)
        groups.append({**saved, "params": list(range(first, first + len(group["params"])))})
        shapes = [p.shape for p in group["params"]]
        if isinstance(of_group, Tensor):
            flat = {**inner["state"].get(saved["params"][0], {}), "master": of_group}
            pieces = {name: _split(name, flat[name], shapes, index) for name in ("master", *(flat.keys() - {"master"}))}
            entries = [{name: parts[i] for name, parts in pieces.items()} for i in range(len(shapes))]
        else:
            if len(saved["params"]) != len(shapes):
                raise ValueError(
                    f"group {index} of the checkpoint has {len(saved['params'])} parameters, not {len(shapes)}"
                )
            entries = [dict(inner["state"].get(key, {})) for key in saved["params"]]
            shorts = [i for i, p in enumerate(group["params"]) if is_short(p) and p.requires_grad]
            if len(shorts) != len(of_group):
                raise ValueError(
                    f"group {index} of the checkpoint has {len(of_group)} masters for {len(shorts)} parameters in 16 "
                    "bits. Load the model in its dtype first"
                )
            for i, master in zip(shorts, of_group, strict=True):
                entries[i]["master"] = master.detach()
        state.update(enumerate(entries, first))
    return {"state": state, "param_groups": groups}


def _split(name: str, value: Any, shapes: list[torch.Size], group_index: int) -> list[Any]:
    """Returns the parts of a flat tensor. It may be longer than all, and a scalar belongs to all."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return [value for _ in shapes]
    sizes = [shape.numel() for shape in shapes]
    if value.numel() < sum(sizes):
        raise ValueError(
            f"{name!r} of group {group_index} in the checkpoint has {value.numel()} elements for {sum(sizes)} in the "
            "parameters. A partition of ZeRO must be put together first"
        )
    parts = torch.split(value.detach().flatten()[: sum(sizes)], sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
