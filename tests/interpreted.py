"""Makes Triton's interpreter fast enough for tests, with the arithmetic of a GPU in every version."""

from __future__ import annotations

import ctypes
import ctypes.util
from typing import Any

import numpy as np
import pytest
import torch

from dracopt_ext import reference


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """``x * y + z`` with one rounding."""
    x, y, z = np.broadcast_arrays(x, y, z)
    if z.dtype == np.float32:
        return reference._fma(*(torch.from_numpy(a.copy()) for a in (x, y, z))).numpy()
    of_libm = ctypes.CDLL(ctypes.util.find_library("m")).fma
    of_libm.argtypes, of_libm.restype = [ctypes.c_double] * 3, ctypes.c_double
    return np.frompyfunc(of_libm, 3, 1)(x, y, z).astype(np.float64)


def set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches the interpreter for one test."""
    from triton.runtime import interpreter

    builder, function = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
    patches_and_calls = function.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__.startswith(
            "triton."
        ):  # a function of the language itself, which the kernel did not patch
            return patches_and_calls(self, *args, **kwargs)
        with np.errstate(all="ignore"):  # a GPU ignores errors, too
            return self.rewrite()(*args, **kwargs)

    # The call of the kernel has patched the language. A patch in every call would take half of the time.
    monkeypatch.setattr(function, "__call__", call)

    one, third = np.float32(1), np.float32(1 / 3)
    handle = interpreter.TensorHandle
    probe = [handle(np.array([value], np.float32), interpreter.tl.float32) for value in (third, 3 * one, -one)]
    if builder.create_fma(interpreter.interpreter_builder, *probe).data[0] == 0:  # rounded twice, as before 3.9
        monkeypatch.setattr(
            builder, "create_fma", lambda _, x, y, z: handle(fma(x.data, y.data, z.data), z.dtype.scalar)
        )
