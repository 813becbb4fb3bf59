"""``python -m tests.count_compilations``: counts how often Triton compiles the kernel in the course of some steps.

No GPU is needed: the driver here does everything except launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

import dracopt_ext
from dracopt_ext._C import StepPlan, Triton
from dracopt_ext.triton_kernels import kernel, launcher

launched: list[Any] = []


class Utils:
    @staticmethod
    def load_binary(*_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    @staticmethod
    def get_device_properties(_: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20, "warpSize": 32}


class Driver:
    utils = Utils()
    map_python_to_cpp_type = getattr(CudaDriver, "map_python_to_cpp_type", None)

    @staticmethod
    def launcher_cls(*_: Any) -> Any:
        return lambda *arguments, **_: launched.append(arguments)

    @staticmethod
    def get_current_target() -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    @staticmethod
    def get_current_device() -> int:
        return 0

    @staticmethod
    def get_current_stream(_: int) -> int:
        return 0

    @staticmethod
    def get_active_torch_device() -> torch.device:
        return torch.device("cpu")


def take_steps(sizes: list[int], dtype: torch.dtype = torch.float32, **options: Any) -> None:
    params = [nn.Parameter(torch.ones(size, dtype=dtype)) for size in sizes]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = dracopt_ext.AdamW(params, **options)
    optimizer._dracopt_kind.create_state(optimizer, optimizer.param_groups[0])
    on_cpu = Triton(launcher.launcher_for, None, tile=launcher.TILE, on_cpu=True, no_kernels=[])
    plan = StepPlan("adam", "AdamW", cpu=False, cuda=False, triton=on_cpu)
    for _ in range(2):
        optimizer.param_groups[0]["lr"] *= 0.9
        assert plan.step(optimizer.param_groups, optimizer.state) is None


def report() -> None:
    compiled = sum(len(caches[0]) for caches in kernel.step_kernel.device_caches.values())
    print(f"{compiled} compilations for {len(launched)} launches")


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    take_steps([3])
    report()
    for sizes in ([1], [16], [1, 16, 17], [8192], [100_000, 5], [16] * 16, [2] * 100):
        take_steps(sizes, lr=1.0)
        take_steps(sizes, lr=0.5, betas=(0.5, 0.6), weight_decay=0, maximize=True)
    report()
    take_steps([3], amsgrad=True)
    report()
    take_steps([3], torch.bfloat16)
    report()


if __name__ == "__main__":
    main()
