"""Tests steps that Python plans for the compiled kernels, without a binding to torch. test_triton.py tests Triton's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dracopt_ext
from dracopt_ext import backend as backend_module
from dracopt_ext.portable import compiled, packed
from dracopt_ext.portable.rules import RULES
from dracopt_ext.reference import MOMENTS, STATE_SCALARS, hyperparameters

from . import cases
from .cases import FAULTS, Case, NoOp, assert_same_bits, inputs, train

HERE = Path(__file__).parent
SIZES = [0, 1, 15, 4099, 70_001]

KERNELS_ALONE = "bites or instruction_sets or threads or two_to_the_31 or test_reference"
"""Tests of what the kernels do, whoever plans the step; and the proofs that other tests can fail."""


@pytest.fixture
def library() -> compiled.Library:
    return compiled.load(backend_module.NATIVE)


@pytest.fixture
def without_binding(library: compiled.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a torch that the installed bindings do not know."""
    monkeypatch.setattr(backend_module, "_C", None)
    monkeypatch.setattr(backend_module, "_LIBRARY", library)
    monkeypatch.setattr(backend_module, "_REASON", "compiled for torch 2.12.0, not for the installed 2.99.0")


def test_rules_have_the_references_names() -> None:
    for name, rule in RULES.items():
        assert rule.group_keys == hyperparameters(name)
        assert set(rule.state_scalar_keys) <= set(STATE_SCALARS)
        assert set(rule.state_keys) <= set(MOMENTS)


@pytest.mark.parametrize("name", ["ROW_WORDS", "HEADER_WORDS", "MAXIMIZE", "STATE_SCALAR_FP32", "FIRST"])
def test_a_library_with_other_constants(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, name, getattr(packed, name) + 1)
    with pytest.raises(OSError, match=r"is of another build: (row|header|recipe)_[a-z]+ differ"):
        compiled.load(backend_module.NATIVE)


def test_a_library_with_other_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "adam", RULES["adam"]._replace(state_keys=("exp_avg_sq", "exp_avg", "max_exp_avg_sq")))
    with pytest.raises(OSError, match="is of another build: adam differ"):
        compiled.load(backend_module.NATIVE)


@pytest.mark.binding
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_bits(case: Case, dtype: torch.dtype, threads: int, request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(threads)
    given = inputs(SIZES, dtype, 3)
    expected = train(case.ours, {**case.options, "backend": "native"}, *given)
    request.getfixturevalue("without_binding")
    assert_same_bits(train(case.ours, {**case.options, "backend": "native"}, *given), expected)


@pytest.mark.binding
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", cases.RULES, ids=str)
def test_bits_bites(case: Case, fault: type[NoOp], request: pytest.FixtureRequest) -> None:
    given = inputs(SIZES, torch.float32, 3)
    options = {**case.options, "backend": "native"}
    expected = train(case.ours, options, *given)
    request.getfixturevalue("without_binding")
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(train(fault(case.ours), options, *given), expected)


@pytest.mark.long
@pytest.mark.binding
def test_what_holds_for_the_native_backend() -> None:
    """The native backend's tests pass in a process in which these kernels replace it."""
    names = ("bits", "dtypes", "layouts", "refusals", "life", "known_defects", "fallback", "checkpoints", "dropin")
    names += ("other_peoples_code", "hostile_programs", "plan")
    files = [HERE / f"test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.as_native"]
    run = subprocess.run(
        [*command, *files, "-m", "not binding", "-k", f"not ({KERNELS_ALONE})"],
        cwd=HERE.parent,
        env={**os.environ, "AS_NATIVE": "compiled"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.usefixtures("without_binding")
def test_without_what_torch_may_take_away(library: compiled.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps need neither torch's threads nor its guards, which only spare the next step most of its work."""
    case = cases.RULES[0]
    given = inputs(SIZES, torch.float32, 3)
    expected = train(case.ours, case.options, *given)
    monkeypatch.setattr("torch._C._dynamo.guards.TensorGuards", lambda *tensors: None)  # refuses our arguments
    monkeypatch.setattr(backend_module, "_LIBRARY", library._replace(parallel_for=None))
    assert_same_bits(train(case.ours, case.options, *given), expected)
    load, none = compiled.ctypes.CDLL, compiled.ctypes.CDLL(None)
    monkeypatch.setattr(compiled.ctypes, "CDLL", lambda name: none if "torch/" in name else load(name))
    assert compiled.load(backend_module.NATIVE).parallel_for is None


@pytest.mark.usefixtures("without_binding")
def test_memory_that_shrinks_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a storage that is freed and gets less memory at the same address."""
    p = torch.nn.Parameter(torch.ones(10))
    p.grad = torch.ones(10)
    optimizer = dracopt_ext.AdamW([p])
    optimizer.step()
    storage_of = torch.Tensor.untyped_storage
    for shrunk in (p, p.grad, optimizer.state[p]["exp_avg"], optimizer.state[p]["step"]):
        optimizer.step()
        before = p.detach().clone()
        smaller = torch.empty(storage_of(shrunk).nbytes() - 1, dtype=torch.uint8)
        instead = {id(shrunk): smaller}
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "untyped_storage", lambda t, instead=instead: storage_of(instead.get(id(t), t)))
            with pytest.raises(ValueError, match=f"of {smaller.numel()} bytes: it was freed or resized"):
                optimizer.step()
        assert torch.equal(p, before)


@pytest.mark.usefixtures("without_binding")
def test_memory_shared_after_a_step_that_failed() -> None:
    """The facts that a failed step found do not describe the tensors of the step before."""
    a, b = (torch.nn.Parameter(torch.ones(11)[:10]) for _ in range(2))
    a.grad = torch.ones(11)[1:]
    optimizer = dracopt_ext.AdamW([a, b], backend="native")
    for _ in range(3):
        optimizer.step()
    a.grad, b.grad = None, torch.ones(10).to_sparse()
    with pytest.raises(RuntimeError, match="does not serve sparse tensors"):
        optimizer.step()
    b.grad = None
    a.grad = torch.empty(0).set_(a.detach().untyped_storage(), 1, (10,))
    with pytest.raises(RuntimeError, match="tensors that share memory"):
        optimizer.step()


@pytest.mark.usefixtures("without_binding")
def test_what_is_said() -> None:
    notice = str(backend_module.notice())
    assert notice.startswith(
        "dracopt_ext has no binding to this torch: compiled for torch 2.12.0, not for the installed 2.99.0. Its kernels"
    )
    assert backend_module.BUILD_FROM_SOURCE in notice
    found = backend_module.backends()
    assert found["native:cpu"] is None
    assert found["native:cuda"] == "compiled for torch 2.12.0, not for the installed 2.99.0"


def test_a_call_that_fails_is_reported(library: compiled.Library) -> None:
    rule = RULES["sgd"]._replace(name="none")
    launch = compiled.CompiledBackend(library).launch_type(rule, torch.device("cpu"), ("fp32",) * 5)
    with pytest.raises(RuntimeError, match="the compiled kernels failed: no compiled rule has this name"):
        launch.launch([], [], 1.0, None, None)


def test_an_instruction_set_that_is_not_there() -> None:
    program = (
        "from dracopt_ext import backend; from dracopt_ext.portable import compiled; compiled.load(backend.NATIVE)"
    )
    env = {**os.environ, "DRACOPT_ISA": "avx1024"}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert "OSError: DRACOPT_ISA=avx1024 is not among what this machine runs: " in run.stderr
