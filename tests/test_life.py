"""Tests users' changes between two steps, and steps in other threads and processes. Each change is also made to torch's
optimizer, or to the reference, and steps are compared."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dracopt_ext

from .cases import (
    CASES,
    FAULTS,
    RULE_CASES,
    STORAGE,
    Case,
    NoOp,
    assert_close,
    assert_same_bits,
    inputs,
    snapshot,
)

NATIVE = {"cpu": frozenset({"native"})}
ADAMW = Case("AdamW", {"lr": 0.01})
SGD = Case("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5})
NADAM = Case("NAdam", {"lr": 0.01})

both_rules = pytest.mark.parametrize("case", [ADAMW, SGD], ids=str)
OTHERS = [case for case in RULE_CASES if case.rule not in [known.rule for known in (ADAMW, SGD, NADAM)]]
all_rules = pytest.mark.parametrize("case", [ADAMW, SGD, NADAM, *OTHERS], ids=str)


class Pair:
    """Our optimizer and its oracle over equal parameters. Each change is made to both.

    The oracle is torch's fused optimizer, or ours with the reference if torch has no fused one.
    """

    def __init__(self, case: Case, count: int = 4, fault: Callable[[Any], Any] | None = None, **options: Any) -> None:
        initial, _ = inputs([64] * count, torch.float32, 0)
        ours = case.ours if fault is None else fault(case.ours)
        self.optimizers = []
        self.seed = 0
        oracle = (case.torchs, case.fused) if case.fused else (case.ours, {"backend": "reference"})
        for make, more in ((ours, {}), oracle):
            params = [nn.Parameter(value.clone()) for value in initial]
            self.optimizers.append(make(params, **{**case.options, **more, **options}))

    def do(self, change: Callable[[torch.optim.Optimizer, list[nn.Parameter]], object]) -> Pair:
        for optimizer in self.optimizers:
            change(optimizer, [p for group in optimizer.param_groups for p in group["params"]])
        return self

    def assert_equal_steps(self, times: int = 1, without: tuple[int, ...] = ()) -> Pair:
        for _ in range(times):
            self.seed += 1
            for optimizer in self.optimizers:
                params = [p for group in optimizer.param_groups for p in group["params"]]
                _, (grads,) = inputs([64] * len(params), torch.float32, 1, self.seed)
                for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
                    p.grad = None if i in without else grad.to(p.dtype).view_as(p)
                optimizer.step()
        assert self.optimizers[0].last_backend == NATIVE  # type: ignore[attr-defined]
        assert_same_bits(*map(snapshot, self.optimizers))
        return self


@all_rules
@pytest.mark.parametrize("fault", FAULTS)
def test_pairs_bite(case: Case, fault: type[NoOp]) -> None:
    with pytest.raises(AssertionError, match="elements differ"):
        Pair(case, fault=fault).assert_equal_steps()


# Hyperparameters and groups


@all_rules
def test_hyperparameters_change(case: Case) -> None:
    pair = Pair(case).assert_equal_steps()
    for key, value in (("lr", 0.5), ("weight_decay", 0.3), ("maximize", True), ("lr", 1), ("lr", 0.25)):
        pair.do(lambda o, _: o.param_groups[0].__setitem__(key, value)).assert_equal_steps(2)  # noqa: B023


def test_amsgrad_is_read_each_step_and_betas_too() -> None:
    pair = Pair(ADAMW, amsgrad=True).assert_equal_steps(2)
    pair.do(lambda o, _: o.param_groups[0].update(amsgrad=False, betas=(0.5, 0.7), eps=1e-3)).assert_equal_steps(2)
    pair.do(lambda o, _: o.param_groups[0].update(amsgrad=True)).assert_equal_steps(2)


@both_rules
def test_groups_are_added_edited_and_removed(case: Case) -> None:
    initial, _ = inputs([64, 64], torch.float32, 0, seed=9)
    pair = Pair(case).assert_equal_steps()
    pair.do(
        lambda o, _: o.add_param_group({"params": [nn.Parameter(initial[0].clone())], "lr": 0.7})
    ).assert_equal_steps(2)
    if case is ADAMW:  # torch's fused SGD raises when a group's parameters begin at different steps
        pair.do(lambda o, _: o.param_groups[0]["params"].append(nn.Parameter(initial[1].clone()))).assert_equal_steps(2)
    pair.do(lambda o, _: o.param_groups[0]["params"].reverse()).assert_equal_steps(2)
    pair.do(lambda o, _: o.param_groups[0]["params"].pop(1)).assert_equal_steps(2)
    pair.do(lambda o, _: o.param_groups.reverse()).assert_equal_steps(2)
    pair.do(lambda o, _: o.param_groups.pop(0)).assert_equal_steps()


def test_groups_with_options_of_their_own() -> None:
    pair = Pair(SGD, count=2)
    initial, _ = inputs([64] * 3, torch.float32, 0, seed=9)
    for value, options in zip(
        initial,
        ({"momentum": 0.0}, {"nesterov": True, "dampening": 0}, {"weight_decay": 0.5, "maximize": True}),
        strict=True,
    ):
        pair.do(lambda o, _: o.add_param_group({"params": [nn.Parameter(value.clone())], **options}))  # noqa: B023
    # torch's fused SGD takes one first step for a whole group only, so all groups take theirs here.
    pair.assert_equal_steps(3)


# Gradients


@pytest.mark.parametrize("case", [ADAMW, NADAM], ids=str)
def test_late_missing_and_frozen_gradients(case: Case) -> None:
    pair = Pair(case)
    for without in ((0,), (0, 2), (), (1,), (0, 1, 2), (3,), ()):
        pair.assert_equal_steps(2, without=without)
    assert [int(state["step"]) for state in pair.optimizers[0].state.values()] != [14] * 4


def test_sgd_first_gradient_on_a_later_step() -> None:
    """torch's fused SGD raises a TypeError here; its other implementation gives each parameter its own first step."""
    found = []
    for make in (dracopt_ext.SGD, torch.optim.SGD):
        a, b = (nn.Parameter(value.clone()) for value in inputs([64, 64], torch.float64, 0)[0])
        optimizer = make([a, b], lr=0.1, momentum=0.9, dampening=0.5)
        for step, (ga, gb) in enumerate(inputs([64, 64], torch.float64, 4)[1]):
            a.grad, b.grad = ga, gb if step > 1 else None
            optimizer.step()
        found.append(snapshot(optimizer))
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-14, atol=1e-15)


def test_no_gradients_at_all() -> None:
    pair = Pair(ADAMW)
    for optimizer in pair.optimizers:
        optimizer.step()
    assert pair.optimizers[0].last_backend == {}  # type: ignore[attr-defined]
    assert not pair.optimizers[0].state
    pair.assert_equal_steps()


def test_gradients_accumulate_and_zero_in_place() -> None:
    for set_to_none in (True, False):
        p = nn.Parameter(torch.ones(64))
        optimizer = dracopt_ext.SGD([p], lr=1.0)
        for _ in range(2):
            (p.sum() * 1.0).backward()
        optimizer.step()
        assert (p == -1.0).all()
        assert p.grad is not None
        assert (p.grad == 2.0).all()
        optimizer.zero_grad(set_to_none)
        assert (p.grad is None) == set_to_none


# Parameters and states that move


@all_rules
def test_data_is_swapped(case: Case) -> None:
    initial, _ = inputs([64] * 4, torch.float32, 0, seed=5)

    def swap(_: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
        for p, value in zip(params, initial, strict=True):
            p.data = value.clone()

    Pair(case).assert_equal_steps(2).do(swap).assert_equal_steps(2)


def test_module_to_double() -> None:
    """SGD without momentum has no states that would stay in fp32, so its steps remain native."""
    model = nn.Linear(8, 8)
    optimizer = dracopt_ext.SGD(model.parameters(), lr=0.5)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    model.double()
    optimizer.zero_grad()
    model(torch.ones(1, 8, dtype=torch.float64)).sum().backward()
    expected = model.weight.detach() - 0.5 * model.weight.grad
    optimizer.step()
    assert optimizer.last_backend == NATIVE
    assert torch.equal(model.weight, expected)


@all_rules
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_module_changes_its_dtype_in_mid_training(case: Case, dtype: torch.dtype) -> None:
    """The states keep their dtype, a mixture that torch refuses. The reference gives the right result."""
    found = []
    for backend in ("native", "reference"):
        torch.manual_seed(1)
        model = nn.Linear(16, 16)
        optimizer = case.ours(model.parameters(), **case.options, backend=backend)
        for step in range(4):
            if step == 2:
                model.to(dtype)
            optimizer.zero_grad()
            model(torch.linspace(-1, 1, 16, dtype=model.weight.dtype)).sum().backward()
            optimizer.step()
        found.append(snapshot(optimizer))
    assert found[0]["0.0"].dtype == dtype
    assert all(value.dtype == torch.float32 for name, value in found[0].items() if name.count(".") > 1)
    if dtype == torch.bfloat16:
        assert_same_bits(*found)
    else:  # two steps, each with the roundings that test_bits.py counts, once or twice for a multiply-add
        for name in found[0]:
            assert_close({name: found[0][name]}, {name: found[1][name]}, 24.0 if found[0][name].dtype == dtype else 2.0)


def test_module_moves_with_its_gradients() -> None:
    """A flag of torch's makes ``module.to()`` swap parameters, which no reference of ours may prevent."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = nn.Linear(4, 4)
        optimizer = dracopt_ext.AdamW(model.parameters())
        for dtype in (torch.float32, torch.float64, torch.float32):
            optimizer.zero_grad()
            model.to(dtype)
            model(torch.ones(1, 4, dtype=dtype)).sum().backward()
            optimizer.step()
            assert optimizer.last_backend == NATIVE
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@all_rules
def test_states_are_offloaded_and_brought_back(case: Case) -> None:
    def offload(o: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
        kept = [{name: value.clone() for name, value in o.state[p].items()} for p in params]
        for p in params:
            for name, value in o.state[p].items():
                o.state[p][name] = torch.empty_like(value, device="meta")
        for p, values in zip(params, kept, strict=True):
            o.state[p].update(values)

    Pair(case).assert_equal_steps(2).do(offload).assert_equal_steps(2)


def test_a_step_while_the_states_are_away_is_refused() -> None:
    p = nn.Parameter(torch.ones(64))
    p.grad = torch.ones(64)
    optimizer = dracopt_ext.AdamW([p])
    optimizer.step()
    before = p.detach().clone()
    kept = optimizer.state[p]["exp_avg"]
    optimizer.state[p]["exp_avg"] = kept.to("meta")
    with pytest.raises(ValueError, match=r"state 'exp_avg' of parameter 0 of group 0 .* is on another device, meta"):
        optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.state[p]["step"] == 1
    optimizer.state[p]["exp_avg"] = kept
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


def test_swap_tensors_finds_no_reference_of_ours() -> None:
    pair = Pair(ADAMW).assert_equal_steps()

    def swap(_: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
        params[0].grad = None
        torch.utils.swap_tensors(params[0], nn.Parameter(torch.full((64,), 0.5)))

    pair.do(swap).assert_equal_steps(2)


@both_rules
def test_states_are_edited_replaced_and_deleted(case: Case) -> None:
    name = "exp_avg" if case is ADAMW else "momentum_buffer"

    def replace(o: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
        o.state[params[1]][name] = torch.full((64,), 0.25)
        o.state[params[2]][name].mul_(2.0)
        o.state[params[3]] = dict(reversed(o.state[params[3]].items()))

    Pair(case).assert_equal_steps(2).do(replace).assert_equal_steps(2)


def test_state_is_deleted_and_starts_afresh() -> None:
    pair = Pair(ADAMW).assert_equal_steps(2)
    pair.do(lambda o, params: o.state.pop(params[1])).assert_equal_steps(2)
    pair.do(lambda o, _: o.state.clear()).assert_equal_steps(2)


def test_state_in_another_order() -> None:
    def reorder(o: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
        for p in params[:2]:
            o.state[p] = o.state.pop(p)

    Pair(ADAMW).assert_equal_steps(2).do(reorder).assert_equal_steps(2)


def test_load_state_dict_in_mid_training() -> None:
    pair = Pair(ADAMW).assert_equal_steps(2)
    saved = [copy.deepcopy(o.state_dict()) for o in pair.optimizers]
    saved = [
        {
            "state": {k: {n: t.clone() for n, t in s.items()} for k, s in d["state"].items()},
            **{"param_groups": d["param_groups"]},
        }
        for d in saved
    ]
    pair.assert_equal_steps(2)
    for optimizer, state in zip(pair.optimizers, saved, strict=True):
        optimizer.load_state_dict(state)
    pair.assert_equal_steps(2)


def test_lazily_cloned_storage_is_copied_before_it_is_written() -> None:
    p = nn.Parameter(torch.ones(64))
    lazy = torch._lazy_clone(p.detach())
    p.grad = torch.ones(64)
    optimizer = dracopt_ext.SGD([p], lr=1.0)
    with pytest.warns(RuntimeWarning, match="leaves lazily cloned tensors to torch"):
        optimizer.step()
    optimizer.step()
    assert optimizer.last_backend == NATIVE
    assert (p == -1).all()
    assert (lazy == 1).all()


def test_step_saturates_where_torchs_does() -> None:
    pair = Pair(ADAMW, count=1).assert_equal_steps()
    pair.do(lambda o, params: o.state[params[0]]["step"].fill_(2**24 - 1)).assert_equal_steps(3)
    assert next(iter(pair.optimizers[0].state.values()))["step"] == 2**24


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_lr_zero_leaves_parameters_bit_identical_but_creates_state(case: Case, dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.randn(1000).to(dtype))
    before = p.detach().clone()
    p.grad = torch.randn(1000).to(dtype)
    optimizer = case.ours([p], **{**case.options, "lr": 0.0})
    optimizer.step()
    assert_same_bits({"": p.detach()}, {"": before})
    state = optimizer.state[p]
    assert all(value.any() for value in state.values())
    assert bool(state) == (case.algorithm != "SGD" or "momentum" in case.options)


@all_rules
def test_nan_and_infinity_take_torchs_way(case: Case) -> None:
    pair = Pair(case)

    def poison(_: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
        with torch.no_grad():
            params[0][3], params[1][5] = float("nan"), float("inf")

    pair.do(poison).assert_equal_steps(3)


# Autograd


def test_backward_through_a_stale_graph_raises() -> None:
    w = nn.Parameter(torch.ones(64))
    optimizer = dracopt_ext.AdamW([w])
    loss = (w * w).sum()
    w.grad = torch.ones(64)
    version = w._version
    optimizer.step()
    assert w._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    averaged = optimizer.state[w]["exp_avg"]
    version = averaged._version
    optimizer.step()
    assert averaged._version == version + 1


def test_inference_mode_holds_for_all_threads() -> None:
    torch.set_num_threads(3)
    with torch.inference_mode():
        params = [torch.ones(4) for _ in range(4000)]  # so many that threads share them
        for p in params:
            p.grad = torch.ones(4)
        optimizer = dracopt_ext.SGD(params, lr=1.0)
        optimizer.step()
        assert optimizer.last_backend == NATIVE
        assert all((p == 0).all() for p in params)


def test_inference_tensors() -> None:
    with torch.inference_mode():
        p = torch.ones(64)
    p.grad = torch.ones(64)
    optimizer = dracopt_ext.SGD([p], lr=1.0)
    with torch.inference_mode():
        optimizer.step()
        assert (p == 0).all()
        assert optimizer.last_backend == NATIVE
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        optimizer.step()


# Threads and processes


def test_several_optimizers_in_several_threads() -> None:
    def work(found: dict[int, Any], i: int) -> None:
        given = inputs([64, 300_001], torch.float32, 4, seed=i)
        params = [nn.Parameter(value.clone()) for value in given[0]]
        optimizer = dracopt_ext.AdamW(params)
        for grads in given[1]:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            optimizer.step()
        found[i] = snapshot(optimizer)

    alone: dict[int, Any] = {}
    together: dict[int, Any] = {}
    for i in range(4):
        work(alone, i)
    threads = [threading.Thread(target=work, args=(together, i)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert_same_bits(together[i], alone[i])


def test_one_optimizer_in_two_threads_raises_or_takes_turns() -> None:
    """A second step during the first is refused. The parameters show exactly the steps that were taken."""
    p = nn.Parameter(torch.zeros(8_000_000))
    p.grad = torch.ones_like(p)
    optimizer = dracopt_ext.SGD([p], lr=1.0)
    taken: list[bool] = []

    def work() -> None:
        for _ in range(20):
            try:
                optimizer.step()
                taken.append(True)
            except RuntimeError as error:
                assert "already running, in another thread" in str(error)  # noqa: PT017

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (p == -len(taken)).all()


def test_step_in_a_forked_child() -> None:
    """torch's own parallel regions hang in a child once the parent has used its threads."""
    torch.set_num_threads(2)
    p = nn.Parameter(torch.ones(2_000_000))
    p.grad = torch.ones_like(p)
    optimizer = dracopt_ext.SGD([p], lr=1.0)
    optimizer.step()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        optimizer.step()
        os.write(writer, b"right" if bool(p.numpy(force=True).max() == -1.0 == p.numpy(force=True).min()) else b"wrong")
        os._exit(0)
    os.close(writer)
    timer = threading.Timer(30, os.kill, (child, 9))
    timer.start()
    answer = os.read(reader, 5)
    os.close(reader)
    os.waitpid(child, 0)
    timer.cancel()
    assert answer == b"right"
    assert (p == 0).all()


def test_swa_learning_rates() -> None:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    optimizer = dracopt_ext.SGD([p], lr=1.0)
    schedule = dracopt_ext.swa_utils.SWALR(optimizer, swa_lr=0.5, anneal_epochs=1, anneal_strategy="linear")
    optimizer.step()
    schedule.step()
    optimizer.step()
    assert (p == -1.5).all()


def test_swa_and_ema_follow() -> None:
    model = nn.Linear(8, 8)
    average = dracopt_ext.swa_utils.AveragedModel(model, multi_avg_fn=dracopt_ext.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = dracopt_ext.SGD(model.parameters(), lr=1.0)
    start = model.weight.detach().clone()
    average.update_parameters(model)
    model.weight.grad, model.bias.grad = torch.ones(8, 8), torch.ones(8)
    optimizer.step()
    average.update_parameters(model)
    torch.testing.assert_close(average.module.weight, start - 0.5)


def test_many_optimizers_share_parameters() -> None:
    p = nn.Parameter(torch.zeros(64))
    first, second = dracopt_ext.SGD([p], lr=1.0), dracopt_ext.SGD([p], lr=2.0)
    p.grad = torch.ones(64)
    first.step()
    second.step()
    first.step()
    assert (p == -4.0).all()
