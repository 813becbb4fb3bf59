"""Why something cannot run here, in words, without a second installation; test_packaging.py has those."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch

import dracopt_ext
from dracopt_ext import __main__, backend


def test_backends_that_can_run() -> None:
    found = dracopt_ext.backends()
    assert list(found) == ["native:cpu", "native:cuda", "triton", "reference"]
    assert found["native:cpu"] is None
    assert found["reference"] is None


def test_torch_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert backend._load_native() == (None, None, "torch 2.9.1+cu128 is older than 2.10")


@pytest.mark.parametrize(
    ("installed", "fits"),
    [
        ("2.13.0", True),
        ("2.13.1+cu130", True),  # of one minor version, whatever it was built with
        ("2.13.0+cpu", True),
        ("2.13.0.post303", True),
        ("2.14.0", False),
        ("2.13.0.dev20260401+cpu", False),  # before the release anything may change
        ("2.13.0a0+git1234567", False),
        ("2.12.0a0+git7654321", True),  # the very build that was compiled against
        ("2.12.0", False),
    ],
)
def test_bindings_fit_their_minor_version(installed: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.BUILD_INFO, "torch", ["2.12.0a0+git7654321", "2.13.0+cpu"])
    assert backend._built_for(installed) == fits


def test_compiled_for_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are used without binding."""
    monkeypatch.setitem(backend.BUILD_INFO, "torch", ["2.98.0", "2.99.0"])
    module, library, reason = backend._load_native()
    assert module is None
    assert library is not None
    assert library.isa == backend.isa()
    assert reason == f"compiled for torch 2.98.0, 2.99.0, not for the installed {torch.__version__}"


def test_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert backend._build_info() == {}
    monkeypatch.setitem(backend.BUILD_INFO, "torch", [])
    for reason in ("no C++ compiler was found (c++)", None):
        monkeypatch.setitem(backend.BUILD_INFO, "reason", reason)
        expected = reason or "not compiled: run `pip install .` in the source tree"
        assert backend._load_native() == (None, None, expected)


@pytest.mark.binding
def test_the_module_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is broken is not papered over."""

    def broken(spec: Any) -> Any:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(importlib.util, "module_from_spec", broken)
    expected = "what was compiled does not load: undefined symbol: _ZN3c10"
    assert backend._load_native() == (None, None, expected)


def test_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    __main__.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"dracopt_ext {dracopt_ext.__version__}, Python ")
    assert any(line.split() == ["native:cpu", "available"] for line in lines)
