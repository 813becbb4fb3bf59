"""Tests the reasons why something cannot run here. test_packaging.py tests those that need a second installation."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dracopt_ext
from dracopt_ext import __main__, any_torch, backend


def test_backends_that_can_run() -> None:
    found = dracopt_ext.backends()
    assert list(found) == ["native:cpu", "native:cuda", "triton", "reference"]
    assert found["native:cpu"] is None
    assert found["reference"] is None


@pytest.mark.parametrize(("version", "works"), [("2.6.0+cu124", False), ("2.7.0", True), ("2.10.0", True)])
def test_torch_that_has_not_our_constructors(version: str, works: bool) -> None:
    """torch's Adam has taken ``decoupled_weight_decay`` since 2.7."""
    if works:
        backend.check_torch(version)
    else:
        with pytest.raises(ImportError, match=r"needs torch 2\.7 or newer, .* but torch 2\.6\.0\+cu124 is installed"):
            backend.check_torch(version)


def test_torch_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert backend._load_native() == (None, "torch 2.9.1+cu128 is older than 2.10")


@pytest.mark.parametrize(
    ("installed", "fits"),
    [
        ("2.13.0", True),
        ("2.13.1+cu130", True),  # the same minor version, whatever it was built with
        ("2.13.0+cpu", True),
        ("2.13.0.post303", True),
        ("2.14.0", False),
        ("2.13.0.dev20260401+cpu", False),  # anything may change before the release
        ("2.13.0a0+git1234567", False),
        ("2.12.0a0+git7654321", True),  # the build that the binding was compiled for
        ("2.12.0", False),
    ],
)
def test_bindings_fit_their_minor_version(installed: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.BUILD_INFO, "torch", ["2.12.0a0+git7654321", "2.13.0+cpu"])
    assert backend._built_for(installed) == fits


@pytest.fixture
def _loaded_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a test load another module, and then forgets it."""
    monkeypatch.setitem(sys.modules, "dracopt_ext._C", sys.modules["dracopt_ext._C"])


@pytest.mark.usefixtures("_loaded_modules")
def test_compiled_for_other_torches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module for any torch takes the place of the missing one."""
    monkeypatch.setitem(backend.BUILD_INFO, "torch", ["2.98.0", "2.99.0"])
    module, reason = backend._load_native()
    assert reason is None
    assert module is not None
    assert module.__name__ == "dracopt_ext.native.any_torch._C"
    assert sys.modules["dracopt_ext._C"] is module
    assert module.isa() == backend.isa()


@pytest.mark.usefixtures("_loaded_modules")
def test_a_torch_that_no_module_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.BUILD_INFO, "torch", ["2.99.0"])

    def find() -> Any:
        raise any_torch.UnknownTorchError("torch 3.0 keeps its key sets in 0 known places")

    monkeypatch.setattr(any_torch, "find_places", find)
    before = sys.modules["dracopt_ext._C"]
    module, reason = backend._load_native()
    assert module is None
    assert sys.modules["dracopt_ext._C"] is before
    assert reason == (
        f"compiled for torch 2.99.0, not for the installed {torch.__version__} (torch 3.0 keeps its key sets in 0 "
        "known places). To compile it for this torch, run in a clone of the repository: DRACOPT_BUILD=force pip "
        "install --force-reinstall --no-deps ."
    )


def test_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert backend._build_info() == {}
    for reason in ("no C++ compiler was found (c++)", None):
        monkeypatch.setattr(backend, "BUILD_INFO", {} if reason is None else {"reason": reason, "torch": []})
        expected = reason or "not compiled: run `pip install .` in the source tree"
        assert backend._load_native() == (None, expected)


def test_a_source_tree_that_hides_an_installed_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed = tmp_path / "dracopt_ext"
    installed.mkdir()
    (installed / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(Path(backend.__file__).parents[1]), str(tmp_path)])
    reason = backend._why_not_compiled()
    assert f"A copy is installed in {installed}: start Python in another folder" in reason
    monkeypatch.setattr(sys, "path", sys.path[:1])
    assert backend._why_not_compiled() == "not compiled: run `pip install .` in the source tree"


def test_the_module_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken module is reported."""

    def broken(spec: Any) -> Any:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(importlib.util, "module_from_spec", broken)
    expected = "what was compiled does not load: undefined symbol: _ZN3c10"
    assert backend._load_native() == (None, expected)


def test_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    __main__.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"dracopt_ext {dracopt_ext.__version__}, Python ")
    assert any(line.split() == ["native:cpu", "available"] for line in lines)
