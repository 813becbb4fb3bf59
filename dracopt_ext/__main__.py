"""``python -m dracopt_ext``: versions, what was built and what can run here."""

import platform

import torch

from . import __version__, backends
from .backend import _C, BUILD_INFO


def main() -> None:
    print(f"dracopt_ext {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    built_for = f"torch {BUILD_INFO['torch']}, {BUILD_INFO['compiler']}" if BUILD_INFO.get("compiler") else "nothing"
    print(f"compiled    {built_for}")
    print(f"CPU ISA     {_C.isa() if _C is not None else 'none'}, {torch.get_num_threads()} threads")
    if _C is not None and _C.cuda_architectures():
        kernels = ", ".join(f"sm_{architecture // 10}" for architecture in _C.cuda_architectures())
        print(f"CUDA        {kernels} by {BUILD_INFO.get('nvcc')}")
    for name, reason in backends().items():
        print(f"{name:11} {'available' if reason is None else f'not available: {reason}'}")


if __name__ == "__main__":
    main()
