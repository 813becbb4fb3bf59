"""Simulates a GPU: a device type of torch in the host's memory, and the kernel's own body compiled for the host.

All else is real: the planning of a step, the table, the arguments and the optimizer classes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
DEVICE = "simulated"

FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fvisibility=hidden"]
FLAGS += ["-DDRACOPT_SIMULATED_GPU", "-DDRACOPT_INTERFACE=1"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def build() -> Path:
    """Compile the module, unless an up-to-date one exists, and return its path."""
    sources = [
        ROOT / "csrc/bindings/unity.cpp",
        ROOT / "csrc/cpu/dispatch.cpp",
        ROOT / "csrc/cpu/kernels.cpp",
        *HERE.glob("*.cpp"),
    ]
    folder = ROOT / "build" / "simulated_gpu"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # for ninja
    checks = SANITIZERS if os.environ.get("DRACOPT_BUILD") == "sanitize" else []
    cpp_extension.load(
        "_C",
        [str(source) for source in sorted(sources)],
        extra_cflags=[*FLAGS, *checks, "-DDRACOPT_ISA=baseline"],
        extra_ldflags=checks,
        extra_include_paths=[str(ROOT / "csrc")],
        build_directory=str(folder),
        is_python_module=False,
    )
    return folder / "_C.so"


class SimulatedGpu:
    """The compiled module, and the values of the simulation that a test may set and read."""

    def __init__(self, path: Path) -> None:
        spec = importlib.util.spec_from_file_location("simulated_gpu._C", path)
        assert spec is not None
        assert spec.loader is not None
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self._library = ctypes.CDLL(str(path))

    def _number(self, name: str) -> ctypes.c_int:
        return ctypes.c_int.in_dll(self._library, f"simulated_{name}")

    def read(self, name: str) -> int:
        """Return ``launches``, ``tables`` (written to the device) or ``last_stream``."""
        return self._number(name).value

    def set(self, name: str, value: int) -> None:
        """Set ``stream`` (the current one), ``capturing`` or ``unavailable`` (1 for true)."""
        self._number(name).value = value

    def table(self) -> int:
        """Return the address at which the last launch found its table."""
        return ctypes.c_void_p.in_dll(self._library, "simulated_table").value or 0

    def fail_in(self, function: str) -> None:
        """Make this function of cuda/kernels.h fail; the empty string stands for none."""
        ctypes.memmove((ctypes.c_char * 64).in_dll(self._library, "simulated_failure"), function.encode() + b"\0", 64)


def load() -> SimulatedGpu:
    path = build()
    torch.utils.rename_privateuse1_backend(DEVICE)
    device_module = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 2,
        current_device=lambda: 0,
        manual_seed_all=lambda seed: None,
        _is_in_bad_fork=lambda: False,
    )
    torch._register_device_module(DEVICE, device_module)
    return SimulatedGpu(path)
