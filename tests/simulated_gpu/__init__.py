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

import pytest
import torch
from torch.utils import cpp_extension

from dracopt_ext import any_torch, backend, devices

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
DEVICE = "simulated"

FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fvisibility=hidden"]
FLAGS += ["-DDRACOPT_SIMULATED_GPU", "-DDRACOPT_INTERFACE=1", "-DDRACOPT_ISA=baseline"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

KERNELS = [ROOT / "csrc/bindings/unity.cpp", *(ROOT / f"csrc/cpu/{name}.cpp" for name in ("dispatch", "kernels"))]
KERNELS.append(HERE / "launcher.cpp")


def build(name: str, sources: list[Path], *flags: str) -> Path:
    """Compile a library, unless an up-to-date one exists, and return its path."""
    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # for ninja
    checks = SANITIZERS if os.environ.get("DRACOPT_BUILD") == "sanitize" else []
    cpp_extension.load(
        name,
        [str(source) for source in sources],
        extra_cflags=[*FLAGS, *checks, *flags],
        extra_ldflags=checks,
        extra_include_paths=[str(ROOT / "csrc")],
        build_directory=str(folder),
        is_python_module=False,
    )
    return folder / f"{name}.so"


class SimulatedGpu:
    """The compiled module, and the values of the simulation that a test may set and read."""

    def __init__(self, path: Path, device: Path) -> None:
        spec = importlib.util.spec_from_file_location(f"{path.parent.name}._C", path)
        assert spec is not None
        assert spec.loader is not None
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self._library, self._device = ctypes.CDLL(str(path)), ctypes.CDLL(str(device))

    def _number(self, name: str) -> ctypes.c_int:
        return ctypes.c_int.in_dll(self._device if name == "stream" else self._library, f"simulated_{name}")

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
    device = build("simulated_device", [HERE / "device.cpp"])
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
    if backend._C is None or not backend._C.__name__.endswith(f".{backend.ANY_TORCH}._C"):
        return SimulatedGpu(build("simulated_gpu", KERNELS), device)
    simulation = SimulatedGpu(build("simulated_gpu_of_any_torch", KERNELS, "-DDRACOPT_ANY_TORCH"), device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "GPU", DEVICE)
        simulation.module.set_places(any_torch.find_places())
    return simulation
