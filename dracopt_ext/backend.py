"""What can run an update here, why something cannot, and which one is chosen."""

from __future__ import annotations

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

_TRITON_REASON = "this version has no Triton kernels"


def backends() -> dict[str, str | None]:
    """Every backend and why it cannot run here; None means that it can.

    The keys are ``native:cpu``, ``native:cuda``, ``triton`` and ``reference``.
    """
    return {"native:cpu": NATIVE_REASON, "native:cuda": _why_no_cuda(), "triton": _TRITON_REASON, "reference": None}


def _why_no_cuda() -> str | None:
    if _C is None:
        return NATIVE_REASON
    if BUILD_INFO.get("no_cuda"):
        return f"compiled without CUDA kernels: {BUILD_INFO['no_cuda']}"
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    reasons: list[str | None] = [_C.cuda_unavailable(device) for device in range(max(torch.cuda.device_count(), 1))]
    return None if None in reasons else reasons[0]


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
    reason = {"native": NATIVE_REASON, "triton": _TRITON_REASON, "reference": None}[backend]
    if reason is not None:
        raise RuntimeError(f"{source}={backend!r} is not available: {reason}")
    return backend


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn, but not twice in a process with the same words."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
