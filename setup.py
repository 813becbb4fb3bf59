"""Builds ``dracopt_ext._C``, or says why it could not and packages the Python part alone.

The CUDA kernels become a part of it wherever there is nvcc: in ``CUDA_HOME`` if that is set, else on the path, else in
/usr/local/cuda.

``DRACOPT_BUILD=force`` makes a failure an error, ``pure`` does not try, ``auto`` (the default) does what is possible;
``sanitize`` is ``force`` with the compiler's checks for wrong memory accesses and undefined behaviour.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

ROOT = Path(__file__).parent
MODE = os.environ.get("DRACOPT_BUILD", "auto")

# The kernels are compiled once per instruction set, each in a namespace of its own.
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"]
OPTIMIZED, LINKED = ["-O3", "-g0"], ["-Wl,--strip-all"] if sys.platform == "linux" else []
if MODE == "sanitize":
    LINKED = ["-fsanitize=address,undefined"]
    OPTIMIZED = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", *LINKED]
COMMON_FLAGS = ["-std=c++20", *OPTIMIZED, "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
# Results must not depend on what the compiler contracts; the other two let the loops vectorise and change no result.
KERNEL_FLAGS = [*COMMON_FLAGS, "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# Machine code for these, and PTX of the first one for all that they leave out and whatever comes after them.
CUDA_ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
BINDING_FLAGS = [*COMMON_FLAGS, "-fno-semantic-interposition"]


def compiler() -> str:
    return os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "c++").split()[0]


class Nvcc:
    """CUDA's compiler, called as it is: torch's own way would insist on the version that torch was built with."""

    def __init__(self) -> None:
        home = os.environ.get("CUDA_HOME")
        places = [Path(home) / "bin" / "nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
        self.path = next((str(place) for place in places if place is not None and Path(place).exists()), None)
        self.libraries: list[str] = []
        self.known: list[int] = []
        self.missing: str | None = None
        if MODE == "sanitize":
            self.missing = "DRACOPT_BUILD=sanitize"
        elif self.path is None:
            self.missing = "nvcc was not found"
        elif MODE != "pure":
            self.missing = self._look()

    def _look(self) -> str | None:
        """What keeps this nvcc from being used. Arguments as large as the kernels' need CUDA 12.1."""
        try:
            # It may be a script that stands far from its toolkit: it is asked where it looks for libraries.
            dry = subprocess.run([str(self.path), "--dryrun", "-o", "x", "x.cu"], capture_output=True, text=True).stderr
            known = self.output("--list-gpu-arch")
        except OSError as error:
            return f"{self.path} does not run: {error}"
        self.libraries = re.findall(r'"-L([^"]+)"', dry)
        self.known = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch}\n" in known]
        if not self.known:
            return f"{self.path} knows none of the architectures"
        if not any((Path(folder) / "libcudart_static.a").exists() for folder in self.libraries):
            return f"{self.path} comes without libcudart_static.a"
        return None

    def output(self, *arguments: str) -> str:
        return subprocess.run([str(self.path), *arguments], capture_output=True, text=True).stdout

    def version(self) -> str:
        return "nvcc " + "".join(re.findall(r"release (\S+),", self.output("--version")))

    def compile(self, source: Path, target: Path) -> None:
        """Compile for every architecture that this nvcc knows."""
        codes = [f"arch=compute_{arch},code=sm_{arch}" for arch in self.known]
        codes.append(f"arch=compute_{self.known[0]},code=compute_{self.known[0]}")
        flags = ["-std=c++20", "-O3", "--fmad=false", "-DDRACOPT_ISA=device", "-Icsrc", "-Xfatbin", "-compress-all"]
        host = ["-ccbin", compiler(), "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off,-g0"]
        generated = [part for code in codes for part in ("-gencode", code)]
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [str(self.path), *flags, *host, *generated, "--threads", "0", "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)


def find_torch() -> Any:
    """torch from the build environment or, as pip isolates builds, from the environment that is installed into."""
    try:
        import torch
    except ImportError:
        sys.path.append(sysconfig.get_path("purelib"))
        try:
            import torch
        except ImportError:
            return None
    return torch


def why_not() -> str | None:
    """What keeps the native part from being compiled, as far as it can be told before trying."""
    if MODE == "pure":
        return "DRACOPT_BUILD=pure"
    if shutil.which(compiler()) is None:
        return f"no C++ compiler was found ({compiler()})"
    if TORCH is None:
        return "torch is not installed"
    if tuple(int(part) for part in TORCH.__version__.split(".")[:2]) < (2, 10):
        return f"torch {TORCH.__version__} is older than 2.10"
    return None


NVCC = Nvcc()
TORCH = find_torch() if MODE != "pure" else None
REASON = why_not()
if REASON is None:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
else:
    BuildExtension, CppExtension = build_ext, Extension


class BuildNative(BuildExtension):
    """Compiles the kernels, then the binding; leaves behind what came of it."""

    cuda: str | None = None
    """Why the CUDA kernels are no part of it."""

    def run(self) -> None:
        self.remove_stale()
        reason = REASON
        if reason is None:
            try:
                super().run()
            except Exception as error:  # distutils, ninja and torch each have their own
                reason = f"compilation failed: {type(error).__name__}: {error}".split("\n")[0]
        if reason is not None:
            if MODE in ("force", "sanitize"):
                raise SystemExit(f"DRACOPT_BUILD={MODE}: {reason}")
            self.remove_stale()
            self.extensions.clear()
            print(f"dracopt_ext: building without compiled kernels: {reason}", file=sys.stderr)
        self.write_info(reason)

    def build_extensions(self) -> None:
        for isa, flags in ISA_FLAGS.items():
            objects = self.compiler.compile(
                [str(Path("csrc/cpu/kernels.cpp"))],
                output_dir=str(Path(self.build_temp) / isa),
                macros=[("DRACOPT_ISA", isa)],
                include_dirs=["csrc"],
                extra_postargs=[*KERNEL_FLAGS, *flags],
            )
            self.extensions[0].extra_objects += objects
        self.add_cuda(self.extensions[0])
        super().build_extensions()

    def add_cuda(self, extension: Extension) -> None:
        """The CUDA kernels and their runtime; or, without nvcc, what says that they are missing."""
        self.cuda = NVCC.missing
        if self.cuda is None:
            target = Path(self.build_temp) / "cuda" / "kernels.o"
            sources = [str(path) for folder in ("core", "rules", "cuda") for path in Path("csrc", folder).iterdir()]
            try:
                if newer_group([*sources, "setup.py"], str(target)):
                    NVCC.compile(Path("csrc/cuda/kernels.cu"), target)
            except subprocess.CalledProcessError as error:
                if MODE == "force":
                    raise
                self.cuda = f"{error.cmd[0]} failed; its output is among the build's"
        if self.cuda is None:
            extension.extra_objects.append(str(target))
            extension.extra_link_args += [f"-L{folder}" for folder in NVCC.libraries]
            extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
        else:
            extension.sources.append("csrc/cuda/absent.cpp")
            print(f"dracopt_ext: building without CUDA kernels: {self.cuda}", file=sys.stderr)

    def package_dir(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib)) / "dracopt_ext"

    def remove_stale(self) -> None:
        """Lest a failed compilation ships the module of an earlier one."""
        for stale in self.package_dir().glob("_C*.so"):
            stale.unlink()

    def write_info(self, reason: str | None) -> None:
        info = {
            "reason": reason,
            "torch": TORCH.__version__ if TORCH is not None else None,
            "compiler": self.compiler_version() if reason is None else None,
            "nvcc": NVCC.version() if reason is None and self.cuda is None else None,
            "no_cuda": self.cuda,
        }
        self.package_dir().mkdir(parents=True, exist_ok=True)
        link = ROOT / "dracopt_ext" / "triton_kernels"
        if self.inplace and not link.exists():
            link.symlink_to("../triton_kernels")  # a build in place finds them where an installation has them
        (self.package_dir() / "_build_info.py").write_text(f'"""Written by setup.py."""\n\nINFO = {info!r}\n')

    @staticmethod
    def compiler_version() -> str:
        return subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout.split("\n")[0]


class Wheel(bdist_wheel):
    """Tags a wheel without compiled module as what it is: pure."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build":
            built = Path(self.get_finalized_command("build").build_lib) / "dracopt_ext"
            self.root_is_pure = not any(built.glob("_C*.so"))


setup(
    ext_modules=[
        CppExtension(
            "dracopt_ext._C",
            ["csrc/cpu/dispatch.cpp", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/bindings/*.cpp")))],
            include_dirs=[str(ROOT / "csrc")],
            define_macros=[("DRACOPT_X86_64", "1")] if "avx2" in ISA_FLAGS else [],
            extra_compile_args=BINDING_FLAGS,
            extra_link_args=LINKED,
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    # Where no torch is found but it could be compiled against: pip then provides one to the build.
    setup_requires=[os.environ.get("DRACOPT_TORCH", "torch>=2.10")] if REASON == "torch is not installed" else [],
)
