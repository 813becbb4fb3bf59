"""Loading and saving treat dtypes, options, hooks and old files as torch does. Ours does more in three points:
``state_dtype``, NAdam's ``mu_product``, and no tensor shared with the loaded dict."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dracopt_ext
from dracopt_ext.reference import MOMENTS

from .cases import Case, assert_same_bits, classes, inputs, snapshot

OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}, "Adam": {"amsgrad": True}}
CLASSES = [Case(name, OPTIONS.get(name, {})) for name in classes()]
every_class = pytest.mark.parametrize("case", CLASSES, ids=str)
BF16, FP32 = torch.bfloat16, torch.float32


def trained(make: Callable[..., Any], dtype: torch.dtype = FP32, steps: int = 3, **options: Any) -> Any:
    initial, gradients = inputs([64, 128], FP32, steps)
    params = [nn.Parameter(value.to(dtype)) for value in initial]
    optimizer = make(params, **options)
    for step in gradients:
        for p, grad in zip(params, step, strict=True):
            p.grad = grad.to(dtype)
        optimizer.step()
    return optimizer


def states(optimizer: Any) -> list[dict[str, Any]]:
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


@every_class
def test_nothing_is_shared_with_what_was_loaded(case: Case) -> None:
    """Two optimizers that load one dict do not write into each other's states, nor into the dict."""
    source = trained(case.ours, **case.options)
    state_dict = source.state_dict()
    first, second = (trained(case.ours, steps=0, **case.options) for _ in range(2))
    first.load_state_dict(state_dict)
    second.load_state_dict(state_dict)
    before = snapshot(source)
    for p in first.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    first.step()
    assert_same_bits(snapshot(source), before)
    for mine, others in zip(states(first), states(second), strict=True):
        assert mine.keys() == others.keys()
        assert all(mine[name].data_ptr() != others[name].data_ptr() for name in mine)


@every_class
@pytest.mark.parametrize("saved", [FP32, BF16], ids=str)
@pytest.mark.parametrize("loaded", [FP32, BF16], ids=str)
def test_dtypes_after_loading_are_torchs(case: Case, saved: torch.dtype, loaded: torch.dtype) -> None:
    """Moments take the parameter's dtype. ``step`` keeps its own, and so does ``mu_product``, which torch rounds."""
    found = []
    for make in (case.ours, case.torchs):
        optimizer = trained(make, loaded, steps=0, **case.options)
        optimizer.load_state_dict(trained(case.torchs, saved, **case.options).state_dict())
        found.append(states(optimizer))
    for ours, theirs in zip(*found, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"mu_product"}:
            assert ours[name].dtype == theirs[name].dtype == (FP32 if name == "step" else loaded)
            assert torch.equal(ours[name], theirs[name])


def test_mu_product_is_not_rounded() -> None:
    source = trained(dracopt_ext.NAdam, BF16)
    exact = states(source)[0]["mu_product"]
    assert exact != exact.bfloat16()
    target = trained(dracopt_ext.NAdam, BF16, steps=0)
    target.load_state_dict(source.state_dict())
    assert states(target)[0]["mu_product"] == exact
    assert states(target)[0]["mu_product"].dtype == FP32


def test_mu_product_that_torch_has_rounded() -> None:
    """A ``mu_product`` in bf16 would keep NAdam off the native path for good."""
    target = trained(dracopt_ext.NAdam, BF16, steps=0)
    rounded = trained(torch.optim.NAdam, BF16, steps=0)
    rounded.load_state_dict(trained(torch.optim.NAdam, BF16).state_dict())
    assert states(rounded)[0]["mu_product"].dtype == BF16
    target.load_state_dict(rounded.state_dict())
    assert states(target)[0]["mu_product"].dtype == FP32
    for p in target.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    target.step()
    assert target.last_backend == {"cpu": frozenset({"native"})}


@every_class
@pytest.mark.parametrize("saved", [None, FP32], ids=str)
def test_state_dtype_holds_after_loading(case: Case, saved: torch.dtype | None) -> None:
    """torch would cast to the parameter's dtype. Moments saved in fp32 are not rounded on the way."""
    source = trained(case.ours, BF16, state_dtype=saved, **case.options)
    target = trained(case.ours, BF16, steps=0, state_dtype=FP32, **case.options)
    target.load_state_dict(source.state_dict())
    for ours, theirs in zip(states(target), states(source), strict=True):
        for name in ours.keys() & set(MOMENTS):
            assert ours[name].dtype == FP32
            assert torch.equal(ours[name], theirs[name].float())
            if saved == FP32:
                assert not torch.equal(ours[name], ours[name].bfloat16().float())


@every_class
def test_training_with_state_dtype_goes_on_as_if_it_had_not_stopped(case: Case) -> None:
    options = {**case.options, "state_dtype": FP32}
    whole = trained(case.ours, BF16, steps=3, **options)
    again = trained(case.ours, BF16, steps=0, **options)
    saved = io.BytesIO()
    torch.save(whole.state_dict(), saved)
    saved.seek(0)
    again.load_state_dict(torch.load(saved, weights_only=True))
    with torch.no_grad():
        for p, q in zip(again.param_groups[0]["params"], whole.param_groups[0]["params"], strict=True):
            p.copy_(q)
    for optimizer in (whole, again):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert_same_bits(snapshot(again), snapshot(whole))


def test_saved_options_replace_those_of_the_optimizer() -> None:
    found = []
    for module in (dracopt_ext, torch.optim):
        optimizer = trained(module.AdamW, steps=0, lr=0.5, weight_decay=0.3)
        optimizer.load_state_dict(trained(module.AdamW, lr=0.25, betas=(0.5, 0.6), maximize=True).state_dict())
        found.append({k: v for k, v in optimizer.param_groups[0].items() if k != "params"})
    assert found[0] == found[1]
    assert found[0]["lr"] == 0.25


@every_class
def test_states_from_before_some_options_existed(case: Case) -> None:
    """Groups in old states lack keys, and step counts are plain numbers."""
    found = []
    for make in (case.ours, case.torchs):
        source = trained(make, **case.options)
        old = copy.deepcopy(source.__getstate__())
        for group in old["param_groups"]:
            for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
                group.pop(key, None)
        for state in old["state"].values():
            for key in ("step", "mu_product"):
                if key in state:
                    state[key] = state[key].item()
        optimizer = trained(make, steps=0, **case.options)
        optimizer.__setstate__(old)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        found.append(optimizer)
    assert found[0].last_backend == {"cpu": frozenset({"native"})}
    assert list(found[0].param_groups[0]) == list(found[1].param_groups[0])
    for ours, theirs in zip(*map(states, found), strict=True):
        assert {name: (value.dtype, value.shape) for name, value in ours.items()} == {
            name: (value.dtype, value.shape) for name, value in theirs.items()
        }
        assert ours.get("step") == theirs.get("step")


@pytest.mark.parametrize("number", [3, 3.0], ids=["int", "float"])
def test_nadams_old_states_with_numbers(number: float) -> None:
    source = trained(dracopt_ext.NAdam)
    state_dict = copy.deepcopy(source.state_dict())
    for state in state_dict["state"].values():
        state["step"], state["mu_product"] = number, state["mu_product"].item()
    target = trained(dracopt_ext.NAdam, steps=0)
    target.load_state_dict(state_dict)
    assert_same_bits(
        {f"{i}.{k}": v for i, state in enumerate(states(target)) for k, v in state.items()},
        {f"{i}.{k}": v for i, state in enumerate(states(source)) for k, v in state.items()},
    )


@every_class
def test_what_does_not_match_is_refused_in_torchs_words(case: Case) -> None:
    good = trained(case.ours, **case.options).state_dict()
    two_groups = {**good, "param_groups": good["param_groups"] * 2}
    fewer = {**good, "param_groups": [{**good["param_groups"][0], "params": [0]}]}
    for wrong in (two_groups, fewer):
        errors = []
        for make in (case.ours, case.torchs):
            optimizer = trained(make, **case.options)
            before = snapshot(optimizer)
            with pytest.raises(ValueError, match="loaded state dict") as info:
                optimizer.load_state_dict(wrong)
            errors.append(str(info.value))
            assert_same_bits(snapshot(optimizer), before)
            assert not optimizer._optimizer_load_state_dict_pre_hooks
            assert not optimizer._optimizer_load_state_dict_post_hooks
        assert errors[0] == errors[1]


@every_class
def test_hooks_around_saving_and_loading(case: Case) -> None:
    """Hooks run in torch's order. A pre-hook may replace the loaded dict, and a post-hook sees the final states."""
    calls: list[Any] = []
    source = trained(case.ours, BF16, state_dtype=FP32, **case.options)
    source.register_state_dict_pre_hook(lambda *_: calls.append("save"))
    source.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "more": calls.append("saved")})
    state_dict = source.state_dict()
    assert calls == ["save", "saved"]
    assert "more" in state_dict

    target = trained(case.ours, BF16, steps=0, state_dtype=FP32, **case.options)
    halved = copy.deepcopy(state_dict)
    for state in halved["state"].values():
        for name in state.keys() & set(MOMENTS):
            state[name] /= 2
    target.register_load_state_dict_pre_hook(lambda *_: halved)
    target.register_load_state_dict_post_hook(
        lambda o: calls.extend(state[name].dtype for state in states(o) for name in state.keys() & set(MOMENTS))
    )
    calls.clear()
    target.load_state_dict(state_dict)
    assert set(calls) == {FP32}
    for ours, theirs in zip(states(target), states(source), strict=True):
        for name in ours.keys() & set(MOMENTS):
            assert torch.equal(ours[name], theirs[name] / 2)


@every_class
def test_distributed_checkpoints_of_one_process(case: Case) -> None:
    """torch first takes a step with zero gradients and lr=0, which must create the state and change no parameter."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    for flatten in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        model = nn.Linear(8, 8)
        before = model.weight.detach().clone()
        optimizer = case.ours(model.parameters(), **case.options)
        state_dict = get_optimizer_state_dict(model, optimizer, options=options)
        assert torch.equal(model.weight, before)
        assert optimizer.state[model.weight]
        assert optimizer.param_groups[0]["lr"] == case.ours([model.weight]).defaults["lr"]
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        set_optimizer_state_dict(model, optimizer, state_dict, options=options)
        optimizer.step()
        assert optimizer.last_backend == {"cpu": frozenset({"native"})}  # type: ignore[attr-defined]


@every_class
@pytest.mark.skipif(not hasattr(torch.optim, "swap_in_optimizer_params_and_state"), reason="this torch lacks it")
def test_swapping_in_parameters_and_states(case: Case) -> None:
    optimizer, other = trained(case.ours, **case.options), trained(case.ours, steps=2, **case.options)
    before = snapshot(optimizer)
    params = {str(i): p for i, p in enumerate(other.param_groups[0]["params"])}
    for p in params.values():
        p.grad = torch.ones_like(p)
    moved = params["0"].detach().clone()
    with dracopt_ext.swap_in_optimizer_params_and_state(optimizer, params, other.state_dict()):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)
    assert not torch.equal(params["0"], moved)
