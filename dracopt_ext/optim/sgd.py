"""Stochastic gradient descent with momentum and Nesterov's variant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..containers import Group
from ._base import FusedOptimizer
from ._engine import given_engine
from ._kind import Kind
from ._precision import Precision, StateDtype


class SgdKind(Kind):
    """SGD's state is the momentum buffer alone, if there is momentum."""

    counts_steps = False
    keeps_fused = False  # torch's fused kernel for the CPU leaves whole vectors of 16-bit parameters unchanged

    def lacks_state(self, entries: Any, group: Group) -> bool:
        return bool(group["momentum"] != 0) and entries.get("momentum_buffer") is None

    def create_state(self, optimizer: FusedOptimizer, group: Group) -> None:
        # The first step fills the buffer, which it writes without reading it.
        for p in group["params"]:
            optimizer.state[p]["momentum_buffer"] = torch.empty_like(p)


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
        backend: ``"native"``, ``"triton"`` or ``"reference"``; None (default) takes the best for each parameter.
            An explicit backend raises where it cannot serve; None falls back to torch, with one warning.
        state_dtype: dtype of the momentum buffer: fp64, fp32, bf16 or fp16, or a mapping from names to dtypes such
            as ``{"momentum_buffer": torch.float32}``. None (default), or a missing name, takes the parameter's. It is
            not part of the state dict, and what is loaded is converted to it.
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

    The formula is documented with :func:`dracopt_ext.reference.sgd`.
    """

    _dracopt_kind = SgdKind("sgd", torch.optim.SGD, "`_fused_sgd` does not support sparse gradients")

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
                momentum,
                dampening,
                weight_decay,
                nesterov,
                maximize=maximize,
                foreach=foreach,
                differentiable=differentiable,
                fused=fused,
            )
