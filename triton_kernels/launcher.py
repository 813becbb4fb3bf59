"""Launches the Triton kernel: chooses its constants and options, and copies its words to the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dracopt_ext import devices
from dracopt_ext.portable import compiled, packed
from dracopt_ext.portable.rules import Rule

from .kernel import VECTOR_BYTES, step_kernel
from .rules import FUNCTIONS

WARPS = 4
ITEMSIZE = {"fp32": 4, "fp64": 8, "bf16": 2, "fp16": 2}
TARGET = "cuda" if torch.version.hip is None else "hip"
INTERPRETED = not isinstance(step_kernel, triton.runtime.JITFunction)
IN_MEMORY = ("cpu",)
"""The types of devices whose memory Triton's interpreter reaches."""


@cache
def estimates_well(device: torch.device) -> bool:
    """Says whether the fast arithmetic suits the estimates of this device, the current one, or of the interpreter."""
    if INTERPRETED:
        return True
    architecture = triton.runtime.driver.active.get_current_target().arch
    return isinstance(architecture, int) and architecture // 10 in (8, 9, 10, 12)  # AMD's architectures have names


def specialization(rule: Rule, dtypes: tuple[str, ...], target: str = TARGET, fast: bool = True) -> dict[str, Any]:
    """Returns the constants for which the kernel is compiled.

    Args:
        rule: the rule whose functions the kernel calls.
        dtypes: the dtypes of parameter, gradient and states.
        target: ``cuda`` or ``hip``.
        fast: whether the fast arithmetic may be tried.
    """
    streams = ("param", "grad", *(f"state{k}" for k in range(packed.MAX_STATES)))
    fp64 = "fp64" in dtypes
    threads = WARPS * (32 if target == "cuda" else 64)
    prepare, load_scalars, update, divides = FUNCTIONS[rule.name]
    return {
        "rule": prepare,
        "load_scalars": load_scalars,
        "update": update,
        "numbers": rule.numbers,
        "carries": len(rule.state_scalar_keys),
        **dict(zip_longest(streams, dtypes)),
        "T": tl.float64 if fp64 else tl.float32,
        "fast": fast and divides and not fp64 and target == "cuda",
        # Every stream is accessed by as many elements. Otherwise Triton would exchange elements between threads.
        "LANES": VECTOR_BYTES.value // max(ITEMSIZE[dtype] for dtype in dtypes),
        "BLOCK": threads * (4 if fp64 else 8),  # so that a thread has a vector of the narrowest dtype beside T
    }


def options(rule: Rule, dtypes: tuple[str, ...], target: str = TARGET) -> dict[str, Any]:
    """Returns the compiler's options. The results' bits depend on the first option."""
    chosen: dict[str, Any] = {"enable_fp_fusion": False, "num_warps": WARPS}
    if target == "cuda":
        # These limits spill no registers. With 96 registers five programs run at once. NAdam needs a few more, and so
        # does a gradient whose dtype is not the parameter's, which is rare.
        is_usual = rule.name != "nadam" and dtypes[0] == dtypes[1]
        chosen["maxnreg"] = 168 if "fp64" in dtypes else 96 if is_usual else 104
    return chosen


def upload(array: list[int], device: torch.device, referred: list[Any]) -> Tensor:
    """Copies words to a device. Nobody waits, because the current stream makes the copy from pinned memory.

    Appends to ``referred`` the tensors that must live as long as a graph that captures the copy.
    """
    source = torch.tensor(array, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    copy = source.to(device, non_blocking=True)
    referred += (source, copy)
    return copy


_launched: set[Any] = set()  # keys for which the kernel has been compiled and loaded


class TritonLaunch(packed.PackedLaunch):
    """A launch by Triton."""

    functions: compiled.Library | None  # prepare scalars on the host; if missing, the kernel does
    _table: Tensor | None = None
    _stream: Any = None  # the stream in which the table was written

    def launch(
        self,
        gradients: list[int],
        recipes: list[tuple[int, ...]],
        divisor: float,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> list[Any]:
        on_gpu = self.device.type == "cuda"
        referred: list[Any] = []
        with torch.cuda.device(self.device) if on_gpu else nullcontext():
            table = self._placed_table(referred)
            if on_gpu and self._stream != torch.cuda.current_stream():
                table.record_stream(torch.cuda.current_stream())
            scaler = []
            for number in (found_inf, grad_scale):
                here = None if number is None else number.to(self.device, non_blocking=True)
                referred.append(here)
                scaler.append(0 if here is None else here.data_ptr())
            # The counter follows the rows and layouts.
            finished = table.data_ptr() + 8 * (table.numel() - 1) if self.counts_steps else 0
            array = self.arguments(gradients, self._prepared(recipes), divisor, scaler, finished)
            arguments = upload(array, self.device, referred)
            constants = specialization(self.rule, self.dtypes, fast=estimates_well(self.device))
            step_kernel[(self._programs,)](table, arguments, **constants, **options(self.rule, self.dtypes))
            _launched.add(self._compiled_for)
        return referred

    def _prepared(self, recipes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Returns the recipes, with prepared scalars in place of those that need nothing from the GPU."""
        if self.functions is None:
            return recipes
        is_fp64 = "fp64" in self.dtypes
        prepared: dict[Any, tuple[int, ...]] = {}
        found = []
        for recipe, row in zip(recipes, self._rows, strict=True):
            has_address = recipe[0] & (1 << packed.FIRST) - 1 or any(row[packed.STATE_SCALARS : packed.PARAM])
            key = recipe, row[packed.FLAGS]
            if not has_address and key not in prepared:
                prepared[key] = self.functions.scalars(self.rule.name, is_fp64, *key)
            found.append(recipe if has_address else prepared[key])
        return found

    @property
    def is_loaded(self) -> bool:
        return self._compiled_for in _launched

    @property
    def _compiled_for(self) -> Any:
        return self.device, self.rule, self.dtypes

    def _placed_table(self, referred: list[Any]) -> Tensor:
        referred.append(self._table)
        if self._table is None:
            self._table = upload(self.table(), self.device, referred)
            self._stream = torch.cuda.current_stream() if self.device.type == "cuda" else None
        return self._table


class TritonBackend:
    """Tells a plan about Triton: which devices Triton serves, and the type of a launch.

    Args:
        on_cpu: whether Triton's interpreter, if the kernels run in it, also serves parameters on the CPU.
        unavailable: says why the kernels cannot run on the GPU with an index; None if they can.
        functions: the compiled kernels, which prepare scalars on the host; None lets the Triton kernel prepare scalars.
    """

    def __init__(
        self,
        on_cpu: bool = False,
        unavailable: Callable[[int], str | None] = lambda index: None,
        functions: compiled.Library | None = None,
    ) -> None:
        self.launch_type = type("TritonLaunch", (TritonLaunch,), {"functions": functions})
        self._devices = {devices.GPU} if not INTERPRETED else set(IN_MEMORY) - (set() if on_cpu else {"cpu"})
        self._unavailable = unavailable

    def why_not(self, device: torch.device) -> str | None:
        """Says why tensors on a device are not served; None if they are."""
        if device.type == "cuda" and (why := self._unavailable(device.index)) is not None:
            return f"tensors on a GPU without Triton kernels ({why})"
        if device.type not in self._devices:
            return "tensors on the CPU" if device.type == "cpu" else "tensors on a device without Triton kernels"
        return None
