"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ._base import FusedOptimizer
from ._context import Options, given_context
from ._kind import Kind

_SPARSE_ERROR = "Adam does not support sparse gradients, please consider SparseAdam instead"


class Adam(FusedOptimizer, torch.optim.Adam):
    """Adam (Kingma & Ba 2015), with AMSGrad; ``torch.optim.Adam`` with another engine.

    Takes what that class takes, with its defaults and errors. ``foreach``, ``fused`` and ``capturable`` are checked as
    there, and ``fused=True`` sets what GradScaler looks for; none of them chooses the engine.

    Args:
        params: tensors, named parameters or groups to optimize.
        lr: learning rate (default 1e-3).
        betas: decay rates of the two moments (default (0.9, 0.999)).
        eps: added to the denominator (default 1e-8).
        weight_decay: L2 penalty, or decoupled decay with ``decoupled_weight_decay`` (default 0).
        amsgrad: divide by the largest second moment so far (Reddi et al. 2018; default False).
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
        error_if_nonfinite: raise RuntimeError, before anything changes, if the norm is not finite (default False), also
            where nothing is clipped. An overflow that a GradScaler handles is no error.
        foreach, fused: None (default), True or False, but not both True.
        capturable: keep the count of steps on the parameter's device, for CUDA graphs (default False).
        differentiable: let torch take steps through which autograd can differentiate (default False).

    Raises:
        ValueError: a number is negative or NaN, a decay rate is not at least 0 and less than 1, or an option has a
            value that it cannot have or that no parameter can use.
        TypeError: ``params`` holds something that is no tensor, or an argument is unknown.
        RuntimeError: the ``backend`` is not available, or options exclude each other.

    The formula is documented with :func:`dracopt_ext.reference.adam`.
    """

    _dracopt_kind = Kind("adam", torch.optim.Adam, sparse_error=_SPARSE_ERROR)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        with given_context(self, options):
            # torch's AdamW is passed over if it stands between, because it takes fewer arguments.
            passed: type = torch.optim.AdamW if isinstance(self, torch.optim.AdamW) else FusedOptimizer
            torchs: Any = super(passed, self)
            torchs.__init__(
                params,
                lr,
                betas,
                eps,
                weight_decay,
                amsgrad,
                foreach=foreach,
                maximize=maximize,
                capturable=capturable,
                differentiable=differentiable,
                fused=fused,
                decoupled_weight_decay=decoupled_weight_decay,
            )


class AdamW(Adam, torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019): Adam with decoupled weight decay; ``torch.optim.AdamW`` with another engine.

    Takes what :class:`Adam` takes, but ``decoupled_weight_decay`` is always on and ``weight_decay`` is 1e-2 by default.
    """

    _dracopt_kind = Kind("adam", torch.optim.AdamW, sparse_error=_SPARSE_ERROR)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        with given_context(self, options):
            super(FusedOptimizer, self).__init__(
                params,
                lr,
                betas,
                eps,
                weight_decay,
                amsgrad,
                foreach=foreach,
                maximize=maximize,
                capturable=capturable,
                differentiable=differentiable,
                fused=fused,
            )
