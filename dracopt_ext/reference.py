"""Specifies every update rule in plain PyTorch, one dense tensor at a time.

The tests compare the compiled kernels with these functions, bit for bit in fp32. PyTorch's CPU tensors lack two
operations that are spelled out here: a fused multiply-add (:func:`_fma`) and a correctly rounded root (:func:`_sqrt`).
Everything else is IEEE arithmetic in the order written. The arithmetic is fp64 where a tensor is stored in fp64, and
fp32 otherwise. Scalars are computed in double precision and rounded once.

A rule takes a parameter, its gradient, its state, and the parameter group's hyperparameters by the group's names. The
tensors are in the arithmetic's dtype. The rule replaces the moments in the given state, advances the state scalars in
place, and returns the new parameter. :func:`update` does what all rules share.

:class:`dracopt_ext.rule.Rule` says what a rule declares beside its function.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .rule import DECAY_RATES, FLAG, NUMBER, PARAM, RULES, declare_rule


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Returns ``a * b + c``, rounded once in fp32 and twice in fp64, because nothing wider than fp64 is at hand.

    The product of two fp32 numbers is exact in fp64, but the sum is not. After rounding to odd, the sum rounds to fp32
    as the exact sum would (Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums").
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
    """Returns the correctly rounded square root, by way of fp64: on some CPUs ``torch.sqrt`` misrounds in fp32."""
    return x.double().sqrt().to(x.dtype)


def _scalar(value: float, like: Tensor) -> Tensor:
    """Converts a scalar that a rule computed to the arithmetic's dtype; raises if it is not finite there."""
    scalar = torch.tensor(value, dtype=like.dtype)
    if not scalar.isfinite():
        raise OverflowError(f"{value} is not finite in {like.dtype}")
    return scalar.to(like.device)


def _decay_and_average(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    decoupled_weight_decay: bool,
) -> tuple[Tensor, Tensor]:
    """Applies weight decay and averages the gradient and its square; returns parameter and gradient."""
    beta1, beta2 = betas
    if weight_decay != 0 and decoupled_weight_decay:
        p = p * _scalar(1 - lr * weight_decay, p)
    elif weight_decay != 0:
        g = _fma(p, _scalar(weight_decay, p), g)
    # Interpolates from the nearer end, as torch.lerp does.
    weight, change = _scalar(1 - beta1, p), g - state["exp_avg"]
    state["exp_avg"] = _fma(weight, change, state["exp_avg"]) if weight < 0.5 else _fma(weight - 1, change, g)
    state["exp_avg_sq"] = _fma(_scalar(1 - beta2, p) * g, g, state["exp_avg_sq"] * _scalar(beta2, p))
    return p, g


def _denominator(second_moment: Tensor, beta2: float, step: float, eps: float) -> Tensor:
    return _sqrt(second_moment) / _scalar((1 - beta2**step) ** 0.5, second_moment) + _scalar(eps, second_moment)


@declare_rule(moments={"exp_avg": None, "exp_avg_sq": None, "max_exp_avg_sq": "amsgrad"}, state_scalars={"step": 0})
def adam(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    decoupled_weight_decay: bool,
) -> Tensor:
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
    state["step"] += 1
    step = state["step"].item()
    p, g = _decay_and_average(p, g, state, lr, betas, weight_decay, decoupled_weight_decay)
    second_moment = state["exp_avg_sq"]
    if amsgrad:
        second_moment = state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], second_moment)
    step_size = _scalar(-(lr / (1 - betas[0] ** step)), p)
    return p + (step_size * state["exp_avg"]) / _denominator(second_moment, betas[1], step, eps)


@declare_rule(moments={"exp_avg": None})
def lion(
    p: Tensor, g: Tensor, state: dict[str, Tensor], *, lr: float, betas: tuple[float, float], weight_decay: float
) -> Tensor:
    r"""Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms").

    .. math::
        c &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad m \leftarrow \beta_2 m + (1 - \beta_2) g \\
        p &\leftarrow (1 - \gamma\lambda)\, p - \gamma\, \mathrm{sign}(c)

    The state holds ``exp_avg`` (m). The sign of zero is zero, and the sign of NaN is NaN.
    """
    beta1, beta2 = betas
    average = _fma(_scalar(1 - beta1, p), g, state["exp_avg"] * _scalar(beta1, p))
    sign = torch.where(average > 0, 1, torch.where(average < 0, -1, average))
    state["exp_avg"] = _fma(_scalar(1 - beta2, p), g, state["exp_avg"] * _scalar(beta2, p))
    return _fma(_scalar(-lr, p), sign, p * _scalar(1 - lr * weight_decay, p))


@declare_rule(moments={"exp_avg": None, "exp_avg_sq": None}, state_scalars={"step": 0, "mu_product": 1})
def nadam(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    momentum_decay: float,
    decoupled_weight_decay: bool,
) -> Tensor:
    r"""NAdam (Dozat 2016, "Incorporating Nesterov momentum into Adam"), as ``torch.optim.NAdam`` writes it.

    .. math::
        g &\leftarrow g + \lambda p \quad\text{(L2)}, \qquad
        p \leftarrow (1 - \gamma\lambda)\, p \quad\text{(decoupled)} \\
        m &\leftarrow m + (1 - \beta_1)(g - m), \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \mu_t &= \beta_1 \big(1 - \tfrac12\, 0.96^{t\psi}\big), \qquad M_t = \mu_1 \cdots \mu_t \\
        p &\leftarrow p - \gamma \Big(\frac{1 - \mu_t}{1 - M_t}\, g + \frac{\mu_{t+1}}{1 - M_{t+1}}\, m\Big)
            \Big/ \Big(\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon\Big)

    The state holds ``step`` (t, before this update), ``mu_product`` (M), ``exp_avg`` (m) and ``exp_avg_sq`` (v).
    """
    state["step"] += 1
    step = state["step"].item()
    mu = betas[0] * (1 - 0.5 * 0.96 ** (step * momentum_decay))
    mu_next = betas[0] * (1 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
    state["mu_product"] *= mu
    mu_product = state["mu_product"].item()
    p, g = _decay_and_average(p, g, state, lr, betas, weight_decay, decoupled_weight_decay)
    grad_factor = _scalar(-lr * (1 - mu) / (1 - mu_product), p)
    exp_avg_factor = _scalar(-lr * mu_next / (1 - mu_product * mu_next), p)
    direction = _fma(exp_avg_factor, state["exp_avg"], grad_factor * g)
    return p + direction / _denominator(state["exp_avg_sq"], betas[1], step, eps)


@declare_rule(moments={"momentum_buffer": "momentum"}, first_step_fills=True)
def sgd(
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> Tensor:
    r"""Stochastic gradient descent with momentum (Sutskever et al. 2013), as ``torch.optim.SGD`` writes it.

    .. math::
        g &\leftarrow g + \lambda p \\
        b &\leftarrow \mu b + (1 - \tau) g \quad\text{(at first } b \leftarrow g\text{)} \\
        p &\leftarrow p - \gamma\, b, \qquad\text{or with Nesterov}\quad p \leftarrow p - \gamma\, (g + \mu b)

    The state holds ``momentum_buffer`` (b), if ``momentum`` is not 0.
    """
    if weight_decay != 0:
        g = _fma(p, _scalar(weight_decay, p), g)
    if momentum != 0:
        buffer = g
        if "momentum_buffer" in state:
            buffer = _fma(_scalar(1 - dampening, p), g, state["momentum_buffer"] * _scalar(momentum, p))
        state["momentum_buffer"] = buffer
        g = _fma(_scalar(momentum, p), buffer, g) if nesterov else buffer
    return _fma(_scalar(-lr, p), g, p)


# ---- 16 bits. A bf16 number is the upper half of an fp32 number.


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds fp32 numbers to bf16, ties away from zero. Returns them, and their masters' lower halves.

    The lower half, taken for a signed integer, is what rounding took away, in units in the last place of fp32. Ties to
    even would not tell a tie that was rounded up from one that was rounded down. The halves are the bits of a bf16
    tensor, because NCCL moves no integers of 16 bits.
    """
    bits = master.view(torch.int32)
    rounded = torch.where(master.isnan(), 0x7FC0, (bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return rounded, torch.where(master.isnan(), 0, bits << 16 >> 16).to(torch.int16).view(torch.bfloat16)


def current_master(param: Tensor, master: Tensor) -> Tensor:
    """Returns a parameter's master in fp32.

    Args:
        param: bf16 or fp16.
        master: the state: the master in fp32, or its lower half in bf16. An fp32 master that does not round to the
            parameter is out of date, because someone has changed the parameter, which takes its place. A tie may have
            been rounded either way. A lower half that would make the master NaN is out of date, too.
    """
    wide = param.float()
    if master.dtype == torch.bfloat16:
        joined = (wide.view(torch.int32) + master.view(torch.int16).to(torch.int32)).view(torch.float32)
        return torch.where(joined.isnan(), wide, joined)
    if param.dtype == torch.bfloat16:
        distance = master.view(torch.int32) - wide.view(torch.int32)
        is_near = (distance >= -0x8000) & (distance <= 0x8000) & ~master.isnan()
    else:
        is_near = master.to(param.dtype).float() == wide
    return torch.where(is_near, master, wide)


def store_master(x: Tensor, param: Tensor, master: Tensor) -> None:
    """Writes a new master, and the parameter that it rounds to."""
    rounded, rest = split_master(x)
    param.copy_(rounded if param.dtype == torch.bfloat16 else x)
    if master.dtype == torch.bfloat16:
        master.view(torch.int16).copy_(rest.view(torch.int16))
    else:
        master.copy_(x)


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Says by which random bits a tensor's streams are rounded in one step: see :func:`random_bits`."""

    seed: int
    step: int
    """Steps that the parameter group has taken."""
    param: int
    """The index of the parameter in the optimizer."""
    states: bool
    """States in 16 bits are rounded at random as well."""
    first: int = 0
    """The number of a shard's first element in the whole tensor."""
    strides: Sequence[int] | None = None
    """The strides of the whole tensor, if this is a shard."""


def element_numbers(tensor: Tensor, rounding: Rounding) -> Tensor:
    """Numbers the elements in the order of the memory, in the whole tensor if this is a shard of it."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    numbers = torch.arange(tensor.numel(), device=tensor.device).view([tensor.shape[d] for d in order])
    if rounding.strides is not None:
        places = [torch.arange(tensor.shape[d], device=tensor.device) * rounding.strides[d] for d in order]
        numbers = torch.zeros_like(numbers)
        for k, place in enumerate(places):
            numbers = numbers + place.view([-1 if j == k else 1 for j in range(len(order))])
    return numbers.permute([order.index(d) for d in range(tensor.dim())]) + rounding.first


def random_bits(tensor: Tensor, rounding: Rounding, stream: int) -> Tensor:
    """Returns 16 random bits for each element, in int64, by Philox 4x32-7 (Salmon et al. 2011).

    Eight elements share the 128 bits of one counter. The counter holds the eighth of the element's number, the stream
    (0 is the parameter, 2 the first state), the parameter's index and the step. The seed is the key.
    """
    mask = 0xFFFFFFFF
    element = element_numbers(tensor, rounding)
    block = element // 8
    w0, w1 = block & mask, block >> 32 | stream << 24
    w2, w3 = torch.full_like(w0, rounding.param), torch.full_like(w0, rounding.step)
    key0, key1 = rounding.seed & mask, rounding.seed >> 32
    for _ in range(7):
        a, b = w0 * 0xD2511F53, w2 * 0xCD9E8D57  # the upper bit is lost, and returns with the shift's sign
        w0, w1, w2, w3 = (b >> 32 & mask) ^ w1 ^ key0, b & mask, (a >> 32 & mask) ^ w3 ^ key1, a & mask
        key0, key1 = key0 + 0x9E3779B9 & mask, key1 + 0xBB67AE85 & mask
    word = torch.stack([w0, w1, w2, w3]).gather(0, (element % 8 // 2)[None])[0]
    return word >> 16 * (element % 2) & 0xFFFF


def round_at_random(x: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds fp32 numbers to bf16 or fp16, up or down by their random bits.

    A number rounds up with the probability of its distance from the lower neighbour, in units of the distance between
    its neighbours. Numbers that the dtype has stay as they are. In fp16's subnormal numbers, that distance is first cut
    off after 16 bits.
    """
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    magnitude, sign = bits & 0x7FFFFFFF, bits >> 31 << 15
    if dtype == torch.bfloat16:
        rounded, nan = magnitude + random >> 16, 0x7FC0
    else:
        normal = magnitude + (random >> 3) - (112 << 23) >> 13
        subnormal = (x.abs().clamp(max=2.0**-14).double() * 2.0**40).long() + random >> 16
        rounded = torch.where(magnitude < 0x38800000, subnormal, normal)
        rounded, nan = torch.where(magnitude >= 0x47800000, 0x7C00, rounded), 0x7E00
    rounded = torch.where(x.isnan(), nan, rounded) | sign
    return (rounded - (rounded >> 15 << 16)).to(torch.int16).view(dtype)


STATE_SCALARS = tuple(dict.fromkeys(name for rule in RULES.values() for name in rule.state_scalars))
"""The state scalars of all rules."""
MOMENTS = tuple(dict.fromkeys(name for rule in RULES.values() for name in rule.moments))
"""The moments of all rules."""


def numbers(rule: str, group: dict[str, Any]) -> dict[str, Any]:
    """Reads a rule's hyperparameters from the parameter group: numbers, tuples of numbers, and flags."""

    def number(value: Any) -> Any:
        return value.item() if isinstance(value, Tensor) else value

    read: dict[str, Callable[[Any], Any]] = {
        NUMBER: number,
        DECAY_RATES: lambda rates: tuple(map(number, rates)),
        FLAG: bool,
    }
    return {name: read[kind](group[name]) for name, kind in RULES[rule].kinds.items()}


def in_fp64(param: Tensor, grad: Tensor | None, state: Mapping[str, Any]) -> bool:
    """Says whether the arithmetic of a parameter's update is fp64 rather than fp32."""
    tensors = [param, grad, *(state.get(name) for name in MOMENTS)]
    return any(t is not None and t.dtype in (torch.float64, torch.complex128) for t in tensors)


def are_modest(numbers: Iterable[Any], most: float = 1e18) -> bool:
    """Says whether numbers lie between 0 and ``most``, and decay rates, which are in tuples, not too close to 1.

    Such hyperparameters make all scalars of an update finite, if the state scalars after the step count are at most 1.
    """
    return all(are_modest(n, 0.999999) if isinstance(n, tuple) else 0 <= n <= most for n in numbers)


def check_finite(
    rule: str,
    numbers: dict[str, Any],
    state_scalars: Mapping[str, Tensor],
    in_fp64: bool,
    group_index: int,
    describe: Callable[[], str],
) -> None:
    """Refuses hyperparameters from which a rule computes scalars that are infinite in its arithmetic.

    Args:
        rule: a name in :data:`RULES`.
        numbers: the hyperparameters, as :func:`numbers` returns them.
        state_scalars: the parameter's state scalars before this step; empty if it has no state yet.
        in_fp64: whether the arithmetic is fp64, else fp32.
        group_index: the index of the parameter group, for errors.
        describe: returns the name by which errors call the parameter.

    Raises:
        ValueError: names the largest of the hyperparameters that would each make the scalars finite if set to 0. If
            there is none, names the largest of all, or the state if it is wrong.
    """
    if are_modest(numbers.values()) and all(0 <= float(v) <= 1 for name, v in state_scalars.items() if name != "step"):
        return
    dtype = torch.float64 if in_fp64 else torch.float32

    def are_finite(numbers: dict[str, Any]) -> bool:
        zero = torch.zeros((), dtype=dtype)
        state = {name: torch.tensor(float(value)) for name, value in RULES[rule].state_scalars.items()}
        state.update(dict.fromkeys(RULES[rule].moments, zero))
        state.update({name: value.detach().cpu().clone() for name, value in state_scalars.items()})
        try:
            RULES[rule].update(zero, zero, state, **numbers)
        except (OverflowError, ZeroDivisionError):
            return False
        return True

    if are_finite(numbers):
        return
    consequence = f": it makes the update infinite in {'fp64' if in_fp64 else 'fp32'}"
    keys = [key for key, kind in RULES[rule].kinds.items() if kind == NUMBER]
    zeros = {key: (0.0, 0.0) if isinstance(value, tuple) else type(value)(0) for key, value in numbers.items()}
    culprits = [key for key in keys if are_finite({**numbers, key: 0.0})] or (keys if are_finite(zeros) else [])
    if culprits:
        culprit = max(culprits, key=lambda key: abs(numbers[key]))
        raise ValueError(f"param_groups[{group_index}][{culprit!r}] is {float(numbers[culprit])!r}{consequence}")
    raise ValueError(
        f"the state of {describe()} has wrong scalars{consequence}. Delete this parameter's state to start it afresh"
    )


def update(
    rule: str,
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    *,
    maximize: bool = False,
    grad_scale: float = 1.0,
    coefficient: float = 1.0,
    first: bool = False,
    master: str | None = None,
    rounding: Rounding | None = None,
) -> None:
    """Updates one parameter and its state in place, by one step.

    Args:
        rule: a name in :data:`RULES`.
        param: a real or complex tensor; a complex number counts as two real ones.
        grad: has the same shape and is not modified. The rule gets it divided by ``grad_scale``, multiplied by
            ``coefficient`` and, with ``maximize``, negated.
        state: the parameter's complete state. Its moments have the parameter's shape, and any dtype and strides.
        group: the parameter group, which holds the rule's hyperparameters: numbers or tensors of one element.
        first: whether the moments hold nothing yet. The rule then does not see them.
        master: the entry of the state that holds the parameter's master, which the rule sees in the parameter's place.
            The parameter is then rounded from it.
        rounding: how streams in 16 bits are rounded at random; None rounds to nearest, ties to even.
    """
    moments = {name: state[name] for name in RULES[rule].moments if state.get(name) is not None}
    of_master = None if master is None else state[master]
    dtype = torch.float64 if in_fp64(param, grad, moments) else torch.float32

    def real(tensor: Tensor) -> Tensor:
        return torch.view_as_real(tensor) if tensor.is_complex() else tensor

    def widened(tensor: Tensor) -> Tensor:
        return real(tensor).to(dtype)

    def store(x: Tensor, to: Tensor, stream: int) -> None:
        # fp64 is rounded to fp32 first, which torch does on some processors only.
        if real(to).element_size() != 2:
            real(to).copy_(x)
        elif stream == PARAM and of_master is not None:
            store_master(x.float(), to, of_master)
        elif rounding is not None and (stream == PARAM or rounding.states):
            to.copy_(round_at_random(x.float(), random_bits(param, rounding, stream), to.dtype))
        else:
            real(to).copy_(x.float())

    g = widened(grad.resolve_conj())
    if grad_scale != 1:
        g = g / torch.tensor(grad_scale, dtype=dtype, device=g.device)
    if coefficient != 1:
        g = g * torch.tensor(coefficient, dtype=dtype, device=g.device)
    of_rule = {name: state[name].clone() for name in RULES[rule].state_scalars if name in state}
    if not first:
        of_rule.update({name: widened(value) for name, value in moments.items()})
    p = RULES[rule].update(
        widened(param if of_master is None else current_master(param, of_master)),
        -g if maximize else g,
        of_rule,
        **numbers(rule, group),
    )
    # Nothing is modified before the rule has finished, because it may raise.
    store(p, param, PARAM)
    for name in RULES[rule].state_scalars:
        if name in state:
            state[name].copy_(of_rule[name])
    for name, moment in moments.items():
        if name in of_rule:
            store(of_rule[name], moment, RULES[rule].stream_of(name))


def sum_of_squares(tensors: Iterable[Tensor]) -> float:
    """Returns the sum of the squares of all elements, from which the global norm follows.

    The order of the additions is fixed. A chunk of 4096 elements lies in rows of 512; each lane adds its squares in
    fp64, row after row, and then neighbours are added in pairs. The sums of the chunks are added exactly.
    """
    sums: list[float] = []
    for tensor in tensors:
        real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        chunks = torch.nn.functional.pad(real.detach().double().flatten(), (0, -real.numel() % 4096)).view(-1, 8, 512)
        lanes = chunks[:, 0].square()
        for row in range(1, 8):
            lanes = _fma(chunks[:, row], chunks[:, row], lanes)
        while lanes.shape[1] > 1:
            lanes = lanes[:, 0::2] + lanes[:, 1::2]
        sums += lanes.flatten().tolist()
    return math.fsum(sums)
