"""Parameters that no backend serves, and what is to be known of them to step them by torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Foreign = tuple[int, int, str, int]
"""Of a parameter: the index of its group, its own in it, why no kernel serves it, and its form: a sum of these."""

NEW = 1
"""A part of its state is missing, or all of it."""
MIXED = 2
"""Its dtypes differ, or another property of its dense tensors that torch would refuse, or round where we do not."""
SPARSE = 4
"""Its gradient is sparse."""
FUSABLE = 8
"""torch's fused kernels for the CPU are right for its tensors: all dense, contiguous and of one dtype."""

UNDER_MODE = "steps under a TorchDispatchMode"
"""Why no parameter is served while there is one: it traces, counts or replaces operations of torch, not kernels."""

_FUSABLE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SHORT = (torch.bfloat16, torch.float16)


def is_under_mode() -> bool:
    """Is a TorchDispatchMode active?"""
    return torch._C._len_torch_dispatch_stack() > 0


def form_of(p: Tensor, moments: Sequence[Tensor | None], *, new: bool, fused: bool, grad_scale: float) -> int:
    """The form of a parameter with a gradient, as csrc/bindings/step_plan.cpp finds it for those that it reads."""
    grad = p.grad
    assert grad is not None
    form = NEW if new else 0
    if grad.is_sparse:
        return form | SPARSE
    if grad.layout is not torch.strided:
        return form
    dtype = p.dtype
    mixed = grad.dtype is not dtype or grad.is_conj() or (grad_scale != 1 and dtype in _SHORT)
    for moment in moments:
        mixed = mixed or (moment is not None and moment.dtype is not dtype)
    if mixed:
        return form | MIXED
    may_fuse = fused and dtype in _FUSABLE_DTYPES
    if may_fuse and all(tensor is None or _is_simple(tensor) for tensor in (p, grad, *moments)):
        form |= FUSABLE
    return form


def _is_simple(tensor: Tensor) -> bool:
    """Does a tensor lie contiguously in the host's memory, itself or as the shard of a distributed one?"""
    local = getattr(tensor, "_local_tensor", tensor)
    is_wrapper = type(local).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl
    return not is_wrapper and local.is_cpu and local.is_contiguous()
