"""Lion."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ._kind import Kind
from ._own import OwnOptimizer, TorchOptions


class Lion(OwnOptimizer):
    """Lion (Chen et al. 2023): steps by the sign of an average of gradients; torch.optim has no such class.

    Args:
        params: tensors, named parameters or groups to optimize.
        lr: learning rate (default 1e-4), which should be 3 to 10 times smaller than AdamW's.
        betas: weight of ``exp_avg`` in the average, and decay rate of ``exp_avg`` (default (0.9, 0.99)).
        weight_decay: decoupled decay, which should be as many times larger than AdamW's (default 0).
        options: as for :class:`Adam`, and ``maximize``, ``foreach``, ``capturable``, ``differentiable`` and ``fused``.
            There is no count of steps, so ``capturable`` changes nothing, and ``differentiable`` must be False.

    Raises:
        ValueError, TypeError, RuntimeError: as for :class:`Adam`.

    The formula is documented with :func:`dracopt_ext.reference.lion`.
    """

    _dracopt_kind = Kind("lion")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float | Tensor = 0,
        **options: Unpack[TorchOptions],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, **options)
