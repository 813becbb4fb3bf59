"""Fixtures that all tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads this variable when it is imported

import dracopt_ext

collect_ignore = ["integrations"]  # `make test-integrations` runs these tests, without this file


def pytest_sessionstart(session: pytest.Session) -> None:
    reason = dracopt_ext.backends()["native:cpu"]
    if reason is not None:
        pytest.exit(f"the tests are about the compiled kernels, which are not there: {reason}", returncode=1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests that need a GPU if there is none, unless `-m` asks for them. Puts long tests first."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if "gpu" in config.option.markexpr or dracopt_ext.backends()["native:cuda"] is None:
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Keeps coverage out of tests marked ``untraced``. In xdist's workers pytest-cov's ``no_cover`` stops one of two
    tracers only."""
    if pyfuncitem.get_closest_marker("untraced") is None:
        return (yield)
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A mesh of this process alone."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh

    store = tmp_path_factory.mktemp("mesh") / "store"
    init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    destroy_process_group()


@pytest.fixture(autouse=True)
def _unchanged_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _warn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets each test see the warnings that a process issues only once."""
    monkeypatch.setattr("dracopt_ext.backend._warned", set())
