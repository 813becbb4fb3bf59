"""The table of test cases and the code that runs a case. Every parity test is parametrized by this table."""

from __future__ import annotations

import functools
import inspect
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dracopt_ext
import dracopt_ext.optim
from dracopt_ext.reference import STATE_SCALARS
from dracopt_ext.rule import RULES, Rule

MakeOptimizer = Callable[..., torch.optim.Optimizer]
Snapshot = dict[str, Tensor]
Place = Callable[[Tensor], Tensor]


def rule_of(name: str) -> Rule:
    rule: Rule = getattr(dracopt_ext, name)._dracopt_kind.rule
    return rule


def classes(*, in_torch: bool | None = None, fused: bool | None = None, counts: bool | None = None) -> list[str]:
    """Returns the names of our classes, or of those that torch has, that take ``fused``, or that count steps."""

    def fits(name: str) -> bool:
        facts = (
            (in_torch, hasattr(torch.optim, name)),
            (fused, "fused" in inspect.signature(getattr(dracopt_ext, name)).parameters),
            (counts, "step" in rule_of(name).state_scalars),
        )
        return all(wanted in (None, fact) for wanted, fact in facts)

    return [name for name in dracopt_ext.optim.__all__ if fits(name)]


def torchs(name: str) -> MakeOptimizer:
    """Returns torch's class, or ours on the reference if torch has none."""
    if hasattr(torch.optim, name):
        return getattr(torch.optim, name)
    return functools.partial(getattr(dracopt_ext, name), backend="reference")


@dataclass(frozen=True)
class Case:
    """An optimizer class with the options that change its arithmetic."""

    algorithm: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.algorithm, *(f"{key}={value}" for key, value in self.options.items())])

    @property
    def ours(self) -> MakeOptimizer:
        return getattr(dracopt_ext, self.algorithm)

    @property
    def torchs(self) -> MakeOptimizer:
        return torchs(self.algorithm)

    @property
    def rule(self) -> Rule:
        return rule_of(self.algorithm)

    def moments(self) -> list[str]:
        """Returns the names of the moments that these options ask for."""
        return self.rule.moments_of(self.ours([torch.zeros(1)], **self.options).param_groups[0])

    @property
    def fused(self) -> dict[str, bool]:
        """The option that makes torch round as ours does on whole SIMD blocks; empty if torch has no such kernel.

        For other processors than x86-64 torch has another kernel of Adam, which fuses other operations.
        """
        has_kernel = self.algorithm in classes(in_torch=True, fused=True)
        return {"fused": True} if has_kernel and (self.algorithm == "SGD" or platform.machine() == "x86_64") else {}

    def assert_agree(self, ours: Snapshot, theirs: Snapshot, steps: int) -> None:
        """Checks our result against torch's after ``steps`` steps on whole SIMD blocks."""
        if self.fused:
            assert_same_bits(ours, theirs)
        else:
            assert_close(ours, theirs, steps * UNFUSED_ULPS)


# A step of torch rounds at most twelve times and ours at most eight, by half an ulp each, in terms no larger than twice
# the scale of the result.
UNFUSED_ULPS = (12 + 8) * 0.5 * 2

CASES = [
    Case("SGD"),
    Case("SGD", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    Case("SGD", {"lr": 0.1, "momentum": 0.9}),
    Case("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    Case("SGD", {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1, "maximize": True}),
    Case("Adam"),
    Case("Adam", {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}),
    Case("Adam", {"lr": 0.01, "amsgrad": True, "maximize": True}),
    Case("Adam", {"lr": 0.01, "betas": (0.3, 0.5), "weight_decay": 0.1, "decoupled_weight_decay": True}),
    Case("AdamW"),
    Case("AdamW", {"lr": 0.01, "weight_decay": 0.1, "betas": (0.5, 0.95)}),
    Case("AdamW", {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    Case("AdamW", {"lr": 0.01, "weight_decay": 0, "eps": 0}),
    Case("Lion", {"lr": 0.01}),
    Case("Lion", {"lr": 0.01, "betas": (0.5, 0.8), "weight_decay": 0.1, "maximize": True}),
    Case("NAdam"),
    Case("NAdam", {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1, "momentum_decay": 0.3, "maximize": True}),
    Case("NAdam", {"lr": 0.01, "betas": (0.4, 0.9), "weight_decay": 0.1, "decoupled_weight_decay": True}),
]
FUSED_CASES = [case for case in CASES if case.fused]
BY_RULE = {
    name: max(rows, key=lambda case: (len(case.moments()), len(case.options)))
    for name, rule in RULES.items()
    if (rows := [case for case in CASES if case.rule is rule])
}
"""By rule, the case with the most moments, and of these the one with the most options."""
RULE_CASES = list(BY_RULE.values())

DTYPES = [torch.float32, torch.float64]
STORAGE = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# Sizes around the widths of vectors and of a thread's share, and 0. torch rounds the tail of a tensor differently.
SIZES = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1000, 8191, 8193, 33000]
WHOLE_BLOCKS = [64, 128, 512, 1024, 4096]


def inputs(
    sizes: Sequence[int], dtype: torch.dtype, steps: int, seed: int = 0
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Initial values, and gradients for each step. Gradients shrink, so amsgrad's maximum is not the last one."""
    generator = torch.Generator().manual_seed(seed)

    def random(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype)

    return [random(size) for size in sizes], [[random(size) / (step + 1) for size in sizes] for step in range(steps)]


def snapshot(optimizer: torch.optim.Optimizer) -> Snapshot:
    """Copies all parameters and states, under names that identify them."""
    found: Snapshot = {}
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            found[f"{g}.{i}"] = p.detach().clone()
            for name, value in optimizer.state.get(p, {}).items():
                found[f"{g}.{i}.{name}"] = value.detach().clone()
                if name == "master_remainder":  # an integer in the bits of another number
                    found[f"{g}.{i}.{name}"] = value.detach().view(torch.int16).float()
    return found


def train(
    make: MakeOptimizer,
    options: dict[str, Any],
    initial: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
    place: Place = Tensor.clone,
    place_grad: Place | None = None,
    place_state: Place | None = None,
) -> Snapshot:
    """Takes one step for each list of gradients.

    ``place`` puts parameters into their place in memory, and gradients if ``place_grad`` is missing. ``place_state``,
    if given, does so for states after the first step.
    """
    params = [torch.nn.Parameter(place(value)) for value in initial]
    optimizer = make(params, **options)
    for number, step in enumerate(gradients):
        for p, grad in zip(params, step, strict=True):
            p.grad_dtype = grad.dtype
            p.grad = (place_grad or place)(grad)
        optimizer.step()
        if number == 0 and place_state is not None:
            for state in optimizer.state.values():
                for name, value in state.items():
                    if value.dim() > 0 or name not in STATE_SCALARS:
                        state[name] = place_state(value)
    return snapshot(optimizer)


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Compares elementwise; all NaNs are equal."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    as_integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (a.view(as_integer) == b.view(as_integer)) | (a.isnan() & b.isnan())


def assert_same_bits(ours: Snapshot, theirs: Snapshot) -> None:
    assert ours.keys() == theirs.keys()
    for name, a in ours.items():
        b = theirs[name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        wrong = ~same_bits(a, b)
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {a.numel()} elements differ, the first at {wrong.nonzero()[0]}"
        )


def assert_close(ours: Snapshot, theirs: Snapshot, ulps: float) -> None:
    """Allows ``ulps`` units in the last place of the larger of the element and its tensor's mean magnitude."""
    assert ours.keys() == theirs.keys()
    for name, a in ours.items():
        b = theirs[name].double()
        if a.numel() == 0:
            continue
        unit = torch.finfo(a.dtype).eps * torch.maximum(b.abs(), b.abs().mean())
        error = ((a.double() - b).abs() / unit).max()
        assert error <= ulps, f"{name}: {error:.1f} ulps"


class NoOp:
    """A fault that every numeric test must notice: the optimizer creates states but leaves the parameters alone."""

    def __init__(self, make: MakeOptimizer) -> None:
        self.make = make

    def __call__(self, params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
        before = [p.detach().clone() for p in params]
        optimizer = self.make(params, **options)

        def undo(*_: Any) -> None:
            with torch.no_grad():
                for p, value in zip(params, before, strict=True):
                    p.copy_(value)

        optimizer.register_step_post_hook(undo)
        return optimizer


class OnePercentOff(NoOp):
    """A fault that every numeric test must notice: updates are 1% too large."""

    def __call__(self, params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
        optimizer = self.make(params, **options)
        before: list[Tensor] = []
        optimizer.register_step_pre_hook(lambda *_: before.extend(p.detach().clone() for p in params))

        def exaggerate(*_: Any) -> None:
            with torch.no_grad():
                for p, value in zip(params, before, strict=True):
                    p.add_(p - value, alpha=0.01)
            before.clear()

        optimizer.register_step_post_hook(exaggerate)
        return optimizer


FAULTS = [NoOp, OnePercentOff]
