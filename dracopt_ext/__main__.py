"""``python -m dracopt_ext``: prints versions, what was built and what can run here."""

import platform

import torch

from . import __version__, backends
from .backend import _C, BUILD_INFO, isa


def main() -> None:
    print(f"dracopt_ext {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    built = ", ".join([*BUILD_INFO.get("torch", ()), "any other"])
    by = BUILD_INFO.get("compiler")
    print("compiled    " + (f"by {by}, with bindings to torch {built}" if by is not None else "nothing"))
    print(f"binding     {'none' if _C is None else _C.__name__.split('.')[-2]}")
    print(f"commit      {BUILD_INFO.get('commit') or 'unknown'}")
    print(f"CPU ISA     {isa() or 'none'}, {torch.get_num_threads()} threads")
    if _C is not None and _C.cuda_architectures():
        kernels = ", ".join(f"sm_{architecture // 10}" for architecture in _C.cuda_architectures())
        print(f"CUDA        {kernels} by {BUILD_INFO.get('nvcc')}")
    for name, reason in backends().items():
        print(f"{name:11} {'available' if reason is None else f'not available: {reason}'}")


if __name__ == "__main__":
    main()
