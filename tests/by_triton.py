"""A pytest plugin that lets Triton's interpreter take the place of the native backend, under this backend's name."""

from __future__ import annotations

from typing import Any

import pytest

from dracopt_ext import backend
from dracopt_ext.optim._base import FusedOptimizer

from . import interpreted

make, last_backend = backend.step_plan, FusedOptimizer.last_backend.fget


def renamed(optimizer: Any) -> dict[str, frozenset[str]]:
    assert last_backend is not None
    found = last_backend(optimizer)
    assert not any("native" in names for names in found.values())
    return {device: frozenset({"triton": "native"}.get(name, name) for name in found[device]) for device in found}


@pytest.fixture(autouse=True)
def _by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted.set_up(monkeypatch)
    monkeypatch.setattr(backend, "step_plan", lambda *names: make(*names[:2], False, True, *names[4:]))
    monkeypatch.setattr(FusedOptimizer, "last_backend", property(renamed))
