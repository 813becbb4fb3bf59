"""Steps on a GPU that clip the gradients: two launches, with the norm and the bits of the CPU."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dracopt_ext
from dracopt_ext.optim._context import context_of

from .cases import BY_RULE, FAULTS, RULE_CASES, STORAGE, Case, NoOp, assert_same_bits, inputs, snapshot, train
from .test_clip import CHUNKS
from .test_gpu import Gpu, OnGpu, Simulated, distributed, gpu, simulation, with_count  # noqa: F401
from .test_layouts import LAYOUTS, given

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16

every_rule = pytest.mark.parametrize("case", RULE_CASES, ids=str)
counting = pytest.mark.parametrize("counts_on", ["host", "gpu"])


def gradients_of(dtype: torch.dtype) -> list[Tensor]:
    """Gradients of many sizes, and of magnitudes far apart."""
    generator = torch.Generator().manual_seed(0)
    sizes = [0, 1, 5, 511, 512, 513, *CHUNKS]
    numbers = [torch.randn(size, generator=generator, dtype=FP64) for size in sizes]
    return [(x * 10.0 ** (k % 5 - 2)).to(dtype) for k, x in enumerate(numbers)]


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_norm_of_the_cpu(gpu: Gpu, dtype: torch.dtype) -> None:  # noqa: F811
    """The norm has the CPU's bits, whatever the sizes, and the step takes two launches."""
    found = []
    for place in (gpu, Tensor.clone):
        gradients = gradients_of(dtype)
        params = [nn.Parameter(place(torch.ones_like(gradient))) for gradient in gradients]
        optimizer = dracopt_ext.SGD(params, lr=0.1, max_grad_norm=0.5)
        norms = []
        for scale in (1.0, 1e-3, 7.0):
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = place(gradient * scale)
            optimizer.step()
            norms.append(optimizer.grad_norm)
        assert norms[0].device == params[0].device
        found.append(({name: x.cpu() for name, x in snapshot(optimizer).items()}, [norm.item() for norm in norms]))
        if place is gpu:
            assert gpu.only_here(optimizer)
            assert gpu.launches(optimizer) == 2
    assert_same_bits(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@every_rule
@counting
def test_bits_of_the_cpu(gpu: Gpu, case: Case, counts_on: str) -> None:  # noqa: F811
    values = inputs([1, 17, 1000, 4099], FP32, 3)
    options = {"max_grad_norm": 30.0}
    ours = gpu.train(case.ours, {**with_count(case, counts_on), **options, "backend": gpu.backend}, *values)
    assert_same_bits(ours, train(case.ours, {**case.options, **options, "backend": "native"}, *values))


@every_rule
@pytest.mark.parametrize("fault", FAULTS)
def test_bits_of_the_cpu_bites(gpu: Gpu, case: Case, fault: type[NoOp]) -> None:  # noqa: F811
    values = inputs([1, 17, 1000], FP32, 3)
    wrong = gpu.train(fault(case.ours), {**case.options, "max_grad_norm": 30.0}, *values)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(wrong, train(case.ours, {**case.options, "max_grad_norm": 30.0}, *values))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", list(itertools.product((0, 1), repeat=2)), ids=str)
def test_layouts(gpu: Gpu, layout: str, where: tuple[int, int]) -> None:  # noqa: F811
    """A gradient counts in the order of its own memory, and the CPU does the same."""
    case, found = BY_RULE["sgd"], []
    for on_gpu in (True, False):
        places = [(OnGpu(gpu, LAYOUTS[name]) if on_gpu else OnCpu(LAYOUTS[name])) for name in names(layout, where)]
        place = dict(zip(("place", "place_grad"), places, strict=True))
        run = gpu.train if on_gpu else train
        found.append(run(case.ours, {**case.options, "max_grad_norm": 1.0}, *given(FP32), **place))
    assert_same_bits(*found)


def names(layout: str, where: tuple[int, int]) -> list[str]:
    return [layout if chosen else "contiguous" for chosen in where]


class OnCpu(OnGpu):
    """Places tensors in the same layout on the CPU."""

    def __init__(self, view: Any) -> None:
        super().__init__(None, view)  # type: ignore[arg-type]

    def buffer(self, tensor: Tensor) -> Tensor:
        return super(OnGpu, self).buffer(tensor)


def test_norm_over_dtypes_groups_and_devices(gpu: Gpu) -> None:  # noqa: F811
    """The launches of all kernels on a GPU add to one sum. Further devices are added without a wait."""
    for homes in ((gpu,), (gpu, Tensor.clone), (gpu, lambda x: gpu(x, 1))):
        if gpu.devices < 2 and len(homes) == 2 and homes[1] is not Tensor.clone:
            continue
        found = []
        for places in (homes, (Tensor.clone,)):
            generator = torch.Generator().manual_seed(0)
            params = []
            for k, (dtype, size) in enumerate(itertools.product(STORAGE, (5, 5000))):
                place = places[k % len(places)]
                params.append(nn.Parameter(place(torch.ones(size, dtype=dtype))))
                params[-1].grad = place(torch.randn(size, generator=generator).to(dtype))
            optimizer = dracopt_ext.AdamW([{"params": [p]} for p in params], max_grad_norm=1.0)
            for _ in range(2):
                optimizer.step()
            found.append(({name: x.cpu() for name, x in snapshot(optimizer).items()}, optimizer.grad_norm.item()))
        # Across devices the sum is rounded twice.
        assert found[0][1] == pytest.approx(found[1][1], rel=2.0**-51 if len(homes) > 1 else 0)
        if len(homes) == 1:
            assert_same_bits(found[0][0], found[1][0])
        else:
            torch.testing.assert_close(found[0][0], found[1][0])


def scale(optimizer: Any, place: Any, factor: float, delegates: bool) -> Tensor:
    """Does what a GradScaler does before the step. If it ``delegates`` the check, the step sets the number returned."""
    found_inf = place(torch.zeros(()))
    optimizer.grad_scale, optimizer.found_inf = place(torch.tensor(factor)), place(torch.zeros(()))
    if delegates:
        context_of(optimizer).overflow = found_inf
    return found_inf


@every_rule
@counting
@pytest.mark.parametrize("overflows", [(), (0,), (1,)])
def test_overflow_is_found_on_the_way(
    gpu: Gpu,  # noqa: F811
    case: Case,
    counts_on: str,
    overflows: tuple[int, ...],
) -> None:
    """The step finds an overflow itself, changes nothing and says so. Otherwise it unscales."""
    initial, gradients = inputs([1, 700, 4099], FP32, 3)
    params = [nn.Parameter(gpu(value)) for value in initial]
    others = [nn.Parameter(value.clone()) for value in initial]
    ours = case.ours(params, **with_count(case, counts_on), max_grad_norm=20.0)
    plain = case.ours(others, **case.options, max_grad_norm=20.0)
    for number, step in enumerate(gradients):
        before = snapshot(ours)
        for p, q, grad in zip(params, others, step, strict=True):
            p.grad, q.grad = gpu(grad * 1024), grad.clone()
        if number in overflows:
            assert params[1].grad is not None
            params[1].grad[3] = math.inf
        found_inf = scale(ours, gpu, 1024.0, delegates=True)
        ours.step()
        assert found_inf.item() == (number in overflows)
        if number in overflows:
            now = {name: x.cpu() for name, x in snapshot(ours).items()}
            # States whose steps the GPU counts may exist after the first step, as they begin.
            created = {name: x for name, x in now.items() if name not in before}
            assert not created or counts_on == "gpu"
            assert all((x == ("mu_product" in name)).all() for name, x in created.items())
            assert_same_bits({name: now[name] for name in before}, {name: x.cpu() for name, x in before.items()})
        else:
            plain.step()
            assert ours.grad_norm.item() == plain.grad_norm.item()
    assert_same_bits({k: v.cpu() for k, v in snapshot(ours).items()}, snapshot(plain))
    if counts_on == "gpu" and not overflows:
        assert gpu.launches(ours) == 2


@counting
def test_overflow_that_the_scaler_has_found(gpu: Gpu, counts_on: str) -> None:  # noqa: F811
    case = BY_RULE["adam"]
    p = nn.Parameter(gpu(torch.ones(300)))
    optimizer = case.ours([p], **with_count(case, counts_on), max_grad_norm=1.0)
    p.grad = gpu(torch.full((300,), 2.0))
    optimizer.step()
    before = {k: v.cpu() for k, v in snapshot(optimizer).items()}
    scale(optimizer, gpu, 2.0, delegates=False)
    optimizer.found_inf = gpu(torch.ones(()))
    optimizer.step()
    assert_same_bits({k: v.cpu() for k, v in snapshot(optimizer).items()}, before)


def test_without_gradients(gpu: Gpu) -> None:  # noqa: F811
    optimizer = dracopt_ext.AdamW([nn.Parameter(gpu(torch.ones(3)))], max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == 0


@pytest.mark.parametrize("trained", [False, True])
def test_error_if_nonfinite(gpu: Gpu, trained: bool) -> None:  # noqa: F811
    p = nn.Parameter(gpu(torch.ones(3)))
    optimizer = dracopt_ext.AdamW([p], max_grad_norm=1.0, error_if_nonfinite=True)
    p.grad = gpu(torch.ones(3))
    if trained:
        optimizer.step()
    before = {k: v.cpu() for k, v in snapshot(optimizer).items()}
    p.grad[1] = math.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.step()
    assert_same_bits({k: v.cpu() for k, v in snapshot(optimizer).items()}, before)


def test_table_stays(gpu: Simulated, simulation: Any) -> None:  # noqa: F811
    """A step with other gradients and another largest norm writes no table, because the sums are zero again."""
    p = nn.Parameter(gpu(torch.ones(5000)))
    optimizer = dracopt_ext.AdamW([p], max_grad_norm=1.0)
    for number in range(4):
        p.grad = gpu(torch.full((5000,), 1.0 + number))
        optimizer.max_grad_norm = 1.0 + number
        if number == 2:
            tables = gpu.tables()
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx((1 + number) * math.sqrt(5000), rel=1e-15)
    assert gpu.tables() == tables


def test_launch_that_failed_leaves_no_sum(gpu: Simulated, simulation: Any) -> None:  # noqa: F811
    if gpu.backend != "native":
        pytest.skip("of the CUDA kernels' simulation")
    p = nn.Parameter(gpu(torch.ones(5000)))
    optimizer = dracopt_ext.AdamW([p], max_grad_norm=1.0)
    p.grad = gpu(torch.ones(5000))
    optimizer.step()
    for function in ("measure", "launch"):
        simulation.fail_in(function)
        with pytest.raises(RuntimeError, match=r"CUDA could not launch the .*kernel"):
            optimizer.step()
        simulation.fail_in("")
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(math.sqrt(5000), rel=1e-15)


def test_launch_that_failed_leaves_no_part_of_a_sum(
    gpu: Simulated,  # noqa: F811
    simulation: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first of two launches has measured when the second one fails."""
    if gpu.backend != "triton":
        pytest.skip("of Triton")
    launcher = pytest.importorskip("dracopt_ext.triton_kernels.launcher")
    params = [nn.Parameter(gpu(torch.ones(50, dtype=dtype))) for dtype in (FP32, FP64)]
    optimizer = dracopt_ext.AdamW(params, max_grad_norm=1.0)
    for p in params:
        p.grad = gpu(torch.ones_like(p))
    optimizer.step()
    measure, calls = launcher.Launcher.measure, iter(range(10))

    def fail(self: Any, *arguments: Any) -> None:
        if next(calls) == 1:
            raise RuntimeError("no memory")
        measure(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(launcher.Launcher, "measure", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            optimizer.step()
    for p in params:
        p.grad = gpu(torch.full_like(p, 2.0))
    optimizer.step()
    assert optimizer.grad_norm.item() == 20


def test_captured(gpu: Simulated, simulation: Any) -> None:  # noqa: F811
    """A capture takes the same two launches, with a table of its own."""
    p = nn.Parameter(gpu(torch.ones(300)))
    optimizer = dracopt_ext.AdamW([p], capturable=True, max_grad_norm=1.0)
    p.grad = gpu(torch.ones(300))
    optimizer.step()
    simulation.set("capturing", 1)
    optimizer.step()
    simulation.set("capturing", 0)
    assert gpu.launches(optimizer) == 2
    assert optimizer.grad_norm.item() == pytest.approx(math.sqrt(300), rel=1e-15)
    assert optimizer.state[p]["step"].item() == 2


@every_rule
@counting
def test_distributed_tensors(gpu: Gpu, case: Case, counts_on: str, mesh: Any) -> None:  # noqa: F811
    """The norm of shards comes from a launch of its own, and the coefficient stays on the GPU."""
    initial, steps = inputs([0, 1, 1000, 4099], FP32, 3)
    options = {**with_count(case, counts_on), "max_grad_norm": 10.0}
    params = [nn.Parameter(gpu(value) if i == 2 else distributed(gpu(value), mesh)) for i, value in enumerate(initial)]
    others = [nn.Parameter(value.clone()) for value in initial]
    ours, plain = case.ours(params, **options), case.ours(others, **case.options, max_grad_norm=10.0)
    for step in steps:
        for i, (p, q, grad) in enumerate(zip(params, others, step, strict=True)):
            p.grad = gpu(grad) if i == 2 else distributed(gpu(grad), mesh)
            q.grad = grad.clone()
        ours.step()
        plain.step()
        assert ours.grad_norm.item() == pytest.approx(plain.grad_norm.item(), rel=1e-15)
        assert ours.last_backend == {gpu.type: frozenset({gpu.backend})}
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(getattr(p, "_local_tensor", p).detach().cpu(), q.detach())


def test_not_finite_without_a_scaler(gpu: Gpu) -> None:  # noqa: F811
    """Nobody looks for an overflow, although the gradients are zeroed."""
    p = nn.Parameter(gpu(torch.ones(300)))
    optimizer = dracopt_ext.SGD([p], lr=1.0, max_grad_norm=1.0)
    p.grad = gpu(torch.ones(300))
    p.grad[3] = math.inf
    optimizer.step(zero_grad=True)
    assert optimizer.grad_norm.item() == math.inf
    assert not p.grad.cpu().any()
    assert p.detach().cpu().isnan().sum() == 1


def test_scaler_on_another_device(gpu: Gpu) -> None:  # noqa: F811
    """The scaler lies where the loss is. It must learn of an overflow all the same."""
    for case in RULE_CASES:
        p = nn.Parameter(gpu(torch.ones(30)))
        optimizer = case.ours([p], **with_count(case, "gpu"), max_grad_norm=1.0)
        for value in (1.0, math.inf, 1.0):
            p.grad = gpu(torch.full((30,), value))
            before = p.detach().cpu()
            found_inf = scale(optimizer, Tensor.clone, 2.0, delegates=True)
            optimizer.step()
            assert found_inf.item() == math.isinf(value)
            assert torch.equal(p.detach().cpu(), before) == math.isinf(value)


def test_arguments_of_a_step_that_failed(gpu: Simulated, simulation: Any) -> None:  # noqa: F811
    """A capture that needs a kernel fails. The next step has other gradients, and does not clip."""
    if gpu.backend != "triton":
        pytest.skip("of Triton")
    launcher = pytest.importorskip("dracopt_ext.triton_kernels.launcher")
    p = nn.Parameter(gpu(torch.ones(30)))
    optimizer = dracopt_ext.AdamW([p], lr=1.0, capturable=True)
    p.grad = gpu(torch.zeros(30))
    optimizer.step()
    launcher.launcher_for.cache_clear()
    optimizer._dracopt_context.plans.clear()
    optimizer.max_grad_norm = 0.0
    simulation.set("capturing", 1)
    with pytest.raises(RuntimeError, match="has yet to compile"):
        optimizer.step()
    simulation.set("capturing", 0)
    optimizer.max_grad_norm = None
    p.grad = gpu(torch.full((30,), 100.0))
    before = p.detach().cpu()
    optimizer.step()
    assert (p.detach().cpu() < before - 0.1).all()
