"""Masters of parameters in 16 bits, rounding at random, and a dtype for each moment: on every engine the same bits, and
the bits of training in fp32."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dracopt_ext
from dracopt_ext import reference
from dracopt_ext.reference import MOMENTS, current_master, split_master

from .cases import FAULTS, RULE_CASES, SIZES, Case, NoOp, Snapshot, assert_same_bits, classes, inputs, snapshot, train
from .test_gpu import INTERPRETED, ON_GPUS, Gpu, gpu, real_gpu, with_count  # noqa: F401

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

Options = dict[str, Any]
OPTIONS: list[tuple[torch.dtype, torch.dtype, Options]] = [
    (BF16, BF16, {"master_weights": "fp32", "state_dtype": FP32}),
    (BF16, BF16, {"master_weights": "split16", "state_dtype": FP32}),
    (BF16, FP32, {"master_weights": "fp32"}),
    (BF16, FP32, {"master_weights": "split16"}),
    (FP16, FP16, {"master_weights": "fp32", "state_dtype": FP32}),
    (FP16, BF16, {"master_weights": "fp32"}),
    (BF16, BF16, {"stochastic_rounding": True}),
    (BF16, BF16, {"stochastic_rounding": True, "state_dtype": FP32, "rounding_seed": 2**64 - 3}),
    (FP16, FP16, {"stochastic_rounding": True, "rounding_seed": 7}),
    (FP16, FP32, {"stochastic_rounding": "all"}),
    (BF16, BF16, {"stochastic_rounding": "all"}),
    (BF16, BF16, {"stochastic_rounding": "all", "master_weights": "split16"}),
    (FP32, BF16, {"stochastic_rounding": "all", "state_dtype": BF16}),
]
"""The dtypes of parameter and gradient, and the options."""
BY_FORM = {"fp32": ("master", FP32), "split16": ("master_remainder", BF16)}
"""The name and the dtype of the state that holds a master."""


def name_of(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(f"{key}={str(option).removeprefix('torch.')}" for key, option in value.items())
    return str(value).removeprefix("torch.")


every_rule = pytest.mark.parametrize("case", RULE_CASES, ids=str)
every_fault = pytest.mark.parametrize("fault", FAULTS)
every_option = pytest.mark.parametrize(("param", "grad", "options"), OPTIONS, ids=name_of)
every_form = pytest.mark.parametrize("form", list(BY_FORM))
every_gpu = pytest.mark.parametrize("gpu", ["simulated", INTERPRETED, *ON_GPUS], indirect=True)


def given_in(param: torch.dtype, grad: torch.dtype, sizes: Any, steps: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    initial, gradients = inputs(sizes, FP32, steps)
    # The last tensor has numbers at which rounding changes its ways: fp16's subnormal and largest ones, and zeros.
    special = torch.tensor([3e-5, -6.1e-5, 5e-8, 0.0, -0.0, 65504.0, -65519.0, 1e-40, math.inf, math.nan])
    initial.append(special)
    for step in gradients:
        step.append(torch.linspace(-1, 1, len(special)))
    return [t.to(param) for t in initial], [[t.to(grad) for t in step] for step in gradients]


# ---- all engines


@every_rule
@every_option
def test_reference(case: Case, param: torch.dtype, grad: torch.dtype, options: Options) -> None:
    given = given_in(param, grad, SIZES, 4)
    ours = train(case.ours, {**case.options, **options, "backend": "native"}, *given)
    assert_same_bits(ours, train(case.ours, {**case.options, **options, "backend": "reference"}, *given))


@every_gpu
@every_rule
@every_option
def test_gpu(gpu: Gpu, case: Case, param: torch.dtype, grad: torch.dtype, options: Options) -> None:  # noqa: F811
    given = given_in(param, grad, gpu.sizes, 3)
    ours = gpu.train(case.ours, {**case.options, **options, "backend": gpu.backend}, *given)
    assert_same_bits(ours, train(case.ours, {**case.options, **options, "backend": "native"}, *given))


@every_gpu
@every_rule
@pytest.mark.parametrize("counts", ["host", "gpu"])
@pytest.mark.parametrize("kind", [True, "all"])
def test_neighbours_that_do_not_round_on_a_gpu(gpu: Gpu, case: Case, counts: str, kind: Any) -> None:  # noqa: F811
    """One group has parameters in bf16, which are rounded at random, and parameters in fp32, which are not."""
    options = {**with_count(case, counts), "stochastic_rounding": kind}
    for dtypes in ([BF16, FP32], [FP32, BF16], [BF16, FP32, BF16]):
        initial, gradients = inputs([300] * len(dtypes), FP32, 3)
        given = (
            [t.to(d) for t, d in zip(initial, dtypes, strict=True)],
            [[t.to(d) for t, d in zip(step, dtypes, strict=True)] for step in gradients],
        )
        found = gpu.train(case.ours, {**options, "backend": gpu.backend}, *given)
        expected = train(case.ours, {**case.options, "stochastic_rounding": kind, "backend": "native"}, *given)
        assert_same_bits(found, expected)
    for fault in FAULTS:
        with pytest.raises(AssertionError, match="elements differ"):
            assert_same_bits(gpu.train(fault(case.ours), {**options, "backend": gpu.backend}, *given), expected)


@every_gpu
@every_option
def test_misaligned_tensors_on_a_gpu(gpu: Gpu, param: torch.dtype, grad: torch.dtype, options: Options) -> None:  # noqa: F811
    """Each stream begins elsewhere within a vector."""
    offsets = iter(range(10**6))

    def misplaced(tensor: Tensor) -> Tensor:
        offset = 3 * next(offsets) % 8
        if tensor.dim() == 0:
            return gpu(tensor)
        buffer = gpu(torch.zeros(tensor.numel() + 8, dtype=tensor.dtype))
        return buffer[offset : offset + tensor.numel()].copy_(tensor)

    given = given_in(param, grad, gpu.misaligned_sizes, 2)
    given_options = {"amsgrad": True, "lr": 0.01, **options}
    ours = gpu.train(
        dracopt_ext.AdamW, {**given_options, "backend": gpu.backend}, *given, place=misplaced, place_state=misplaced
    )
    assert_same_bits(ours, train(dracopt_ext.AdamW, {**given_options, "backend": "native"}, *given))


@every_gpu
def test_one_launch_for_any_mix(gpu: Gpu) -> None:  # noqa: F811
    if gpu.backend == "triton":
        pytest.skip("Triton compiles a kernel for each mix")
    params = [nn.Parameter(gpu(torch.ones(size, dtype=dtype))) for size in (5, 5000) for dtype in (BF16, FP16, FP32)]
    optimizer = dracopt_ext.AdamW(params, master_weights="fp32", stochastic_rounding="all", state_dtype=BF16)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert gpu.launches(optimizer) == 1
        assert gpu.only_here(optimizer)


# ---- masters


def masters_of(trained: Snapshot) -> Snapshot:
    """Replaces parameters and the states of their masters by the masters in fp32."""
    found = dict(trained)
    for form, dtype in BY_FORM.values():
        for name in [name for name in trained if name.endswith(f".{form}")]:
            param = name.removesuffix(f".{form}")
            master = found.pop(name)
            found[param] = current_master(trained[param], master.short().view(dtype) if dtype == BF16 else master)
    return found


def in_bf16_and_fp32(case: Case, form: str, steps: int = 6) -> tuple[Options, Any, Any]:
    """Returns options, inputs in bf16, and the same numbers in fp32."""
    initial, gradients = inputs(SIZES, FP32, steps)
    rounded = [t.bfloat16() for t in initial], [[t.bfloat16() for t in step] for step in gradients]
    wide = [t.float() for t in rounded[0]], [[t.float() for t in step] for step in rounded[1]]
    return {**case.options, "master_weights": form, "state_dtype": FP32}, rounded, wide


@every_rule
@every_form
def test_masters_are_those_of_training_in_fp32(case: Case, form: str) -> None:
    options, rounded, wide = in_bf16_and_fp32(case, form)
    ours, theirs = train(case.ours, options, *rounded), train(case.ours, case.options, *wide)
    assert_same_bits(masters_of(ours), theirs)
    for i in range(len(SIZES)):
        assert ours[f"0.{i}"].dtype == BF16
        assert torch.equal(ours[f"0.{i}"], split_master(theirs[f"0.{i}"])[0])
        assert f"0.{i}.{BY_FORM[form][0]}" in ours


@every_rule
@every_form
@every_fault
def test_masters_bite(case: Case, form: str, fault: type[NoOp]) -> None:
    options, rounded, wide = in_bf16_and_fp32(case, form)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(masters_of(train(fault(case.ours), options, *rounded)), train(case.ours, case.options, *wide))


def trained(make: Callable[..., Any], dtype: torch.dtype = BF16, steps: int = 3, **options: Any) -> Any:
    initial, gradients = inputs([64, 1000], FP32, steps)
    optimizer = make([nn.Parameter(value.to(dtype)) for value in initial], **options)
    for step in gradients:
        go_on(optimizer, step)
    return optimizer


def params_of(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def go_on(optimizer: Any, gradients: list[Tensor] | None = None, steps: int = 1) -> None:
    """Takes steps with the same gradients."""
    for _ in range(steps):
        for i, p in enumerate(params_of(optimizer)):
            grad = torch.linspace(-1, 1, p.numel()).view_as(p) if gradients is None else gradients[i]
            p.grad = grad.to(p.dtype)
        optimizer.step()


CHANGES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "copy_": lambda p, new: p.data.copy_(new),
    "under no_grad": lambda p, new: torch.no_grad()(p.copy_)(new),
    "data": lambda p, new: setattr(p, "data", new.clone()),
    "swap_tensors": lambda p, new: torch.utils.swap_tensors(p, nn.Parameter(new.clone())),
}


@every_form
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_parameter_that_the_user_changes_takes_its_masters_place(form: str, change: str, backend: str) -> None:
    """The next step begins from the parameter. A split master keeps its lower half, which is below what bf16 holds."""
    optimizer = trained(dracopt_ext.AdamW, master_weights=form, state_dtype=FP32, lr=0.01, backend=backend)
    p = params_of(optimizer)[1]
    new = (torch.randn(1000) * 3).bfloat16()
    old = p.detach().clone()
    new[:10] = old[:10]  # these keep their masters
    before = optimizer.master_params()[1]
    state = {name: value.clone() for name, value in optimizer.state[p].items()}
    if change == "swap_tensors":
        state_of_p = optimizer.state.pop(p)
    CHANGES[change](p, new)
    if change == "swap_tensors":
        optimizer.state[p] = state_of_p
    go_on(optimizer)
    start = torch.where(new == old, before, new.float())
    if form == "split16":
        start = current_master(new, state["master_remainder"])
        assert ((start - new.float()).abs() <= new.float().abs() * 2**-8).all()  # half a unit in the last place
        assert torch.equal(start[:10], before[:10])
    alone = nn.Parameter(start)
    alone.grad = torch.linspace(-1, 1, 1000).bfloat16().float()
    other = dracopt_ext.AdamW([alone], lr=0.01)
    other.state[alone] = {name: value for name, value in state.items() if "master" not in name}
    other.step()
    assert torch.equal(optimizer.master_params()[1], alone)


@every_gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=name_of)
@pytest.mark.parametrize("grad", [BF16, FP16], ids=name_of)
def test_a_parameter_that_changes_on_a_gpu(gpu: Gpu, dtype: torch.dtype, grad: torch.dtype) -> None:  # noqa: F811
    """Vectors and single elements, in loops for certain dtypes and in the loop for any."""
    found = []
    for place, backend in ((gpu, gpu.backend), (Tensor.clone, "native")):
        p = nn.Parameter(place(torch.linspace(-2, 2, 1003).to(dtype)))
        optimizer = dracopt_ext.SGD([p], lr=0.01, master_weights="fp32", backend=backend)
        p.grad_dtype = grad
        for step in range(3):
            p.grad = place(torch.linspace(1, -1, 1003).to(grad))
            optimizer.step()
            if step == 1:
                p.data[::3] = 0.7
        found.append({"p": p.detach().cpu(), "master": optimizer.state[p]["master"].cpu()})
    assert_same_bits(*found)
    assert (found[0]["master"][::3] - 0.7).abs().max() < 0.02


def test_masters_learn_where_bf16_stalls() -> None:
    """An update of 1/1000 of the parameter is less than half the distance to the next bf16 number."""
    found = {}
    ways: dict[str, Options] = {
        "plain": {},
        "masters": {"master_weights": "split16"},
        "random": {"stochastic_rounding": True},
    }
    for way, options in ways.items():
        p = nn.Parameter(torch.ones(1000, dtype=BF16))
        optimizer = dracopt_ext.SGD([p], lr=0.001, **options)
        for _ in range(200):
            p.grad = torch.ones_like(p)
            optimizer.step()
        found[way] = p.float().mean().item()
    assert found["plain"] == 1
    assert abs(found["masters"] - 0.8) < 2**-9
    # A step moves by 1/256 with the probability 0.256, so that 200 steps of 1000 elements vary by this much.
    deviation = 2**-8 * math.sqrt(200 * 0.256 * 0.744 / 1000)
    assert abs(found["random"] - 0.8) < 5 * deviation


def test_parameters_in_fp32_and_fp64_are_their_own_masters() -> None:
    params = [nn.Parameter(torch.ones(100, dtype=dtype)) for dtype in (BF16, FP32, FP64)]
    optimizer = dracopt_ext.AdamW(params, master_weights="fp32")
    go_on(optimizer)
    assert ["master" in optimizer.state[p] for p in params] == [True, False, False]
    assert optimizer.last_backend == {"cpu": frozenset({"native"})}
    masters = optimizer.master_params()
    assert masters[1] is params[1]
    assert masters[2] is params[2]
    assert masters[0].dtype == FP32


@every_form
def test_master_params_are_copies(form: str) -> None:
    fresh = dracopt_ext.AdamW([nn.Parameter(torch.ones(3, dtype=BF16))], master_weights=form)
    assert torch.equal(fresh.master_params()[0], torch.ones(3))
    optimizer = trained(dracopt_ext.AdamW, master_weights=form)
    before = snapshot(optimizer)
    masters = optimizer.master_params()
    for master, p in zip(masters, params_of(optimizer), strict=True):
        assert torch.equal(split_master(master)[0], p)
        assert not torch.equal(master, p.float())
        master.zero_()
    assert_same_bits(snapshot(optimizer), before)


@every_gpu
@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf, math.nan, 3.38e38])
def test_halves_that_make_no_master(gpu: Gpu, value: float) -> None:  # noqa: F811
    """Zero with a negative lower half would be NaN. The parameter is the master then, as after pruning."""
    for place, backend in ((gpu, gpu.backend), (Tensor.clone, "native"), (Tensor.clone, "reference")):
        p = nn.Parameter(place(torch.linspace(-2, 2, 1003).bfloat16()))
        optimizer = dracopt_ext.SGD([p], lr=0.01, master_weights="split16", backend=backend)
        p.grad = place(torch.linspace(1, -1, 1003).bfloat16())
        optimizer.step()
        p.data.fill_(value)
        master = optimizer.master_params()[0].cpu()
        p.grad.zero_()
        optimizer.step()
        for found in (master, optimizer.master_params()[0].cpu(), p.detach().float().cpu()):
            assert torch.allclose(found, torch.full_like(found, value), rtol=2**-8, atol=1e-30, equal_nan=True) or (
                math.isinf(value) and (found.abs() >= 3.38e38).all()
            )


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_master_is_not_taken_for_a_moment(backend: str) -> None:
    """The state keeps its size while the master leaves and a momentum comes, and the other way round."""
    p = nn.Parameter(torch.ones(4, dtype=BF16))
    optimizer = dracopt_ext.SGD([p], lr=0.1, master_weights="fp32", backend=backend)
    go_on(optimizer)
    p.grad = None
    p.data = p.data.float()
    optimizer.param_groups[0]["momentum"] = 0.9
    before, grad = p.detach().clone(), torch.linspace(-1, 1, 4)
    go_on(optimizer)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], grad)
    assert torch.allclose(p, before - 0.1 * grad)
    p.grad = None
    p.data = p.data.bfloat16()
    optimizer.param_groups[0]["momentum"] = 0
    del optimizer.state[p]["master"]
    go_on(optimizer)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], grad)


# ---- rounding at random


def rounded_once(numbers: Tensor, **options: Any) -> Tensor:
    """Returns these numbers as a step that changes nothing else rounds them: a step of SGD from zero."""
    p = nn.Parameter(torch.zeros(numbers.shape, dtype=BF16))
    p.grad_dtype = numbers.dtype
    p.grad = -numbers
    dracopt_ext.SGD([p], lr=1.0, **{"stochastic_rounding": True, **options}).step()
    return p.detach()


def test_the_mean_of_many_roundings_is_the_number() -> None:
    number = 1 + 0.3 * 2**-7  # bf16 has 1 and 1 + 2^-7
    rounded = rounded_once(torch.full((200_000,), number))
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
    deviation = 2**-7 * math.sqrt(0.3 * 0.7 / 200_000)
    assert abs(rounded.double().mean().item() - torch.tensor(number).double().item()) < 5 * deviation


def test_elements_and_steps_and_parameters_and_seeds_differ() -> None:
    numbers = torch.full((1000,), 1 + 0.5 * 2**-7)

    def of(index: int, steps: int, seed: int) -> Tensor:
        params = [nn.Parameter(torch.zeros(1000, dtype=BF16)) for _ in range(index + 1)]
        optimizer = dracopt_ext.SGD(params, lr=1.0, stochastic_rounding=True, rounding_seed=seed)
        for _ in range(steps):
            params[-1].data.zero_()
            params[-1].grad_dtype = FP32
            params[-1].grad = -numbers
            optimizer.step()
        return params[-1].detach()

    found = [of(0, 1, 0), of(0, 2, 0), of(1, 1, 0), of(0, 1, 1), of(0, 1, 2**32)]
    assert torch.equal(found[0], of(0, 1, 0))
    for i, a in enumerate(found):
        assert 0.4 < (a > 1).double().mean() < 0.6
        for b in found[:i]:
            # Half of the elements agree by chance, with a deviation of 16.
            assert abs((a == b).sum() - 500) < 5 * 16


@pytest.mark.parametrize("options", [{"stochastic_rounding": True}, {"stochastic_rounding": "all"}], ids=name_of)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_no_learning_rate_leaves_parameters_alone(options: Options, backend: str) -> None:
    for case in RULE_CASES:
        optimizer = trained(case.ours, steps=0, lr=0.0, backend=backend, **options)
        before = [p.detach().clone() for p in params_of(optimizer)]
        go_on(optimizer, steps=3)
        assert all(torch.equal(p, old) for p, old in zip(params_of(optimizer), before, strict=True))


@every_rule
@every_fault
def test_rounding_at_random_bites(case: Case, fault: type[NoOp]) -> None:
    """The reference would notice parameters that stay, and fp32 states of another rule, which parameters show late."""
    given = given_in(BF16, BF16, SIZES, 4)
    options = {**case.options, "stochastic_rounding": True, "state_dtype": FP32}
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(
            train(fault(case.ours), options, *given), train(case.ours, {**options, "backend": "reference"}, *given)
        )


def test_threads_and_offsets_and_layouts_change_no_bit() -> None:
    """The number of an element is its place in the memory of its tensor, whatever lies around it."""
    initial, gradients = inputs([60_000], FP32, 3)
    options = {"lr": 0.1, "stochastic_rounding": "all", "backend": "native"}

    def run(place: Callable[[Tensor], Tensor], place_grad: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        given = [t.bfloat16() for t in initial], [[t.bfloat16() for t in step] for step in gradients]
        return train(dracopt_ext.AdamW, options, *given, place=place, place_grad=place_grad)["0.0"].flatten()

    def shifted(tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.numel() + 8, dtype=tensor.dtype)[3 : 3 + tensor.numel()].copy_(tensor)

    def gaps(tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.numel(), 3, dtype=tensor.dtype)[:, 1].copy_(tensor)

    def matrix(tensor: Tensor) -> Tensor:
        return tensor.view(200, 300).clone()

    def transposed(tensor: Tensor) -> Tensor:
        return tensor.view(200, 300).t().contiguous().t()

    expected = run(Tensor.clone)
    for place in (shifted, gaps, matrix):
        assert torch.equal(run(place), expected)
    assert torch.equal(run(matrix, transposed), expected)
    torch.set_num_threads(1)
    assert torch.equal(run(Tensor.clone), expected)
    # The parameter's memory has another order here, so that other elements get these bits.
    assert not torch.equal(run(transposed), expected)
    rows_first = run(lambda tensor: tensor.view(300, 200).t(), lambda tensor: tensor.view(300, 200).t())
    assert torch.equal(rows_first.view(200, 300).t().flatten(), expected)


@pytest.mark.parametrize("place", ["gaps", "transposed", "permuted"])
@every_option
def test_layouts(place: str, param: torch.dtype, grad: torch.dtype, options: Options) -> None:
    """Parameters, gradients and masters may lie anyhow, and differently from each other."""
    places: dict[str, Callable[[Tensor], Tensor]] = {
        "gaps": lambda t: torch.zeros(12, 70, 20, dtype=t.dtype)[:, ::2, 1:19:2].copy_(t.view(12, 35, 9)),
        "transposed": lambda t: t.view(12, 35, 9).transpose(0, 1).contiguous().transpose(0, 1),
        "permuted": lambda t: t.view(12, 35, 9).permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }
    whole: Callable[[Tensor], Tensor] = lambda t: t.view(12, 35, 9).clone()  # noqa: E731
    initial, gradients = inputs([12 * 35 * 9], FP32, 3)
    given = [t.to(param) for t in initial], [[t.to(grad) for t in step] for step in gradients]
    ways = [(places[place], whole, whole), (whole, places[place], whole), (whole, whole, places[place])]
    for place_param, place_grad, place_state in ways:
        found = []
        for backend in ("native", "reference"):
            options = {**options, "amsgrad": True, "lr": 0.01, "backend": backend}
            make = dracopt_ext.AdamW

            def in_place(t: Tensor, place_state: Any = place_state) -> Tensor:
                return t.clone() if t.dim() == 0 else place_state(t.reshape(-1))

            found.append(train(make, options, *given, place=place_param, place_grad=place_grad, place_state=in_place))
        assert_same_bits(*found)


# ---- a dtype for each moment


def test_a_dtype_for_each_moment() -> None:
    wanted = {"exp_avg": BF16, "exp_avg_sq": FP32, "max_exp_avg_sq": FP16}
    optimizer = trained(dracopt_ext.AdamW, FP16, state_dtype=wanted, amsgrad=True)
    assert optimizer.last_backend == {"cpu": frozenset({"native"})}
    for p in params_of(optimizer):
        assert {name: optimizer.state[p][name].dtype for name in wanted} == wanted
    assert optimizer.state_dtype == wanted
    theirs = trained(dracopt_ext.AdamW, FP16, state_dtype=wanted, amsgrad=True, backend="reference")
    assert_same_bits(snapshot(optimizer), snapshot(theirs))
    loaded = trained(dracopt_ext.AdamW, FP16, steps=0, state_dtype={"exp_avg": FP64}, amsgrad=True)
    loaded.load_state_dict(optimizer.state_dict())
    state = loaded.state[params_of(loaded)[0]]
    assert [state[name].dtype for name in wanted] == [FP64, FP16, FP16]
    assert torch.equal(state["exp_avg"], optimizer.state[params_of(optimizer)[0]]["exp_avg"].double())
    loaded.state_dtype = {"exp_avg_sq": BF16}
    assert loaded.state_dtype == {"exp_avg_sq": BF16}
    with pytest.raises(ValueError, match="the key 'moment'"):
        loaded.state_dtype = {"moment": BF16}
    assert loaded.state_dtype == {"exp_avg_sq": BF16}


# ---- checkpoints


def reloaded(optimizer: Any, make: Callable[..., Any], **options: Any) -> Any:
    """Returns a new optimizer of the same parameters' copies, which has loaded the other one's state."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = make([nn.Parameter(p.detach().clone()) for p in params_of(optimizer)], **options)
    other.load_state_dict(torch.load(file))
    return other


@every_rule
@every_option
def test_training_goes_on_as_if_it_had_not_stopped(
    case: Case, param: torch.dtype, grad: torch.dtype, options: Options
) -> None:
    options = {**case.options, **options}
    optimizer = trained(case.ours, param, **options)
    other = reloaded(optimizer, case.ours, **options)
    for copied in (other, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert_same_bits(snapshot(copied), snapshot(optimizer))
    same = copy.deepcopy(optimizer)
    for each in (optimizer, other, same):
        go_on(each, steps=2)
    assert_same_bits(snapshot(other), snapshot(optimizer))
    assert_same_bits(snapshot(same), snapshot(optimizer))


@every_form
@pytest.mark.parametrize("name", classes(in_torch=True))
def test_torch_loads_our_checkpoints_and_we_load_torchs(form: str, name: str) -> None:
    """torch takes everything except the masters, which it keeps and ignores."""
    options = {"momentum": 0.9} if name == "SGD" else {}
    ours = trained(getattr(dracopt_ext, name), master_weights=form, **options)
    theirs = reloaded(ours, getattr(torch.optim, name), **options)
    go_on(theirs)
    plain = trained(getattr(torch.optim, name), **options)
    again = reloaded(plain, getattr(dracopt_ext, name), master_weights=form, **options)
    for p, master in zip(params_of(again), again.master_params(), strict=True):
        assert torch.equal(master, p.float())
        assert [key for key in MOMENTS if key in again.state[p]]
        assert again.state[p][BY_FORM[form][0]].dtype == BY_FORM[form][1]
    go_on(again, steps=2)
    assert not any(torch.equal(m, p.float()) for m, p in zip(again.master_params(), params_of(again), strict=True))
    without = reloaded(ours, getattr(dracopt_ext, name), **options)
    assert not any("master" in name for p in params_of(without) for name in without.state[p])
    go_on(without)


def test_split_masters_load_whole_ones() -> None:
    """Checkpoints of TransformerEngine name them ``master_param``. Its parameters have rounded ties to even."""
    master = torch.randn(5000)
    bits = master.view(torch.int32)
    bits[:1000] = bits[:1000] & ~0xFFFF | 0x8000
    p = nn.Parameter(master.bfloat16())
    theirs = torch.optim.AdamW([p])
    p.grad = torch.zeros_like(p)
    theirs.step()
    saved = theirs.state_dict()
    for key, form in (("master_param", "split16"), ("master", "split16"), ("master_param", "fp32")):
        saved["state"][0] = {**{k: v for k, v in saved["state"][0].items() if "master" not in k}, key: master}
        ours = dracopt_ext.AdamW([nn.Parameter(master.bfloat16())], master_weights=form)
        ours.load_state_dict(saved)
        loaded = ours.master_params()[0]
        is_odd_tie = (bits & 0xFFFF == 0x8000) & (bits >> 16 & 1 == 0) & (form == "split16")
        assert 300 < is_odd_tie.sum() < 700 or form == "fp32"
        assert torch.equal(loaded[~is_odd_tie], master[~is_odd_tie])
        assert torch.equal(loaded.view(torch.int32)[is_odd_tie], bits[is_odd_tie] - 1)
        assert torch.equal(params_of(ours)[0], master.bfloat16())
        assert set(ours.state[params_of(ours)[0]]) == {"step", "exp_avg", "exp_avg_sq", BY_FORM[form][0]}


def of_another_library(optimizer: Any) -> tuple[list[dict[str, Tensor]], list[dict[str, Any]]]:
    """Returns the states of an optimizer's parameters, without step counts, and the groups with them."""
    states = [
        {name: value for name, value in optimizer.state[p].items() if name != "step"} for p in params_of(optimizer)
    ]
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    for group in groups:
        group["step"] = 3
        for key in ("foreach", "maximize", "capturable", "differentiable", "fused", "amsgrad"):
            del group[key]
    return states, groups


def two_groups(dtypes: tuple[torch.dtype, ...] = (BF16, BF16, BF16), **options: Any) -> Any:
    values = [t.to(dtype) for t, dtype in zip(inputs([64, 1000, 15], FP32, 1)[0], dtypes, strict=True)]
    params = [nn.Parameter(value) for value in (values[0].view(8, 8), *values[1:])]
    return dracopt_ext.AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.01}], **options)


@every_form
@pytest.mark.parametrize("library", ["apex", "Megatron", "DeepSpeed", "TransformerEngine"])
def test_checkpoints_of_other_libraries(form: str, library: str) -> None:
    """Training goes on with the masters, moments and step counts of checkpoints that look like theirs."""
    dtypes = (BF16, BF16, BF16) if library == "DeepSpeed" else (BF16, FP32, BF16)
    theirs = two_groups(dtypes, master_weights="fp32", state_dtype=FP32)
    go_on(theirs, steps=3)
    states, groups = of_another_library(theirs)
    masters = [state.pop("master", None) for state in states]
    saved: dict[str, Any] = {"state": dict(enumerate(states)), "param_groups": groups}
    by_group = [masters[:2], masters[2:]]
    if library == "TransformerEngine":
        for state, master in zip(states, masters, strict=True):
            state.update({} if master is None else {"master_param": master})
    elif library == "DeepSpeed":
        padding = torch.zeros(7)
        flat = [
            {name: torch.cat([s[name].flatten() for s in of_group] + [padding]) for name in of_group[0]}
            for of_group in (states[:2], states[2:])
        ]
        for index, group in enumerate(groups):
            group["params"] = [index]
        inner = {"state": dict(enumerate(flat)), "param_groups": groups}
        whole = [torch.cat([m.flatten() for m in of_group] + [padding]) for of_group in by_group]
        saved = {"optimizer_state_dict": inner, "fp32_groups_flat": whole, "cur_iter": 3}
    else:
        shorts = [[master for master in of_group if master is not None] for of_group in by_group]
        keys = (
            ("optimizer_state_dict", "fp32_from_fp16") if library == "apex" else ("optimizer", "fp32_from_fp16_params")
        )
        saved = dict(zip(keys, (saved, shorts), strict=True))
    ours = two_groups(dtypes, master_weights=form, state_dtype=FP32)
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        p.data.copy_(q)
    ours.load_state_dict(saved)
    for optimizer in (ours, theirs):
        go_on(optimizer, steps=2)
    for p, q in zip(ours.master_params(), theirs.master_params(), strict=True):
        assert torch.equal(p, q)
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(ours.state[p]["exp_avg_sq"], theirs.state[q]["exp_avg_sq"])
        assert ours.state[p]["step"] == 5
    assert "step" not in ours.param_groups[0]


@pytest.mark.parametrize(
    ("masters", "error"),
    [
        ([[torch.zeros(8, 8)], [torch.zeros(15)]], "group 0 of the checkpoint has 1 masters for 2 parameters"),
        ([[torch.zeros(8, 8), torch.zeros(1000)]], "masters for 1 groups, not 2"),
        ([torch.zeros(1000), torch.zeros(15)], "'master' of group 0 .* has 1000 elements for 1064"),
        ("more", "group 1 of the checkpoint has 2 parameters, not 1"),
    ],
)
def test_checkpoints_of_other_libraries_that_lack_masters(masters: Any, error: str) -> None:
    optimizer = two_groups(master_weights="fp32")
    go_on(optimizer)
    before, inner = snapshot(optimizer), optimizer.state_dict()
    if masters == "more":
        masters = [[torch.zeros(8, 8), torch.zeros(1000)], [torch.zeros(15)]]
        inner["param_groups"][1]["params"].append(3)
    with pytest.raises(ValueError, match=error):
        optimizer.load_state_dict({"optimizer_state_dict": inner, "fp32_from_fp16": masters})
    assert_same_bits(snapshot(optimizer), before)


def test_masters_of_parameters_that_have_no_moments_yet() -> None:
    """Other libraries make masters before a parameter has its first gradient."""
    params = [nn.Parameter(torch.ones(3, dtype=BF16)) for _ in range(2)]
    masters = [nn.Parameter(torch.full((3,), 1.001)) for _ in params]
    inner = torch.optim.Adam(masters)
    masters[0].grad = torch.ones(3)
    inner.step()
    for backend in ("native", "reference"):
        optimizer = dracopt_ext.Adam(params, master_weights="fp32", backend=backend)
        optimizer.load_state_dict({"optimizer_state_dict": inner.state_dict(), "fp32_from_fp16": [masters]})
        go_on(optimizer)
        alone = nn.Parameter(torch.full((3,), 1.001))
        alone.grad = torch.linspace(-1, 1, 3)
        dracopt_ext.Adam([alone]).step()
        assert torch.equal(optimizer.master_params()[1], alone)
        assert [optimizer.state[p]["step"].item() for p in params] == [2, 1]


def test_loading_without_masters_is_as_before() -> None:
    """Users' hooks see the dict first, and users' entries stay."""
    optimizer = trained(dracopt_ext.Adam)
    optimizer.param_groups[0]["step"] = 7
    optimizer.state[params_of(optimizer)[0]].update({"master": 1, "master_param": 2})
    saved = optimizer.state_dict()
    other = trained(dracopt_ext.Adam, steps=0)
    other.register_load_state_dict_pre_hook(lambda _, wrapped: wrapped["inner"])
    other.load_state_dict({"inner": saved})
    assert other.param_groups[0]["step"] == 7
    state = other.state[params_of(other)[0]]
    assert (state["master"], state["master_param"]) == (1, 2)
    go_on(other)


WRONG_MASTERS: list[tuple[str, str, Any, str]] = [
    (
        "fp32",
        "master",
        torch.zeros(63),
        r"'master' of parameter 0 of group 0 \(shape \[64\]\) has another shape, \[63\]",
    ),
    ("fp32", "master", torch.zeros(64, dtype=BF16), "of parameter 0 .* must be in torch.float32, not torch.bfloat16"),
    ("fp32", "master_remainder", torch.zeros(64, dtype=BF16), "only the lower half of the master of parameter 0"),
    (
        "split16",
        "master_remainder",
        torch.zeros(64),
        "'master_remainder' of .* must be in torch.bfloat16, not torch.float32",
    ),
    (
        "split16",
        "master_param",
        torch.zeros(64, dtype=FP64),
        "'master_param' of .* must be in torch.float32, not torch.float64",
    ),
    ("fp32", "master", 3.0, "'master' of parameter 0 .* must be a tensor, not float"),
]


@pytest.mark.parametrize(("form", "name", "master", "error"), WRONG_MASTERS)
def test_wrong_masters_of_a_checkpoint(form: str, name: str, master: Any, error: str) -> None:
    optimizer = trained(dracopt_ext.AdamW, master_weights=form)
    saved = trained(dracopt_ext.AdamW, steps=1).state_dict()
    saved["state"][0][name] = master
    saved["param_groups"][0]["lr"] = 0.7
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=error):
        optimizer.load_state_dict(saved)
    assert_same_bits(snapshot(optimizer), before)
    assert optimizer.param_groups[0]["lr"] == 1e-3


WRONG_STATES: list[tuple[str, Any, type[Exception], str]] = [
    ("fp32", None, KeyError, "the state of parameter 1 .* has no 'master'"),
    ("split16", None, KeyError, "the state of parameter 1 .* has no 'master_remainder'"),
    ("fp32", 3, ValueError, "'master' of parameter 1 .* must be a Tensor, not int"),
    ("fp32", torch.zeros(999), ValueError, r"'?master'? of parameter 1 .* has another shape, \[999\]"),
    ("fp32", torch.zeros(1000, dtype=FP64), ValueError, "'master' of parameter 1 .* has a dtype that does not fit"),
    ("fp32", torch.zeros(1000, dtype=torch.int16), ValueError, "has a dtype that does not fit, torch.int16"),
    ("split16", torch.zeros(1000), ValueError, "'master_remainder' .* has a dtype that does not fit, torch.float32"),
    ("split16", torch.zeros(1000, dtype=FP16), ValueError, "has a dtype that does not fit, torch.float16"),
]


@pytest.mark.parametrize(("form", "master", "kind", "error"), WRONG_STATES)
@pytest.mark.parametrize("backend", ["native", "reference"])
@every_rule
def test_wrong_masters_in_a_state(
    form: str, master: Any, kind: type[Exception], error: str, backend: str, case: Case
) -> None:
    optimizer = trained(case.ours, master_weights=form, backend=backend, **case.options)
    p, name = params_of(optimizer)[1], BY_FORM[form][0]
    del optimizer.state[p][name]
    before = snapshot(optimizer)
    if master is not None:
        optimizer.state[p][name] = master
    with pytest.raises(kind, match=error):
        go_on(optimizer)
    optimizer.state[p].pop(name, None)
    assert_same_bits(snapshot(optimizer), before)
    del optimizer.state[p]
    go_on(optimizer)


# ---- what is refused


REFUSED: list[tuple[Options, torch.dtype, str]] = [
    ({"master_weights": "bf16"}, BF16, "master_weights='bf16' is none of None, 'fp32' and 'split16'"),
    ({"master_weights": "fp32"}, FP32, r"is for parameters in bf16 or fp16, but parameter 0 of group 0 \(shape"),
    ({"master_weights": "split16"}, FP16, r"serves bf16 only.*, but parameter 0 of group 0 .* is torch.float16"),
    ({"master_weights": "fp32"}, torch.complex64, r"real floating-point parameters only, but parameter 0 of group 0"),
    ({"master_weights": "fp32"}, torch.int32, r"real floating-point parameters only, but parameter 0 of group 0"),
    ({"stochastic_rounding": "some"}, BF16, "stochastic_rounding='some' is none of False, True and 'all'"),
    ({"stochastic_rounding": True}, FP32, "stochastic_rounding=True is for parameters in bf16 or fp16"),
    ({"stochastic_rounding": "all"}, FP32, "stochastic_rounding='all' is for parameters in bf16 or fp16"),
    ({"stochastic_rounding": True, "master_weights": "fp32"}, BF16, "has nothing to do beside master_weights"),
    ({"stochastic_rounding": True, "rounding_seed": -1}, BF16, "rounding_seed is -1; it must be at least 0"),
    ({"rounding_seed": 2**64}, BF16, "it must be at least 0 and less than 2\\^64"),
    ({"state_dtype": {"exp_avg": torch.int8}}, BF16, "is none of torch.float64, torch.float32, torch.bfloat16"),
    ({"master_weights": ["fp32"]}, BF16, r"master_weights=\['fp32'\] is none of"),
    ({"state_dtype": {"moment": BF16}}, BF16, "state_dtype has the key 'moment'; the moments are exp_avg, exp_avg_sq"),
]


@pytest.mark.parametrize(("options", "dtype", "error"), REFUSED, ids=name_of)
def test_wrong_options(options: Options, dtype: torch.dtype, error: str) -> None:
    params = [nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=dtype != torch.int32)]
    with pytest.raises(ValueError, match=error):
        dracopt_ext.AdamW(params, **options)


@pytest.mark.parametrize("seed", [1.5, "1"])
def test_seeds_are_integers(seed: Any) -> None:
    with pytest.raises(TypeError, match="rounding_seed must be an int"):
        dracopt_ext.SGD([nn.Parameter(torch.ones(3, dtype=BF16))], stochastic_rounding=True, rounding_seed=seed)


def test_a_group_that_takes_no_count_changes_nothing() -> None:
    optimizer = trained(dracopt_ext.AdamW, stochastic_rounding=True)
    before = snapshot(optimizer)
    optimizer.param_groups[0] = MappingProxyType(optimizer.param_groups[0])
    with pytest.raises(TypeError, match="does not support item assignment"):
        go_on(optimizer)
    assert_same_bits(snapshot(optimizer), before)


def test_what_has_no_16_bits_is_left_to_torch() -> None:
    """A differentiable group beside one that is rounded at random."""
    params = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (BF16, FP32)]
    groups = [{"params": params[:1]}, {"params": params[1:], "differentiable": True}]
    optimizer = dracopt_ext.Adam(groups, stochastic_rounding="all")
    with pytest.warns(RuntimeWarning, match="differentiable"):
        go_on(optimizer)
    assert optimizer.last_backend == {"cpu": frozenset({"native", "torch"})}


def test_a_group_that_is_added_later_is_checked() -> None:
    optimizer = trained(dracopt_ext.AdamW, master_weights="split16")
    with pytest.raises(ValueError, match=r"parameter 0 of group 1 .* is torch.float16"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=FP16))]})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    go_on(optimizer)


@every_gpu
def test_a_graph_cannot_count_the_steps_of_rounding_at_random(gpu: Gpu) -> None:  # noqa: F811
    if gpu.simulation is None:
        pytest.skip("of the simulation")
    p = nn.Parameter(gpu(torch.ones(5, dtype=BF16)))
    optimizer = dracopt_ext.AdamW([p], capturable=True, stochastic_rounding=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = snapshot(optimizer)
    gpu.simulation.set("capturing", 1)
    with pytest.raises(RuntimeError, match=r"cannot be captured .* parameter 0 .* is rounded at random"):
        optimizer.step()
    gpu.simulation.set("capturing", 0)
    assert_same_bits(snapshot(optimizer), before)
    optimizer.step()


# ---- beside other features


@every_option
def test_gradients_that_are_released_give_the_same_bits(
    param: torch.dtype, grad: torch.dtype, options: Options
) -> None:
    found = []
    for release in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10)).to(param)
        groups = [{"params": list(model[0].parameters())}, {"params": list(model[1].parameters())}]
        optimizer = dracopt_ext.AdamW(groups, lr=0.01, **options)
        handle = optimizer.release_gradients() if release else None
        for _ in range(3):
            model(torch.linspace(-1, 1, 60).view(2, 30).to(param)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        del handle
        found.append(snapshot(optimizer))
    assert_same_bits(*found)


@every_option
def test_clipping_and_scaling_give_the_same_bits(param: torch.dtype, grad: torch.dtype, options: Options) -> None:
    found = []
    for backend in ("native", "reference"):
        optimizer = trained(
            dracopt_ext.AdamW, param, steps=0, backend=backend, max_grad_norm=1.0, fused=True, **options
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for _ in range(3):
            for p in params_of(optimizer):
                p.grad = torch.linspace(-1, 1, p.numel()).to(p.dtype)
            scaler.scale(torch.zeros(()))
            scaler.step(optimizer)
            scaler.update()
        found.append(snapshot(optimizer))
    assert_same_bits(*found)


def test_steps_without_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference steps what has masters or is rounded at random, because torch would lose what they keep."""
    for options in ({"master_weights": "split16"}, {"stochastic_rounding": True}):
        expected = snapshot(trained(dracopt_ext.AdamW, **options))
        with monkeypatch.context() as patch:
            patch.setattr("dracopt_ext.backend.NATIVE_REASON", "switched off")
            with pytest.warns(RuntimeWarning, match="to the reference"):
                optimizer = trained(dracopt_ext.AdamW, **options)
        assert optimizer.last_backend == {"cpu": frozenset({"reference"})}
        assert_same_bits(snapshot(optimizer), expected)
        monkeypatch.setattr("dracopt_ext.backend._warned", set())


def test_sparse_gradients_are_refused_where_the_reference_would_step() -> None:
    p = nn.Parameter(torch.ones(4, 3, dtype=BF16))
    optimizer = dracopt_ext.SGD([p], master_weights="fp32")
    p.grad = torch.ones(4, 3, dtype=BF16).to_sparse()
    with pytest.raises(RuntimeError, match="dense tensors only"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(p, torch.ones(4, 3, dtype=BF16))


@every_option
def test_distributed_tensors_by_the_reference(
    param: torch.dtype, grad: torch.dtype, options: Options, mesh: Any
) -> None:
    from torch.distributed.tensor import DTensor, Shard

    given = given_in(param, grad, [17, 1000], 3)
    options = {"lr": 0.01, **options}
    expected = train(dracopt_ext.AdamW, {**options, "backend": "native"}, *given)

    def place(tensor: Tensor) -> Tensor:
        return DTensor.from_local(tensor.clone(), mesh, [Shard(0)], run_check=False)

    for backend in ("reference", "native"):
        found = train(dracopt_ext.AdamW, {**options, "backend": backend}, *given, place=place)
        assert_same_bits({name: getattr(t, "to_local", lambda t=t: t)() for name, t in found.items()}, expected)


def test_reference_numbers_shards_like_the_whole() -> None:
    whole = torch.zeros(6, 10, dtype=BF16)
    rounding = reference.Rounding(seed=5, step=3, param=2, states=False)
    expected = reference.random_bits(whole, rounding, 0)
    for rows, columns in ((slice(2, 5), slice(0, 10)), (slice(0, 6), slice(3, 7)), (slice(1, 4), slice(5, 10))):
        shard = torch.zeros(rows.stop - rows.start, columns.stop - columns.start, dtype=BF16)
        first = rows.start * 10 + columns.start
        part = reference.Rounding(5, 3, 2, states=False, first=first, strides=[10, 1])
        assert torch.equal(reference.random_bits(shard, part, 0), expected[rows, columns])
