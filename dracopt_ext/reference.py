"""The specification: every update rule in plain PyTorch, one dense tensor at a time.

The compiled kernels are held against these functions, bit for bit in fp32. For that, two operations that PyTorch's CPU
tensors lack are spelled out: a fused multiply-add (:func:`_fma`) and a correctly rounded square root (:func:`_sqrt`).
Everything else is IEEE arithmetic in the order written. Arithmetic is fp32 whatever the storage, fp64 for fp64 tensors;
scalars are computed in double precision and rounded once.

A rule takes a parameter, its gradient (negated already if the objective is maximized), the parameter's state, which it
updates in place, and the hyperparameters of the parameter group under their names there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` with one rounding in fp32. In fp64, where nothing wider is at hand, with two.

    The product of two fp32 numbers is exact in fp64. The sum is not; rounded to odd, it rounds to fp32 as the exact sum
    would (Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums").
    """
    if a.dtype == torch.float64 or b.dtype == torch.float64:
        return a * b + c
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.contiguous().view(torch.int64)
    towards_error = torch.where((error > 0) == (total > 0), 1, -1)
    adjust = (error != 0) & ((bits & 1) == 0) & torch.isfinite(total)
    return torch.where(adjust, bits + towards_error, bits).view(torch.float64).float()


def _sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root in fp32, which ``torch.sqrt`` is not on every CPU; through fp64 it is."""
    return x.double().sqrt().to(x.dtype)


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def _arithmetic(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def adam(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    decoupled_weight_decay: bool,
) -> None:
    r"""Adam (Kingma & Ba 2015), AMSGrad (Reddi et al. 2018) and AdamW (Loshchilov & Hutter 2019).

    .. math::
        g &\leftarrow g + \lambda p \quad\text{(L2)} \\
        p &\leftarrow (1 - \gamma\lambda)\, p \quad\text{(decoupled)} \\
        m &\leftarrow m + (1 - \beta_1)(g - m) \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad \hat v \leftarrow \max(\hat v, v) \quad\text{(amsgrad)} \\
        p &\leftarrow p - \frac{\gamma}{1 - \beta_1^t}\, m \Big/ \Big(\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon\Big)

    The state holds ``step`` (t, before this update), ``exp_avg`` (m), ``exp_avg_sq`` (v) and, with ``amsgrad``,
    ``max_exp_avg_sq``. The order of operations is that of torch's fused CPU kernels.
    """
    beta1, beta2 = betas
    state["step"] += 1
    step = state["step"].item()
    p, g = _arithmetic(param), _arithmetic(grad)
    exp_avg, exp_avg_sq = _arithmetic(state["exp_avg"]), _arithmetic(state["exp_avg_sq"])

    if weight_decay != 0 and decoupled_weight_decay:
        p = p * _scalar(1 - lr * weight_decay, p)
    elif weight_decay != 0:
        g = _fma(p, _scalar(weight_decay, p), g)
    # torch.lerp: from the nearer end.
    weight = _scalar(1 - beta1, p)
    exp_avg = _fma(weight, g - exp_avg, exp_avg) if weight < 0.5 else _fma(weight - 1, g - exp_avg, g)
    exp_avg_sq = _fma(_scalar(1 - beta2, p) * g, g, exp_avg_sq * _scalar(beta2, p))
    second_moment = exp_avg_sq
    if amsgrad:
        second_moment = torch.maximum(_arithmetic(state["max_exp_avg_sq"]), exp_avg_sq)
        state["max_exp_avg_sq"].copy_(second_moment)
    denom = _sqrt(second_moment) / _scalar((1 - beta2**step) ** 0.5, p) + _scalar(eps, p)
    p = p + (_scalar(-(lr / (1 - beta1**step)), p) * exp_avg) / denom

    param.copy_(p)
    state["exp_avg"].copy_(exp_avg)
    state["exp_avg_sq"].copy_(exp_avg_sq)


def sgd(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    r"""Stochastic gradient descent with momentum (Sutskever et al. 2013), as ``torch.optim.SGD`` writes it.

    .. math::
        g &\leftarrow g + \lambda p \\
        b &\leftarrow \mu b + (1 - \tau) g \quad\text{(at first } b \leftarrow g\text{)} \\
        p &\leftarrow p - \gamma\, b, \qquad\text{or with Nesterov}\quad p \leftarrow p - \gamma\, (g + \mu b)

    The state holds ``momentum_buffer`` (b), if ``momentum`` is not 0; this function creates it at the first step.
    """
    p, g = _arithmetic(param), _arithmetic(grad)
    if weight_decay != 0:
        g = _fma(p, _scalar(weight_decay, p), g)
    if momentum != 0:
        buffer = g
        if state.get("momentum_buffer") is not None:
            buffer = _fma(_scalar(1 - dampening, p), g, _arithmetic(state["momentum_buffer"]) * _scalar(momentum, p))
            state["momentum_buffer"].copy_(buffer)
        else:
            state["momentum_buffer"] = buffer.detach().to(grad.dtype, copy=True)
        g = _fma(_scalar(momentum, p), buffer, g) if nesterov else buffer
    param.copy_(_fma(_scalar(-lr, p), g, p))


RULES: dict[str, Callable[..., None]] = {"adam": adam, "sgd": sgd}
