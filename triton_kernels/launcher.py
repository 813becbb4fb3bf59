"""Launches the Triton kernel: chooses its constants and options."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from dracopt_ext._C import rules as compiled_rules

from . import kernel
from .arithmetic import INTERPRETED
from .kernel import VECTOR_BYTES, step_kernel
from .rules import RULES
from .squares import squares_kernel

COMPILED = compiled_rules()
if RULES.keys() != COMPILED.keys():
    raise ImportError(f"triton_kernels/rules.py has the rules {sorted(RULES)}, and csrc/rules has {sorted(COMPILED)}")
TILE = kernel.TILE.value
WARPS = 4
OPTIONS = {"enable_fp_fusion": False, "num_warps": WARPS}
"""The compiler's options for all kernels. The results' bits depend on the first."""
ITEMSIZE = {"fp32": 4, "fp64": 8, "bf16": 2, "fp16": 2}
TARGET = "cuda" if torch.version.hip is None else "hip"


def estimates_well() -> bool:
    """Says whether the fast arithmetic suits the estimates of the current device, or of the interpreter."""
    if INTERPRETED:
        return True
    architecture = triton.runtime.driver.active.get_current_target().arch
    return isinstance(architecture, int) and architecture // 10 in (8, 9, 10, 12)  # AMD's architectures have names


def specialization(
    rule: str,
    dtypes: tuple[str, ...],
    target: str = TARGET,
    fast: bool = True,
    master: str | None = None,
    at_random: int = 0,
) -> dict[str, Any]:
    """Returns the constants for which the kernel is compiled.

    Args:
        rule: the name of the rule whose functions the kernel calls.
        dtypes: the dtypes of the parameter, the gradient and the states that the group has.
        target: ``cuda`` or ``hip``.
        fast: whether the fast arithmetic may be tried.
        master: the form of masters; None if the parameter has none.
        at_random: 1 if the parameter is rounded at random, plus 2 if states are.
    """
    fp64 = "fp64" in dtypes
    threads = WARPS * (32 if target == "cuda" else 64)
    functions, compiled = RULES[rule], COMPILED[rule]
    return {
        "prepare": functions.prepare,
        "scalar_count": compiled.scalars,
        "update": functions.update,
        "hyperparameters": compiled.hyperparameters,
        "state_scalar_count": len(compiled.state_scalar_keys),
        "dtypes": dtypes,
        "master": master,
        "at_random": at_random,
        "T": tl.float64 if fp64 else tl.float32,
        "fast": fast and functions.divides and not fp64 and target == "cuda",
        # Every stream is accessed by as many elements. Otherwise Triton would exchange elements between threads.
        "LANES": VECTOR_BYTES.value
        // max(ITEMSIZE[dtype] for dtype in (*dtypes, *(["fp32"] if master == "fp32" else []))),
        "BLOCK": threads * (4 if fp64 else 8),  # so that a thread has a vector of the narrowest dtype beside T
    }


def options(
    dtypes: tuple[str, ...], target: str = TARGET, master: str | None = None, at_random: int = 0
) -> dict[str, Any]:
    """Returns the compiler's options for the update kernel; the arguments are those of :func:`specialization`."""
    chosen: dict[str, Any] = dict(OPTIONS)
    if target == "cuda":
        # These limits spill no registers, except 16 bytes of AMSGrad with all streams rounded at random (Triton 3.7,
        # sm_100). With 102 a thread, five programs run at once.
        is_usual = dtypes[0] == dtypes[1] and len(dtypes) < 5 and master is None
        chosen["maxnreg"] = 168 if at_random or "fp64" in dtypes else 102 if is_usual else 128
    return chosen


class Launcher:
    """Launches the kernel that is compiled for a rule and the dtypes of the streams, on one device.

    The device must be the current one in every call.
    """

    def __init__(self, rule: str, dtypes: tuple[str, ...], master: str | None, at_random: int) -> None:
        constants = specialization(rule, dtypes, fast=estimates_well(), master=master, at_random=at_random)
        self._for_update = {**constants, **options(dtypes, master=master, at_random=at_random)}
        grad = dtypes[1]
        self._for_squares = {"grad": grad, "LANES": VECTOR_BYTES.value // ITEMSIZE[grad], **OPTIONS}
        self._loaded: set[Any] = set()

    def update(self, programs: int, rows: int, layouts: int, first_tiles: int, arguments: int, capturing: bool) -> None:
        """Updates the tensors of a launch, which csrc/cuda/launch.h describes.

        Args:
            programs: the number of programs.
            rows, layouts, first_tiles, arguments: addresses on the device.
            capturing: whether a graph is being captured. The kernel cannot be loaded meanwhile.
        """
        self._launch(step_kernel, self._for_update, capturing, programs, rows, layouts, first_tiles, arguments)

    def measure(
        self, programs: int, rows: int, layouts: int, first_tiles: int, arguments: int, capturing: bool
    ) -> None:
        """Adds the squares of a launch's gradients; the arguments are those of :meth:`update`."""
        self._launch(squares_kernel, self._for_squares, capturing, programs, rows, layouts, first_tiles, arguments)

    def _launch(self, jit: Any, options: dict[str, Any], capturing: bool, programs: int, *addresses: int) -> None:
        if capturing and jit not in self._loaded:
            raise RuntimeError(
                "step() cannot be captured in a CUDA graph: Triton has yet to compile its kernel. Take a step before "
                "the capture"
            )
        jit[(programs,)](*addresses, **options)
        self._loaded.add(jit)


@cache
def launcher_for(rule: str, dtypes: tuple[str, ...], device: str, master: str | None, at_random: int) -> Launcher:
    """Returns the launcher for a rule, how the streams are stored and rounded, and the current device."""
    return Launcher(rule, dtypes, master, at_random)
