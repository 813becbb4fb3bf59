"""NAdam."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._base import FusedOptimizer
from ._engine import given_engine
from ._kind import Kind
from ._precision import Precision, StateDtype


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
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None (default) takes the best for each parameter.
            An explicit backend raises where it cannot serve; None falls back to torch, with one warning.
        state_dtype: dtype of the moments: fp64, fp32, bf16 or fp16, or a mapping from names to dtypes such as
            ``{"exp_avg_sq": torch.float32}``. None (default), or a missing name, takes the parameter's. It is not part
            of the state dict, and what is loaded is converted to it.
        master_weights: ``"fp32"`` keeps a master in fp32 of each parameter in bf16 or fp16, from which the parameter is
            rounded after each step. ``"split16"`` keeps the same master of a bf16 parameter in 2 bytes instead of 4.
            None (default) keeps none. Parameters in fp32 and fp64 are their own masters.
        stochastic_rounding: round parameters in bf16 and fp16 up or down at random, so that the mean is right (default
            False). ``"all"`` does the same to moments in 16 bits. The random bits follow from ``rounding_seed``, the
            step, and the places of parameter and element.
        rounding_seed: from 0 (default) to 2^64 - 1; the same in all processes.
        max_grad_norm: largest global L2 norm of all gradients; larger ones are scaled down as by
            :func:`torch.nn.utils.clip_grad_norm_`, but are not written. None (default) clips nothing. ``grad_norm`` is
            the norm before clipping.
        error_if_nonfinite: raise RuntimeError, before anything changes, if that norm is not finite (default False).
            An overflow that a GradScaler handles is no error.

    The formula is documented with :func:`dracopt_ext.reference.nadam`.
    """

    _dracopt_kind = Kind("nadam", torch.optim.NAdam, "NAdam does not support sparse gradients")

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
        backend: str | None = None,
        state_dtype: StateDtype = None,
        master_weights: str | None = None,
        stochastic_rounding: bool | str = False,
        rounding_seed: int = 0,
        max_grad_norm: float | None = None,
        error_if_nonfinite: bool = False,
    ) -> None:
        precision = Precision(state_dtype, master_weights, stochastic_rounding, rounding_seed)
        with given_engine(self, backend, precision, max_grad_norm, error_if_nonfinite):
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
