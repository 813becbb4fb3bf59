"""Calls the compiled CPU kernels without a binding to torch: by address, through their C functions."""

from __future__ import annotations

import ctypes
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import packed
from .rules import RULES, Rule


class Library(NamedTuple):
    """The functions of csrc/cpu/packed.cpp."""

    isa: str
    update: Any
    parallel_for: Any
    prepare: Any
    scalar_bytes: int
    codes: dict[str, int]
    """The codes of dtypes, by name."""

    def scalars(self, rule: str, is_fp64: bool, recipe: tuple[int, ...], flags: int) -> tuple[int, ...]:
        """Returns the scalars that a recipe leads to, as a prepared recipe for a row with these flags.

        The recipe must hold all numbers itself. It stays as it is if a scalar is not finite.
        """
        given, found = array("q", recipe), array("q", bytes(self.scalar_bytes))
        count = self.prepare(rule.encode(), is_fp64, given.buffer_info()[0], flags, found.buffer_info()[0])
        return (1 << packed.PREPARED, *found[:count]) if count > 0 else recipe


def load(folder: Path) -> Library:
    """Loads the kernels that lie in a folder, and chooses an instruction set.

    Raises:
        OSError: if the library does not load or is of another build, or ``DRACOPT_ISA`` names no instruction set of
            this machine.
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
    library.dracopt_constants.restype = ctypes.c_char_p
    lines = [line.split() for line in library.dracopt_constants().decode().splitlines()]
    constants = {name: values for name, *values in lines if name != "rule"}
    shared = {
        "row_words": [packed.ROW_WORDS],
        "header_words": [packed.HEADER_WORDS],
        "row_flags": [packed.MAXIMIZE, packed.STATE_SCALAR_FP32],
        "recipe_first": [1 << packed.FIRST],
    }
    known = [["rule", *_description(rule)] for rule in RULES.values()]
    differ = [name for name, values in shared.items() if constants.get(name) != list(map(str, values))]
    differ += [line[1] for line in lines if line[0] == "rule" and line not in known]
    if differ:
        raise OSError(f"libdracopt_kernels.so is of another build: {', '.join(differ)} differ")
    codes = {name: code for code, name in enumerate(constants["dtypes"])}
    try:  # ctypes searches the libraries that torch has loaded
        parallel_for = ctypes.cast(ctypes.CDLL(torch._C.__file__).torch_parallel_for, ctypes.c_void_p)
    except (OSError, AttributeError):
        parallel_for = None  # the kernels then use one thread
    functions = library.dracopt_update, parallel_for, library.dracopt_prepare
    return Library(isa.decode(), *functions, int(constants["scalar_bytes"][0]), codes)


def _description(rule: Rule) -> list[str]:
    """Returns a rule's keys as the library lists them."""
    return [rule.name, *rule.group_keys, ";", *rule.state_scalar_keys, ";", *rule.state_keys, ";"]


class CompiledLaunch(packed.PackedLaunch):
    """A call of the library."""

    functions: Library
    _table: array[int] | None = None

    def launch(
        self,
        gradients: list[int],
        recipes: list[tuple[int, ...]],
        divisor: float,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> list[Any]:
        assert found_inf is None  # the host has read both tensors: see StepPlan._host_decides
        assert grad_scale is None
        if self._table is None:
            self._table = array("q", self.table())
        arguments = array("q", self.arguments(gradients, recipes, divisor, [0, 0], 0))
        dtypes = bytes(self.functions.codes[name] for name in self.dtypes).ljust(2 + packed.MAX_STATES, b"\0")
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


class CompiledBackend:
    """Tells a plan what it must know of the compiled kernels."""

    def __init__(self, library: Library) -> None:
        self.launch_type = type("CompiledLaunch", (CompiledLaunch,), {"functions": library})

    def why_not(self, device: torch.device) -> str | None:
        if device.type == "cuda":
            return "tensors on a GPU without the native kernels (which need a binding to this torch there)"
        return None if device.type == "cpu" else "tensors on a device without native kernels"
