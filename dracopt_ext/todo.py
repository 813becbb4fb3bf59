"""Describes what a plan leaves to Python: states to create, and unsupported parameters with facts about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Index = tuple[int, int]
"""The index of a group, and the index of a parameter in this group."""
Run = tuple[int, int, int]
"""Neighbouring parameters: the index of their group, the index of the first one, and the index after the last."""
Scaler = tuple[Tensor | None, Tensor | None]
"""GradScaler's tensors ``found_inf`` and ``grad_scale``, for the kernels to read."""
Clipping = tuple[float, Tensor, bool, bool, Callable[[list[tuple[Any, int, float]]], float]]
"""How to clip, as csrc/bindings/gpu_launches.h says: the largest norm, where the norm is written, two flags, and what
adds sums over processes."""
Unsupported = tuple[int, int, str, int]
"""An unsupported parameter: its group's index, its own index, the reason, and its form, a sum of the flags below."""

NEW = 1
"""The parameter's state is missing, in part or as a whole."""
MIXED = 2
"""torch cannot step the tensors as we do: their dtypes differ, the gradient is a conjugate view, or a gradient in 16
bits must be divided or multiplied, after which torch would round once more."""
SPARSE = 4
"""The gradient is sparse."""
FUSABLE = 8
"""torch's fused CPU kernels, which ignore strides and sizes, are right for the parameter's tensors.

All tensors are plain ones, contiguous, and have one shape and one dtype. Their memory suffices, and no other tensor
shares it. The state scalars are in fp32.
"""


class Todo(NamedTuple):
    """Lists what must be done before a plan can run, or in its place."""

    missing: list[Run]
    """Parameters whose state must be created."""
    unsupported: list[Unsupported]
    """Parameters that the kernels do not serve."""
    host_decides: bool
    """The host must read the scaler's numbers before anything is done."""
    nothing_left: bool
    """The kernels serve no parameter at all."""


_FUSABLE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SHORT = (torch.bfloat16, torch.float16)


def form_of(
    p: Tensor,
    grad: Tensor,
    state_scalars: Sequence[Any],
    moments: Sequence[Any],
    *,
    new: bool,
    may_fuse: bool,
    adjusts: bool,
) -> int:
    """Returns the form of a parameter with a gradient, as csrc/bindings/todo.cpp does.

    ``adjusts`` says whether the gradient is divided or multiplied first. ``state_scalars`` and ``moments`` are the
    scalars and tensors of the parameter's state, or None if they have yet to be created.
    """
    form = NEW if new else 0
    if grad.is_sparse:
        return form | SPARSE
    if grad.layout is not torch.strided:
        return form
    dtype = p.dtype
    mixed = grad.dtype is not dtype or grad.is_conj() or (adjusts and dtype in _SHORT)
    for moment in moments:
        mixed = mixed or (isinstance(moment, Tensor) and moment.dtype is not dtype)
    if mixed:
        return form | MIXED
    if may_fuse and dtype in _FUSABLE_DTYPES and _is_fusable(p, grad, state_scalars, moments):
        form |= FUSABLE
    return form


def _is_fusable(p: Tensor, grad: Tensor, state_scalars: Sequence[Any], moments: Sequence[Any]) -> bool:
    tensors = [tensor for tensor in (p, grad, *moments) if tensor is not None]
    scalars = [scalar for scalar in state_scalars if scalar is not None]
    return all(map(_lies_simply, (*tensors, *scalars))) and (
        all(tensor.shape == tensors[0].shape for tensor in tensors)
        and all(scalar.dtype == torch.float32 and scalar.numel() == 1 for scalar in scalars)
    )


def _lies_simply(tensor: Any) -> bool:
    """Says whether a tensor, and no wrapper, lies contiguously in the host's memory and its storage is large enough."""
    if not isinstance(tensor, Tensor) or not tensor.is_cpu or not tensor.is_contiguous():
        return False
    if type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        return False
    end = (tensor.storage_offset() + tensor.numel()) * tensor.itemsize
    return tensor.numel() == 0 or end <= tensor.untyped_storage().nbytes()
