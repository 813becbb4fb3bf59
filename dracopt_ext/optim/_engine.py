"""The engine, which an optimizer keeps from step to step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import backend as backend_module

if TYPE_CHECKING:
    from .._C import StepPlan
    from ._base import FusedOptimizer
    from ._release import GradientRelease
    from ._step import Step

STATE_DTYPES = (None, torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Engine:
    """Belongs to one optimizer. Holds what the user asked for, the plans, and what ran in the last step."""

    def __init__(
        self,
        backend: str | None = None,
        state_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
        error_if_nonfinite: bool = False,
    ) -> None:
        if state_dtype not in STATE_DTYPES:
            names = ", ".join(map(str, STATE_DTYPES[1:]))
            raise ValueError(f"state_dtype={state_dtype!r} is none of {names}; None stands for the parameter's own")
        options = backend_module.resolve(backend), state_dtype, checked_norm(max_grad_norm), bool(error_if_nonfinite)
        self.__setstate__(options)

    def __getstate__(self) -> tuple[str | None, torch.dtype | None, float | None, bool]:
        return self.backend, self.state_dtype, self.max_grad_norm, self.error_if_nonfinite

    def __setstate__(self, asked_for: tuple[str | None, torch.dtype | None, float | None, bool]) -> None:
        self.backend, self.state_dtype, self.max_grad_norm, self.error_if_nonfinite = asked_for
        self.grad_norm: Tensor | None = None  # of the last step that clipped
        self.norm_is_elsewhere = False  # the last gradients were distributed over GPUs, whose norm no plan finds
        self.release: GradientRelease | None = None  # if parameters are stepped inside of backward()
        self.overflow: Tensor | None = None  # where the next step must say whether it has found an overflow
        # The plans that were needed so far, by whether each may use the native kernels, and Triton. Plans stay, because
        # captured graphs refer to their tables.
        self.plans: dict[tuple[bool, bool], StepPlan] = {}
        self.plan_ran: StepPlan | None = None  # in the last step
        self.others_ran: dict[str, set[str]] = {}  # by device type, what ran beside the plan in the last step
        # The running step, by process. A child that is forked meanwhile inherits only its parent's.
        self.running: dict[int, Step] = {}


def checked_norm(max_grad_norm: float | None) -> float | None:
    """Returns the largest norm that gradients may have, if it can be right."""
    if max_grad_norm is None:
        return None
    most = float(max_grad_norm)
    if not most >= 0:
        raise ValueError(f"max_grad_norm is {most}; it must be at least 0, or None to clip nothing")
    return most


def give_engine(
    optimizer: FusedOptimizer,
    backend: str | None,
    state_dtype: torch.dtype | None,
    max_grad_norm: float | None,
    error_if_nonfinite: bool,
) -> None:
    """Gives an optimizer its engine, before torch's constructor runs. None keeps an option that a subclass has set."""
    before: Engine | None = optimizer.__dict__.get("_dracopt_engine")
    if before is not None:
        backend, state_dtype = backend or before.backend, state_dtype or before.state_dtype
        max_grad_norm = before.max_grad_norm if max_grad_norm is None else max_grad_norm
        error_if_nonfinite = error_if_nonfinite or before.error_if_nonfinite
    optimizer._dracopt_engine = Engine(backend, state_dtype, max_grad_norm, error_if_nonfinite)


def engine_of(optimizer: FusedOptimizer) -> Engine:
    """Returns an optimizer's engine; makes one that asks for nothing if our constructor was skipped."""
    engine: Engine | None = optimizer.__dict__.get("_dracopt_engine")
    if engine is None:
        engine = optimizer._dracopt_engine = Engine()
    return engine
