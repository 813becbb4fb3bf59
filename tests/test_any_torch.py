"""The module for any torch holds what the module for the installed torch holds, and refuses a torch that it would
misunderstand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dracopt_ext
from dracopt_ext import any_torch, backend

ROOT = Path(__file__).parents[1]


def run_with_any_torch(tests: str, *options: str) -> None:
    files = [f"tests/test_{name}.py" for name in tests.split()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.by_any_torch", *files]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, *options], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.long
def test_what_holds_for_the_native_backend() -> None:
    """The native backend's tests pass in a process in which this module replaces the other one."""
    run_with_any_torch("plan dtypes layouts refusals life known_defects fallback checkpoints dropin properties")


@pytest.mark.long
def test_what_holds_for_other_peoples_code() -> None:
    run_with_any_torch("bits distributed other_peoples_code hostile_programs any_torch", "-k", "not what_holds")


@pytest.mark.long
def test_what_holds_for_gpus() -> None:
    """The simulated GPU's tests pass, too, with the CUDA kernels' code and with Triton's."""
    run_with_any_torch("gpu", "-m", "not untraced")


@pytest.fixture(scope="module")
def module() -> Any:
    loaded = backend.load_module(backend.ANY_TORCH)
    loaded.set_places(any_torch.find_places())
    return loaded


@pytest.fixture
def adamw(module: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(backend, "_C", module)
    return dracopt_ext.AdamW


def parameters(count: int) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.ones(3)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones(3)
    return params


def test_gradients_that_come_and_go(adamw: Any) -> None:
    """A tensor without a gradient may have had one, may have its place, or may never have had such a place."""
    had, has_place, never, has = parameters(4)
    had.grad = has_place.grad = None
    has_place.register_hook(lambda grad: grad)
    never = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = adamw([had, has_place, never, has], lr=0.5)
    optimizer.step()
    assert [bool((p == 1).all()) for p in (had, has_place, never, has)] == [True, True, True, False]
    assert list(optimizer.state) == [has]
    had.grad = torch.ones(3)
    optimizer.step()
    assert [bool((p == 1).all()) for p in (had, has_place, never)] == [False, True, True]


class WithoutKeys(Tensor):
    """A subclass that torch's key sets do not tell from a tensor."""


def test_subclasses_without_keys(adamw: Any) -> None:
    params = [nn.Parameter(torch.ones(3).as_subclass(WithoutKeys)), nn.Parameter(torch.ones(3))]
    for p in params:
        p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="does not serve tensor subclasses: parameter 0"):
        adamw(params, backend="native").step()


def test_gradients_whose_objects_are_gone(adamw: Any) -> None:
    """Gradients of a backward have no Python objects yet, and need none."""
    model = nn.Linear(4, 3)
    optimizer = adamw(model.parameters(), lr=0.1)
    twin = nn.Linear(4, 3)
    twin.load_state_dict(model.state_dict())
    expected = torch.optim.AdamW(twin.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        for trained, by in ((model, optimizer), (twin, expected)):
            by.zero_grad()
            trained(torch.ones(2, 4)).sum().backward()
            by.step()
    assert optimizer.last_backend == {"cpu": frozenset({"native"})}
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-6)
        assert not torch.allclose(p, 1.001 * q, rtol=1e-6)


# ---- torches that the module would misunderstand


def test_places_are_found_anywhere() -> None:
    """The search works under modes and default devices that a program may have set before the import."""
    expected = any_torch.find_places()
    with torch.device("meta"), torch.inference_mode():
        assert any_torch.find_places() == expected
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert any_torch.find_places() == expected


@pytest.mark.parametrize(
    ("replaced", "by", "expected"),
    [
        ("torch._C._dispatch_keys", lambda t: torch._C.DispatchKeySet(torch._C.DispatchKey.Meta), "key sets in 0"),
        ("torch._C._increment_version", lambda tensors: None, "versions in"),
        ("torch._lazy_clone", torch.clone, "marks of lazy clones in 0"),
        ("torch._neg_view", None, "TypeError: 'NoneType' object is not callable"),
    ],
)
def test_a_place_that_is_not_certain(replaced: str, by: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaced, by)
    with pytest.raises(any_torch.UnknownTorchError, match=expected):
        any_torch.find_places()


def test_a_function_that_torch_has_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch._lazy_clone")
    with pytest.raises(
        any_torch.UnknownTorchError, match="AttributeError: module 'torch' has no attribute '_lazy_clone'"
    ):
        any_torch.find_places()


def test_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = torch._C._parse_dispatch_key
    monkeypatch.setattr(torch._C, "_parse_dispatch_key", lambda name: parse("Meta" if name == "AutocastCPU" else name))
    with pytest.raises(any_torch.UnknownTorchError, match="has other keys for plain tensors"):
        any_torch.find_places()


def test_memory_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError("Permission denied: '/proc/self/mem'")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(any_torch.UnknownTorchError, match="PermissionError: Permission denied"):
        any_torch.find_places()
