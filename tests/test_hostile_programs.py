"""Tests programs that no one writes on purpose: a user's code runs within a step and changes what the step reads,
memory runs out, processes fork, numbers overflow. A step does its work or raises, and the next one is right.

``STRESS_SECONDS`` sets how long the stress at the end takes.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import dracopt_ext

from .cases import assert_same_bits, classes, inputs, snapshot, torchs

CLASSES = classes()
every_class = pytest.mark.parametrize("name", CLASSES)
left_to_torch = pytest.mark.filterwarnings("ignore:.*leaves .* to (torch's own|the reference):RuntimeWarning")
NATIVE = {"cpu": frozenset({"native"})}


def make(name: str, count: int = 4, module: Any = dracopt_ext, **options: Any) -> Any:
    """An optimizer with ``count`` groups of two parameters, in the middle of its training."""
    params = [nn.Parameter(value) for value in inputs([33] * (2 * count), torch.float32, 0)[0]]
    if name == "SGD":
        options = {"momentum": 0.9, **options}
    groups = [{"params": params[i : i + 2]} for i in range(0, 2 * count, 2)]
    optimizer: Any = (torchs(name) if module is torch.optim else getattr(module, name))(groups, lr=0.1, **options)
    give_gradients(params)
    optimizer.step()
    return optimizer


def params_of(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(params: list[Any]) -> None:
    for i, p in enumerate(params):
        p.grad = torch.linspace(-1 - i, 1, p.numel(), dtype=p.dtype).view_as(p)


def in_new_process(program: str, **environment: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True)


class Number:
    """A number as in a configuration library. ``__float__`` calls ``act`` before it returns the value."""

    def __init__(self, value: float, act: Callable[[], object] = lambda: None) -> None:
        self.value = value
        self.act = act

    def __float__(self) -> float:
        self.act()
        return self.value


class Index:
    """An object that is a number only by ``__index__``."""

    def __index__(self) -> int:
        return 2


# Numbers of all kinds

NUMBERS: dict[str, Any] = {
    "Fraction": Fraction(1, 8),
    "Decimal": Decimal("0.125"),
    "numpy.float64": np.float64(0.125),
    "numpy.float32": np.float32(0.125),
    "numpy.float16": np.float16(0.125),
    "numpy.ndarray": np.array(0.125),
    "own": Number(0.125),
    "tensor": torch.tensor(0.125),
    "bfloat16 tensor": torch.tensor(0.125, dtype=torch.bfloat16),
}


def assert_like_torchs(ours: Any, theirs: Any) -> None:
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)


@every_class
def test_comparisons_bite(name: str) -> None:
    """Comparisons see a step that was not taken, and one that is 1% too long."""
    idle, wrong, theirs = make(name), make(name), make(name, module=torch.optim)
    for group in wrong.param_groups:
        group["lr"] *= 1.01
    for optimizer in (wrong, theirs):
        give_gradients(params_of(optimizer))
        optimizer.step()
    for optimizer in (idle, wrong):
        with pytest.raises(AssertionError, match="not close"):
            assert_like_torchs(optimizer, theirs)


def assert_steps_alike(name: str, edit: Callable[[Any, Any], object], plain: Any) -> None:
    """Asserts that an edit with a number gives the bits of an edit with the plain number, and is close to torch's."""
    ours, expected, theirs = make(name), make(name), make(name, module=torch.optim)
    for optimizer, value in ((ours, None), (expected, plain), (theirs, plain)):
        edit(optimizer, value)
        for _ in range(2):
            optimizer.step()
    assert ours.last_backend == expected.last_backend == NATIVE
    assert_same_bits(snapshot(ours), snapshot(expected))
    assert_like_torchs(ours, theirs)


@pytest.mark.parametrize("kind", NUMBERS)
@every_class
def test_numbers_of_any_kind(name: str, kind: str) -> None:
    keys = ["lr", "weight_decay", *(["momentum", "dampening"] if name == "SGD" else ["eps"])]
    keys += ["momentum_decay"] if name == "NAdam" else []

    def edit(optimizer: Any, plain: Any) -> None:
        value = NUMBERS[kind] if plain is None else plain
        for group in optimizer.param_groups[1:]:
            group.update(dict.fromkeys(keys, value))
            if name != "SGD":
                group["betas"] = (value, value)

    assert_steps_alike(name, edit, 0.125)


@every_class
def test_numbers_by_index_and_whole_ones(name: str) -> None:
    for value in (Index(), np.int64(2), 2):

        def edit(optimizer: Any, plain: Any, value: Any = value) -> None:
            optimizer.param_groups[0]["lr"] = value if plain is None else plain

        assert_steps_alike(name, edit, 2.0)


class Key(str, Enum):
    LR = "lr"
    STEP = "step"


class Equal:
    """A key that equals a string, and calls ``act`` when it is compared."""

    def __init__(self, name: str, act: Callable[[], object] = lambda: None) -> None:
        self.name = name
        self.act = act

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        self.act()
        return other == self.name


KEYS: dict[str, Callable[[str], Any]] = {
    "another string": lambda name: "".join(list(name)),
    "enumeration": lambda name: Key(name),
    "equal": lambda name: Equal(name),
}


@pytest.mark.parametrize("kind", KEYS)
@every_class
def test_keys_of_any_kind(name: str, kind: str) -> None:
    def edit(optimizer: Any, plain: Any) -> None:
        if plain is not None:
            optimizer.param_groups[1]["lr"] = plain
            return
        group = optimizer.param_groups[1]
        group["initial_lr"] = group.pop("lr")
        group[KEYS[kind]("lr")] = 0.5
        entries = optimizer.state[group["params"][0]]
        if "step" in entries:
            entries[KEYS[kind]("step")] = entries.pop("step")

    ours, theirs = make(name), make(name, module=torch.optim)
    edit(ours, None)
    edit(theirs, 0.5)
    for optimizer in (ours, theirs):
        optimizer.step()
    assert ours.last_backend == NATIVE
    assert_like_torchs(ours, theirs)


# Code of the user's that runs within a step

EDITS: dict[str, Callable[[Any], object]] = {
    "removes groups": lambda o: o.param_groups.clear(),
    "removes the group": lambda o: o.param_groups.pop(1),
    "replaces groups": lambda o: o.param_groups.__setitem__(slice(None), [dict(group) for group in o.param_groups]),
    "adds many groups": lambda o: [o.add_param_group({"params": [nn.Parameter(torch.ones(3))]}) for _ in range(64)],
    "empties the group": lambda o: [group.clear() for group in o.param_groups],
    "removes parameters": lambda o: [group["params"].clear() for group in o.param_groups],
    "replaces parameters": lambda o: [group.update(params=[]) for group in o.param_groups],
    "replaces numbers": lambda o: [group.update(lr=float(random.random())) for group in o.param_groups],
    "replaces betas": lambda o: [group.update(betas=[0.5, 0.5]) for group in o.param_groups if "betas" in group],
    "empties the state": lambda o: o.state.clear(),
    "empties states": lambda o: [entries.clear() for entries in o.state.values()],
    "takes gradients away": lambda o: o.zero_grad(),
    "steps another time": lambda o: [group.update(lr=0.1) for group in o.param_groups] and o.step(),
    "loads a checkpoint": lambda o: o.load_state_dict(make(type(o).__name__).state_dict()),
}


def after_edit(optimizer: Any, name: str) -> None:
    """Asserts that the optimizer takes a good step again."""
    fresh = make(name)
    optimizer.param_groups[:] = [dict(group, params=list(group["params"])) for group in fresh.param_groups]
    optimizer.state.clear()
    optimizer.state.update(fresh.state)
    theirs = make(name, module=torch.optim)
    for each in (optimizer, theirs):
        give_gradients(params_of(each))
        each.step()
    assert_like_torchs(optimizer, theirs)


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """Keeps the objects that exist already, such as torch's modules, out of this file's collections of garbage."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Once:
    """Acts at the first call only, and then collects garbage so that released objects are gone."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act
        self.acted = False

    def __call__(self) -> None:
        if not self.acted:
            self.acted = True
            self.act()
            gc.collect()


@pytest.mark.parametrize("where", ["lr", "weight_decay", "maximize", "key"])
@pytest.mark.parametrize("kind", EDITS)
@every_class
def test_edits_while_a_group_is_read(name: str, kind: str, where: str) -> None:
    optimizer = make(name)
    act = Once(lambda: EDITS[kind](optimizer))
    group = optimizer.param_groups[1]
    give_gradients(params_of(optimizer))
    if where == "key":
        group[Equal("lr", act)] = group.pop("lr")
    elif where == "maximize":
        group["maximize"] = type("Flag", (), {"__bool__": lambda self: bool(act())})()
    else:
        group[where] = Number(0.1, act)
    try:
        optimizer.step()
    except (TypeError, KeyError, RuntimeError, IndexError) as error:
        assert kind not in ("replaces numbers", "takes gradients away"), error  # noqa: PT017
    assert act.acted
    after_edit(optimizer, name)


def test_a_step_within_a_step_is_refused() -> None:
    optimizer, theirs = make("AdamW"), make("AdamW", module=torch.optim)

    def step() -> None:
        with pytest.raises(
            RuntimeError, match="already running, in another thread or in code that this step has called"
        ):
            optimizer.step()

    optimizer.param_groups[1]["lr"] = Number(0.1, step)
    optimizer.step()
    theirs.step()
    assert_like_torchs(optimizer, theirs)
    assert optimizer.last_backend == NATIVE


class Wrapper(Tensor):
    """A tensor around another one. A look at its layout runs the user's code."""

    act: Callable[[], object] = staticmethod(lambda: None)
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Any:
        wrapper = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, dtype=held.dtype, dispatch_layout=True
        )
        wrapper.held = held
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.layout.default:
            Wrapper.act()
            return args[0].held.layout

        def unwrap(value: Any) -> Any:
            return value.held if isinstance(value, Wrapper) else value

        def wrap(value: Any) -> Any:
            return Wrapper(value) if isinstance(value, Tensor) else value

        found = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        in_place = found is not None and func._schema.name[-1] == "_"
        return args[0] if in_place else tree_map(wrap, found)


@left_to_torch
@pytest.mark.parametrize("kind", [*EDITS, "takes the gradient away", "looks at all objects"])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_edits_while_a_wrapper_is_looked_at(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make(name, fused=True)
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(Wrapper(p.detach())) for p in group["params"]]
    optimizer.state.clear()

    def give() -> None:
        for p in params_of(optimizer):
            p.grad = Wrapper(torch.ones(33))

    more = {
        "takes the gradient away": lambda o: [setattr(p, "grad", None) for p in params_of(o)],
        "looks at all objects": lambda o: [list(each) for each in gc.get_objects() if type(each) is list],
    }
    give()
    optimizer.step()
    give()
    act = Once(lambda: {**EDITS, **more}[kind](optimizer))
    monkeypatch.setattr(Wrapper, "act", staticmethod(act))
    with suppress(TypeError, KeyError, RuntimeError, IndexError, AttributeError):
        optimizer.step()
    assert act.acted
    monkeypatch.undo()
    after_edit(optimizer, name)


@pytest.mark.parametrize("kind", EDITS)
def test_edits_while_an_error_is_written(kind: str) -> None:
    optimizer = make("AdamW")

    act = Once(lambda: EDITS[kind](optimizer))

    class Name:
        def __repr__(self) -> str:
            act()
            return "mine"

    group = optimizer.param_groups[1]
    group["param_names"] = [Name(), Name()]
    give_gradients(params_of(optimizer))
    group["params"][1].data = torch.ones(2)
    message = r"parameter 1 of group 1 \((mine, )?shape \[2\]\)"
    if kind == "adds many groups":
        message = "cannot add param group without names"
    elif kind == "steps another time":
        message = "already running"
    with pytest.raises((ValueError, RuntimeError), match=message):
        optimizer.step()
    assert act.acted
    after_edit(optimizer, "AdamW")


@every_class
def test_a_key_is_not_asked_while_an_error_is_written(name: str) -> None:
    """The key comes last, after all keys that a rule reads."""
    optimizer = make(name)
    act = Once(optimizer.param_groups.clear)
    group = optimizer.param_groups[1]
    give_gradients(params_of(optimizer))
    group["params"][1].data = torch.ones(2)
    group[Equal("param_names", act)] = ["mine", "too"]
    with pytest.raises(ValueError, match=r"parameter 1 of group 1 \("):
        optimizer.step()
    after_edit(optimizer, name)


class OwnError(ArithmeticError):
    pass


def fail(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OwnError(), MemoryError(), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("where", ["lr", "betas", "maximize", "key"])
def test_errors_of_the_users_own_pass_through(where: str, error: BaseException) -> None:
    optimizer = make("AdamW")
    give_gradients(params_of(optimizer))
    before = snapshot(optimizer)
    group = optimizer.param_groups[2]
    good = dict(group)
    if where == "key":
        group[Equal("lr", fail(error))] = group.pop("lr")
    elif where == "maximize":
        group["maximize"] = type("Flag", (), {"__bool__": lambda self: fail(error)()})()
    else:
        number = Number(0.1, fail(error))
        group[where] = (0.9, number) if where == "betas" else number
    with pytest.raises(type(error)) as raised:
        optimizer.step()
    assert raised.value is error
    assert_same_bits(snapshot(optimizer), before)
    optimizer.param_groups[2] = good
    optimizer.step()
    assert optimizer.last_backend == NATIVE


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (Number(0.1, fail(ValueError("inner"))), TypeError, r"param_groups\[2\]\['lr'\] must be a number, not Number"),
        (Number(0.1, fail(TypeError("inner"))), TypeError, r"param_groups\[2\]\['lr'\] must be a number, not Number"),
        (Number(0.1, fail(OverflowError("inner"))), ValueError, r"param_groups\[2\]\['lr'\] is too large for a float"),
        (10**400, ValueError, r"param_groups\[2\]\['lr'\] is too large for a float"),
        (b"0.1", TypeError, r"param_groups\[2\]\['lr'\] must be a number, not bytes"),
        (1j, TypeError, r"param_groups\[2\]\['lr'\] must be a number, not complex"),
        (Number(math.nan), ValueError, r"param_groups\[2\]\['lr'\] is nan; it must be finite"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_what_is_no_number_is_named(value: Any, error: type[Exception], message: str, backend: str | None) -> None:
    optimizer = make("AdamW", backend=backend)
    give_gradients(params_of(optimizer))
    before = snapshot(optimizer)
    optimizer.param_groups[2]["lr"] = value
    with pytest.raises(error, match=message) as raised:
        optimizer.step()
    if isinstance(value, Number) and not math.isnan(value.value):
        assert str(raised.value.__cause__) == "inner"
    assert_same_bits(snapshot(optimizer), before)
    optimizer.param_groups[2]["lr"] = 0.1
    optimizer.step()
    assert (backend or "native") in optimizer.last_backend["cpu"]


def test_a_class_that_torch_steps_may_have_any_numbers() -> None:
    """The class's own method makes numbers of them."""

    class Scheduled(dracopt_ext.SGD):
        def _init_group(self, group: Any, *lists: Any) -> Any:
            if callable(group["lr"]):
                group["lr"] = group["lr"]()
            return super()._init_group(group, *lists)  # type: ignore[misc]

    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = Scheduled([p], lr=0.5)
    optimizer.param_groups[0]["lr"] = lambda: 0.25
    with pytest.warns(RuntimeWarning, match="overrides _init_group"):
        optimizer.step()
    assert (p == 0.75).all()


# Memory that runs out


FAILING_ALLOCATIONS = """
#include <cstdlib>
#include <new>
static thread_local int countdown = 0;
extern "C" int fail_allocation(int number) {
  const int left = countdown;
  countdown = number;
  return left;
}
void* operator new(std::size_t size) {
  if (size >= 2048 && countdown > 0 && --countdown == 0) throw std::bad_alloc();
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
"""

# Define how parameters are made.
PLAIN = """
import torch

count = 1000

def wrap(tensor):
    return tensor

def local(tensor):
    return tensor.detach()
"""
DISTRIBUTED = """
import torch
from torch.distributed import device_mesh, init_process_group
from torch.distributed.tensor import DTensor, Shard

init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mesh = device_mesh.init_device_mesh("cpu", (1,))
count = 300

def wrap(tensor):
    return DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)

def local(tensor):
    return tensor._local_tensor.detach()
"""

STARVED = """
import ctypes
import dracopt_ext

fail_allocation = ctypes.CDLL(None).fail_allocation
torch.set_num_threads(1)
for moved in (False, True):
    failed = True
    number = 0
    while failed:
        number += 1
        params = [torch.nn.Parameter(wrap(torch.zeros(1))) for _ in range(count)]
        optimizer = dracopt_ext.AdamW(params, lr=1.0, weight_decay=0.0, eps=0.0)
        optimizer.param_groups[0]["params"] = params[:10]
        for p in params[:10]:
            p.grad = wrap(torch.ones(1))
        optimizer.step()
        optimizer.param_groups[0]["params"] = params
        for p in params:
            state = optimizer.state[p] = {"step": torch.tensor(0.0)}
            state.update((key, wrap(torch.zeros(1))) for key in ("exp_avg", "exp_avg_sq"))
            if moved or p.grad is None:
                p.grad = wrap(torch.ones(1))
            local(p).zero_()
        fail_allocation(number)
        try:
            optimizer.step()
            failed = False
        except MemoryError:
            assert fail_allocation(0) == 0
            assert all(local(p).item() == 0 for p in params), (number, "half done")
            optimizer.step()
        fail_allocation(0)
        assert all(abs(local(p).item() + 1) < 1e-5 for p in params), (number, "wrong")
    print(number - 1)
"""


@pytest.mark.parametrize("kind", [PLAIN, DISTRIBUTED], ids=["plain", "distributed"])
def test_memory_runs_out_and_is_there_again(kind: str, tmp_path: Path) -> None:
    """Each larger allocation of a step fails in turn. Nothing has changed then, and the next step works.

    The plan's work grows with the number of parameters, and it allocates memory at several places.
    """
    source, library = tmp_path / "failing.cpp", tmp_path / "failing.so"
    source.write_text(FAILING_ALLOCATIONS)
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    run = in_new_process(kind + STARVED, LD_PRELOAD=f"{library}:{os.environ.get('LD_PRELOAD', '')}")
    assert run.returncode == 0, run.stderr
    assert [int(number) >= 3 for number in run.stdout.split()] == [True, True], run.stdout


def in_child(work: Callable[[], str]) -> str:
    """Returns the answer of a forked child, or the signal that ended the child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer = "raised"
        try:
            answer = work()
        except BaseException as error:
            answer = repr(error)
        finally:
            os.write(writer, answer.encode()[:1000])
            os._exit(0)
    os.close(writer)
    timer = threading.Timer(60, os.kill, (child, 9))
    timer.start()
    with os.fdopen(reader) as file:
        answer = file.read()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    return answer or f"died by signal {status & 127}"


# Processes and threads


def test_a_child_forked_during_a_step() -> None:
    """The child inherits a step that never ends in the child."""
    p = nn.Parameter(torch.zeros(5_000_000))  # long enough to let go of the GIL
    p.grad = torch.ones_like(p)
    optimizer = dracopt_ext.SGD([p], lr=1.0)
    end = threading.Event()

    def train() -> None:
        while not end.is_set():
            optimizer.step()

    def step_in_child() -> str:
        before = p[-1].item()
        optimizer.step()
        return "right" if p[-1].item() == before - 1 else "wrong"

    thread = threading.Thread(target=train)
    thread.start()
    try:
        assert [in_child(step_in_child) for _ in range(12)] == ["right"] * 12
    finally:
        end.set()
        thread.join()


def test_a_checkpoint_is_loaded_meanwhile() -> None:
    """The checkpoint takes effect before or after a step. Neither thread fails."""
    optimizer = make("AdamW", count=64)
    saved = optimizer.state_dict()
    give_gradients(params_of(optimizer))
    end = time.monotonic() + 2
    seen: list[BaseException] = []

    def load() -> None:
        try:
            while time.monotonic() < end:
                optimizer.load_state_dict(saved)
        except BaseException as error:
            seen.append(error)

    thread = threading.Thread(target=load)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        while time.monotonic() < end:
            optimizer.step()
    finally:
        thread.join()
        sys.setswitchinterval(interval)
    assert seen == []
    optimizer.step()
    assert optimizer.last_backend == NATIVE


# Hyperparameters


@left_to_torch
@every_class
def test_a_learned_learning_rate(name: str) -> None:
    """A group sees the new value of a hyperparameter that an earlier group updates, as in torch."""

    def build(module: Any, fault: float = 1.0) -> Any:
        params = [nn.Parameter(value) for value in inputs([33, 33, 33], torch.float32, 0)[0]]
        lr = nn.Parameter(torch.tensor(0.5 * fault))
        groups = [{"params": [params[0]]}, {"params": [lr]}, {"params": params[1:], "lr": lr.detach()}]
        options = {"momentum": 0.9} if name == "SGD" else {}
        maker = torchs(name) if module is torch.optim else getattr(module, name)
        optimizer: Any = maker(groups, lr=0.25, foreach=False, **options)
        for step in range(3):
            for p in params_of(optimizer):
                p.grad = torch.full_like(p, 0.125 * (step + 1))
            optimizer.step()
        return optimizer

    ours, theirs = build(dracopt_ext), build(torch.optim)
    other = "torch" if hasattr(torch.optim, name) else "reference"
    assert ours.last_backend == {"cpu": frozenset({"native", other})}
    for p, q in zip(params_of(ours)[1:], params_of(theirs)[1:], strict=True):
        assert torch.equal(p, q)
    torch.testing.assert_close(params_of(ours)[0], params_of(theirs)[0])
    assert not torch.equal(params_of(build(dracopt_ext, 1.01))[2], params_of(theirs)[2])


def test_a_hyperparameter_that_moves_into_a_parameter() -> None:
    """The search for shared memory is repeated when only a hyperparameter has moved."""
    optimizer = make("SGD")
    lr = torch.tensor(0.1)
    optimizer.param_groups[2]["lr"] = lr
    optimizer.step()
    optimizer.step()
    assert optimizer.last_backend == NATIVE
    optimizer.param_groups[2]["lr"] = params_of(optimizer)[0].detach()[3]
    with pytest.warns(RuntimeWarning, match="leaves tensors that share memory to torch's own"):
        optimizer.step()
    assert optimizer.last_backend == {"cpu": frozenset({"native", "torch"})}
    optimizer.param_groups[2]["lr"] = lr
    optimizer.step()
    assert optimizer.last_backend == NATIVE


HUGE: dict[str, tuple[str, dict[str, float], str, float]] = {
    "lr": ("AdamW", {"lr": 1e300}, "lr", 1e300),
    "lr over the bias correction": ("Adam", {"lr": 1e38}, "lr", 1e38),
    "weight decay": ("Adam", {"weight_decay": 1e300}, "weight_decay", 1e300),
    "lr times weight decay": ("AdamW", {"lr": 1e-3, "weight_decay": 1e300}, "weight_decay", 1e300),
    "eps": ("AdamW", {"eps": 1e300}, "eps", 1e300),
    "negative": ("SGD", {"lr": -1e300}, "lr", -1e300),
    "momentum": ("SGD", {"momentum": 1e39}, "momentum", 1e39),
    "dampening": ("SGD", {"dampening": 1e39}, "dampening", 1e39),
    "two at once": ("SGD", {"lr": 1e39, "weight_decay": 2e39}, "weight_decay", 2e39),
    "momentum decay": ("NAdam", {"momentum_decay": -1e5}, "momentum_decay", -1e5),
    "momentum decay beyond integers": ("NAdam", {"momentum_decay": -1e300}, "momentum_decay", -1e300),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("kind", HUGE)
def test_hyperparameters_that_the_arithmetic_does_not_hold(kind: str, backend: str | None) -> None:
    name, edit, culprit, value = HUGE[kind]
    optimizer = make(name, backend=backend)
    give_gradients(params_of(optimizer))
    before = snapshot(optimizer)
    good = {key: optimizer.param_groups[2][key] for key in edit}
    optimizer.param_groups[2].update(edit)
    message = f"param_groups[2][{culprit!r}] is {value!r}: it makes the update infinite in fp32"
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)
    optimizer.param_groups[2].update(good)
    optimizer.step()
    assert (backend or "native") in optimizer.last_backend["cpu"]


HARMLESS: dict[str, tuple[str, dict[str, float]]] = {
    "momentum decay": ("NAdam", {"momentum_decay": 1e300}),
    "weight decay with a tiny lr": ("AdamW", {"weight_decay": 1e39, "lr": 1e-40}),
    "dampening without momentum": ("SGD", {"dampening": 1e39, "momentum": 0.0}),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("kind", HARMLESS)
def test_large_hyperparameters_that_are_harmless(kind: str, backend: str | None) -> None:
    """torch accepts these numbers, too."""
    name, edit = HARMLESS[kind]
    ours, theirs = make(name, backend=backend), make(name, module=torch.optim)
    for optimizer in (ours, theirs):
        give_gradients(params_of(optimizer))
        optimizer.param_groups[2].update(edit)
        optimizer.step()
    assert_like_torchs(ours, theirs)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_product_of_momenta_that_is_rounded_to_one(backend: str | None) -> None:
    optimizer = make("NAdam", backend=backend)
    give_gradients(params_of(optimizer))
    optimizer.param_groups[1].update(betas=(1 - 1e-9, 0.999), momentum_decay=1e3)
    for p in optimizer.param_groups[1]["params"]:
        optimizer.state[p]["mu_product"].fill_(1.0)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="it makes the update infinite in fp32"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


def test_fp64_holds_what_fp32_does_not() -> None:
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    optimizer = dracopt_ext.SGD([p], lr=1e300)
    optimizer.step()
    assert (p == -1e300).all()


def test_a_state_that_makes_the_update_infinite() -> None:
    optimizer = make("NAdam")
    give_gradients(params_of(optimizer))
    optimizer.state[params_of(optimizer)[3]]["mu_product"].fill_(math.nan)
    before = snapshot(optimizer)
    message = r"the state of parameter 1 of group 1 \(shape \[33\]\) has wrong scalars: it makes the update infinite"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_negative_momentum_decay_is_torchs(backend: str | None) -> None:
    """torch accepts a negative decay as long as 0.96 to its power is a number."""
    ours = make("NAdam", backend=backend)
    theirs = torch.optim.NAdam([{"params": [p.detach().clone()]} for p in params_of(ours)], lr=0.1)
    theirs.load_state_dict({**theirs.state_dict(), "state": deepcopy(ours.state_dict()["state"])})
    wrong = make("NAdam", backend=backend)
    for optimizer, decay in ((ours, -0.5), (theirs, -0.5), (wrong, -0.505)):
        give_gradients(params_of(optimizer))
        for group in optimizer.param_groups:
            group["momentum_decay"] = decay
        for _ in range(3):
            optimizer.step()
    for p, q, r in zip(params_of(ours), params_of(theirs), params_of(wrong), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-6)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(r.detach(), q.detach(), rtol=1e-6, atol=1e-6)


# Addresses


def at_odd_address(values: Tensor) -> Tensor:
    memory = bytearray(values.numel() * values.itemsize + 64)
    tensor = torch.frombuffer(memory, dtype=values.dtype, offset=1, count=values.numel()).view(values.shape)
    if tensor.data_ptr() % values.itemsize == 0:
        tensor = torch.frombuffer(memory, dtype=values.dtype, offset=2, count=values.numel()).view(values.shape)
    assert tensor.data_ptr() % values.itemsize != 0
    return tensor.copy_(values)


@left_to_torch
@pytest.mark.parametrize("what", ["parameter", "gradient", "moment", "step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_odd_addresses(what: str, dtype: torch.dtype) -> None:
    """torch steps tensors that some processors cannot access."""

    def run(module: Any, odd: bool, lr: float = 0.1) -> Any:
        p = nn.Parameter(torch.ones(40, dtype=dtype))
        optimizer = module.AdamW([p, nn.Parameter(torch.ones(40))], lr=lr)
        for step in range(3):
            give_gradients(params_of(optimizer))
            if odd and step == 1:
                state = optimizer.state[p]
                if what == "parameter":
                    p.data = at_odd_address(p.detach())
                elif what == "gradient":
                    p.grad = at_odd_address(p.grad)
                elif what == "moment":
                    state["exp_avg"] = at_odd_address(state["exp_avg"])
                else:
                    state["step"] = at_odd_address(state["step"].view(1)).view(())
            optimizer.step()
            if odd and step == 1:
                assert optimizer.last_backend == {"cpu": frozenset({"native", "torch"})}
        return p.detach()

    theirs = run(torch.optim, odd=False)
    torch.testing.assert_close(run(dracopt_ext, odd=True), theirs)
    if dtype != torch.bfloat16:  # bf16 does not show 1%
        with pytest.raises(AssertionError, match="not close"):
            torch.testing.assert_close(run(dracopt_ext, odd=True, lr=0.101), theirs)


def test_a_hyperparameter_at_an_odd_address() -> None:
    ours, theirs = make("AdamW"), make("AdamW", module=torch.optim)
    for optimizer, lr in ((ours, at_odd_address(torch.tensor([0.25]))), (theirs, 0.25)):
        optimizer.param_groups[1]["lr"] = lr
        give_gradients(params_of(optimizer))
        optimizer.step()
    assert ours.last_backend == NATIVE
    assert_like_torchs(ours, theirs)


def test_an_empty_tensor_far_behind_its_storage() -> None:
    p = nn.Parameter(torch.empty(0))
    p.data = torch.empty(0).set_(torch.UntypedStorage(0), 2**60, (0,), (1,))  # type: ignore[call-overload]
    p.grad = torch.empty(0)
    optimizer = dracopt_ext.AdamW([p])
    optimizer.step()
    optimizer.step()
    assert optimizer.last_backend == NATIVE


# All at once


def test_stress() -> None:
    """Threads step their own optimizers and a shared one. The numbers in an optimizer edit it."""
    end = time.monotonic() + float(os.environ.get("STRESS_SECONDS", "2"))
    shared = make("AdamW", count=8)
    unexpected: list[BaseException] = []
    steps: list[int] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        count = 0
        try:
            while time.monotonic() < end:
                name = chance.choice(CLASSES)
                own = make(name)
                give_gradients(params_of(own))
                for optimizer in (own, shared):
                    kind = chance.choice([kind for kind in EDITS if kind != "adds many groups"])
                    groups = [group for group in list(optimizer.param_groups) if "lr" in group]
                    if groups:
                        number = Number(0.1, lambda o=optimizer, k=kind: EDITS[k](o))
                        chance.choice(groups)["lr"] = number
                    with suppress(TypeError, KeyError, RuntimeError, IndexError, ValueError):
                        optimizer.step()
                    count += 1
                if seed == 0:
                    fresh = make("AdamW", count=8)
                    shared.param_groups[:] = fresh.param_groups
                    shared.state.clear()
                    shared.state.update(fresh.state)
                after_edit(own, name)
        except BaseException as error:
            unexpected.append(error)
        steps.append(count)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert unexpected == []
    assert min(steps) > 0
    shared.param_groups.clear()
    shared.param_groups.extend(make("AdamW").param_groups)
    after_edit(shared, "AdamW")


# The build


def test_an_instruction_set_in_any_bytes() -> None:
    program = "import dracopt_ext; print(dracopt_ext.backends()['native:cpu'])"
    run = in_new_process(program, DRACOPT_ISA=b"\xff")
    assert run.returncode == 0, run.stderr
    assert rb"DRACOPT_ISA=\xff is not among what this machine runs" in run.stdout


def test_kernels_are_those_of_the_binding(tmp_path: Path) -> None:
    """LD_LIBRARY_PATH leads to another library of the same name."""
    decoy = tmp_path / "libdracopt_kernels.so"
    command = [os.environ.get("CXX", "c++"), "-shared", f"-Wl,-soname,{decoy.name}", "-x", "c", os.devnull]
    subprocess.run([*command, "-o", str(decoy)], check=True)
    program = "import dracopt_ext; assert dracopt_ext.backends()['native:cpu'] is None, dracopt_ext.backends()"
    run = in_new_process(program, LD_LIBRARY_PATH=str(tmp_path))
    assert run.returncode == 0, run.stderr


def test_kernels_of_another_build_are_refused(tmp_path: Path) -> None:
    """The interface's number tells builds apart. The test changes the number in the machine code."""
    native = Path(dracopt_ext.__file__).parent / "native"
    for path in native.rglob("*.so"):
        copy = tmp_path / path.relative_to(native)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    interface = ctypes.CDLL(str(native / "libdracopt_kernels.so"))["_ZN7dracopt3cpu9interfaceEv"]
    interface.restype = ctypes.c_uint64
    number = interface().to_bytes(8, "little")
    library = tmp_path / "libdracopt_kernels.so"
    assert library.read_bytes().count(number) == 1
    library.write_bytes(library.read_bytes().replace(number, bytes(8)))
    paths = [str(path) for path in tmp_path.glob("*/_C*.so")]
    assert paths
    for path in paths:
        program = f"""
import importlib.util, torch
spec = importlib.util.spec_from_file_location("dracopt_ext._C", {path!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""
        run = in_new_process(program)
        assert b"ImportError: libdracopt_kernels.so is of another build than its binding" in run.stderr
