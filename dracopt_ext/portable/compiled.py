"""The compiled kernels of the CPU without a binding to torch: called by address, through their C functions."""

from __future__ import annotations

import ctypes
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import words

_SCALAR_BYTES = 96  # of csrc/core/rule_entry.h
_CODES = {name: code for code, name in enumerate(words.DTYPES.values())}  # of csrc/core/dtype.h


class Library(NamedTuple):
    """The functions of csrc/cpu/words.cpp."""

    isa: str
    update: Any
    parallel_for: Any
    prepare: Any

    def scalars(self, rule: str, is_fp64: bool, recipe: tuple[int, ...], flags: int) -> tuple[int, ...]:
        """The recipe with what it leads to in its place, if it holds all numbers itself, for a row with these flags.

        It stays as it is if what it leads to is infinite.
        """
        given, found = array("q", recipe), array("q", bytes(_SCALAR_BYTES))
        count = self.prepare(rule.encode(), is_fp64, given.buffer_info()[0], flags, found.buffer_info()[0])
        return (1 << words.PREPARED, *found[:count]) if count > 0 else recipe


def load(folder: Path) -> Library:
    """Load the kernels that lie in a folder, and choose an instruction set.

    Raises:
        OSError: if the library does not load, or ``DRACOPT_ISA`` names no instruction set of this machine.
    """
    library = ctypes.CDLL(str(folder / "libdracopt_kernels.so"))
    library.dracopt_isa.restype = ctypes.c_char_p
    library.dracopt_update.restype = ctypes.c_char_p
    library.dracopt_update.argtypes = [ctypes.c_char_p, ctypes.c_char_p, *[ctypes.c_void_p] * 3]
    library.dracopt_prepare.restype = ctypes.c_size_t
    library.dracopt_prepare.argtypes = [
        ctypes.c_char_p,
        ctypes.c_bool,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    why_not = ctypes.c_char_p()
    isa = library.dracopt_isa(ctypes.byref(why_not))
    if isa is None:
        raise OSError((why_not.value or b"").decode())
    try:  # this looks through the libraries that torch has loaded
        parallel_for = ctypes.cast(ctypes.CDLL(torch._C.__file__).torch_parallel_for, ctypes.c_void_p)
    except (OSError, AttributeError):
        parallel_for = None  # one thread
    return Library(isa.decode(), library.dracopt_update, parallel_for, library.dracopt_prepare)


class Launch(words.Launch):
    """A call of the library."""

    functions: Library
    _table: array[int] | None = None

    def run(
        self,
        gradients: list[int],
        recipes: list[tuple[int, ...]],
        divisor: float,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> list[Any]:
        assert found_inf is None  # the host has read them: see StepPlan._host_decides
        assert grad_scale is None
        if self._table is None:
            self._table = array("q", self.table())
        arguments = array("q", self.arguments(gradients, recipes, divisor, [0, 0], 0))
        dtypes = bytes(_CODES[name] for name in self.dtypes).ljust(2 + words.MAX_STATES, b"\0")
        error = self.functions.update(
            self.rule.name.encode(),
            dtypes,
            self._table.buffer_info()[0],
            arguments.buffer_info()[0],
            self.functions.parallel_for,
        )
        if error is not None:
            raise RuntimeError(f"the compiled kernels failed: {error.decode()}")
        return []


class Kernels:
    """What a plan is to know of them."""

    def __init__(self, library: Library) -> None:
        self.launch = type("Launch", (Launch,), {"functions": library})

    def why_not(self, device: torch.device) -> str | None:
        if device.type == "cuda":
            return "tensors on a GPU without the native kernels (which need a binding to this torch there)"
        return None if device.type == "cpu" else "tensors on a device without native kernels"
