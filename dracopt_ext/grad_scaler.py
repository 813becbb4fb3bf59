"""A GradScaler whose check for an overflow takes no pass over the gradients of its own."""

from __future__ import annotations

from typing import Any

import torch

from .optim._base import FusedOptimizer
from .optim._context import context_of


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` that lets an optimizer of ours find an overflow while it computes the norm.

    This concerns optimizers with ``fused=True`` and ``max_grad_norm``. torch's class reads and writes all gradients for
    the check. Both classes serve all optimizers. The arguments are those of torch's class.
    """

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        # torch calls this method for an optimizer that unscales its gradients itself, if they are still scaled.
        if not isinstance(optimizer, FusedOptimizer) or context_of(optimizer).max_grad_norm is None:
            return super()._check_inf_per_device(optimizer)
        scale, _ = self._check_scale_growth_tracker("_check_inf_per_device")
        found_inf = torch.zeros((), dtype=torch.float32, device=scale.device)
        context_of(optimizer).overflow = found_inf
        state = self._per_optimizer_states[id(optimizer)]
        state["found_inf_per_device"] = {scale.device: found_inf}
        found: dict[str, Any] = state["found_inf_per_device"]
        return found
