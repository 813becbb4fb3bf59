"""What can run an update here, why something cannot, and which one is chosen."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType
from typing import Any

import torch

NAMES = ("native", "triton", "reference")


def _build_info() -> dict[str, Any]:
    """What the build left behind; empty in a source tree that was never built."""
    if importlib.util.find_spec("dracopt_ext._build_info") is None:
        return {}
    return dict(importlib.import_module("dracopt_ext._build_info").INFO)


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _load_native() -> tuple[ModuleType | None, str | None]:
    """The compiled module, or the reason why there is none."""
    if _minor(torch.__version__) < (2, 10):
        return None, f"torch {torch.__version__} is older than 2.10"
    if importlib.util.find_spec("dracopt_ext._C") is None:
        return None, BUILD_INFO.get("reason") or "not compiled: run `pip install .` in the source tree"
    built_for = BUILD_INFO.get("torch") or torch.__version__
    if _minor(built_for) != _minor(torch.__version__):
        return (
            None,
            f"compiled for torch {built_for}, not for the installed {torch.__version__}: install dracopt_ext anew",
        )
    try:
        return importlib.import_module("dracopt_ext._C"), None
    except ImportError as error:
        return None, f"the compiled module does not load: {error}"


BUILD_INFO = _build_info()
_C, NATIVE_REASON = _load_native()

GPU = "cuda"
"""The type of the devices that the CUDA kernels serve."""


def backends() -> dict[str, str | None]:
    """Every backend and why it cannot run here; None means that it can.

    The keys are ``native:cpu``, ``native:cuda``, ``triton`` and ``reference``.
    """
    return {"native:cpu": NATIVE_REASON, "native:cuda": _why_no_cuda(), "triton": why_no_triton(), "reference": None}


def _why_no_cuda() -> str | None:
    if _C is None:
        return NATIVE_REASON
    if BUILD_INFO.get("no_cuda"):
        return f"compiled without CUDA kernels: {BUILD_INFO['no_cuda']}"
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    reasons: list[str | None] = [_C.cuda_unavailable(device) for device in range(max(torch.cuda.device_count(), 1))]
    return None if None in reasons else reasons[0]


INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
"""Whether Triton's kernels are interpreted, on tensors of the CPU as well."""


@functools.cache
def why_no_triton() -> str | None:
    """Why the Triton kernels cannot run here; None if they can. Imports triton only if there is a GPU for it."""
    if importlib.util.find_spec("dracopt_ext.triton_kernels") is None:
        return "not installed: run `pip install .` in the source tree"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'triton>=3.6'"
    if not INTERPRETING and not torch.cuda.is_available():
        return "torch finds no GPU"
    try:
        import triton
    except ImportError as error:
        return f"triton does not load: {error}"
    # Before 3.7 the square root for AMD is not that of IEEE 754 where numbers are subnormal.
    needed = (3, 6) if torch.version.hip is None else (3, 7)
    if _minor(triton.__version__) < needed:
        return f"triton {triton.__version__} is older than {needed[0]}.{needed[1]}"
    if INTERPRETING:
        return None
    reasons = [why_no_triton_on(device) for device in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


@functools.cache
def why_no_triton_on(device: int) -> str | None:
    """The same of one GPU."""
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"Triton does not compile for {torch.cuda.get_device_name(device)}: its compute capability is below 8.0"
    return None


def triton_serves_gpus() -> bool:
    """Whether a GPU's tensors are Triton's if nothing else was asked for: there is one, and no CUDA kernel for it."""
    # While nothing is on a GPU, none is to be waked.
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and _triton_is_needed()


@functools.cache
def _triton_is_needed() -> bool:
    return not INTERPRETING and _why_no_cuda() is not None and why_no_triton() is None


def resolve(backend: str | None) -> str | None:
    """The backend to use for an optimizer that was asked for ``backend``; None leaves the choice to each step.

    ``DRACOPT_BACKEND`` takes the place of None.

    Raises:
        ValueError: if no backend has that name.
        RuntimeError: if it cannot run here; the message says why.
    """
    source = "backend"
    if backend is None:
        source, backend = "DRACOPT_BACKEND", os.environ.get("DRACOPT_BACKEND") or None
    if backend is None:
        return None
    if backend not in NAMES:
        raise ValueError(f"{source}={backend!r} is none of {', '.join(map(repr, NAMES))}")
    reason = {"native": NATIVE_REASON, "reference": None}[backend] if backend != "triton" else why_no_triton()
    if reason is not None:
        raise RuntimeError(f"{source}={backend!r} is not available: {reason}")
    return backend


def step_plan(backend: str, rule: str, optimizer: str, asked_for: str | None) -> Any:
    """What steps an optimizer of this class name by the rule, with the kernels of a backend that can run here."""
    if backend == "triton":
        plan = importlib.import_module("dracopt_ext.triton_kernels.plan")
        return plan.StepPlan(rule, optimizer, on_cpu=asked_for == "triton", unavailable=why_no_triton_on)
    assert _C is not None
    return _C.StepPlan(rule, optimizer)


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn, but not twice in a process with the same words."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
