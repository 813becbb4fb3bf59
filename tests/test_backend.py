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
    assert backend._load_native() == (None, "torch 2.9.1+cu128 is older than 2.10")


def test_compiled_for_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend.BUILD_INFO, "torch", "2.12.0")
    module, reason = backend._load_native()
    assert module is None
    assert str(reason).startswith("compiled for torch 2.12.0, not for the installed ")


def test_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert backend._build_info() == {}
    for reason in ("no C++ compiler was found (c++)", None):
        monkeypatch.setitem(backend.BUILD_INFO, "reason", reason)
        assert backend._load_native() == (None, reason or "not compiled: run `pip install .` in the source tree")


def test_the_module_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(importlib, "import_module", broken)
    assert backend._load_native() == (None, "the compiled module does not load: undefined symbol: _ZN3c10")


def test_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    __main__.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"dracopt_ext {dracopt_ext.__version__}, Python ")
    assert any(line.split() == ["native:cpu", "available"] for line in lines)
