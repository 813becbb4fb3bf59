"""Parameters that no backend serves, and the facts about them by which torch steps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Foreign = tuple[int, int, str, int]
"""A parameter, by the index of its group and its own in it; why no kernel serves it; and its form, a sum of these."""

NEW = 1
"""A part of its state is missing, or all of it."""
MIXED = 2
"""Its dtypes differ, or another property of its dense tensors that torch would refuse, or round where we do not."""
SPARSE = 4
"""Its gradient is sparse."""
FUSABLE = 8
"""torch's fused kernels for the CPU, which look at no strides and sizes, are right for its tensors.

They are all contiguous, of one shape and one dtype, with memory that suffices and that no other tensor shares; and the
step count is in fp32.
"""

UNDER_MODE = "steps under a TorchDispatchMode"
"""Why no parameter is served while there is one: it traces, counts or replaces operations of torch, not kernels."""
SHARES_MEMORY = "tensors that share memory"

_FUSABLE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SHORT = (torch.bfloat16, torch.float16)


def is_under_mode() -> bool:
    """Is a TorchDispatchMode active? torch keeps the modes of make_fx with ``pre_dispatch=True`` apart from others."""
    before_dispatch = torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
    return before_dispatch or torch._C._len_torch_dispatch_stack() > 0


def form_of(
    p: Tensor,
    grad: Tensor,
    carried: Sequence[Any],
    moments: Sequence[Any],
    *,
    new: bool,
    may_fuse: bool,
    grad_scale: float,
) -> int:
    """The form of a parameter with a gradient, as csrc/bindings/step_plan.cpp finds it for those that it reads.

    ``carried`` and ``moments`` are its state's scalars and tensors, None where they have yet to be created.
    """
    form = NEW if new else 0
    if grad.is_sparse:
        return form | SPARSE
    if grad.layout is not torch.strided:
        return form
    dtype = p.dtype
    mixed = grad.dtype is not dtype or grad.is_conj() or (grad_scale != 1 and dtype in _SHORT)
    for moment in moments:
        mixed = mixed or (isinstance(moment, Tensor) and moment.dtype is not dtype)
    if mixed:
        return form | MIXED
    if may_fuse and dtype in _FUSABLE_DTYPES and _is_fusable(p, grad, carried, moments):
        form |= FUSABLE
    return form


def _is_fusable(p: Tensor, grad: Tensor, carried: Sequence[Any], moments: Sequence[Any]) -> bool:
    tensors = [_local_of(tensor) for tensor in (p, grad, *moments) if tensor is not None]
    scalars = [_local_of(scalar) for scalar in carried if scalar is not None]
    return all(map(_lies_simply, (*tensors, *scalars))) and (
        all(tensor.shape == tensors[0].shape for tensor in tensors)
        and all(scalar.dtype == torch.float32 and scalar.numel() == 1 for scalar in scalars)
    )


def _local_of(tensor: Any) -> Any:
    """The tensor that holds a tensor's elements: the shard of a distributed one, or itself. None for other wrappers."""
    if not isinstance(tensor, Tensor):
        return None
    if type(tensor).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl:
        return tensor
    return getattr(tensor, "_local_tensor", None)


def _lies_simply(tensor: Any) -> bool:
    """Does a tensor lie contiguously in the host's memory, which suffices for it?"""
    if not isinstance(tensor, Tensor) or not tensor.is_cpu or not tensor.is_contiguous():
        return False
    end = (tensor.storage_offset() + tensor.numel()) * tensor.itemsize
    return tensor.numel() == 0 or end <= tensor.untyped_storage().nbytes()
