from typing import Any

import torch

class StepPlan:
    """One optimizer's step over the native kernels; see csrc/bindings/step_plan.h."""

    def __init__(self, rule: str) -> None: ...
    def step(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[torch.Tensor, Any],
        grad_scale: float = 1.0,
        created: list[tuple[int, int]] | None = None,
        stepped: list[tuple[int, int]] = ...,
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int, str]]] | None: ...
    @property
    def updated(self) -> int:
        """How many parameters the last call updated."""

def isa() -> str:
    """The instruction set of the CPU kernels: "avx512", "avx2" or "baseline"."""
