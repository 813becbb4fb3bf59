from typing import Any

import torch

class StepPlan:
    """Steps one optimizer with the native kernels; see csrc/bindings/step_plan.h."""

    def __init__(self, rule: str, optimizer: str) -> None: ...
    def step(
        self,
        param_groups: Any,
        state: Any,
        grad_scale: float = 1.0,
        scaler: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        created: list[tuple[int, int, int]] | None = None,
        stepped: list[tuple[int, int]] | None = None,
        only_on: str | None = None,
        not_on: str | None = None,
        only_looks: bool = False,
    ) -> Any: ...
    @property
    def updated(self) -> dict[str, int]:
        """How many parameters the last call updated, by type of device."""
    @property
    def launches(self) -> int:
        """How many launches of the update kernel the last call made."""

def isa() -> str:
    """Names the instruction set of the CPU kernels: "avx512", "avx2" or "baseline"."""

def cuda_unavailable(device: int) -> str | None:
    """Says why the CUDA kernels cannot run on this GPU; None if they can. The call looks for GPUs."""

def cuda_architectures() -> list[int]:
    """Lists the architectures of the CUDA kernels in ascending order: 900 is sm_90. Empty without CUDA kernels."""
