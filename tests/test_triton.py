"""Tests of the Triton backend beside test_gpu.py: its compiled code, its compilations, and when it serves."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dracopt_ext
from dracopt_ext import backend as backend_module

from . import interpreted
from .cases import FAULTS, RULE_CASES, Case, NoOp, assert_same_bits, inputs, snapshot, train
from .triton_compiler import variants

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
launcher = pytest.importorskip("dracopt_ext.triton_kernels.launcher")
arithmetic = pytest.importorskip("dracopt_ext.triton_kernels.arithmetic")

ROOT = Path(__file__).parents[1]
BYTES = {"fp32": 4, "fp64": 8, "bf16": 2, "fp16": 2}

interpreting = pytest.mark.skipif(not backend_module.INTERPRETING, reason="Triton's kernels are compiled here")
every_rule = pytest.mark.parametrize("case", RULE_CASES, ids=str)


def without_interpreter() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


# ---- results


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted.set_up(monkeypatch)


@triton.jit
def fast(xs, ds, quotients, quotients_by, roots_over, BLOCK: tl.constexpr):
    """Writes the results of the fast arithmetic for pairs of a numerator and a divisor."""
    at = tl.arange(0, BLOCK)
    x, d = tl.load(xs + at), tl.load(ds + at)
    tl.store(quotients + at, arithmetic.quotient(x, d, True))
    tl.store(quotients_by + at, arithmetic.quotient_by(x, arithmetic.divisor_of(d), True))
    tl.store(roots_over + at, arithmetic.root_over(x, arithmetic.divisor_of(d), True))


@interpreting
@pytest.mark.usefixtures("interpreter")
def test_fast_arithmetic() -> None:
    """Fast arithmetic gives the bits of IEEE's operations or, rarely where numbers are ordinary, NaN.

    The host makes the estimates here. test_core.py tests the same sequences in C++, with many more numbers.
    """
    generator = torch.Generator().manual_seed(0)
    special = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 2.0**-100, 2.0**-80, 1.0, -1.0, 2.0**40, 3e38, torch.inf, torch.nan]
    pairs = torch.cartesian_prod(torch.tensor(special), torch.tensor(special))
    any_size = torch.randint(-(2**31), 2**31, (2**15, 2), generator=generator).to(torch.int32).view(torch.float32)
    exponents = torch.linspace(-110, -70, 2**15)  # numerators and radicands near the proof's limits
    tiny = torch.rand(2**15, 2, generator=generator) + 0.1
    tiny[:, 0] *= 2**exponents
    begin = len(pairs) + len(any_size) + len(tiny)
    size = triton.next_power_of_2(begin)
    ordinary = torch.randn(size - begin, 2, generator=generator).abs() + 1e-3
    x, d = torch.cat([pairs, any_size, tiny, ordinary]).T.contiguous()
    found = [torch.empty_like(x) for _ in range(3)]
    fast[(1,)](x, d, *found, BLOCK=size)
    with np.errstate(all="ignore"):
        quotients, roots_over = x.numpy() / d.numpy(), np.sqrt(x.numpy()) / d.numpy()
    for result, exact in zip(found, (quotients, quotients, roots_over), strict=True):
        expected = torch.from_numpy(exact)
        proved = ~result.isnan()
        assert torch.equal(result[proved].view(torch.int32), expected[proved].view(torch.int32))
        assert proved[begin:].all()
        assert 0.1 < proved[begin - len(tiny) : begin].float().mean() < 0.9


@interpreting
@pytest.mark.usefixtures("interpreter")
@every_rule
@pytest.mark.parametrize("fault", FAULTS)
def test_on_the_cpu_in_the_interpreter(case: Case, fault: type[NoOp]) -> None:
    """The interpreter serves tensors on the CPU if Triton is asked for, so that users can debug a kernel."""
    given = inputs([1, 100], torch.float32, 3)
    options = {**case.options, "backend": "triton"}
    expected = train(case.ours, {**case.options, "backend": "native"}, *given)
    assert_same_bits(train(case.ours, options, *given), expected)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(train(fault(case.ours), options, *given), expected)


@pytest.mark.long
@interpreting
def test_what_holds_for_the_native_backend() -> None:
    """Tests of refusals and of users' changes between steps pass in a process where Triton replaces that backend."""
    files = [f"tests/test_{name}.py" for name in ("refusals", "life", "known_defects", "fallback")]
    others = "not (forked or threads or compiled_training)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.by_triton"]
    run = subprocess.run([*command, *files, "-k", others], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


# ---- compiled code


@pytest.mark.long
def test_compiled_for_gpus_that_are_not_here() -> None:
    """Each variant spills nothing, rounds only as IEEE 754 does, and accesses memory in vectors."""
    complete = os.environ.get("TRITON_VARIANTS") == "all"
    run = subprocess.run(
        [sys.executable, "-m", "tests.triton_compiler", *(["--all"] if complete else [])],
        cwd=ROOT,
        env=without_interpreter(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == len(variants(complete))
    sources = "".join((ROOT / "csrc" / name).read_text() for name in ("core/math.h", "rules/nadam.h"))
    numbers = {float.fromhex(text) for text in re.findall(r"-?0x1\.[0-9a-f]+p[+-]?\d+", sources)}
    assert len(numbers) == 6
    for variant in found:
        assert variant["stack"] == 0, variant
        assert variant["inexact"] == [], variant
        if variant["rule"] == "nadam":  # no constant was rounded to fp32
            assert numbers <= set(variant["constants"]), variant
        elements = 4 if "fp64" in variant["dtypes"] else 8  # per thread
        streams = [*variant["dtypes"], *{"fp32": ["fp32"], "split16": ["bf16"], None: []}[variant["master"]]]
        # All streams are accessed equally often, the widest by 16 bytes.
        widest = max(BYTES[dtype] for dtype in streams)
        vectors = [elements * widest // 16 * (BYTES[dtype] == widest) for dtype in streams]
        loads, stores = sum(vectors), sum(vectors) - vectors[1]
        if variant["target"].startswith("sm_"):
            assert variant["loads_before_arithmetic"] == loads, variant
            ways = 2 if variant["fast"] else 1  # the loop tries the fast arithmetic before the plain one
            assert variant["vector_loads"] == ways * loads, variant
            ways_that_store = 1 if variant["at_random"] else ways  # the compiler lets both ways share much code
            assert ways_that_store * stores <= variant["vector_stores"] <= ways * stores, variant
            if widest == 4:
                vectors = [elements * widest // 16 * (BYTES[dtype] == 2) for dtype in streams]
                loads, stores = sum(vectors), sum(vectors) - vectors[1]
                assert variant["half_vector_loads"] == ways * loads, variant
                assert ways_that_store * stores <= variant["half_vector_stores"] <= ways * stores, variant
            # Threads exchange only whether all are done, by one or two stores, and at the end which one is last.
            assert variant["exchanges"] <= 2 * ways - 1, variant
            estimates = {"rcp.approx.ftz.f32": elements, "rsqrt.approx.ftz.f32": elements}
            assert variant["estimates"] == (estimates if variant["fast"] else {}), variant
        else:  # AMD's compiler unrolls loops
            assert variant["vector_loads"] >= loads, variant
            assert variant["vector_stores"] >= stores, variant
        if "fp64" not in variant["dtypes"]:
            divides = launcher.RULES[variant["rule"]].divides
            assert variant["fast"] == (divides and variant["target"] != "gfx942"), variant
            is_usual = variant["dtypes"][0] == variant["dtypes"][1] and len(variant["dtypes"]) < 5
            if is_usual and variant["target"] != "gfx942" and not (variant["master"] or variant["at_random"]):
                assert variant["registers"] <= 102, variant


def test_compiled_once(tmp_path: Path) -> None:
    """Other dtypes and more states need a compilation. Other numbers, sizes and counts of tensors do not."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.count_compilations"],
        cwd=ROOT,
        env={**without_interpreter(), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "1 compilations for 2 launches",
        "1 compilations for 30 launches",
        "2 compilations for 32 launches",
        "3 compilations for 34 launches",
    ]


# ---- launches


def parameters(count: int) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.ones(3, 4)) for _ in range(count)]
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    return params


@interpreting
@pytest.mark.usefixtures("interpreter")
@every_rule
def test_inference_mode(case: Case) -> None:
    """States and parameters are created in inference mode; a step outside it follows."""
    results = []
    for backend in ("triton", "native"):
        p = parameters(1)[0]
        optimizer = case.ours([p], **case.options, backend=backend)
        with torch.inference_mode():
            optimizer.step()
            made_there = nn.Parameter(torch.ones(3), requires_grad=False)
            made_there.grad = torch.ones(3)
            of_inference = case.ours([made_there], **case.options, backend=backend)
            of_inference.step()
        optimizer.step()
        results.append({**snapshot(optimizer), **{f"i{k}": v for k, v in snapshot(of_inference).items()}})
    assert_same_bits(*results)


@interpreting
@pytest.mark.usefixtures("interpreter")
def test_default_device() -> None:
    p = parameters(1)[0]
    optimizer = dracopt_ext.AdamW([p], backend="triton")
    with torch.device("meta"):
        optimizer.step()
    assert not torch.equal(p, torch.ones(3, 4))


@interpreting
@pytest.mark.usefixtures("interpreter")
def test_one_step_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = dracopt_ext.AdamW(parameters(1), backend="triton")
    launch = launcher.Launcher.update
    refused = []

    def step_and_launch(*arguments: Any) -> None:
        with pytest.raises(RuntimeError, match="already running, in another thread") as caught:
            optimizer.step()
        refused.append(caught)
        launch(*arguments)

    monkeypatch.setattr(launcher.Launcher, "update", step_and_launch)
    optimizer.step()
    assert refused


@interpreting
@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore:.*non-leaf Tensor:UserWarning")
def test_what_other_code_may_do_during_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may run while Python launches. It takes away everything that the step has found."""
    launch = launcher.Launcher.update
    for case in RULE_CASES:
        initial, (first, second) = inputs([1000] * 5, torch.float32, 2)
        expected = train(case.ours, {**case.options, "backend": "native"}, initial, [first, second])
        params = [nn.Parameter(value.clone()) for value in initial]
        optimizer = case.ours(params, **case.options, backend="triton")
        for p, grad in zip(params, first, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        for p, grad in zip(params, second, strict=True):
            p.grad = grad.clone()
        taken: list[Any] = []

        def take_away_and_launch(*arguments: Any, optimizer: Any = optimizer, taken: list[Any] = taken) -> None:
            views = [p.data.view(-1) for p in optimizer.param_groups[0]["params"]]
            taken.extend(weakref.ref(value) for state in optimizer.state.values() for value in state.values())
            taken.extend(views)  # keep the parameters' memory, which holds the result
            optimizer.state.clear()
            for p in optimizer.param_groups[0]["params"]:
                p.grad = None
                p.data = torch.zeros(1)
            optimizer.param_groups[0]["params"].clear()
            assert all(kept() is not None for kept in taken if isinstance(kept, weakref.ref))
            others = [torch.zeros(1000) for _ in range(100)]
            launch(*arguments)
            assert not any(other.any() for other in others)

        with monkeypatch.context() as patch:
            patch.setattr(launcher.Launcher, "update", take_away_and_launch)
            del p
            params.clear()
            optimizer.step()
        results = [value for value in taken if isinstance(value, torch.Tensor)]
        assert len(results) == 5
        for i, result in enumerate(results):
            assert torch.equal(result, expected[f"0.{i}"].view(-1))
        gc.collect()
        assert all(kept() is None for kept in taken if not isinstance(kept, torch.Tensor))


@interpreting
@pytest.mark.usefixtures("interpreter")
@every_rule
def test_failure_changes_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(2)
    optimizer = case.ours(params, **case.options, backend="triton")
    optimizer.step()
    before = snapshot(optimizer)

    class Failing:
        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("out of resources")

    with monkeypatch.context() as patch:
        patch.setattr(launcher, "step_kernel", Failing())
        with pytest.raises(RuntimeError, match="out of resources"):
            optimizer.step()
        fresh = case.ours(params, **case.options, backend="triton")
        with pytest.raises(RuntimeError, match="out of resources"):
            fresh.step()
        assert not any(fresh.state.values())
    assert_same_bits(snapshot(optimizer), before)
    optimizer.step()


# ---- availability


def test_no_tensors_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton serves tensors on the CPU only in its interpreter."""
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    monkeypatch.setattr(backend_module, "why_no_triton", lambda: None)
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = dracopt_ext.AdamW([p], backend="triton")
    with pytest.raises(
        RuntimeError,
        match=r"backend='triton' does not serve tensors on the CPU: parameter 0 of group 0 \(shape \[3\]\). Leave "
        r"`backend` at None",
    ):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state


@pytest.fixture
def _reasons_anew() -> Any:
    cached = (backend_module.why_no_triton, backend_module.why_no_triton_on, backend_module._triton_is_needed)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.usefixtures("_reasons_anew")
def test_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason() -> str | None:
        backend_module.why_no_triton.cache_clear()
        return dracopt_ext.backends()["triton"]

    monkeypatch.setattr(backend_module, "INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason() == "torch finds no GPU"
    with pytest.raises(RuntimeError, match="backend='triton' is not available: torch finds no GPU"):
        dracopt_ext.SGD([nn.Parameter(torch.ones(1))], backend="triton")
    assert not backend_module.triton_serves_gpus()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert reason() == "Triton does not compile for Old: its compute capability is below 8.0"
    backend_module.why_no_triton_on.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7 + 2 * device, 0))
    assert reason() is None
    backend_module._triton_is_needed.cache_clear()
    assert not backend_module.triton_serves_gpus()  # while nothing is on a GPU
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert backend_module.triton_serves_gpus()  # this build of torch has no CUDA, so there are no CUDA kernels

    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert reason() == "triton 3.5.1 is older than 3.6"
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert reason() == "triton 3.6.0 is older than 3.7"
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert (reason() or "").startswith("triton does not load: ")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "triton" else name)
    assert reason() == "triton is not installed: pip install 'triton>=3.6'"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert reason() == "not installed: run `pip install .` in the source tree"
