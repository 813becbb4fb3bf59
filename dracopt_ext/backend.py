"""What can run an update here, why something cannot, and which one is chosen."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .portable import compiled

NAMES = ("native", "triton", "reference")


def _build_info() -> dict[str, Any]:
    """What the build left behind; empty in a source tree that was never built."""
    if importlib.util.find_spec("dracopt_ext._build_info") is None:
        return {}
    return dict(importlib.import_module("dracopt_ext._build_info").INFO)


def _minor(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _is_release(version: str) -> bool:
    return re.fullmatch(r"[\d.]+(\.post\d+)?(\+.*)?", version) is not None


def _built_for(version: str) -> bool:
    """Is there a binding for this version of torch?

    Releases of one minor version have one ABI. What comes before a release has that of its own build.
    """
    built = [other for other in BUILD_INFO.get("torch", ()) if _minor(other) == _minor(version)]
    return version in built or any(_is_release(other) and _is_release(version) for other in built)


def _load_native() -> tuple[ModuleType | None, compiled.Library | None, str | None]:
    """The compiled module ``dracopt_ext._C``; else the kernels without it; and why there is no module for this torch.

    A module that is there and does not load is a mistake to be mended, and nothing takes its place.
    """
    installed, built = torch.__version__, BUILD_INFO.get("torch")
    if _minor(installed) < (2, 10):
        return None, None, f"torch {installed} is older than 2.10"
    if not built:
        return None, None, BUILD_INFO.get("reason") or "not compiled: run `pip install .` in the source tree"
    reason = f"compiled for torch {', '.join(built)}, not for the installed {installed}"
    if _built_for(installed):
        folder = NATIVE / "torch_{}_{}".format(*_minor(installed))
        reason = f"{folder} has no module for this Python"
        spec = PathFinder.find_spec("dracopt_ext._C", [str(folder)])
        try:
            if spec is not None and spec.loader is not None:
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                sys.modules["dracopt_ext._C"] = module
                return module, None, None
        except ImportError as error:
            return None, None, f"what was compiled does not load: {error}"
    try:
        return None, importlib.import_module("dracopt_ext.portable.compiled").load(NATIVE), reason
    except (ImportError, OSError, AttributeError) as error:
        return None, None, f"{reason}; and without binding it does not load: {error}"


BUILD_INFO = _build_info()
NATIVE = Path(__file__).parent / "native"
"""What was compiled: the kernels, and their bindings to versions of torch."""
_C, _LIBRARY, _REASON = _load_native()

NATIVE_REASON = None if _LIBRARY is not None else _REASON
"""Why the compiled kernels cannot run at all; None if they can."""

# Forced, so that what is there stays if it fails.
BUILD_FROM_SOURCE = (
    "DRACOPT_BUILD=force pip install --force-reinstall --no-deps --no-cache-dir --no-binary dracopt-ext dracopt-ext"
)


def notice() -> str | None:
    """What a user is to know when the package is imported; None if there is nothing."""
    if NATIVE_REASON is not None:
        return f"dracopt_ext runs without its compiled kernels: {NATIVE_REASON}"
    if _LIBRARY is not None:
        return (
            f"dracopt_ext has no binding to this torch: {_REASON}. Its kernels run on the CPU all the same, with more "
            f"work for the host in each step. For less, build it for this torch: {BUILD_FROM_SOURCE} (in a clone, `.` "
            "for the last two words)"
        )
    return None


def isa() -> str | None:
    """The instruction set of the CPU's kernels; None if there are none."""
    if _C is not None:
        return str(_C.isa())
    return _LIBRARY.isa if _LIBRARY is not None else None


GPU = "cuda"
"""The type of the devices that the CUDA kernels serve."""


def backends() -> dict[str, str | None]:
    """Every backend and why it cannot run here; None means that it can.

    The keys are ``native:cpu``, ``native:cuda``, ``triton`` and ``reference``.
    """
    return {"native:cpu": NATIVE_REASON, "native:cuda": _why_no_cuda(), "triton": why_no_triton(), "reference": None}


def _why_no_cuda() -> str | None:
    if _C is None:
        return _REASON
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
    if backend == "native" and _C is not None:
        return _C.StepPlan(rule, optimizer)
    plan = importlib.import_module("dracopt_ext.portable.plan")
    kernels: Any
    if backend == "native":
        kernels = importlib.import_module("dracopt_ext.portable.compiled").Kernels(_LIBRARY)
    else:
        step = importlib.import_module("dracopt_ext.triton_kernels.step")
        kernels = step.Kernels(on_cpu=asked_for == "triton", unavailable=why_no_triton_on, functions=_library())
    return plan.StepPlan(rule, optimizer, kernels)


@functools.cache
def _library() -> compiled.Library | None:
    """The compiled kernels by their C functions; None if there are none, or none apart from the binding."""
    if _C is None:
        return _LIBRARY
    try:
        return importlib.import_module("dracopt_ext.portable.compiled").load(NATIVE)  # type: ignore[no-any-return]
    except OSError:
        return None


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn, but not twice in a process with the same words."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
