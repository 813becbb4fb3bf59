"""Compiles the programs that run the kernels without torch: ``check`` and, with nvcc, ``sweep``.

Without nvcc, or with ``--host``, ``check`` uses the launcher of the tests' simulated GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent

VARIANTS: dict[str, Mapping[str, str | int]] = {
    "project": {},
    "contracted": {"FMAD": "true"},
    "streaming": {"LOAD": '".cs"', "STORE": '".cs"'},
    "no_allocate": {"LOAD": '".L1::no_allocate"'},
    "tile_2k": {"TILE": 2048},
    "tile_8k": {"TILE": 8192},
    "blocks_5": {"BLOCKS": 5},
    "blocks_7": {"BLOCKS": 7},
    "blocks_8": {"BLOCKS": 8},
    "threads_256": {"THREADS": 256, "BLOCKS": 3},
    "threads_256_tile_8k": {"THREADS": 256, "BLOCKS": 3, "TILE": 8192},
    "threads_256_blocks_4_tile_8k": {"THREADS": 256, "BLOCKS": 4, "TILE": 8192},
}
"""The macros in which each variant differs from the project's kernel, without their prefix DRACOPT_. FMAD is nvcc's
option: the compiler then contracts a multiplication and an addition, which does not give the CPU's bits."""

FLAGS = ["-std=c++20", "-O3", "-Icsrc", "-DDRACOPT_ISA=device"]


def run(*command: str | Path) -> None:
    subprocess.run([*map(str, command)], cwd=ROOT, check=True)


def nvcc(architecture: str, *arguments: str | Path, fmad: str = "false") -> None:
    # The programs' host code calls the rules with lambdas of its own, which needs relaxed constexpr.
    exact = [f"--fmad={fmad}", "-Xcompiler=-ffp-contract=off", "--expt-relaxed-constexpr"]
    run("nvcc", *FLAGS, *exact, f"-arch={architecture}", *arguments)


def compile_variant(name: str, architecture: str, out: Path) -> Path:
    macros = dict(VARIANTS[name])
    fmad = str(macros.pop("FMAD", "false"))
    about = " ".join(f"{macro}={value}".replace('"', "") for macro, value in macros.items())
    defines = [f"-DDRACOPT_{macro}={value}" for macro, value in macros.items()]
    about = "contracted" if fmad == "true" else about
    target = out / f"{name}.o"
    nvcc(architecture, f"-Ddracopt={name}", f'-DDRACOPT_ABOUT="{about}"', *defines, "-c", HERE / "variant.cu",
         "-o", target, fmad=fmad)  # fmt: skip
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "kernels")
    parser.add_argument("--architecture", default="native", help="sm_90, for example (this machine's)")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--host", action="store_true", help="only check, for the host")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    if args.host or shutil.which("nvcc") is None:
        if not args.host:
            print("nvcc was not found: the programs are for the host, and there is no sweep", file=sys.stderr)
        compiler = os.environ.get("CXX", "c++")
        run(compiler, "-std=c++20", "-O1", "-ffp-contract=off", "-DDRACOPT_ISA=host", "-Icsrc", HERE / "check.cpp",
            ROOT / "tests/simulated_gpu/launcher.cpp", "-o", args.out / "check")  # fmt: skip
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        check = pool.submit(
            nvcc, args.architecture, "-x", "cu", HERE / "check.cpp", "csrc/cuda/kernels.cu", "-o", args.out / "check"
        )
        compiled = [pool.submit(compile_variant, name, args.architecture, args.out) for name in args.variants]
        nvcc(
            args.architecture, HERE / "sweep.cu", *(variant.result() for variant in compiled), "-o", args.out / "sweep"
        )
        check.result()


if __name__ == "__main__":
    main()
