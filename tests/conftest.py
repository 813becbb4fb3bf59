"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import dracopt_ext


def pytest_sessionstart(session: pytest.Session) -> None:
    reason = dracopt_ext.backends()["native:cpu"]
    if reason is not None:
        pytest.exit(f"the tests are about the compiled kernels, which are not there: {reason}", returncode=1)


@pytest.fixture(autouse=True)
def _unchanged_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _warn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test sees the warnings that a process sees once."""
    monkeypatch.setattr("dracopt_ext.backend._warned", set())
