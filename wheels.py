"""Builds the wheels and the source distribution, and tries the wheels in clean environments.

``python wheels.py build`` puts into ``dist`` a source distribution and, built from it, a wheel for each version of
Python. A wheel has the kernels once and a binding for each version of torch. Torch's headers are enough to build a
binding. ``python wheels.py test`` installs each wheel into new environments without a compiler, and runs the tests
there.

``make wheels`` and ``make test-wheel`` call this script with the tools that it needs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent
WORK, DIST = ROOT / "build" / "wheels", ROOT / "dist"

PYTHON = "{}.{}".format(*sys.version_info)
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
TORCHES = {"2.10.0": "3.10", "2.11.0": "3.10", "2.12.1": "3.10", "2.13.0": "3.10", "2.14.1": "3.10", "2.15.0": "3.11"}
"""The newest release of each supported minor version of torch, and the oldest Python that this release supports."""

TORCH_LIBRARIES = [f"lib{name}.so" for name in ("c10", "torch", "torch_cpu", "torch_python")]

# The other tests need the sources, or a compiler.
TESTED = "bits dropin dtypes layouts refusals life known_defects fallback checkpoints properties backend plan"
FOR_TESTS = ["pytest", "hypothesis", "numpy"]


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
    """Runs a command and returns what it prints; ends the program if the command fails."""
    # The tools lie beside this interpreter.
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **(env or {})}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}{' '.join(map(str, command))} failed with {done.returncode}")
    return done.stdout


def tag(version: str) -> str:
    """Returns the tag of a version of Python in file names."""
    return "cp" + version.replace(".", "")


def minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def find_python(version: str) -> str | None:
    """Finds an interpreter: this one, one on the path, or pyenv's."""
    if minor(version) == sys.version_info[:2]:
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    places = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"))]
    for place in places:  # the path may hold a shim without an interpreter
        if place is not None and subprocess.run([place, "--version"], capture_output=True).returncode == 0:
            return str(place)
    return None


def fetch_headers(torch: str) -> Path:
    """Returns a folder with the headers of a version of torch, taken from its wheel."""
    folder = WORK / "headers" / torch
    if not folder.exists():
        partial = folder.with_name(f"{torch}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        # The wheel for any Python will do, but there must be one.
        oldest = TORCHES.get(torch, PYTHONS[0])
        python = f"--python-version={max(oldest, PYTHON, key=minor)}"
        run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", python, "-d", partial,
            f"torch=={torch}")  # fmt: skip
        (wheel,) = partial.glob("*.whl")
        with zipfile.ZipFile(wheel) as opened:
            names = [name for name in opened.namelist() if name.startswith(("torch/include/", "torch/version.py"))]
            opened.extractall(partial, names)
        wheel.unlink()
        partial.rename(folder)
    return folder


def served(python: str, torches: Sequence[str]) -> list[str]:
    """Returns the versions of torch that support a version of Python."""
    found = [torch for torch in torches if minor(TORCHES.get(torch, PYTHONS[0])) <= minor(python)]
    return found or sys.exit(f"none of torch {', '.join(torches)} is for Python {python}")


def build_sdist() -> Path:
    """Builds the source distribution in ``dist``; returns the folder into which it was unpacked."""
    run("pyproject-build", "--sdist", "--outdir", DIST, env={"DRACOPT_BUILD": "pure"})
    (archive,) = DIST.glob("*.tar.gz")
    shutil.rmtree(WORK / "source", ignore_errors=True)
    with tarfile.open(archive) as opened:
        opened.extractall(WORK / "source", filter="data")
    (folder,) = (WORK / "source").iterdir()
    return folder


def build_wheel(python: str, source: Path, headers: Sequence[Path], commit: str) -> Path:
    """Builds and repairs a wheel for an interpreter: it names what it needs of the system, and holds no torch."""
    raw = WORK / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    env = {
        "DRACOPT_BUILD": "force",
        "DRACOPT_COMMIT": commit,
        "DRACOPT_TORCH_HEADERS": os.pathsep.join(map(str, headers)),
    }
    run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", raw, source, env=env)
    (wheel,) = raw.glob("*.whl")
    excluded = [option for library in TORCH_LIBRARIES for option in ("--exclude", library)]
    platform = ["--plat", os.environ["PLATFORM"]] if os.environ.get("PLATFORM") else []
    run("auditwheel", "repair", *platform, *excluded, "-w", raw / "repaired", wheel)
    (repaired,) = (raw / "repaired").glob("*.whl")
    return Path(shutil.move(repaired, DIST / repaired.name))


def report(wheel: Path) -> None:
    """Prints the compressed size of a wheel in KB, by part."""
    parts: dict[str, int] = {}
    with zipfile.ZipFile(wheel) as opened:
        for entry in filter(lambda entry: not entry.is_dir(), opened.infolist()):
            folders = entry.filename.split("/")
            part = folders[2].split(".")[0] if folders[1] == "native" else "Python"
            parts[part] = parts.get(part, 0) + entry.compress_size
    print(f"{wheel.name}: {wheel.stat().st_size / 1000:.0f} KB")
    for part, size in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"  {part:24}{size / 1000:6.0f}")


def build(pythons: Sequence[str], torches: Sequence[str]) -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    commit = run("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*").strip()
    begin = time.monotonic()
    headers = {torch: fetch_headers(torch) for torch in torches}
    print(f"headers of torch {', '.join(torches)}: {time.monotonic() - begin:.0f} s", flush=True)
    source = build_sdist()
    for version in pythons:
        python = find_python(version)
        if python is None:
            sys.exit(f"there is no Python {version} on the path")
        begin = time.monotonic()
        wheel = build_wheel(python, source, [headers[torch] for torch in served(version, torches)], commit)
        print(f"built in {time.monotonic() - begin:.0f} s", flush=True)
        report(wheel)
    files = sorted(DIST.iterdir())
    print(run("twine", "check", "--strict", *files), end="")
    print(run("check-wheel-contents", *DIST.glob("*.whl")), end="")


def test_in(python: str, wheel: Path, torch: str) -> None:
    """Installs a wheel beside a torch, without a compiler, and runs the tests against the wheel."""
    name = f"Python {python}, torch {torch}"
    folder = WORK / "test"
    shutil.rmtree(folder, ignore_errors=True)
    interpreter = find_python(python)
    assert interpreter is not None
    run(interpreter, "-m", "venv", folder / "venv")
    installed = folder / "venv" / "bin" / "python"
    run(installed, "-m", "pip", "install", "-q", f"torch=={torch}", *FOR_TESTS)
    begin = time.monotonic()
    run(installed, "-m", "pip", "install", "-q", wheel)
    print(f"{name}: installed in {time.monotonic() - begin:.1f} s", flush=True)

    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)  # for pytest's settings
    alone = {"PATH": str(installed.parent), "CXX": "/nowhere/c++", "CUDA_HOME": "/nowhere"}
    say_binding = "from dracopt_ext import backend; print(backend._C.__name__.split('.')[-2])"
    tests = ["-m", "pytest", "-q", *(f"tests/test_{test}.py" for test in TESTED.split())]
    print(run(installed, "-m", "dracopt_ext", env=alone, cwd=folder), end="", flush=True)
    assert run(installed, "-c", say_binding, env=alone, cwd=folder) == "torch_{}_{}\n".format(*minor(torch))
    print(run(installed, *tests, env=alone, cwd=folder).splitlines()[-1], flush=True)

    newer = [*tests, "-p", "tests.by_any_torch"]
    print("as under a newer torch:", run(installed, *newer, env=alone, cwd=folder).splitlines()[-1], flush=True)
    shutil.rmtree(folder)


def test(pythons: Sequence[str], torches: Sequence[str]) -> None:
    """Tests with the first Python under every version of torch, and with the others under the newest one."""
    for i, python in enumerate(pythons):
        (wheel,) = DIST.glob(f"*-{tag(python)}-*.whl")
        for torch in served(python, torches)[0 if i == 0 else -1 :]:
            test_in(python, wheel, torch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["build", "test"])
    parser.add_argument("--pythons", nargs="+", default=PYTHONS)
    parser.add_argument("--torches", nargs="+", default=list(TORCHES))
    arguments = parser.parse_args()
    {"build": build, "test": test}[arguments.command](arguments.pythons, arguments.torches)


if __name__ == "__main__":
    main()
