"""Stochastic gradient descent with momentum and Nesterov's variant."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ._base import FusedOptimizer
from ._context import Options, given_context
from ._kind import Kind


class SGD(FusedOptimizer, torch.optim.SGD):
    """SGD with momentum, dampening and Nesterov's variant; ``torch.optim.SGD`` with another engine.

    Takes what that class takes, with its defaults and errors. ``foreach`` and ``fused`` are checked as there, and
    ``fused=True`` sets what GradScaler looks for; neither chooses the engine.

    Args:
        params: tensors, named parameters or groups to optimize.
        lr: learning rate (default 1e-3).
        momentum: factor of the momentum buffer (default 0: no buffer).
        dampening: the gradient enters the buffer times 1 - dampening, from the second step on (default 0).
        weight_decay: L2 penalty (default 0).
        nesterov: look ahead by one momentum step (default False).
        maximize: ascend instead of descending (default False).
        options: as for :class:`Adam`. The moment is ``momentum_buffer``.

    The formula is documented with :func:`dracopt_ext.reference.sgd`.
    """

    _dracopt_kind = Kind(
        "sgd",
        torch.optim.SGD,
        takes_sparse=True,
        sparse_error="`_fused_sgd` does not support sparse gradients",
        keeps_fused=False,  # torch's fused kernel for the CPU leaves whole vectors of 16-bit parameters unchanged
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        with given_context(self, options):
            super(FusedOptimizer, self).__init__(
                params,
                lr,
                momentum,
                dampening,
                weight_decay,
                nesterov,
                maximize=maximize,
                foreach=foreach,
                differentiable=differentiable,
                fused=fused,
            )
