"""The update rules in Triton, line for line like csrc/rules: the same operations in the same order give the same bits.

A rule has two functions. ``prepare`` takes the last step's state scalars and the hyperparameters, all of them fp64, and
returns this step's state scalars and the step's scalars: in the arithmetic's dtype, T, and in the order of csrc/rules,
because the kernel reads them from memory if the host has prepared them. A flag is true unless it is 0. ``update`` takes
these scalars and a block of elements of the parameter, the gradient and the states that the group has, and returns the
new parameter and states. With ``fast``, the parameter is NaN where ``update`` must compute it again without ``fast``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import divisor_of, exponential, fma, maximum, quotient, root_over, sqrt


@triton.jit
def rounded(x, is_fp32):
    return tl.where(is_fp32, x.to(tl.float32).to(tl.float64), x)


# ---- Adam and its relatives share weight decay and the moving averages of the gradient and of its square


@triton.jit
def prepare_moments(
    step,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    decoupled_weight_decay,
    power: tl.constexpr,
    T: tl.constexpr,
):
    decoupled = decoupled_weight_decay != 0
    weight = (1 - beta1).to(T)
    from_grad = weight >= 0.5  # torch.lerp then starts from the gradient, the nearer end
    bias_correction2_sqrt, reciprocal = divisor_of(sqrt(1 - power(beta2, step)).to(T))
    return (
        tl.where(decoupled, 1 - lr * weight_decay, 1.0).to(T),  # the parameter's factor, if decoupled
        tl.where(decoupled, 0.0, weight_decay).to(T),  # the parameter's factor in the gradient, if not decoupled
        tl.where(from_grad, weight - 1, weight),
        beta2.to(T),
        (1 - beta2).to(T),
        bias_correction2_sqrt,
        reciprocal,
        eps.to(T),
        ((decoupled == 0) & (weight_decay != 0)).to(T),
        from_grad.to(T),
    )


@triton.jit
def update_moments(moments, p, g, exp_avg, exp_avg_sq):
    decay, l2, lerp, beta2, one_minus_beta2, _, _, _, has_l2, from_grad = moments
    g = tl.where(has_l2 != 0, fma(p, l2, g), g)
    p = p * decay
    exp_avg = fma(lerp, g - exp_avg, tl.where(from_grad != 0, g, exp_avg))
    exp_avg_sq = fma(one_minus_beta2 * g, g, exp_avg_sq * beta2)
    return p, g, exp_avg, exp_avg_sq


@triton.jit
def denominator(moments, second_moment, fast: tl.constexpr):
    _, _, _, _, _, bias_correction2_sqrt, reciprocal, eps, _, _ = moments
    return root_over(second_moment, (bias_correction2_sqrt, reciprocal), fast) + eps


# ---- Adam (Kingma & Ba 2015), AMSGrad (Reddi et al. 2018) and AdamW (Loshchilov & Hutter 2019)


@triton.jit
def prepare_adam(state_scalars, is_fp32, first, h, power: tl.constexpr, T: tl.constexpr):
    lr, beta1, beta2, eps, weight_decay, _, decoupled_weight_decay = h
    step = rounded(state_scalars[0] + 1, is_fp32[0])
    bias_correction1 = 1 - power(beta1, step)
    moments = prepare_moments(step, lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, power, T)
    neg_step_size = (-(lr / bias_correction1)).to(T)
    return (step, state_scalars[1]), moments + (neg_step_size,)


@triton.jit
def update_adam(c, p, g, states, fast: tl.constexpr):
    moments, neg_step_size = c[:10], c[10]
    p, g, exp_avg, exp_avg_sq = update_moments(moments, p, g, states[0], states[1])
    new_states = exp_avg, exp_avg_sq
    second_moment = exp_avg_sq
    if len(states) == 3:
        second_moment = maximum(states[2], exp_avg_sq)
        new_states = exp_avg, exp_avg_sq, second_moment
    p = p + quotient(neg_step_size * exp_avg, denominator(moments, second_moment, fast), fast)
    return p, new_states


# ---- Lion (Chen et al. 2023)


@triton.jit
def prepare_lion(state_scalars, is_fp32, first, h, power: tl.constexpr, T: tl.constexpr):
    lr, beta1, beta2, weight_decay = h
    scalars = (1 - lr * weight_decay).to(T), (-lr).to(T), beta1.to(T), (1 - beta1).to(T), beta2.to(T), (1 - beta2).to(T)
    return state_scalars, scalars


@triton.jit
def update_lion(c, p, g, states, fast: tl.constexpr):
    decay, neg_lr, beta1, one_minus_beta1, beta2, one_minus_beta2 = c
    exp_avg = states[0]
    average = fma(one_minus_beta1, g, exp_avg * beta1)
    sign = tl.where(average > 0, 1.0, tl.where(average < 0, -1.0, average))  # zero and NaN stay as they are
    p = fma(neg_lr, sign, p * decay)
    return p, (fma(one_minus_beta2, g, exp_avg * beta2),)


# ---- NAdam (Dozat 2016), and NAdamW with decoupled weight decay, as torch.optim.NAdam defines them


@triton.jit
def momentum(step, beta1, momentum_decay):
    """Returns the momentum of a step: beta1 (1 - 0.96^(step * momentum_decay) / 2)."""
    ln = tl.full((), -0.040821994520255166, tl.float64)  # the logarithm of 0.96
    ln_rest = tl.full((), -8.893492737632459e-19, tl.float64)
    decays = step * momentum_decay
    x = decays * ln
    return beta1 * (1 - 0.5 * exponential(x, fma(decays, ln, -x) + decays * ln_rest))


@triton.jit
def prepare_nadam(state_scalars, is_fp32, first, h, power: tl.constexpr, T: tl.constexpr):
    lr, beta1, beta2, eps, weight_decay, momentum_decay, decoupled_weight_decay = h
    step = rounded(state_scalars[0] + 1, is_fp32[0])
    mu = momentum(step, beta1, momentum_decay)
    mu_next = momentum(step + 1, beta1, momentum_decay)
    mu_product = rounded(state_scalars[1] * rounded(mu, is_fp32[1]), is_fp32[1])
    moments = prepare_moments(step, lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, power, T)
    grad_factor = (-lr * (1 - mu) / (1 - mu_product)).to(T)
    exp_avg_factor = (-lr * mu_next / (1 - mu_product * mu_next)).to(T)
    return (step, mu_product), moments + (grad_factor, exp_avg_factor)


@triton.jit
def update_nadam(c, p, g, states, fast: tl.constexpr):
    moments, grad_factor, exp_avg_factor = c[:10], c[10], c[11]
    p, g, exp_avg, exp_avg_sq = update_moments(moments, p, g, states[0], states[1])
    direction = fma(exp_avg_factor, exp_avg, grad_factor * g)
    p = p + quotient(direction, denominator(moments, exp_avg_sq, fast), fast)
    return p, (exp_avg, exp_avg_sq)


# ---- SGD with momentum, dampening and Nesterov's form, as torch.optim.SGD defines them (Sutskever et al. 2013, with
# the learning rate outside the buffer)


@triton.jit
def prepare_sgd(state_scalars, is_fp32, first, h, power: tl.constexpr, T: tl.constexpr):
    lr, momentum, dampening, weight_decay, nesterov = h
    # `first`: the buffer starts as the gradient itself, undampened
    scalars = (
        (-lr).to(T),
        momentum.to(T),
        (1 - dampening).to(T),
        weight_decay.to(T),
        (weight_decay != 0).to(T),
        nesterov.to(T),
        first.to(T),
    )
    return state_scalars, scalars


@triton.jit
def update_sgd(c, p, g, states, fast: tl.constexpr):
    neg_lr, momentum, one_minus_dampening, l2, has_l2, nesterov, first = c
    g = tl.where(has_l2 != 0, fma(p, l2, g), g)
    new_states = states
    if len(states) == 1:
        buffer = tl.where(first != 0, g, fma(one_minus_dampening, g, states[0] * momentum))
        new_states = (buffer,)
        g = tl.where(nesterov != 0, fma(momentum, buffer, g), buffer)
    p = fma(neg_lr, g, p)
    return p, new_states


class TritonRule(NamedTuple):
    prepare: Any
    update: Any
    divides: bool = True
    """``update`` divides, so ``fast`` pays."""


RULES = {
    "adam": TritonRule(prepare_adam, update_adam),
    "lion": TritonRule(prepare_lion, update_lion, divides=False),
    "nadam": TritonRule(prepare_nadam, update_nadam),
    "sgd": TritonRule(prepare_sgd, update_sgd, divides=False),
}
"""All rules, by their names in csrc/rules."""
