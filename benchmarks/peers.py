"""The optimizers that are compared, each at its best setting."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch

import dracopt_ext

from .cases import Case

Groups = list[dict[str, Any]]
Make = Callable[[Case, Groups], torch.optim.Optimizer]

BASELINE = "torch fused"
SLOW = {"torch foreach", "torch for-loop"}
"""Those that take every fourth round only where a case is large."""


def make_groups(case: Case) -> Groups:
    """New parameters with gradients, with the same values in each call."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in case.shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    if not case.group_each:
        return [{"params": params}]
    lr = case.options["lr"]
    return [{"params": [p], "lr": lr * (1 + i / len(params))} for i, p in enumerate(params)]


def _dracopt(case: Case, groups: Groups) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(dracopt_ext, case.optimizer)(groups, **case.options)
    return optimizer


def _torch(**implementation: bool) -> Make:
    def make(case: Case, groups: Groups) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = getattr(torch.optim, case.optimizer)(
            groups, **case.options, **implementation
        )
        return optimizer

    return make


def _deepspeed(case: Case, groups: Groups) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, **case.options, adamw_mode=case.optimizer == "AdamW")
    return optimizer


PEERS: dict[str, Make] = {
    "dracopt": _dracopt,
    "torch fused": _torch(fused=True),
    "torch foreach": _torch(foreach=True),
    "torch for-loop": _torch(foreach=False, fused=False),
    "DeepSpeed CPUAdam": _deepspeed,
}


def runs(peer: str, case: Case) -> bool:
    return peer != "DeepSpeed CPUAdam" or case.optimizer in ("Adam", "AdamW")


def deepspeed_missing() -> str | None:
    """Why DeepSpeed's optimizer cannot run here; None if it can."""
    # It compiles its kernel when the first optimizer is made, and talks on stdout, where our table goes.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            from deepspeed.ops.adam import DeepSpeedCPUAdam
        except ImportError as error:
            return f"not installed ({error})"
        try:
            DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(1))])
        except Exception as error:
            return f"its kernel does not compile or load ({str(error).splitlines()[0]})"
    return None


def require_native(optimizer: torch.optim.Optimizer) -> None:
    """Raise unless the last step of this optimizer of ours ran in the native kernels and nowhere else."""
    ran = getattr(optimizer, "last_backend", None)
    if ran != {"cpu": frozenset({"native"})}:
        raise RuntimeError(f"dracopt was to be measured with its native kernels, but {ran} ran")


def require_equal_work(optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """Raise unless all of them, after as many steps, arrived at the same parameters."""
    expected = _params(optimizers[BASELINE])
    for name, optimizer in optimizers.items():
        for ours, theirs in zip(_params(optimizer), expected, strict=True):
            if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6):
                raise RuntimeError(f"{name} computes something else than {BASELINE}")


def _params(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
