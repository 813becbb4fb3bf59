"""Takes steps whose gradients are clipped by their global norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import clip_grad
from . import _scaled

if TYPE_CHECKING:
    from ._step import Step


def update_clipped(
    step: Step, max_norm: float, found_inf: Tensor | None, grad_scale: Tensor | None, overflow: Tensor | None
) -> None:
    """Updates every parameter that has a gradient, clipped to a global norm, unless there was an overflow.

    If there is a tensor ``overflow``, this step looks for an overflow itself and sets the tensor. ``found_inf`` means
    nothing then.
    """
    context = step.context
    checks = overflow is not None
    if checks:
        found_inf = overflow
    raises = context.error_if_nonfinite and found_inf is None
    is_done = _update_in_one_go(step, max_norm, found_inf, grad_scale, checks=checks, raises=raises)
    if not is_done:
        gradients = [p.grad for group in step.with_gradients() for p in group["params"]]
        # The CPU's kernels find the norm of distributed gradients, too.
        context.norm_is_elsewhere = any(clip_grad.is_distributed(grad) and not grad.is_cpu for grad in gradients)
        context.grad_norm = norm = clip_grad.global_norm(gradients, grad_scale)
        coefficient = (max_norm / (norm + 1e-6)).clamp(max=1)
        step.coefficient = coefficient.item() if coefficient.is_cpu else coefficient
        if overflow is not None:
            overflow.copy_(~norm.isfinite(), non_blocking=not overflow.is_cpu)
    if raises and context.grad_norm is not None:
        clip_grad.check_finite(context.grad_norm, clips=context.max_grad_norm is not None)
    if not is_done:
        _scaled.update_scaled(step, found_inf, grad_scale)


def _update_in_one_go(
    step: Step, max_norm: float, found_inf: Tensor | None, grad_scale: Tensor | None, *, checks: bool, raises: bool
) -> bool:
    """Lets the kernels find the norm and then update, unless an error must be raised. Returns false if they cannot.

    ``checks`` says whether the step sets ``found_inf``, and ``raises`` whether a norm that is not finite is an error.
    """
    context = step.context
    if context.backend == "reference" or context.norm_is_elsewhere:
        return False
    scale, scaler = 1.0, (found_inf, grad_scale)
    if not _scaled.are_on_gpu(found_inf, grad_scale):
        if found_inf is not None and not checks and found_inf.item():
            return False
        scale = 1.0 if grad_scale is None else grad_scale.item()
        scaler = (found_inf if checks else None, None)
    norm = torch.empty((), dtype=torch.float64, device=_first_device(step.optimizer.param_groups))
    if step.update_by_kernels(scale, scaler, (max_norm, norm, checks, raises, clip_grad.add_over_meshes)) is not None:
        return False
    context.grad_norm = norm
    return True


def _first_device(groups: Any) -> torch.device | None:
    """Returns the first parameter's device, where all gradients are likely to lie. Iterators must stay as they are."""
    for group in groups:
        params = group["params"]
        if isinstance(params, (list, tuple)) and params:
            device: torch.device | None = getattr(params[0], "device", None)
            return device
    return None
