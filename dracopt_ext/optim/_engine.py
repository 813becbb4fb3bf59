"""The engine, which an optimizer keeps from step to step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .. import backend as backend_module

if TYPE_CHECKING:
    from .._C import StepPlan
    from ._base import FusedOptimizer
    from ._step import Step

STATE_DTYPES = (None, torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Engine:
    """Belongs to one optimizer. Holds what the user asked for, the plans, and what ran in the last step."""

    def __init__(self, backend: str | None = None, state_dtype: torch.dtype | None = None) -> None:
        if state_dtype not in STATE_DTYPES:
            names = ", ".join(map(str, STATE_DTYPES[1:]))
            raise ValueError(f"state_dtype={state_dtype!r} is none of {names}; None stands for the parameter's own")
        self.__setstate__((backend_module.resolve(backend), state_dtype))

    def __getstate__(self) -> tuple[str | None, torch.dtype | None]:
        return self.backend, self.state_dtype

    def __setstate__(self, asked_for: tuple[str | None, torch.dtype | None]) -> None:
        self.backend, self.state_dtype = asked_for
        # The plans that were needed so far, by whether each may use the native kernels, and Triton. Plans stay, because
        # captured graphs refer to their tables.
        self.plans: dict[tuple[bool, bool], StepPlan] = {}
        self.plan_ran: StepPlan | None = None  # in the last step
        self.others_ran: dict[str, set[str]] = {}  # by device type, what ran beside the plan in the last step
        # The running step, by process. A child that is forked meanwhile inherits only its parent's.
        self.running: dict[int, Step] = {}


def give_engine(optimizer: FusedOptimizer, backend: str | None, state_dtype: torch.dtype | None) -> None:
    """Gives an optimizer its engine, before torch's constructor runs. None keeps an option that a subclass has set."""
    before: Engine | None = optimizer.__dict__.get("_dracopt_engine")
    if before is not None:
        backend, state_dtype = backend or before.backend, state_dtype or before.state_dtype
    optimizer._dracopt_engine = Engine(backend, state_dtype)


def engine_of(optimizer: FusedOptimizer) -> Engine:
    """Returns an optimizer's engine; makes one that asks for nothing if our constructor was skipped."""
    engine: Engine | None = optimizer.__dict__.get("_dracopt_engine")
    if engine is None:
        engine = optimizer._dracopt_engine = Engine()
    return engine
