from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

class Triton:
    """The facts of the Triton kernels that a plan needs; see csrc/bindings/backends.h."""

    def __init__(
        self,
        make_launcher: Callable[[str, tuple[str, ...], str, str | None, int], Any],
        is_capturing: Callable[[], bool] | None,
        tile: int,
        on_cpu: bool,
        no_kernels: Sequence[str | None],
    ) -> None: ...

class StepPlan:
    """Steps one optimizer; see csrc/bindings/step_plan.h."""

    def __init__(
        self, rule: str, optimizer: str, cpu: bool, cuda: bool, triton: Triton | None, masters: str | None = None
    ) -> None: ...
    def step(
        self,
        param_groups: Any,
        state: Any,
        grad_scale: float = 1.0,
        scaler: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        coefficient: float | torch.Tensor = 1.0,
        clipping: Any = None,
        created: list[tuple[int, int, int]] | None = None,
        stepped: list[tuple[int, int]] | None = None,
        zeroes: bool = False,
        at_random: Any = None,
        only_looks: bool = False,
    ) -> Any: ...
    @property
    def updated(self) -> dict[tuple[str, str], int]:
        """How many parameters the last call updated, by the device's type and the backend's name."""
    @property
    def zeroed(self) -> bool:
        """Says whether the last call was a step that left all gradients zero."""
    @property
    def launches(self) -> int:
        """How many kernels the last call launched, except those that write tables."""

class Rule(NamedTuple):
    """Describes an update rule."""

    group_keys: dict[str, str]
    """Keys of the parameter group that the rule reads, with their kinds: see dracopt_ext/rule.py."""
    hyperparameters: int
    """How many numbers these keys yield; decay rates are two."""
    state_scalar_keys: tuple[str, ...]
    """Keys of the state's scalars; the step count is the first."""
    state_keys: tuple[str, ...]
    """Keys of the state's tensors."""
    scalars: int
    """How many scalars a step prepares, each in the arithmetic's dtype."""

def rules() -> dict[str, Rule]:
    """Describes the compiled rules, by name."""

def launch_layout() -> dict[str, int]:
    """Says where a kernel finds what a launch takes: offsets and sizes of csrc/cuda/launch.h, in bytes."""

def isa() -> str:
    """Names the instruction set of the CPU kernels: "avx512", "avx2" or "baseline"."""

def cuda_unavailable(device: int) -> str | None:
    """Says why the CUDA kernels cannot run on this GPU; None if they can. The call looks for GPUs."""

def cuda_architectures() -> list[int]:
    """Lists the architectures of the CUDA kernels in ascending order: 900 is sm_90. Empty without CUDA kernels."""

def sum_of_squares(
    gradients: list[torch.Tensor], of_parameters: bool
) -> tuple[float, list[torch.Tensor], list[torch.Tensor]]:
    """Adds the squares of those gradients that the CPU's kernels serve. The list holds gradients, or their parameters.

    Returns the sum, items that have among them every dtype that was served, and the items that were not served.
    """

def multiply_gradients(gradients: list[torch.Tensor], of_parameters: bool, number: float) -> list[torch.Tensor]:
    """Multiplies the gradients that the CPU's kernels serve, in place. Returns the other items of the list."""

def limit_gradients(gradients: list[torch.Tensor], of_parameters: bool, number: float) -> list[torch.Tensor]:
    """Limits the same gradients to [-number, number]. Returns the other items of the list."""

def zero_gradients(gradients: list[torch.Tensor], of_parameters: bool) -> list[torch.Tensor]:
    """Fills the same gradients with zeros. Returns the other items of the list."""

def measure_on_gpu(
    gradients: list[torch.Tensor], norm: torch.Tensor, grad_scale: torch.Tensor | None
) -> list[torch.Tensor]:
    """Finds the norm of gradients on the GPU of ``norm``, divided by the scale. Returns all other gradients."""
