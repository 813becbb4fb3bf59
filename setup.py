"""Builds the compiled part, or says why it could not and packages the Python part alone.

``dracopt_ext/native`` then holds the kernels, in a library that knows no torch. For each minor version of torch a
folder holds the module ``_C``, which binds the kernels to this version. The module is made for the installed torch. If
``DRACOPT_TORCH_HEADERS`` names folders (as PATH does), modules are made for the versions whose headers lie there, as in
torch's wheels: ``torch/include`` and ``torch/version.py``.

The library contains the CUDA kernels if nvcc is found: in ``CUDA_HOME`` if that is set, else on the path, else in
/usr/local/cuda.

The CUDA kernels are compiled for all of ``CUDA_ARCHITECTURES`` that this nvcc knows. ``DRACOPT_CUDA_ARCHITECTURES``
replaces them by those that it names, such as ``90`` or ``80,90``. Each takes a sixth of the time.

A build in a tree that was built before compiles what has changed since.

A further module ``_C``, which uses only torch's stable C interface, serves all versions that no other module fits.

``DRACOPT_BUILD=force`` makes a failure an error, ``pure`` does not try, ``auto`` (the default) does what is possible;
``sanitize`` is ``force`` with the compiler's checks for wrong memory accesses and undefined behaviour; ``any`` is
``force`` with only the module for any torch, which compiles faster than the others.
"""

from __future__ import annotations

import copy
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

ROOT = Path(__file__).parent
MODE = os.environ.get("DRACOPT_BUILD", "auto")
FORCED = ("force", "sanitize", "any")

# The kernels are compiled once per instruction set, each time in a namespace of its own.
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["baseline"] = ["-O2"]  # calls of fma() take its time, and -O3 only makes it larger
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    widths = ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mprefer-vector-width=512"]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], *widths]
OPTIMIZED, LINKED = ["-O3", "-g0"], ["-Wl,--strip-all"] if sys.platform == "linux" else []
if MODE == "sanitize":
    LINKED = ["-fsanitize=address,undefined"]
    OPTIMIZED = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", *LINKED]
# Results must not depend on what the compiler contracts.
COMMON_FLAGS = ["-std=c++20", *OPTIMIZED, "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-ffp-contract=off"]
# These two flags let loops vectorise and change no result.
KERNEL_FLAGS = [*COMMON_FLAGS, "-fno-math-errno", "-fno-trapping-math"]
# The build makes machine code for these architectures, and PTX for GPUs of all other and later generations. The PTX has
# an architecture of its own, by which the sources recognize it.
PTX = 87
CUDA_ARCHITECTURES = [75, 80, 90, 100, 120]  # 86 and 89 run the code for 80
if os.environ.get("DRACOPT_CUDA_ARCHITECTURES"):
    wanted = re.split(r"[,; ]+", os.environ["DRACOPT_CUDA_ARCHITECTURES"])
    if not all(number.isdecimal() for number in wanted):
        raise SystemExit(f"DRACOPT_CUDA_ARCHITECTURES is {' '.join(wanted)!r}; give it numbers such as 90 or 80,90")
    CUDA_ARCHITECTURES = sorted(map(int, wanted))
    if PTX in CUDA_ARCHITECTURES:
        raise SystemExit(f"DRACOPT_CUDA_ARCHITECTURES: {PTX} stands for PTX here; the code for 80 runs on such a GPU")
# Kernels and bindings must agree on the headers that both include, so a hash of these is compiled into both.
SHARED_HEADERS = [*sorted((ROOT / "csrc/core").glob("*.h")), *map(Path, ("csrc/cpu/kernels.h", "csrc/cuda/kernels.h"))]
SHARED_HEADERS.append(Path("csrc/cuda/launch.h"))
INTERFACE = hashlib.sha256(b"".join((ROOT / path).read_bytes() for path in SHARED_HEADERS)).hexdigest()[:16]
INTERFACE_MACRO = ("DRACOPT_INTERFACE", f"0x{INTERFACE}u")
BINDING_FLAGS = [*COMMON_FLAGS, "-fno-semantic-interposition"]
# On Linux the kernels are a library. Elsewhere the binding contains them.
SHARED_KERNELS = sys.platform == "linux"
TORCH_LIBRARIES = ["torch", "torch_cpu", "torch_python", "c10"]
HEADERS = [Path(folder) for folder in os.environ.get("DRACOPT_TORCH_HEADERS", "").split(os.pathsep) if folder]
if MODE == "pure":
    HEADERS = []


def compiler() -> str:
    return os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "c++").split()[0]


class Nvcc:
    """Calls CUDA's compiler itself, because torch's own way insists on the version that torch was built with."""

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
        """Says why this nvcc cannot be used; None if it can. Kernel arguments as large as ours need CUDA 12.1."""
        try:
            # nvcc may be a script far from its toolkit, so it is asked where it looks for libraries.
            dry = subprocess.run([str(self.path), "--dryrun", "-o", "x", "x.cu"], capture_output=True, text=True).stderr
            known = self.output("--list-gpu-arch")
        except OSError as error:
            return f"{self.path} does not run: {error}"
        self.libraries = re.findall(r'"-L([^"]+)"', dry)
        self.known = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch}\n" in known]
        if not self.known:
            return f"{self.path} knows none of the architectures {', '.join(map(str, CUDA_ARCHITECTURES))}"
        if not any((Path(folder) / "libcudart_static.a").exists() for folder in self.libraries):
            return f"{self.path} comes without libcudart_static.a"
        return None

    def output(self, *arguments: str) -> str:
        return subprocess.run([str(self.path), *arguments], capture_output=True, text=True).stdout

    def compression(self) -> list[str]:
        """From 12.8 on nvcc compresses by a fifth better. Drivers read that from 550 on."""
        return ["--compress-mode=size"] if "--compress-mode" in self.output("--help") else ["-Xfatbin", "-compress-all"]

    def version(self) -> str:
        return "nvcc " + "".join(re.findall(r"release (\S+),", self.output("--version")))

    def compile(self, source: Path, target: Path) -> None:
        """Compiles for every one of CUDA_ARCHITECTURES that this nvcc knows."""
        codes = [f"arch=compute_{arch},code=sm_{arch}" for arch in self.known]
        codes.append(f"arch=compute_{PTX},code=compute_{PTX}")
        macros = ["-DDRACOPT_ISA=device", f"-DDRACOPT_PTX={10 * PTX}"]
        flags = ["-std=c++20", "-O3", "--fmad=false", *macros, "-Icsrc", *self.compression()]
        hidden = ["-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-ffp-contract=off", "-g0"]
        host = ["-ccbin", compiler(), "-Xcompiler", ",".join(hidden)]
        generated = [part for code in codes for part in ("-gencode", code)]
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"unfinished-{target.name}")
        files = ["-c", str(source), "-o", str(unfinished)]
        subprocess.run([str(self.path), *flags, *host, *generated, "--threads", "0", *files], check=True)
        os.replace(unfinished, target)


def find_torch() -> Any:
    """Imports torch from the build environment or, because pip isolates builds, from the one to install into."""
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
    """Says why the native part cannot be compiled, if this can be told before trying."""
    if MODE == "pure":
        return "DRACOPT_BUILD=pure"
    if MODE == "any" and sys.platform != "linux":
        return "the module for any torch is for Linux"
    if shutil.which(compiler()) is None:
        return f"no C++ compiler was found ({compiler()})"
    if not VERSIONS:
        return "torch is not installed"
    for version in VERSIONS:
        if minor(version) < (2, 10):
            return f"torch {version} is older than 2.10"
    return None


def version_of(headers: Path) -> str:
    """Returns the version of torch that headers belong to, without what torch was built with."""
    found = re.search(r"__version__ = '([^'+]+)", (headers / "torch" / "version.py").read_text())
    assert found is not None
    return found.group(1)


def minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def binding(version: str, make: Callable[..., Extension] = Extension, **where: Any) -> Extension:
    """Describes the module for a version of torch."""
    return make(
        "dracopt_ext.native.torch_{}_{}._C".format(*minor(version)),
        ["csrc/bindings/unity.cpp"],
        include_dirs=[str(ROOT / "csrc"), *where.pop("include_dirs", [])],
        define_macros=[INTERFACE_MACRO],
        extra_compile_args=BINDING_FLAGS,
        extra_link_args=[*LINKED, *where.pop("extra_link_args", [])],
        **where,
    )


def for_any_torch() -> list[Extension]:
    """Describes the module for torches that no other fits. It finds its way by /proc, so it is for Linux."""
    if sys.platform != "linux":
        return []
    headers, libraries = ([str(HEADERS[0] / "torch/include")], []) if HEADERS else (include_paths(), library_paths())
    return [
        Extension(
            "dracopt_ext.native.any_torch._C",
            ["csrc/bindings/unity.cpp"],
            include_dirs=[str(ROOT / "csrc"), *headers],
            define_macros=[INTERFACE_MACRO, ("DRACOPT_ANY_TORCH", "1")],
            extra_compile_args=BINDING_FLAGS,
            library_dirs=libraries,
            # The linker must keep the library, although a stub defines nothing that is needed.
            extra_link_args=[*LINKED, "-Wl,--no-as-needed", "-ltorch_cpu"],
        )
    ]


def bindings() -> list[Extension]:
    if REASON is not None:
        return [Extension("dracopt_ext.native._C", [])]  # makes setuptools ask for a build
    if MODE == "any":
        return for_any_torch()
    if not HEADERS:
        return [*for_any_torch(), binding(TORCH.__version__, CppExtension)]
    return for_any_torch() + [
        binding(
            version,
            include_dirs=[str(folder / "torch/include"), str(folder / "torch/include/torch/csrc/api/include")],
            extra_link_args=["-Wl,--no-as-needed", *(f"-l{library}" for library in TORCH_LIBRARIES)],
        )
        for version, folder in zip(VERSIONS, HEADERS, strict=True)
    ]


NVCC = Nvcc()
TORCH = find_torch() if MODE != "pure" and not HEADERS else None
VERSIONS = [version_of(folder) for folder in HEADERS] or ([TORCH.__version__] if TORCH is not None else [])
REASON = why_not()
if REASON is None and not HEADERS:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths, library_paths
else:
    BuildExtension = build_ext


class BuildNative(BuildExtension):
    """Compiles the kernels, then the bindings, and records the outcome."""

    cuda: str | None = None
    """The reason why the CUDA kernels are left out; None if they are built."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def run(self) -> None:
        self.remove_stale()
        reason = REASON
        if reason is None:
            inplace = self.inplace
            try:
                super().run()
            except Exception as error:  # distutils, ninja and torch each have their own errors
                reason = f"compilation failed: {type(error).__name__}: {error}".split("\n")[0]
            self.inplace = inplace  # setuptools forgets this if the build fails
        if reason is not None:
            if MODE in FORCED:
                raise SystemExit(f"DRACOPT_BUILD={MODE}: {reason}")
            self.remove_stale()
            self.extensions.clear()
            print(f"dracopt_ext: building without compiled kernels: {reason}", file=sys.stderr)
        self.write_info(reason)

    def build_extensions(self) -> None:
        objects = self.compile_for_cpu()
        cuda, libraries = self.compile_for_gpu()
        if SHARED_KERNELS:
            library = self.native_dir() / "libdracopt_kernels.so"
            library.parent.mkdir(parents=True, exist_ok=True)
            self.compiler.link_shared_object(
                [*objects, *cuda],
                str(library),
                libraries=libraries,
                library_dirs=NVCC.libraries,
                extra_postargs=[*LINKED, f"-Wl,-soname,{library.name}"],
                target_lang="c++",
            )
            objects, cuda, libraries = [], [], ["dracopt_kernels"]
        if HEADERS:
            self.make_stubs()
        for extension in self.extensions:
            extension.extra_objects += [*objects, *cuda]
            extension.libraries += libraries
            folders = [self.native_dir(), self.stubs_dir(), *NVCC.libraries]
            extension.extra_link_args += [f"-L{folder}" for folder in folders]
            if SHARED_KERNELS:
                extension.runtime_library_dirs = ["$ORIGIN/.."]
                # This option makes an RPATH, which LD_LIBRARY_PATH does not override as it does a RUNPATH.
                extension.extra_link_args.append("-Wl,--disable-new-dtags")
        super().build_extensions()

    def build_extension(self, extension: Extension) -> None:
        """Builds each in a folder of its own, because the bindings' objects have the same names."""
        own = copy.copy(self)
        own.build_temp = str(Path(self.build_temp) / extension.name)
        super(BuildNative, own).build_extension(extension)

    def compile_for_cpu(self) -> list[str]:
        """Compiles the kernels for each instruction set, and the code that chooses one; returns the objects."""
        kernels = Path("csrc/cpu/kernels.cpp")
        macros = [INTERFACE_MACRO, *([("DRACOPT_X86_64", "1")] if "avx2" in ISA_FLAGS else [])]
        jobs = [(isa, [kernels], [*KERNEL_FLAGS, *flags]) for isa, flags in ISA_FLAGS.items()]
        jobs.append(("host", sorted({*kernels.parent.glob("*.cpp")} - {kernels}), COMMON_FLAGS))
        read = ["setup.py", *map(str, SHARED_HEADERS), *sources_in("core", "rules", "cpu")]

        how = [self.compiler_version(), self.compiler.compiler_so, getattr(self.compiler, "compiler_so_cxx", None)]

        def compile_one(job: tuple[str, list[Path], list[str]]) -> list[str]:
            isa, sources, flags = job
            # Another compiler, or other flags, compile into another folder.
            key = hashlib.sha256(repr((how, macros, flags)).encode()).hexdigest()[:8]
            folder, unfinished = (str(Path(self.build_temp) / f"{isa}-{key}{end}") for end in ("", "-unfinished"))
            names = [str(source) for source in sources]
            objects: list[str] = self.compiler.object_filenames(names, output_dir=folder)
            if any(newer_group(read, target) for target in objects):
                made = self.compiler.compile(
                    names,
                    output_dir=unfinished,
                    macros=[("DRACOPT_ISA", isa), *macros],
                    include_dirs=["csrc"],
                    extra_postargs=flags,
                )
                for finished, target in zip(made, objects, strict=True):
                    Path(target).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(finished, target)
            return objects

        with ThreadPoolExecutor(self.parallel) as pool:
            return [target for objects in pool.map(compile_one, jobs) for target in objects]

    def compile_for_gpu(self) -> tuple[list[str], list[str]]:
        """Returns the CUDA kernels' objects and the libraries that they need; without nvcc, an object that says so."""
        self.cuda = NVCC.missing
        if self.cuda is None:
            name = "-".join([*NVCC.version().split(), *map(str, NVCC.known)])
            target = Path(self.build_temp) / name / "kernels.o"
            try:
                if newer_group(["setup.py", *sources_in("core", "rules", "cuda")], str(target)):
                    NVCC.compile(Path("csrc/cuda/kernels.cu"), target)
                return [str(target)], ["cudart_static", "dl", "rt", "pthread"]
            except subprocess.CalledProcessError as error:
                if MODE in FORCED:
                    raise
                self.cuda = f"{error.cmd[0]} failed; its output is among the build's"
        print(f"dracopt_ext: building without CUDA kernels: {self.cuda}", file=sys.stderr)
        compiled = self.compiler.compile(
            ["csrc/cuda/absent.cpp"], output_dir=self.build_temp, include_dirs=["csrc"], extra_postargs=COMMON_FLAGS
        )
        return compiled, []

    def make_stubs(self) -> None:
        """Makes empty libraries with the names of torch's, because the linker records only the names."""
        self.stubs_dir().mkdir(parents=True, exist_ok=True)
        for library in TORCH_LIBRARIES:
            name = f"lib{library}.so"
            command = [compiler(), "-shared", f"-Wl,-soname,{name}", "-x", "c", os.devnull]
            subprocess.run([*command, "-o", str(self.stubs_dir() / name)], check=True)

    def stubs_dir(self) -> Path:
        return Path(self.build_temp) / "stubs"

    def native_dir(self) -> Path:
        """The folder in the build; a build in place copies its contents."""
        return Path(self.build_lib) / "dracopt_ext" / "native"

    def copy_extensions_to_source(self) -> None:
        shutil.copytree(self.native_dir(), ROOT / "dracopt_ext" / "native")

    def package_dir(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib)) / "dracopt_ext"

    def remove_stale(self) -> None:
        """Removes earlier modules, so that a failed compilation does not ship one of them."""
        for folder in (self.package_dir() / "native", self.native_dir()):
            shutil.rmtree(folder, ignore_errors=True)
        for module in self.package_dir().glob("_C*.so"):  # its place in earlier versions
            module.unlink()

    def write_info(self, reason: str | None) -> None:
        info = {
            "reason": reason,
            "torch": VERSIONS if reason is None and MODE != "any" else [],
            "commit": commit(),
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


def sources_in(*folders: str) -> list[str]:
    return [str(path) for folder in folders for path in Path("csrc", folder).iterdir()]


def commit() -> str | None:
    """Names the commit, with "-dirty" if the tree was changed; DRACOPT_COMMIT gives a source distribution's."""
    if os.environ.get("DRACOPT_COMMIT"):
        return os.environ["DRACOPT_COMMIT"]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None


class Wheel(bdist_wheel):
    """Tags a wheel without a compiled module as pure."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build":
            built = Path(self.get_finalized_command("build").build_lib) / "dracopt_ext"
            self.root_is_pure = not (built / "native").exists()


setup(
    ext_modules=bindings(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    # pip provides a torch to the build if nothing else is missing.
    setup_requires=[os.environ.get("DRACOPT_TORCH", "torch>=2.10")] if REASON == "torch is not installed" else [],
)
