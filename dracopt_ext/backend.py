"""Lists the backends: which can run an update here, why others cannot, and which one is chosen."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import any_torch

NAMES = ("native", "triton", "reference")


def _build_info() -> dict[str, Any]:
    """Returns what the build left behind; an empty dict in a source tree that was never built."""
    if importlib.util.find_spec("dracopt_ext._build_info") is None:
        return {}
    return dict(importlib.import_module("dracopt_ext._build_info").INFO)


def _minor(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def check_torch(version: str) -> None:
    """Raises ImportError if our classes cannot be those of this version of torch."""
    if _minor(version) < (2, 7):
        raise ImportError(
            f"dracopt_ext needs torch 2.7 or newer, and compiled kernels need 2.10, but torch {version} is installed: "
            "pip install 'torch>=2.10'"
        )


def _is_release(version: str) -> bool:
    return re.fullmatch(r"[\d.]+(\.post\d+)?(\+.*)?", version) is not None


def _built_for(version: str) -> bool:
    """Says whether there is a binding for this version of torch.

    Releases of one minor version share one ABI. A build from before a release has an ABI of its own.
    """
    built = [other for other in BUILD_INFO.get("torch", ()) if _minor(other) == _minor(version)]
    return version in built or any(_is_release(other) and _is_release(version) for other in built)


def _load_native() -> tuple[ModuleType | None, str | None]:
    """Loads the compiled module ``dracopt_ext._C``, or says why there is none.

    If the binding for this torch exists and does not load, the one for any torch is not tried: the user must see the
    error.
    """
    installed = torch.__version__
    if _minor(installed) < (2, 10):
        return None, f"torch {installed} is older than 2.10"
    if BUILD_INFO.get("reason", "") is not None:
        return None, BUILD_INFO.get("reason") or _why_not_compiled()
    fits = _built_for(installed)
    try:
        module = load_module("torch_{}_{}".format(*_minor(installed)) if fits else ANY_TORCH)
        if not fits:
            module.set_places(any_torch.find_places())
    except ImportError as error:
        if fits:
            return None, f"what was compiled does not load: {error}"
        built = ", ".join(BUILD_INFO["torch"]) or "of any version"
        how = f"To compile it for this torch, run in a clone of the repository: {BUILD_FROM_SOURCE}"
        return None, f"compiled for torch {built}, not for the installed {installed} ({error}). {how}"
    sys.modules["dracopt_ext._C"] = module
    return module, None


def load_module(name: str) -> ModuleType:
    """Loads the module in a folder of :data:`NATIVE`."""
    # pybind11 loads no second module of one name.
    spec = PathFinder.find_spec(f"dracopt_ext.native.{name}._C", [str(NATIVE / name)])
    if spec is None or spec.loader is None:
        raise ImportError(f"{NATIVE / name} has no module for this Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _why_not_compiled() -> str:
    here = Path(__file__).parent
    others = [path for path in sys.path if Path(path or ".").resolve() != here.parent.resolve()]
    spec = PathFinder.find_spec("dracopt_ext", others)
    if spec is not None and spec.origin is not None:
        return (
            f"this is the source tree in {here.parent}, which is not compiled. A copy is installed in "
            f"{Path(spec.origin).parent}: start Python in another folder to use it"
        )
    return "not compiled: run `pip install .` in the source tree"


check_torch(torch.__version__)
BUILD_INFO = _build_info()
NATIVE = Path(__file__).parent / "native"
"""The folder of the compiled kernels and their bindings to versions of torch."""
ANY_TORCH = "any_torch"
"""The folder in it of the binding to all other versions."""
# A forced build fails if it cannot compile, so that the installed package stays.
BUILD_FROM_SOURCE = "DRACOPT_BUILD=force pip install --force-reinstall --no-deps ."
_C, NATIVE_REASON = _load_native()


def notice() -> str | None:
    """Says what a user must know when the package is imported; None if there is nothing."""
    if NATIVE_REASON is None:
        return None
    return f"dracopt_ext lets torch step all parameters, because it has no kernels for them: {NATIVE_REASON}"


def isa() -> str | None:
    """Returns the instruction set of the CPU's kernels; None if there are no kernels."""
    return None if _C is None else str(_C.isa())


def backends() -> dict[str, str | None]:
    """Returns every backend with the reason why it cannot run here, which is None if it can.

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
"""True if Triton's kernels are interpreted, on tensors of the CPU as well."""


@functools.cache
def why_no_triton() -> str | None:
    """Says why the Triton kernels cannot run here; None if they can. Imports triton only if there is a GPU for it."""
    if _C is None:
        return f"the compiled module, which plans Triton's steps, is missing: {NATIVE_REASON}"
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
    # Before 3.7 the square root for AMD differs from IEEE 754 if numbers are subnormal.
    needed = (3, 6) if torch.version.hip is None else (3, 7)
    if _minor(triton.__version__) < needed:
        return f"triton {triton.__version__} is older than {needed[0]}.{needed[1]}"
    if INTERPRETING:
        return None
    reasons = [why_no_triton_on(device) for device in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


@functools.cache
def why_no_triton_on(device: int) -> str | None:
    """Says why the Triton kernels cannot run on one GPU; None if they can."""
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"Triton does not compile for {torch.cuda.get_device_name(device)}: its compute capability is below 8.0"
    return None


def triton_serves_gpus() -> bool:
    """Says whether Triton steps a GPU's tensors unless another backend was asked for: no CUDA kernel serves the GPU."""
    # A process that uses no GPU must not initialize one.
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and _triton_is_needed()


@functools.cache
def _triton_is_needed() -> bool:
    return not INTERPRETING and _why_no_cuda() is not None and why_no_triton() is None


def resolve(backend: str | None) -> str | None:
    """Returns the backend for an optimizer that was asked for ``backend``; None leaves the choice to each step.

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


def step_plan(rule: str, optimizer: str, native: bool, triton: bool, masters: str | None = None) -> Any:
    """Makes the plan that steps an optimizer of this class name by a rule. There must be a compiled module.

    Args:
        rule: the rule's name.
        optimizer: the name of the optimizer's class, for errors.
        native: whether the native kernels may be used. Triton then only serves GPUs on which they do not run.
        triton: whether Triton may be used.
        masters: the form in which parameters in 16 bits have masters; None if they have none.
    """
    assert _C is not None
    by_triton = _triton(on_cpu=not native) if triton else None
    return _C.StepPlan(rule, optimizer, cpu=native, cuda=native, triton=by_triton, masters=masters)


def _triton(on_cpu: bool) -> Any:
    """Describes Triton to a plan. Only its interpreter can also serve the CPU."""
    assert _C is not None
    launcher = importlib.import_module("dracopt_ext.triton_kernels.launcher")
    return _C.Triton(
        launcher.launcher_for,
        is_capturing=_capture_query(),
        tile=launcher.TILE,
        on_cpu=on_cpu and launcher.INTERPRETED,
        no_kernels=[why_no_triton_on(device) for device in range(torch.cuda.device_count())],
    )


def _capture_query() -> Callable[[], bool] | None:
    """Returns the function that says whether a graph is being captured; None if torch was built without GPUs.

    The function runs no Python code, so no other thread can run in the middle of a step.
    """
    if torch.version.cuda is None and torch.version.hip is None:
        return None
    query: Callable[[], bool] = torch._C._cuda_isCurrentStreamCapturing
    return query


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warns, unless this process has warned in the same words before."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
