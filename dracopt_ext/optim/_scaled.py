"""Takes steps to which torch.amp.GradScaler leaves the division by its scale and the check for an overflow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import devices
from . import _by_torch
from ._precision import Precision

if TYPE_CHECKING:
    from ._step import Step


def update_scaled(step: Step, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
    """Updates every parameter that has a gradient, unless there was an overflow."""
    context = step.context
    kernels_serve_none = True
    if context.backend != "reference" and are_on_gpu(found_inf, grad_scale):
        todo = step.update_by_kernels(scaler=(found_inf, grad_scale))
        if todo is None:
            return  # the kernels have read both, and the host does not wait
        kernels_serve_none = todo.nothing_left
    groups = step.with_gradients()
    params = [p for group in groups for p in group["params"]]
    torch_may = context.backend is None and context.precision == Precision() and context.max_grad_norm is None
    torch_may &= found_inf is not None or grad_scale is not None
    torch_may &= kernels_serve_none and step.kind.torch_step is not None
    if torch_may and params and all(p.device.type != "cpu" for p in params):
        _by_torch.call_torch(step, groups, scaled=True)  # torch's fused kernels read both as well
        step.note("torch", {p.device for p in params})
    elif found_inf is None or not found_inf.item():
        if isinstance(step.coefficient, Tensor):
            step.coefficient = step.coefficient.item()
        step.update(1.0 if grad_scale is None else grad_scale.item())


def are_on_gpu(*numbers: Tensor | None) -> bool:
    """Says whether a kernel can read the numbers that are not None, which must be fp32 scalars on a GPU."""
    return all(
        x is None or (x.device.type == devices.GPU and x.dtype == torch.float32 and x.numel() == 1) for x in numbers
    )
