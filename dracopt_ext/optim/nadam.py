"""NAdam."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ._base import FusedOptimizer
from ._context import Options, given_context
from ._kind import Kind


class NAdam(FusedOptimizer, torch.optim.NAdam):
    """NAdam (Dozat 2016): Adam with Nesterov's momentum; ``torch.optim.NAdam`` with another engine.

    Takes what that class takes, with its defaults and errors. ``foreach`` and ``capturable`` are checked as there;
    neither chooses the engine.

    Args:
        params: tensors, named parameters or groups to optimize.
        lr: learning rate (default 2e-3).
        betas: decay rates of the two moments (default (0.9, 0.999)).
        eps: added to the denominator (default 1e-8).
        weight_decay: L2 penalty, or decoupled decay with ``decoupled_weight_decay`` (default 0).
        momentum_decay: how fast the momentum of a step approaches ``betas[0]`` (default 4e-3).
        decoupled_weight_decay: NAdamW (default False).
        maximize: ascend instead of descending (default False).
        foreach, capturable, differentiable: as for :class:`Adam`.
        options: as for :class:`Adam`.

    Raises:
        ValueError, TypeError, RuntimeError: as for :class:`Adam`.

    The formula is documented with :func:`dracopt_ext.reference.nadam`.
    """

    _dracopt_kind = Kind("nadam", torch.optim.NAdam)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        with given_context(self, options):
            super(FusedOptimizer, self).__init__(
                params,
                lr,
                betas,
                eps,
                weight_decay,
                momentum_decay,
                decoupled_weight_decay,
                foreach=foreach,
                maximize=maximize,
                capturable=capturable,
                differentiable=differentiable,
            )
