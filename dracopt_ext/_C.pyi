from typing import Any

import torch

class StepPlan:
    """One optimizer's step over the native kernels; see csrc/bindings/step_plan.h."""

    def __init__(self, rule: str, optimizer: str) -> None: ...
    def step(
        self,
        param_groups: Any,
        state: Any,
        grad_scale: float = 1.0,
        scaler: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        created: list[tuple[int, int, int]] | None = None,
        stepped: list[tuple[int, int]] = ...,
    ) -> Any: ...
    @property
    def updated(self) -> dict[str, int]:
        """How many parameters the last call updated, by type of device."""
    @property
    def launches(self) -> int:
        """How many launches of the update kernel the last call made."""

def isa() -> str:
    """The instruction set of the CPU kernels: "avx512", "avx2" or "baseline"."""

def cuda_unavailable(device: int) -> str | None:
    """Why the CUDA kernels cannot run on this GPU; None if they can. Looks for GPUs."""

def cuda_architectures() -> list[int]:
    """What the CUDA kernels were compiled for, in ascending order: 900 is sm_90. Empty if they were not."""
