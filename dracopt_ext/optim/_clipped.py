"""Takes steps whose gradients are clipped by their global norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import clip_grad
from . import _scaled

if TYPE_CHECKING:
    from ._step import Step


def update_clipped(step: Step, max_norm: float, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
    """Updates every parameter that has a gradient, clipped to a global norm, unless there was an overflow."""
    engine = step.engine
    overflow, engine.overflow = engine.overflow, None
    if overflow is not None:
        found_inf = overflow
    raises = engine.error_if_nonfinite and found_inf is None
    is_done = _update_in_one_go(step, (max_norm, overflow is not None, raises), found_inf, grad_scale)
    if not is_done:
        gradients = [p.grad for group in step.with_gradients() for p in group["params"]]
        # The CPU's kernels find the norm of distributed gradients, too.
        engine.norm_is_elsewhere = any(clip_grad.is_distributed(grad) and not grad.is_cpu for grad in gradients)
        engine.grad_norm = norm = clip_grad.global_norm(gradients, grad_scale)
        coefficient = (max_norm / (norm + 1e-6)).clamp(max=1)
        step.coefficient = coefficient.item() if coefficient.is_cpu else coefficient
        if overflow is not None:
            overflow.copy_(~norm.isfinite(), non_blocking=not overflow.is_cpu)
    if raises and engine.grad_norm is not None:
        clip_grad.check_finite(engine.grad_norm)
    if not is_done:
        _scaled.update_scaled(step, found_inf, grad_scale)


def _update_in_one_go(
    step: Step, how: tuple[float, bool, bool], found_inf: Tensor | None, grad_scale: Tensor | None
) -> bool:
    """Lets the kernels find the norm and then update, unless an error must be raised. Returns false if they cannot.

    ``how`` is the largest norm, whether the step sets ``found_inf``, and whether a norm that is not finite is an error.
    """
    engine = step.engine
    max_norm, checks, raises = how
    if engine.backend == "reference" or engine.norm_is_elsewhere:
        return False
    scale, scaler = 1.0, (found_inf, grad_scale)
    if not _scaled.are_on_gpu(found_inf, grad_scale):
        if found_inf is not None and not checks and found_inf.item():
            return False
        scale = 1.0 if grad_scale is None else grad_scale.item()
        scaler = (found_inf if checks else None, None)
    device = next((p.device for group in step.optimizer.param_groups for p in group["params"]), None)
    norm = torch.empty((), dtype=torch.float64, device=device)
    if step.update_by_kernels(scale, scaler, (max_norm, norm, checks, raises, clip_grad.add_over_meshes)) is not None:
        return False
    engine.grad_norm = norm
    return True
