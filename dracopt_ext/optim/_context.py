"""The context, which an optimizer keeps from step to step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from .. import backend as backend_module
from ..containers import as_number
from ._precision import Precision, StateDtype, check_use, place_of_shard

if TYPE_CHECKING:
    from .._C import StepPlan
    from ._base import FusedOptimizer
    from ._release import GradientRelease
    from ._step import Step


class Context:
    """Belongs to one optimizer. Holds what the user asked for, the plans, and what ran in the last step."""

    def __init__(
        self,
        backend: str | None = None,
        precision: Precision = Precision(),  # noqa: B008
        max_grad_norm: float | None = None,
        error_if_nonfinite: bool = False,
    ) -> None:
        options = backend_module.resolve(backend), precision, checked_norm(max_grad_norm), bool(error_if_nonfinite)
        self.__setstate__(options)

    def __getstate__(self) -> tuple[str | None, Precision, float | None, bool]:
        return self.backend, self.precision, self.max_grad_norm, self.error_if_nonfinite

    def __setstate__(self, asked_for: tuple[str | None, Precision, float | None, bool]) -> None:
        self.backend, self.precision, self.max_grad_norm, self.error_if_nonfinite = asked_for
        self.grad_norm: Tensor | None = None  # found by the last step that needed it
        self.norm_is_elsewhere = False  # the last gradients were distributed over GPUs, whose norm no plan finds
        self.release: GradientRelease | None = None  # if parameters are stepped inside of backward()
        self.overflow: Tensor | None = None  # where the next step must say whether it has found an overflow
        # The plans that were needed so far, by whether each may use the native kernels, and Triton. Plans stay, because
        # captured graphs refer to their tables.
        self.plans: dict[tuple[bool, bool], StepPlan] = {}
        self.plan_ran: StepPlan | None = None  # in the last step
        self.others_ran: dict[str, set[str]] = {}  # by device type, what ran beside the plan in the last step
        self._shards: dict[int, tuple[Any, tuple[int, list[int]]]] = {}  # by a parameter's identity, with its spec
        # The running step, by process. A child that is forked meanwhile inherits only its parent's.
        self.running: dict[int, Step] = {}

    def place_of_shard(self, p: Any) -> tuple[int, list[int]]:
        """Returns the place of a distributed parameter's part in the whole tensor, which is found out once."""
        known = self._shards.get(id(p))
        if known is None or known[0] is not p._spec:
            known = self._shards[id(p)] = p._spec, place_of_shard(p)
        return known[1]


def checked_norm(max_grad_norm: float | None) -> float | None:
    """Returns the largest norm that gradients may have, if it can be right."""
    if max_grad_norm is None:
        return None
    most = float(as_number(max_grad_norm, "max_grad_norm"))
    if not most >= 0:
        raise ValueError(f"max_grad_norm is {most}; it must be at least 0, or None to clip nothing")
    return most


class Options(TypedDict, total=False):
    """The options that all optimizers take beside torch's, as keywords. The docstring of ``Adam`` describes them."""

    backend: str | None
    state_dtype: StateDtype
    master_weights: str | None
    stochastic_rounding: bool | str
    rounding_seed: int
    max_grad_norm: float | None
    error_if_nonfinite: bool


DEFAULTS: Options = {
    "backend": None,
    "state_dtype": None,
    "master_weights": None,
    "stochastic_rounding": False,
    "rounding_seed": 0,
    "max_grad_norm": None,
    "error_if_nonfinite": False,
}


@contextmanager
def given_context(optimizer: FusedOptimizer, options: Options) -> Iterator[None]:
    """Gives an optimizer its context, before torch's constructor runs in the block.

    None, False and 0 keep an option that a subclass has set.

    Raises:
        TypeError: an option has an unknown name.
    """
    for name in [name for name in options if name not in DEFAULTS]:
        raise TypeError(f"{type(optimizer).__name__}.__init__() got an unexpected keyword argument {name!r}")
    given: dict[str, Any] = {**DEFAULTS, **options}
    backend, max_grad_norm, error_if_nonfinite = map(given.pop, ("backend", "max_grad_norm", "error_if_nonfinite"))
    precision = Precision(**given)
    before: Context | None = optimizer.__dict__.get("_dracopt_context")
    if before is not None:
        backend = backend or before.backend
        max_grad_norm = before.max_grad_norm if max_grad_norm is None else max_grad_norm
        error_if_nonfinite = error_if_nonfinite or before.error_if_nonfinite
        precision = replace(before.precision, **{name: value for name, value in vars(precision).items() if value})
    if isinstance(precision.state_dtype, Mapping):
        precision = replace(precision, state_dtype=dict(precision.state_dtype))
    precision.check(optimizer._dracopt_kind.rule.moments)
    optimizer._dracopt_context = Context(backend, precision, max_grad_norm, error_if_nonfinite)
    yield
    check_use(optimizer, precision)


def context_of(optimizer: FusedOptimizer) -> Context:
    """Returns an optimizer's context; makes one that asks for nothing if our constructor was skipped."""
    context: Context | None = optimizer.__dict__.get("_dracopt_context")
    if context is None:
        context = optimizer._dracopt_context = Context()
    return context
