"""The GPU backends give the bits of the CPU in one launch. Tests run on a simulated GPU (see ``simulated_gpu``), and
with ``pytest -m gpu`` on a real one."""

from __future__ import annotations

import copy
import ctypes
import functools
import itertools
import math
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

import dracopt_ext
from dracopt_ext import backend as backend_module
from dracopt_ext import devices
from dracopt_ext.reference import MOMENTS, STATE_SCALARS

from . import interpreted, simulated_gpu
from .cases import (
    CASES,
    DTYPES,
    FAULTS,
    RULE_CASES,
    SIZES,
    Case,
    NoOp,
    Snapshot,
    assert_same_bits,
    classes,
    inputs,
    rule_of,
    snapshot,
    train,
)
from .test_dtypes import FORMS, PAIRWISE, Form, name_of, stored
from .test_layouts import LAYOUTS, Buffers, given
from .test_properties import Trained, programs

TILE = 4096
ARGUMENT_WORDS = (32764 - 120) // 8
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Gpu:
    """A GPU to test on, and the kernels to test there."""

    simulation: Any = None  # a SimulatedGpu if the GPU is no real one
    type = "cuda"
    sizes: Sequence[int] = (*SIZES, TILE, 3 * TILE + 5)
    few_sizes = sizes
    misaligned_sizes: Sequence[int] = (1, 2, 5, 8, 9, 17, TILE - 1, TILE, TILE + 1, TILE + 7, 2 * TILE + 9)

    def __init__(self, backend: str = "native") -> None:
        self.backend = backend

    @property
    def devices(self) -> int:
        return torch.cuda.device_count()

    def __call__(self, tensor: Tensor, index: int = 0) -> Tensor:
        return tensor.to(torch.device(self.type, index), copy=True)

    def train(self, make: Any, options: dict[str, Any], *given: Any, **more: Any) -> Snapshot:
        found = train(make, options, *given, **{"place": self, **more})
        return {name: value.cpu() for name, value in found.items()}

    def only_here(self, optimizer: Any) -> bool:
        """Says whether only this GPU worked in the last step."""
        return bool(optimizer.last_backend == {self.type: frozenset({self.backend})})

    def launches(self, optimizer: Any) -> int:
        """The number of launches in the last step."""
        plan = optimizer._dracopt_context.plan_ran
        return 0 if plan is None else int(plan.launches)


def needs_a_gpu(backend: str = "native") -> None:
    reason = dracopt_ext.backends()["native:cuda" if backend == "native" else backend]
    if not torch.cuda.is_available():
        reason = reason or "torch finds no GPU"
    if reason is not None:
        pytest.skip(reason)


class Simulated(Gpu):
    type = simulated_gpu.DEVICE
    devices = 2

    def __init__(self, simulation: simulated_gpu.SimulatedGpu) -> None:
        super().__init__()
        self.simulation = simulation

    def tables(self) -> int:
        """The number of tables that were written to the device."""
        return self.simulation.read("tables")

    def memory(self) -> list[int]:
        """The addresses at which the last launch found its table and, with Triton, its arguments."""
        return [self.simulation.table()]


class Interpreted(Simulated):
    """A simulated GPU whose kernels run in Triton's interpreter, in the host's memory and slowly."""

    sizes = (0, 1, 17, 1000, TILE + 3)
    few_sizes = (1, 17, 1000)
    misaligned_sizes = (1, 9, 17, 1000)

    def __init__(self, simulation: simulated_gpu.SimulatedGpu) -> None:
        super().__init__(simulation)
        self.backend = "triton"
        self._tables = 0
        self._memory = [0, 0]

    def record(self, rows: int, arguments: int) -> None:
        """Notes the addresses of a launch. A table is allocated while the one before still exists."""
        self._tables += rows != self._memory[0]
        self._memory = [rows, arguments]

    def tables(self) -> int:
        return self._tables

    def memory(self) -> list[int]:
        return self._memory


load_simulation = functools.cache(simulated_gpu.load)


ON_GPUS = [pytest.param(backend, marks=pytest.mark.gpu) for backend in ("cuda", "triton")]
# Measuring coverage makes the interpreter three times slower, so the largest tests go without.
INTERPRETED = pytest.param("interpreted", marks=pytest.mark.untraced)
GPUS = [pytest.param("simulated"), INTERPRETED, *ON_GPUS]
large = pytest.mark.parametrize("gpu", GPUS, indirect=True)


def on_every_gpu(names: str, values: list[Any], interpreted: list[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by the GPU and by tuples of values. The interpreter is slow and takes tuples of its own."""
    pairs = [(gpu, value) for gpu in GPUS for value in (interpreted if gpu is INTERPRETED else values)]
    params = [pytest.param(*gpu.values, *value, marks=gpu.marks, id=f"{gpu.values[0]}-{value}") for gpu, value in pairs]
    return pytest.mark.parametrize(f"gpu, {names}", params, indirect=["gpu"])


def on_a_real_gpu(kernels: str, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    backend = "native" if kernels == "cuda" else "triton"
    needs_a_gpu(backend)
    if backend == "triton":
        serve_gpus_by_triton(monkeypatch)
    return Gpu(backend)


def serve_gpus_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Triton take the place of the CUDA kernels."""
    module = backend_module._C
    assert module is not None

    def make(*names: str, cpu: bool, cuda: bool, triton: Any, masters: str | None) -> Any:
        return module.StepPlan(*names, cpu=cpu, cuda=cuda and triton is None, triton=triton, masters=masters)

    monkeypatch.setattr(backend_module, "_C", SimpleNamespace(**{**vars(module), "StepPlan": make}))
    monkeypatch.setattr(backend_module, "triton_serves_gpus", lambda: True)


@pytest.fixture(params=ON_GPUS)
def real_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A real GPU, for tests that no simulation can replace."""
    return on_a_real_gpu(request.param, monkeypatch)


@pytest.fixture(params=["simulated", "interpreted", *ON_GPUS])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    backend = "native" if request.param in ("simulated", "cuda") else "triton"
    if request.param in ("cuda", "triton"):
        yield on_a_real_gpu(request.param, monkeypatch)
        return
    if torch.version.cuda is not None or torch.cuda.is_available():
        pytest.skip("torch takes one accelerator only, and this one has another")
    simulation = load_simulation()
    monkeypatch.setattr(devices, "GPU", simulated_gpu.DEVICE)
    monkeypatch.setattr(backend_module, "_C", simulation.module)
    if backend == "triton":
        launcher = pytest.importorskip("dracopt_ext.triton_kernels.launcher")
        interpreted.set_up(monkeypatch)
        serve_gpus_by_triton(monkeypatch)
        monkeypatch.setattr(backend_module, "_capture_query", lambda: lambda: simulation.read("capturing") == 1)
        there, launch = Interpreted(simulation), launcher.Launcher.update

        def launch_and_record(self: Any, programs: int, *addresses: Any) -> None:
            there.record(addresses[0], addresses[3])
            launch(self, programs, *addresses)

        monkeypatch.setattr(launcher.Launcher, "update", launch_and_record)
        yield there
    else:
        yield Simulated(simulation)
    for name in ("stream", "capturing", "unavailable"):
        simulation.set(name, 0)
    simulation.fail_in("")


@pytest.fixture
def simulation(gpu: Gpu) -> simulated_gpu.SimulatedGpu:
    """A simulation, for tests that a real GPU cannot run."""
    if gpu.simulation is None:
        pytest.skip("of the simulation")
    return gpu.simulation


@pytest.fixture
def simulated(gpu: Gpu) -> simulated_gpu.SimulatedGpu:
    """The simulation of the CUDA kernels, for tests that only this simulation can run."""
    if gpu.simulation is None or gpu.backend != "native":
        pytest.skip("of the simulation")
    return gpu.simulation


COMMON = [(FP32, FP32, FP32), (BF16, BF16, FP32), (BF16, BF16, BF16), (FP16, FP16, FP32), (FP16, FP16, FP16)]
"""The usual dtypes of models, for which the kernels have loops of their own."""

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_rule = pytest.mark.parametrize("case", RULE_CASES, ids=str)
every_fault = pytest.mark.parametrize("fault", FAULTS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
counting = pytest.mark.parametrize("counts_on", ["host", "gpu"])


def with_count(case: Case, counts_on: str) -> dict[str, Any]:
    """The case's options, with the one that decides where steps are counted."""
    if counts_on == "host":
        return case.options
    if case.algorithm == "SGD":
        return {**case.options, "fused": True}
    return {**case.options, "capturable": True}


@large
@every_case
@counting
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_the_cpu(gpu: Gpu, case: Case, counts_on: str, dtype: torch.dtype) -> None:
    given = inputs(gpu.sizes, dtype, 3)
    ours = gpu.train(case.ours, {**with_count(case, counts_on), "backend": gpu.backend}, *given)
    assert_same_bits(ours, train(case.ours, {**case.options, "backend": "native"}, *given))


@large
@every_rule
@counting
@every_fault
def test_bits_of_the_cpu_bites(gpu: Gpu, case: Case, counts_on: str, fault: type[NoOp]) -> None:
    given = inputs(gpu.sizes, FP32, 3)
    wrong = gpu.train(fault(case.ours), with_count(case, counts_on), *given)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(wrong, train(case.ours, case.options, *given))


@every_rule
@on_every_gpu("param, grad, state", FORMS, interpreted=PAIRWISE)
def test_mixed_dtypes(gpu: Gpu, case: Case, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> None:
    form = (param, grad, state)
    options = {**case.options, "state_dtype": state}
    given = stored(form, gpu.few_sizes, 3)
    ours = gpu.train(case.ours, {**options, "backend": gpu.backend}, *given)
    assert_same_bits(ours, train(case.ours, {**options, "backend": "native"}, *given))


@every_rule
@counting
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
def test_bits_after_many_steps(gpu: Gpu, case: Case, counts_on: str, dtype: torch.dtype) -> None:
    """Powers and exponentials have the same bits at step counts that other tests do not reach."""
    (value,), ((first,), (second,)) = inputs([100], dtype, 2)
    for number in (99, 65_535, 1_000_000, 16_777_214):
        results = []
        for place in (gpu, Tensor.clone):
            p = nn.Parameter(place(value))
            options = with_count(case, counts_on) if place is gpu else case.options
            optimizer = case.ours([p], **options)
            p.grad = place(first)
            optimizer.step()
            for name, scalar in optimizer.state[p].items():
                if name in STATE_SCALARS:
                    scalar.fill_(number if name == "step" else 0.1234)
            p.grad = place(second)
            optimizer.step()
            results.append({name: value.cpu() for name, value in snapshot(optimizer).items()})
        assert_same_bits(*results)


@every_rule
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex(gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
    given = inputs([1, 5, 1000, TILE], dtype, 3)
    ours = gpu.train(case.ours, {**case.options, "backend": gpu.backend}, *given)
    assert_same_bits(ours, train(case.ours, {**case.options, "backend": "native"}, *given))


@every_rule
def test_special_numbers(gpu: Gpu, case: Case) -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42, -1e-42, 3e38, 1e-30, 65504.0, 65520.0])
    for dtype in (FP32, BF16, FP16, FP64):
        values = [special.to(dtype)], [[special.flip(0).to(dtype)], [special.roll(3).to(dtype)]]
        assert_same_bits(gpu.train(case.ours, case.options, *values), train(case.ours, case.options, *values))


def special_among_others(gpu: Gpu, form: Form) -> tuple[list[Tensor], list[list[Tensor]]]:
    """A parameter and its gradients. Few vectors, all in the first half, hold what FastMath leaves to PlainMath.

    The size is two tiles of the CUDA kernel and some elements, or four of the blocks that Triton tries at once.
    """
    generator = torch.Generator().manual_seed(0)
    size = 2 * TILE + 300 if gpu.backend == "native" else 4 * 1024 + 300
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-42, 1e-30, 1e-18, 3e38])

    def numbers(dtype: torch.dtype) -> Tensor:
        found = torch.randn(size, generator=generator)
        places = torch.randint(size // 2, (12,), generator=generator)
        found[places] = special[torch.randint(len(special), (12,), generator=generator)]
        return found.to(dtype)

    return [numbers(form[0])], [[numbers(form[1])] for _ in range(3)]


@large
@every_rule
@pytest.mark.parametrize("form", COMMON, ids=name_of)
@pytest.mark.parametrize("maximize", [False, True])
def test_special_numbers_among_others(gpu: Gpu, case: Case, form: Form, maximize: bool) -> None:
    values = special_among_others(gpu, form)
    options = {**case.options, "state_dtype": form[2], "maximize": maximize}
    assert_same_bits(gpu.train(case.ours, options, *values), train(case.ours, options, *values))


@every_rule
@every_fault
def test_special_numbers_among_others_bites(gpu: Gpu, case: Case, fault: type[NoOp]) -> None:
    values = special_among_others(gpu, (FP32, FP32, FP32))
    wrong = gpu.train(fault(case.ours), case.options, *values)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(wrong, train(case.ours, case.options, *values))


# ---- layouts


class OnGpu(Buffers):
    """Places copies of tensors in larger buffers on a GPU."""

    def __init__(self, gpu: Gpu, view: Callable[[Tensor, torch.Size], Tensor]) -> None:
        super().__init__(view)
        self.gpu = gpu

    def buffer(self, tensor: Tensor) -> Tensor:
        return self.gpu(super().buffer(tensor))


PLACES = list(itertools.product((FP32, BF16, FP64), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]))


@every_rule
@every_layout
@on_every_gpu("dtype, where", PLACES, interpreted=[*PLACES[:3], (BF16, (1, 1, 1)), (FP64, (1, 1, 1))])
def test_layouts(gpu: Gpu, case: Case, layout: str, dtype: torch.dtype, where: tuple[int, int, int]) -> None:
    """The parameter, the gradient and the states take the layout, alone or together."""
    places = [OnGpu(gpu, LAYOUTS[layout if chosen else "contiguous"]) for chosen in where]
    names = ("place", "place_grad", "place_state")
    ours = gpu.train(case.ours, case.options, *given(dtype), **dict(zip(names, places, strict=True)))
    for place in places:
        place.assert_nothing_else_was_written()
    assert_same_bits(ours, train(case.ours, case.options, *given(dtype)))


OFFSETS = [(1, 1, 1), (3, 3, 3), (0, 1, 0), (1, 0, 0), (1, 2, 3), (4, 4, 0), (7, 7, 7)]
MISALIGNED = list(itertools.product([*COMMON, (FP64, FP64, FP64)], OFFSETS))


@every_rule
@on_every_gpu("form, offsets", MISALIGNED, interpreted=[(form, at) for form, at in MISALIGNED if at in OFFSETS[2:5]])
def test_misaligned(gpu: Gpu, case: Case, form: Form, offsets: tuple[int, int, int]) -> None:
    def shifted(offset: int) -> OnGpu:
        return OnGpu(gpu, lambda buffer, shape: buffer[offset : offset + shape.numel()].view(shape))

    places = [shifted(offset) for offset in offsets]
    options = {**case.options, "state_dtype": form[2]}
    values = stored(form, gpu.misaligned_sizes, 2)
    names = ("place", "place_grad", "place_state")
    ours = gpu.train(case.ours, options, *values, **dict(zip(names, places, strict=True)))
    for place in places:
        place.assert_nothing_else_was_written()
    assert_same_bits(ours, train(case.ours, options, *values))


def test_expanded_gradient(gpu: Gpu) -> None:
    q = nn.Parameter(torch.ones(6, 7))
    row = torch.randn(7)
    q.grad = row.expand(6, 7)
    dracopt_ext.AdamW([q]).step()
    p = nn.Parameter(gpu(torch.ones(6, 7)))
    p.grad = gpu(row).expand(6, 7)
    optimizer = dracopt_ext.AdamW([p])
    optimizer.step()
    assert gpu.only_here(optimizer)
    assert torch.equal(p.cpu(), q)


def test_more_elements_than_two_to_the_31(gpu: Gpu) -> None:
    """The first, last and middle elements are updated like those of a small tensor."""
    if gpu.simulation is not None:
        pytest.skip("takes too long without a GPU")
    places = (0, 2**30, 2**31 - 1, 2**31, 2**31 + 123)
    p = nn.Parameter(torch.zeros(2**31 + 124, dtype=BF16, device="cuda"))
    p.grad = torch.zeros_like(p)
    small = nn.Parameter(torch.zeros(len(places), dtype=BF16))
    small.grad = torch.arange(1.0, 1 + len(places)).bfloat16()
    for place, value in zip(places, small.grad, strict=True):
        p.grad[place] = value
    for parameter in (p, small):
        dracopt_ext.SGD([parameter], lr=0.1, momentum=0.9).step()
    assert torch.equal(p[list(places)].cpu(), small)
    assert int(p.count_nonzero()) == len(places)


# ---- launches and the table


def parameters(gpu: Gpu, sizes: list[int], dtype: torch.dtype = FP32) -> list[nn.Parameter]:
    params = [nn.Parameter(gpu(torch.ones(size, dtype=dtype))) for size in sizes]
    give_gradients(gpu, params)
    return params


def give_gradients(gpu: Gpu, params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = torch.full_like(p, 0.5)


def launches_for(tensors: int, pairs: int, slot_words: int) -> int:
    return math.ceil((tensors + pairs * slot_words) / ARGUMENT_WORDS)


@large
@pytest.mark.parametrize(
    ("tensors", "groups", "expected"),
    [(1, 1, 1), (465, 465, 1), (3900, 30, 1), (4000, 1, 1), (4100, 1, 2), (10_000, 10, launches_for(10_000, 10, 5))],
)
def test_one_launch(gpu: Gpu, tensors: int, groups: int, expected: int) -> None:
    if gpu.backend == "triton":
        expected = 1  # Triton's arguments lie in memory
        if gpu.simulation is not None:
            tensors, groups = tensors // 50 + 1, groups // 50 + 1
    params = parameters(gpu, [3] * tensors)
    chunk = math.ceil(tensors / groups)
    optimizer = dracopt_ext.AdamW(
        [{"params": params[i : i + chunk], "lr": 1e-3 * (1 + i)} for i in range(0, tensors, chunk)]
    )
    for _ in range(2):
        optimizer.step()
        assert gpu.launches(optimizer) == expected
        assert gpu.only_here(optimizer)
    for g, group in enumerate(optimizer.param_groups):
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.full((3,), 0.5)
        alone = dracopt_ext.AdamW([p], lr=group["lr"])
        alone.step()
        alone.step()
        if g in (0, 1, groups // 2, groups - 1):
            assert all(torch.equal(q.cpu(), p) for q in group["params"])


def test_one_launch_for_each_arithmetic(gpu: Gpu) -> None:
    params = [p for dtype in (FP32, BF16, FP16) for p in parameters(gpu, [3, 5], dtype)]
    optimizer = dracopt_ext.AdamW(params)
    optimizer.step()
    assert gpu.launches(optimizer) == (1 if gpu.backend == "native" else 3)  # Triton has one for each mix of dtypes
    optimizer.add_param_group({"params": parameters(gpu, [3, 5], FP64)})
    optimizer.step()
    assert gpu.launches(optimizer) == (2 if gpu.backend == "native" else 4)


@pytest.mark.parametrize("work", ["465 groups", "30 groups", "mixed dtypes"])
def test_launches_that_the_profiler_counts(real_gpu: Gpu, work: str) -> None:
    from benchmarks.measure import on_gpu  # imported here because tests may be copied without the benchmarks

    if work == "mixed dtypes":
        groups = [{"params": parameters(real_gpu, [100] * 50, dtype)} for dtype in (FP32, BF16)]
    else:
        tensors, count = (465, 465) if work == "465 groups" else (3900, 30)
        params = parameters(real_gpu, [100] * tensors)
        size = tensors // count
        groups = [{"params": params[i : i + size], "lr": 1e-3 + i * 1e-6} for i in range(0, tensors, size)]
    optimizer = dracopt_ext.AdamW(groups)
    optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            optimizer.step()
            torch.cuda.synchronize()
    names = on_gpu(profile)
    kernels = [name for name in names if "Memcpy" not in name]
    expected = 2 if work == "mixed dtypes" and real_gpu.backend == "triton" else 1
    assert 9 * expected <= len(kernels) <= 10 * expected, names  # the profiler may lose one at the edges of its window
    assert len(set(kernels)) == 1
    assert len(names) == len(kernels) or real_gpu.backend == "triton"  # Triton's arguments are copied


THREADS = """
import os
import torch, dracopt_ext
from dracopt_ext import backend, devices
from tests import simulated_gpu
devices.GPU = simulated_gpu.DEVICE
backend._C = simulated_gpu.load().module
torch.set_num_threads(4)
params = [torch.nn.Parameter(torch.ones(1).to(simulated_gpu.DEVICE)) for _ in range(5000)]
for p in params:
    p.grad = torch.ones(1).to(simulated_gpu.DEVICE)
optimizer = dracopt_ext.SGD(params, lr=0.1)
before = len(os.listdir("/proc/self/task"))
optimizer.step()
assert optimizer.last_backend == {simulated_gpu.DEVICE: frozenset({"native"})}
print(len(os.listdir("/proc/self/task")) - before)
"""


def test_no_other_thread_is_waited_for(simulated: simulated_gpu.SimulatedGpu) -> None:
    """A region of 16 threads before the launch made steps 10 ms slower on an H200's host."""
    if not os.path.exists("/proc/self/task"):
        pytest.skip("needs /proc")
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", THREADS], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0\n"


def test_different_numbers_of_states(gpu: Gpu) -> None:
    a, b = parameters(gpu, [10_000, 20_000])
    optimizer = dracopt_ext.Adam([{"params": [a], "amsgrad": True}, {"params": [b]}])
    optimizer.step()
    assert gpu.launches(optimizer) == (1 if gpu.backend == "native" else 2)  # Triton has a kernel for each number
    assert torch.equal(a[:100], b[:100])


@large
@pytest.mark.parametrize("count", [1, 2, 7])
def test_empty_tensors_at_every_position(gpu: Gpu, count: int) -> None:
    for place in range(count):
        sizes = [TILE + 3] * count
        sizes[place] = 0
        given = inputs(sizes, FP32, 2)
        for options in ({}, {"capturable": True}):
            ours = gpu.train(dracopt_ext.AdamW, options, *given)
            assert_same_bits(ours, train(dracopt_ext.AdamW, {}, *given))


@pytest.mark.usefixtures("simulation")
def test_table_is_written_once(gpu: Simulated) -> None:
    """A step writes the table only if a fact in the table has changed."""
    params = parameters(gpu, [3, 1000, 20])
    optimizer = dracopt_ext.AdamW(params, lr=0.1)

    def tables_of_a_step() -> int:
        before = gpu.tables()
        optimizer.step()
        return gpu.tables() - before

    assert tables_of_a_step() == 1
    for step in range(4):
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.param_groups[0]["weight_decay"] += 0.01 * step
        optimizer.zero_grad()
        give_gradients(gpu, params)  # at other addresses
        assert tables_of_a_step() == 0

    changes: list[Callable[[], Any]] = [
        lambda: setattr(params[0], "data", params[0].data.clone()),
        lambda: optimizer.state[params[1]].update(exp_avg_sq=gpu(torch.ones(2000))[::2]),
        lambda: setattr(params[1], "grad", gpu(torch.ones(2000))[::2]),
        lambda: setattr(params[1], "grad", None),
        lambda: optimizer.state[params[2]].update(exp_avg=gpu(torch.zeros(20))),
        lambda: optimizer.param_groups[0].update(maximize=True),
        lambda: optimizer.add_param_group({"params": parameters(gpu, [5])}),
    ]
    for change in changes:
        change()
        assert tables_of_a_step() == 1
        assert tables_of_a_step() == 0


@pytest.mark.usefixtures("simulation")
@pytest.mark.filterwarnings("ignore:.*leaves sparse tensors to torch's own:RuntimeWarning")
def test_unsupported_ones_do_not_move_the_table(gpu: Simulated) -> None:
    """Parameters that torch steps leave the table as it is."""
    p, q = parameters(gpu, [10]), [nn.Parameter(torch.ones(10))]
    q[0].grad = torch.ones(10).to_sparse()
    optimizer = dracopt_ext.SGD(p + q, lr=0.1)
    optimizer.step()
    before = gpu.tables()
    for _ in range(3):
        optimizer.step()
        assert optimizer.last_backend == {gpu.type: frozenset({gpu.backend}), "cpu": frozenset({"torch"})}
    assert gpu.tables() == before


@pytest.mark.usefixtures("simulation")
def test_table_of_strided_tensors_is_written_once(gpu: Simulated) -> None:
    values = [torch.ones(6, 5, 4, 3), torch.ones(7, 8), torch.ones(3, 4, 5)]
    params = [nn.Parameter(gpu(value)) for value in values]
    optimizer = dracopt_ext.AdamW(params)
    before = gpu.tables()
    for step in range(4):
        optimizer.param_groups[0]["lr"] *= 0.9
        for p, value in zip(params, values, strict=True):
            p.grad = gpu(value.transpose(0, -1).contiguous()).transpose(0, -1)
        sum(range(10**step))  # other numbers on the stack
        optimizer.step()
    assert gpu.only_here(optimizer)
    assert gpu.tables() == before + 1


def test_what_a_user_changes_between_steps(gpu: Gpu) -> None:
    def run(place: Callable[[Tensor], Tensor]) -> Snapshot:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return place(torch.randn(*shape, generator=generator))

        params = [nn.Parameter(random(100)) for _ in range(4)]
        optimizer = dracopt_ext.AdamW(params[:3], lr=0.1)

        def step(without: int | None = None) -> None:
            for i, p in enumerate(params):
                p.grad = None if i == without else random(100)
            optimizer.step()

        step()
        step(without=1)
        step()
        params[0].data = random(100)
        step()
        optimizer.state[params[1]]["exp_avg"] = random(100)
        optimizer.param_groups[0]["betas"] = (0.8, 0.9)
        step()
        optimizer.add_param_group({"params": [params[3]], "lr": 0.2, "amsgrad": True})
        step()
        optimizer.state[params[2]]["exp_avg_sq"] = place(torch.zeros(100, 2))[:, 0]
        optimizer.param_groups[0]["maximize"] = True
        step()
        optimizer.load_state_dict(optimizer.state_dict())
        step()
        return {name: value.cpu() for name, value in snapshot(optimizer).items()}

    assert_same_bits(run(gpu), run(Tensor.clone))


def test_a_learning_rate_that_the_step_updates(gpu: Gpu) -> None:
    """torch takes one group after the other and so reads the updated value. No kernel does."""
    params = parameters(gpu, [1, 5])
    groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": params[0].detach().view(())}]
    optimizer = dracopt_ext.AdamW(groups, capturable=True, backend=gpu.backend)
    with pytest.raises(RuntimeError, match="does not serve tensors that share memory: parameter 0 of group 0"):
        optimizer.step()
    optimizer.param_groups[1]["lr"] = params[0].detach().clone().view(())
    optimizer.step()
    assert gpu.only_here(optimizer)


def test_versions_are_counted(gpu: Gpu) -> None:
    (p,) = parameters(gpu, [4])
    optimizer = dracopt_ext.AdamW([p], fused=True)
    optimizer.step()
    tensors = [p, *optimizer.state[p].values()]
    before = [t._version for t in tensors]
    optimizer.step()
    assert [t._version for t in tensors] == [version + 1 for version in before]


def distributed(tensor: Tensor, mesh: Any) -> Any:
    """Wraps a tensor. The mesh need not be one of the tensor's device."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(tensor.shape, tensor.stride(), tensor.dtype)
    return DTensor(tensor, DTensorSpec(mesh, (Shard(0),), tensor_meta=meta), requires_grad=False)


@every_rule
@pytest.mark.parametrize("counts_on", ["host", "gpu"])
def test_distributed_tensors(gpu: Gpu, case: Case, counts_on: str, mesh: Any) -> None:
    """One launch updates the shards of all parameters, and plain parameters among them."""
    initial, steps = inputs([0, 1, 1000, TILE + 3], FP32, 3)
    options = case.options
    if counts_on == "gpu":
        options = {**options, **({"capturable": True} if case.algorithm == "NAdam" else {"fused": True})}
    params = [nn.Parameter(gpu(value) if i == 2 else distributed(gpu(value), mesh)) for i, value in enumerate(initial)]
    optimizer = case.ours(params, **options)
    for step in steps:
        for i, (p, grad) in enumerate(zip(params, step, strict=True)):
            p.grad = gpu(grad) if i == 2 else distributed(gpu(grad), mesh)
        optimizer.step()
        assert gpu.only_here(optimizer)
        assert gpu.launches(optimizer) == 1
    ours = {name: getattr(value, "_local_tensor", value).cpu() for name, value in snapshot(optimizer).items()}
    assert_same_bits(ours, train(case.ours, case.options, initial, steps))


def test_versions_of_distributed_tensors(gpu: Gpu, mesh: Any) -> None:
    p = nn.Parameter(distributed(gpu(torch.ones(4)), mesh))
    p.grad = distributed(gpu(torch.ones(4)), mesh)
    optimizer = dracopt_ext.AdamW([p], fused=True)
    optimizer.step()
    moments = [optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq")]
    tensors = [p, *moments, *(t._local_tensor for t in (p, *moments)), optimizer.state[p]["step"]]
    before = [t._version for t in tensors]
    optimizer.step()
    assert [t._version for t in tensors] == [version + 1 for version in before]


@every_rule
def test_parameters_on_gpu_and_cpu(gpu: Gpu, case: Case) -> None:
    if gpu.backend == "triton" and gpu.simulation is None:
        pytest.skip("the CUDA kernels are there, too, and the native backend would step the GPU's parameters as well")
    initial, steps = inputs([100, 200, 300, 400], FP32, 3)
    turn = iter(range(1000))

    def alternate(tensor: Tensor) -> Tensor:
        return gpu(tensor) if next(turn) % 2 else tensor.clone()

    ours = gpu.train(case.ours, case.options, initial, steps, place=alternate)
    assert_same_bits(ours, train(case.ours, case.options, initial, steps))


def test_triton_serves_where_cuda_does_not(gpu: Gpu, simulation: simulated_gpu.SimulatedGpu) -> None:
    if gpu.backend == "native":
        pytest.skip("of Triton")
    from dracopt_ext.triton_kernels import launcher

    def plan_for(*no_kernels: str | None) -> Any:
        triton = simulation.module.Triton(
            launcher.launcher_for, None, tile=launcher.TILE, on_cpu=False, no_kernels=no_kernels
        )
        return simulation.module.StepPlan("adam", "AdamW", cpu=True, cuda=True, triton=triton)

    params = [*parameters(gpu, [3]), nn.Parameter(torch.ones(3))]
    params[1].grad = torch.ones(3)
    optimizer = dracopt_ext.AdamW(params)
    optimizer.step()
    plan = plan_for()
    for available in (True, False, True):
        simulation.set("unavailable", not available)
        assert plan.step(optimizer.param_groups, optimizer.state) is None
        assert plan.updated == {("cpu", "native"): 1, (gpu.type, "native" if available else "triton"): 1}
    simulation.set("unavailable", 1)
    _, unsupported, _, _ = plan_for("too old", None).step(optimizer.param_groups, optimizer.state)
    assert unsupported == [(0, 0, "tensors on a GPU without Triton kernels (too old)", 0)]


def test_what_other_code_may_take_away_of_distributed_tensors(
    gpu: Gpu, mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Python launches a kernel, other code frees the parameters, their shards and their states."""
    if gpu.backend == "native" or gpu.simulation is None:
        pytest.skip("of the interpreter")
    from dracopt_ext.triton_kernels import launcher

    params = [nn.Parameter(distributed(gpu(torch.ones(1000)), mesh)) for _ in range(3)]
    optimizer = dracopt_ext.AdamW(params, lr=0.5)
    for _ in range(2):
        for p in params:
            p.grad = distributed(gpu(torch.ones(1000)), mesh)
        if not optimizer.state:
            optimizer.step()
    memory = [p._local_tensor.detach() for p in params]
    versions = [result._version for result in memory]
    rubbish: list[Any] = []
    launch = launcher.Launcher.update

    def take_away_and_launch(*arguments: Any) -> None:
        for p in params:
            for name in ("exp_avg", "exp_avg_sq"):
                optimizer.state[p][name]._local_tensor = torch.zeros(1)
            p._local_tensor = torch.zeros(1)
        optimizer.state.clear()
        optimizer.param_groups[0]["params"].clear()
        params.clear()
        rubbish.extend(distributed(torch.full((1000,), 1e9), mesh) for _ in range(200))
        launch(*arguments)

    monkeypatch.setattr(launcher.Launcher, "update", take_away_and_launch)
    optimizer.step()
    assert all((tensor._local_tensor == 1e9).all() for tensor in rubbish)
    q = nn.Parameter(torch.ones(1000))
    theirs = torch.optim.AdamW([q], lr=0.5)
    for _ in range(2):
        q.grad = torch.ones(1000)
        theirs.step()
    assert [result._version - 1 for result in memory] == versions
    for result in memory:
        torch.testing.assert_close(result.cpu(), q.detach(), rtol=1e-5, atol=0)


@every_rule
def test_what_other_code_may_take_away(gpu: Gpu, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """While Python launches a kernel, other code takes away what the CPU has yet to step, and the learning rate."""
    if gpu.backend == "native" or gpu.simulation is None:
        pytest.skip("of the interpreter")
    from dracopt_ext.triton_kernels import launcher

    def prepare() -> tuple[Any, list[Any]]:
        params = [nn.Parameter(gpu(torch.ones(1000))), *(nn.Parameter(torch.ones(1000)) for _ in range(3))]
        groups = [{"params": params[:1], "lr": gpu(torch.tensor(0.5))}, {"params": params[1:], "lr": 0.5}]
        optimizer: Any = case.ours(groups, **case.options)
        optimizer.param_groups[0]["capturable"] = True
        for _ in range(2):
            for p in params:
                p.grad = torch.full_like(p, 0.5)
            optimizer.step()
        for p in params:
            p.grad = torch.full_like(p, 0.25)
        return optimizer, [p.data for p in params]

    expected, values = prepare()
    expected.step()
    launch = launcher.Launcher.update
    rubbish: list[Any] = []

    def take_away_and_launch(*arguments: Any) -> None:
        for state in optimizer.state.values():
            state.clear()
        optimizer.state.clear()
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
                p.data = torch.zeros(1, device=p.device)
        optimizer.param_groups[1]["params"].clear()
        optimizer.param_groups[0]["lr"] = 0.0
        rubbish.extend([torch.full((1000,), 1e9) for _ in range(200)])
        rubbish.extend([gpu(torch.tensor(1e9)) for _ in range(200)])
        launch(*arguments)

    optimizer, ours = prepare()
    monkeypatch.setattr(launcher.Launcher, "update", take_away_and_launch)
    optimizer.step()
    assert all((tensor == 1e9).all() for tensor in rubbish)
    q = nn.Parameter(torch.ones(1000))
    theirs = case.torchs([q], **{**case.options, "lr": 0.5})
    for gradient in (0.5, 0.5, 0.25):
        q.grad = torch.full_like(q, gradient)
        theirs.step()
    for value, result in zip(values, ours, strict=True):
        assert torch.equal(value, result)
        assert torch.allclose(result.cpu(), q.detach(), rtol=1e-5)


@pytest.mark.parametrize("first", [False, True])
def test_neither_side_changes_where_the_other_is_wrong(gpu: Gpu, first: bool) -> None:
    """The GPU's kernels step some parameters, and the CPU's the others. Each side finds one kind of mistake."""
    for side in (0, 1):
        params = [nn.Parameter(gpu(torch.ones(3))), nn.Parameter(torch.ones(3))]
        optimizer = dracopt_ext.AdamW([{"params": [p]} for p in params], lr=0.1)
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        if not first:
            optimizer.step()
        before = snapshot(optimizer)
        group = optimizer.param_groups[side]
        for change, back in (({"lr": 1e300}, {"lr": 0.1}), ({"eps": float("nan")}, {"eps": 1e-8})):
            group.update(change)
            with pytest.raises(ValueError, match=rf"param_groups\[{side}\]"):
                optimizer.step()
            assert_same_bits(snapshot(optimizer), before)
            group.update(back)
        p = group["params"][0]
        grad = p.grad
        p.grad = torch.ones_like(p)
        p.grad.data = gpu(torch.ones(4)) if side == 0 else torch.ones(4)
        with pytest.raises(ValueError, match=f"the gradient of parameter 0 of group {side}"):
            optimizer.step()
        assert_same_bits(snapshot(optimizer), before)
        p.grad = grad
        optimizer.step()
        assert set(optimizer.last_backend) == {gpu.type, "cpu"}


def test_overflow_on_both_sides_comes_before_what_is_wrong(gpu: Gpu) -> None:
    """A step that an overflow ends does not ask whether its update would be finite."""
    params = [nn.Parameter(gpu(torch.ones(3))), nn.Parameter(torch.ones(3))]
    optimizer = dracopt_ext.AdamW([{"params": [p]} for p in params], lr=0.1, fused=True)
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.param_groups[0]["lr"] = 1e39
    scaled(optimizer, gpu, found=1.0, scale=2.0)
    assert_same_bits(snapshot(optimizer), before)


@pytest.mark.parametrize("order", [1, -1], ids=["updated first", "read first"])
def test_a_learning_rate_on_the_cpu_that_the_step_updates(gpu: Gpu, order: int) -> None:
    """torch reads the updated value in a later group, and the old one in an earlier group."""
    results = []
    for make in (dracopt_ext.AdamW, torch.optim.AdamW):
        rate, p = nn.Parameter(torch.tensor(0.5)), nn.Parameter(gpu(torch.ones(3)))
        groups = [{"params": [rate], "lr": 0.1}, {"params": [p], "lr": rate.detach().view(())}]
        optimizer = make(groups[::order], foreach=False)
        for _ in range(3):
            for param in (rate, p):
                param.grad = torch.full_like(param, 0.5)
            if make is dracopt_ext.AdamW:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    optimizer.step()
                assert all("tensors that share memory" in str(warning.message) for warning in caught)
            else:
                optimizer.step()
        results.append(p.detach().cpu())
    torch.testing.assert_close(*results)


def test_several_devices(gpu: Gpu) -> None:
    if gpu.devices < 2:
        pytest.skip("there is one GPU")
    initial, steps = inputs([100, 9000, 300, 400], FP32, 3)
    for options in ({}, {"capturable": True}):
        turn = iter(range(1000))
        ours = gpu.train(dracopt_ext.AdamW, options, initial, steps, place=lambda t: gpu(t, next(turn) % 2))  # noqa: B023
        assert_same_bits(ours, train(dracopt_ext.AdamW, {}, initial, steps))


# ---- numbers that lie on the GPU


def test_tensor_lr_on_the_gpu(gpu: Gpu) -> None:
    def run(place: Callable[[Tensor], Tensor], **options: Any) -> Snapshot:
        lr = place(torch.tensor(0.1))
        params = [nn.Parameter(place(torch.linspace(-1, 1, 100))) for _ in range(2)]
        optimizer = dracopt_ext.AdamW(params, lr=lr, **options)
        for step in range(3):
            for p in params:
                p.grad = place(torch.full((100,), 1.0 + step))
            optimizer.step()
            lr.mul_(0.5)
        return {name: value.cpu() for name, value in snapshot(optimizer).items()}

    expected = run(Tensor.clone)
    for options in ({}, {"fused": True}, {"capturable": True}):
        assert_same_bits(run(gpu, **options), expected)


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("algorithm", classes())
def test_tensor_hyperparameters(gpu: Gpu, algorithm: str, dtype: torch.dtype) -> None:
    values = {"lr": 0.05} if algorithm != "AdamW" else {"lr": 0.05, "betas": (0.8, 0.95)}
    if algorithm == "SGD":
        values["momentum"] = 0.9

    def numbers(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(numbers, value))
        return gpu(torch.tensor(value, dtype=dtype))

    given = inputs([7, TILE + 1], FP32, 3)
    options = {key: numbers(value) if key != "momentum" else value for key, value in values.items()}
    more = {"capturable": True} if rule_of(algorithm).state_scalars else {}
    make = getattr(dracopt_ext, algorithm)
    exact = {key: value if dtype == FP64 else _rounded(value) for key, value in values.items()}
    assert_same_bits(gpu.train(make, {**options, **more}, *given), train(make, exact, *given))


def test_tensor_lr_on_another_device(gpu: Gpu) -> None:
    """torch takes over the parameter and copies the lr to its device."""
    if gpu.devices < 2:
        pytest.skip("there is one GPU")
    lr = gpu(torch.tensor(0.25), 1)
    params = parameters(gpu, [10, 20])
    optimizer = dracopt_ext.SGD(params, lr=lr)
    with pytest.warns(RuntimeWarning, match="leaves hyperparameters on another device to torch's"):
        optimizer.step()
    assert optimizer.last_backend == {gpu.type: frozenset({"torch"})}
    assert torch.equal(params[0].detach().cpu(), torch.full((10,), 1 - 0.25 * 0.5))


def _rounded(value: Any) -> Any:
    return tuple(map(_rounded, value)) if isinstance(value, tuple) else torch.tensor(value).item()


def test_steps_of_different_tensors(gpu: Gpu) -> None:
    """Each tensor counts its own steps, on the host and on the GPU. Some lack a gradient at times."""
    for options in ({}, {"capturable": True}, {"fused": True}):
        results = []
        for place in (gpu, Tensor.clone):
            params = [nn.Parameter(place(torch.ones(50))) for _ in range(5)]
            optimizer = dracopt_ext.AdamW(params, lr=0.1, **(options if place is gpu else {}))
            for step in range(6):
                for i, p in enumerate(params):
                    p.grad = place(torch.full((50,), 1.0 + i)) if step % (i + 1) == 0 else None
                optimizer.step()
            results.append({name: value.cpu() for name, value in snapshot(optimizer).items()})
        assert_same_bits(*results)


def examples(count: int) -> Any:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@counting
@programs
@examples(200)
@pytest.mark.parametrize("gpu", ["simulated", *ON_GPUS], indirect=True)
def test_whatever_a_user_does(gpu: Gpu, counts_on: str, **given: Any) -> None:
    assert_same_bits_after_each_action(gpu, counts_on, **given)


@pytest.mark.long
@counting
@programs
@examples(50)
@pytest.mark.parametrize("gpu", [INTERPRETED], indirect=True)
def test_whatever_a_user_does_in_the_interpreter(gpu: Gpu, counts_on: str, **given: Any) -> None:
    assert_same_bits_after_each_action(gpu, counts_on, **given)


def assert_same_bits_after_each_action(
    gpu: Gpu,
    counts_on: str,
    case: Case,
    state_dtype: torch.dtype | None,
    parameters: list[Any],
    program: list[tuple[Any, ...]],
) -> None:
    """Any shapes, strides, dtypes, options and actions give the bits of the CPU."""
    more = {"state_dtype": state_dtype}
    ours = Trained(case.ours, {**with_count(case, counts_on), **more, "backend": gpu.backend}, parameters, gpu)
    on_cpu = Trained(case.ours, {**case.options, **more, "backend": "native"}, parameters)
    for action in [*program, ("step", set())]:
        ours.act(*action)
        on_cpu.act(*action)
        found = {name: value.cpu() for name, value in snapshot(ours.optimizer).items()}
        assert_same_bits(found, snapshot(on_cpu.optimizer))


@pytest.mark.parametrize("case", [case for case in RULE_CASES if case.rule.state_scalars], ids=str)
def test_one_group_counts_on_the_host(gpu: Gpu, case: Case) -> None:
    """The group that counts on the host begins later than the other, with the same hyperparameters."""
    results = []
    for place, capturable in ((gpu, True), (Tensor.clone, False)):
        late, early = (nn.Parameter(place(torch.ones(100))) for _ in range(2))
        groups = [{"params": [late]}, {"params": [early], "capturable": capturable}]
        optimizer = case.ours(groups, **case.options)
        for number in range(4):
            early.grad = place(torch.full((100,), 0.5 + number))
            if number >= 2:
                late.grad = place(torch.full((100,), 0.5 - number))
            optimizer.step()
        results.append({name: value.cpu() for name, value in snapshot(optimizer).items()})
    assert_same_bits(*results)


def test_nadam_with_a_state_on_both_sides(gpu: Gpu) -> None:
    """mu_product depends on the step count: the host cannot update one without the other."""
    (p,) = parameters(gpu, [100])
    q = nn.Parameter(torch.ones(100))
    q.grad = torch.full((100,), 0.5)
    ours, on_cpu = dracopt_ext.NAdam([p]), dracopt_ext.NAdam([q])
    ours.step()
    ours.state[p]["step"] = gpu(ours.state[p]["step"])
    with pytest.warns(RuntimeWarning, match="leaves a state on the CPU beside numbers on the GPU"):
        ours.step()
    assert ours.last_backend == {gpu.type: frozenset({"torch"})}
    ours.state[p]["mu_product"] = gpu(ours.state[p]["mu_product"])
    for _ in range(3):
        on_cpu.step()
    ours.step()
    assert torch.allclose(p.detach().cpu(), q.detach())
    assert torch.allclose(ours.state[p]["mu_product"].cpu(), on_cpu.state[q]["mu_product"])


# ---- GradScaler


def scaled(optimizer: Any, gpu: Gpu, found: float, scale: float) -> None:
    optimizer.found_inf = gpu(torch.tensor(found))
    optimizer.grad_scale = gpu(torch.tensor(scale))
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf, optimizer.grad_scale


@pytest.fixture
def reads(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Records the tensors that the host reads and must wait for."""
    found: list[Tensor] = []
    item = Tensor.item
    monkeypatch.setattr(Tensor, "item", lambda tensor: found.append(tensor) or item(tensor))
    return found


@every_rule
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
@pytest.mark.parametrize("scale", [1024.0, 3.0, 2.0**41, 0.0])
def test_grad_scale_is_read_by_the_kernel(
    gpu: Gpu, case: Case, dtype: torch.dtype, scale: float, reads: list[Tensor]
) -> None:
    """The fast arithmetic does not divide by some of the scales. Some of the gradients are too small for it."""
    initial, steps = inputs([5, 3 * TILE if gpu.backend == "native" else 3000], dtype, 3)
    for step in steps:
        step[1][::97] *= 1e-30
    results = []
    for place in (gpu, Tensor.clone):
        params = [nn.Parameter(place(value)) for value in initial]
        fused = {} if case.algorithm == "NAdam" else {"fused": True}
        if place is gpu and case.algorithm == "NAdam":
            fused = {"capturable": True}
        optimizer = case.ours(params, **{**case.options, **fused})
        for number, step in enumerate(steps):
            for p, grad in zip(params, step, strict=True):
                p.grad = place(grad * 1024)
            reads.clear()
            if place is gpu:
                scaled(optimizer, gpu, 0.0, scale)
                assert gpu.only_here(optimizer)
                # The host reads found_inf before it creates a state without step count: an overflow must create none.
                assert not reads or (number == 0 and not case.rule.state_scalars)
            else:
                optimizer.grad_scale = torch.tensor(scale)
                optimizer.found_inf = torch.tensor(0.0)
                optimizer.step()
        results.append({name: value.cpu() for name, value in snapshot(optimizer).items()})
    assert_same_bits(*results)


@every_rule
@pytest.mark.parametrize("first", [True, False])
def test_overflow_changes_nothing(gpu: Gpu, case: Case, first: bool) -> None:
    initial, steps = inputs([5, 3 * TILE], FP32, 3)
    options = {**case.options, "capturable": True} if case.algorithm == "NAdam" else {**case.options, "fused": True}
    results = []
    for overflows in (True, False):
        params = [nn.Parameter(gpu(value)) for value in initial]
        optimizer = case.ours(params, **options)
        for number, step in enumerate(steps):
            if overflows and number == (0 if first else 1):
                for p, grad in zip(params, step, strict=True):
                    p.grad = gpu(grad) * math.inf
                before = snapshot(optimizer)
                scaled(optimizer, gpu, 1.0, 2.0)
                after = snapshot(optimizer)
                assert_same_bits({name: after[name] for name in before}, before)
            for p, grad in zip(params, step, strict=True):
                p.grad = gpu(grad)
            optimizer.step()
        results.append(snapshot(optimizer))
    assert_same_bits(*results)


def test_overflow_with_counts_on_the_host(gpu: Gpu) -> None:
    params = parameters(gpu, [10])
    optimizer = dracopt_ext.AdamW(params)
    scaled(optimizer, gpu, 1.0, 2.0)
    assert not optimizer.state
    scaled(optimizer, gpu, 0.0, 2.0)
    before = snapshot(optimizer)
    scaled(optimizer, gpu, 1.0, 2.0)
    assert_same_bits(snapshot(optimizer), before)
    assert optimizer.state[params[0]]["step"].item() == 1


def test_scaler_where_no_kernel_serves(gpu: Gpu, simulated: simulated_gpu.SimulatedGpu, reads: list[Tensor]) -> None:
    """torch's fused kernels read found_inf and grad_scale, too."""
    params = parameters(gpu, [10])
    simulated.set("unavailable", 1)
    optimizer = dracopt_ext.AdamW(params, fused=True, lr=0.1)
    params[0].grad = gpu(torch.full((10,), 8.0))
    scaled(optimizer, gpu, 1.0, 16.0)
    assert torch.equal(params[0].detach().cpu(), torch.ones(10))
    scaled(optimizer, gpu, 0.0, 16.0)
    assert optimizer.last_backend == {gpu.type: frozenset({"torch"})}
    assert not reads
    q = nn.Parameter(torch.ones(10))
    q.grad = torch.full((10,), 0.5)
    dracopt_ext.AdamW([q], fused=True, lr=0.1).step()
    assert torch.allclose(params[0].detach().cpu(), q.detach())


@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
def test_scaler_where_kernels_serve_some(gpu: Gpu) -> None:
    """Parameters that torch steps are unscaled, too, and stay as they are after an overflow."""

    def parameters_with_gradients(place: Callable[[Tensor], Tensor], scale: float) -> list[nn.Parameter]:
        shared = place(torch.ones(15))
        params = [nn.Parameter(t) for t in (place(torch.ones(10)), shared[:10], shared[5:])]
        for p in params:
            p.grad = place(torch.full((10,), 0.5 * scale))
        return params

    expected = parameters_with_gradients(torch.clone, 1.0)
    torch.optim.AdamW(expected, lr=0.1, foreach=False).step()
    params = parameters_with_gradients(gpu, 16.0)
    optimizer = dracopt_ext.AdamW(params, fused=True, lr=0.1)
    scaled(optimizer, gpu, 1.0, 16.0)
    assert all(torch.equal(p.detach().cpu(), torch.ones(10)) for p in params)
    scaled(optimizer, gpu, 0.0, 16.0)
    # The elements that two parameters share are left out, because fused kernels may update them in any order.
    for p, q, own in zip(params, expected, (slice(10), slice(5), slice(5, 10)), strict=True):
        assert torch.allclose(p.detach().cpu()[own], q.detach()[own])


def test_grad_scaler_end_to_end(real_gpu: Gpu) -> None:
    """A real GradScaler trains like unscaled training that leaves out the steps that overflow."""
    for name in classes(fused=True):
        make = getattr(dracopt_ext, name)
        torch.manual_seed(0)
        p, q = (nn.Parameter(torch.linspace(-1, 1, 1000, device="cuda")) for _ in range(2))
        ours, plain = make([p], lr=0.1, fused=True), make([q], lr=0.1)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=2)
        for step in range(8):
            gradient = torch.randn(1000, device="cuda")
            overflows = step in (0, 3)
            p.grad = gradient * scaler.get_scale() if scaler._scale is not None else gradient * 2.0**10
            scaler.scale(torch.ones((), device="cuda"))  # initializes the scale
            if overflows:
                p.grad[7] = math.inf
            scaler.step(ours)
            assert real_gpu.only_here(ours)
            scaler.update()
            if not overflows:
                q.grad = gradient
                plain.step()
        assert torch.equal(p, q)


# ---- graphs and streams


def test_capture_is_refused_where_it_would_be_wrong(gpu: Gpu, simulation: simulated_gpu.SimulatedGpu) -> None:
    p, q = parameters(gpu, [10, 20])
    plain, fused = dracopt_ext.AdamW([p]), dracopt_ext.NAdam([p])
    for optimizer in (plain, fused):
        optimizer.step()
        before = snapshot(optimizer)
        simulation.set("capturing", 1)
        with pytest.raises(RuntimeError, match=f"instance of {type(optimizer).__name__} but .*capturable is False"):
            optimizer.step()
        simulation.set("capturing", 0)
        assert_same_bits(snapshot(optimizer), before)

    for case in RULE_CASES:
        optimizer = case.ours([q], **case.options, **({"capturable": True} if case.rule.state_scalars else {}))
        simulation.set("capturing", 1)
        with pytest.raises(
            RuntimeError, match=r"parameter 0 of group 0 \(shape \[20\]\) has no state yet. Take a step"
        ):
            optimizer.step()
        assert not optimizer.state
        simulation.set("capturing", 0)
        optimizer.step()
        simulation.set("capturing", 1)
        optimizer.step()
        simulation.set("capturing", 0)

    counted = dracopt_ext.AdamW([q], capturable=True)
    counted.step()
    counted.state[q]["step"] = counted.state[q]["step"].cpu()
    simulation.set("capturing", 1)
    with pytest.raises(RuntimeError, match=r"has its state 'step' on the CPU"):
        counted.step()
    simulation.set("capturing", 0)
    mixed = dracopt_ext.SGD([q, nn.Parameter(torch.ones(3))])
    mixed.param_groups[0]["params"][1].grad = torch.ones(3)
    simulation.set("capturing", 1)
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 \(shape \[3\]\) is not on the GPU"):
        mixed.step()


def test_captured_memory_outlives_the_capture(gpu: Simulated, simulation: simulated_gpu.SimulatedGpu) -> None:
    """A table and arguments that a graph refers to must not change, whatever the optimizer does later."""
    params = parameters(gpu, [10, 20])
    optimizer = dracopt_ext.AdamW(params, capturable=True)
    optimizer.step()
    tables = gpu.tables()
    simulation.set("capturing", 1)
    optimizer.step()
    simulation.set("capturing", 0)
    assert gpu.tables() == tables  # captured without a copy
    captured = gpu.memory()
    contents = [ctypes.string_at(address, 160) for address in captured]
    for _ in range(4):
        params[0].data = params[0].data.clone()
        optimizer.step()
        assert not set(gpu.memory()) & set(captured)
    assert [ctypes.string_at(address, 160) for address in captured] == contents


def test_table_of_a_capture_is_the_graphs_alone(gpu: Simulated, simulation: simulated_gpu.SimulatedGpu) -> None:
    """The replay writes this table, not the capture. A step without a graph must not rely on the table."""
    params = parameters(gpu, [10, 20])
    optimizer = dracopt_ext.AdamW(params, capturable=True)
    optimizer.step()
    params[0].data = params[0].data.clone()
    simulation.set("capturing", 1)
    optimizer.step()
    captured, tables = gpu.memory()[0], gpu.tables()
    simulation.set("capturing", 0)
    optimizer.step()
    assert gpu.memory()[0] != captured
    assert gpu.tables() == tables + 1


def test_a_capture_needs_a_kernel_that_is_loaded(gpu: Gpu, simulation: simulated_gpu.SimulatedGpu) -> None:
    if gpu.backend == "native":
        pytest.skip("CUDA loads kernels during a capture")
    from dracopt_ext.triton_kernels import launcher

    params = parameters(gpu, [10])
    launcher.launcher_for.cache_clear()
    for again in (False, True):
        optimizer = dracopt_ext.SGD(params, lr=0.1)
        if not again:
            simulation.set("capturing", 1)
            with pytest.raises(RuntimeError, match=r"Triton has yet to compile its kernel\. Take a step before"):
                optimizer.step()
            assert torch.equal(params[0].detach().cpu(), torch.ones(10))
            simulation.set("capturing", 0)
            optimizer.step()
        simulation.set("capturing", 1)
        optimizer.step()
        simulation.set("capturing", 0)


def test_current_stream(gpu: Gpu, simulated: simulated_gpu.SimulatedGpu) -> None:
    params = parameters(gpu, [10])
    optimizer = dracopt_ext.AdamW(params)
    for stream in (0, 3, 3, 5):
        simulated.set("stream", stream)
        optimizer.step()
        assert simulated.read("last_stream") == stream


every_tail = pytest.mark.parametrize(("max_norm", "zeroes"), [(None, False), (1.0, True)], ids=["step", "whole tail"])
"""The tail of a training step: the step alone, or with clipping and zeroing."""


@every_rule
@every_tail
def test_graph_replays(real_gpu: Gpu, case: Case, max_norm: float | None, zeroes: bool) -> None:
    """Replays of a captured step equal eager steps while gradients and a Tensor lr change."""
    is_sgd = case.algorithm == "SGD"
    given_options = {**case.options, "max_grad_norm": max_norm}
    options = {**given_options, **({} if is_sgd else {"capturable": True})}
    initial, steps = inputs([5, 3 * TILE], FP32, 6)
    lr = torch.tensor(0.1, device="cuda")
    params = [nn.Parameter(value.cuda()) for value in initial]
    gradients = [torch.zeros_like(p) for p in params]
    optimizer = case.ours(params, **{**options, "lr": lr})

    def load(step: int) -> None:
        for p, gradient, value in zip(params, gradients, steps[step], strict=True):
            gradient.copy_(value)
            p.grad = gradient
        lr.fill_(0.1 / (step + 1))

    load(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step(zero_grad=zeroes)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step(zero_grad=zeroes)
    assert real_gpu.only_here(optimizer)
    for step in range(1, len(steps)):
        load(step)
        graph.replay()
        assert all(gradient.any() != zeroes for gradient in gradients)
    torch.cuda.synchronize()

    eager = [nn.Parameter(value.clone()) for value in initial]
    rate = torch.tensor(0.1)
    reference = case.ours(eager, **{**given_options, "lr": rate})
    for step, values in enumerate(steps):
        for p, value in zip(eager, values, strict=True):
            p.grad = value
        rate.fill_(0.1 / (step + 1))
        reference.step()
    ours = {name: value.cpu() for name, value in snapshot(optimizer).items()}
    assert_same_bits(ours, snapshot(reference))


CAPTURED = """
import sys
import torch, dracopt_ext
p = torch.nn.Parameter(torch.ones(10_000, device="cuda"))
p.grad = torch.full_like(p, 0.5)
optimizer = dracopt_ext.SGD([p], lr=0.25, backend=sys.argv[1])
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    optimizer.step()
assert torch.equal(p.cpu(), torch.ones(10_000)), "the capture has stepped"
graph.replay()
graph.replay()
assert torch.equal(p.cpu(), torch.full((10_000,), 0.75)), p
"""


def test_first_step_of_a_process_is_captured(real_gpu: Gpu) -> None:
    """SGD without momentum needs no step before the capture, so CUDA loads our kernels during the capture."""
    if real_gpu.backend == "triton":
        pytest.skip("Triton compiles in a step before the capture")
    done = subprocess.run([sys.executable, "-c", CAPTURED, real_gpu.backend], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@every_tail
def test_steps_on_several_streams(real_gpu: Gpu, max_norm: float | None, zeroes: bool) -> None:
    initial, steps = inputs([5, 300 * TILE], FP32, 12)
    params = [nn.Parameter(value.cuda()) for value in initial]
    optimizer = dracopt_ext.AdamW(params, max_grad_norm=max_norm)
    streams = [torch.cuda.Stream() for _ in range(3)]
    last = torch.cuda.current_stream()
    for number, step in enumerate(steps):
        stream = streams[number % 3]
        stream.wait_stream(last)
        with torch.cuda.stream(stream):
            for p, value in zip(params, step, strict=True):
                p.grad = value.cuda()
            if number % 4 == 3:
                params[0].data = params[0].data.clone()  # another table
            optimizer.step(zero_grad=zeroes)
            assert real_gpu.only_here(optimizer)
        last = stream
    torch.cuda.synchronize()
    ours = {name: value.cpu() for name, value in snapshot(optimizer).items()}
    assert_same_bits(ours, train(dracopt_ext.AdamW, {"max_grad_norm": max_norm}, initial, steps))


def test_table_outlives_its_last_step_on_another_stream(real_gpu: Gpu) -> None:
    """A table's memory belongs to the stream that wrote it, which frees it while the other stream still waits."""
    initial, steps = inputs([5000] * 40, FP32, 3)
    params = [nn.Parameter(value.cuda()) for value in initial]
    optimizer = dracopt_ext.AdamW(params)
    gradients = [[value.cuda() for value in step] for step in steps]

    def step(number: int) -> None:
        for p, gradient in zip(params, gradients[number], strict=True):
            p.grad = gradient
        optimizer.step()

    step(0)
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        torch.cuda._sleep(200_000_000)
        step(1)
        old = params[0].data
        params[0].data = old.clone()
        step(2)  # needs another table and frees the first step's
    rubbish = [
        torch.full((size,), 255, dtype=torch.uint8, device="cuda") for size in (1024, 4096, 16384) for _ in range(50)
    ]
    torch.cuda.synchronize()
    del rubbish, old
    ours = {name: value.cpu() for name, value in snapshot(optimizer).items()}
    assert_same_bits(ours, train(dracopt_ext.AdamW, {}, initial, steps))


@every_tail
def test_host_never_waits(real_gpu: Gpu, max_norm: float | None, zeroes: bool) -> None:
    """step() returns before the GPU has begun with the step."""
    params = [nn.Parameter(torch.ones(1000, device="cuda")) for _ in range(50)]
    optimizer = dracopt_ext.AdamW(params, fused=True, max_grad_norm=max_norm)
    for number in range(4):
        for p in params:
            p.grad = torch.ones_like(p)
        if number == 2:
            params[0].data = params[0].data.clone()  # another table
        optimizer.found_inf = torch.zeros((), device="cuda")
        optimizer.grad_scale = torch.ones((), device="cuda")
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)
        slept = torch.cuda.Event()
        slept.record()
        optimizer.step(zero_grad=zeroes)
        assert real_gpu.only_here(optimizer)
        assert number == 0 or not slept.query()


@pytest.mark.parametrize("name", classes())
def test_model_is_trained_alike(real_gpu: Gpu, name: str) -> None:
    """A twin on the CPU that gets the GPU's gradients keeps the same bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 10))
    twin = copy.deepcopy(model)
    model.cuda()
    make, lr = getattr(dracopt_ext, name), {"SGD": 0.2, "Lion": 1e-3}.get(name, 1e-2)
    ours, theirs = make(model.parameters(), lr=lr), make(twin.parameters(), lr=lr)
    x, y = torch.randn(256, 64, device="cuda"), torch.randint(10, (256,), device="cuda")
    losses = []
    for _ in range(80):
        ours.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.cpu()
        ours.step()
        assert real_gpu.only_here(ours)
        theirs.step()
    assert losses[-1] < 0.8 * losses[0]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.cpu(), q)


# ---- failures and bad input


@pytest.mark.parametrize("function", ["launch", "write_table", "is_capturing"])
def test_failure_is_reported_and_changes_nothing(
    gpu: Gpu, simulated: simulated_gpu.SimulatedGpu, function: str
) -> None:
    params = parameters(gpu, [10, 20])
    optimizer = dracopt_ext.AdamW(params)
    optimizer.step()
    before = snapshot(optimizer)
    params[0].data = params[0].data.clone()  # so that the table must be written
    simulated.fail_in(function)
    with pytest.raises(RuntimeError, match="cudaErrorLaunchFailure") as caught:
        optimizer.step()
    if function != "is_capturing":
        assert "2 tensors in 1 launches" in str(caught.value)
    assert_same_bits(snapshot(optimizer), before)
    simulated.fail_in("")
    optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 2


def test_a_step_that_failed_leaves_no_scaler_behind(gpu: Gpu, simulated: simulated_gpu.SimulatedGpu) -> None:
    params = parameters(gpu, [10])
    optimizer = dracopt_ext.AdamW(params, lr=0.1, capturable=True, fused=True)
    optimizer.step()
    before = params[0].detach().clone()
    simulated.fail_in("launch")
    with pytest.raises(RuntimeError, match="cudaErrorLaunchFailure"):
        scaled(optimizer, gpu, 1.0, 2.0)
    simulated.fail_in("")
    optimizer.found_inf = optimizer.grad_scale = None
    optimizer.step()
    assert not torch.equal(params[0], before)


def test_states_on_another_device(gpu: Gpu) -> None:
    (p,) = parameters(gpu, [10])
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer = dracopt_ext.AdamW([p])
        optimizer.step()
        optimizer.state[p][name] = torch.zeros(10)
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=f"state '{name}' of parameter 0 .* is on another device, cpu"):
            optimizer.step()
        assert_same_bits(snapshot(optimizer), before)
    q = nn.Parameter(torch.ones(10))
    q.grad = torch.ones(10)
    optimizer = dracopt_ext.AdamW([q])
    optimizer.step()
    optimizer.state[q]["step"] = gpu(torch.tensor(1.0))
    with pytest.raises(ValueError, match=f"state 'step' of parameter 0 .* is on another device, {gpu.type}"):
        optimizer.step()


def test_a_learning_rate_that_is_nan(gpu: Gpu) -> None:
    optimizer = dracopt_ext.AdamW(parameters(gpu, [10]))
    optimizer.step()
    optimizer.param_groups[0]["lr"] = math.nan
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['lr'\] is nan; it must be finite"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


@every_rule
def test_checkpoints_cross_devices(gpu: Gpu, case: Case) -> None:
    initial, steps = inputs([9, TILE + 9], FP32, 4)
    expected = train(case.ours, case.options, initial, steps)
    params = [nn.Parameter(value.clone()) for value in initial]
    optimizer = case.ours(params, **case.options)
    for number, step in enumerate(steps):
        place = gpu if number % 2 else Tensor.clone
        saved = pickle.loads(pickle.dumps(optimizer.state_dict())) if number < 2 else optimizer.state_dict()
        params = [nn.Parameter(place(p.detach().cpu())) for p in params]
        optimizer = case.ours(params, **case.options)
        if number:
            optimizer.load_state_dict(saved)
        for p, grad in zip(params, step, strict=True):
            p.grad = place(grad)
        optimizer.step()
    assert_same_bits({name: value.cpu() for name, value in snapshot(optimizer).items()}, expected)


def test_moments_are_created_on_the_gpu(gpu: Gpu) -> None:
    (p,) = parameters(gpu, [4])
    optimizer = dracopt_ext.AdamW([p], state_dtype=BF16)
    optimizer.step()
    state = optimizer.state[p]
    assert {state[name].device.type for name in MOMENTS if name in state} == {gpu.type}
    assert state["step"].device.type == "cpu"
    optimizer = dracopt_ext.AdamW([p], fused=True)
    optimizer.step()
    assert optimizer.state[p]["step"].device.type == gpu.type
