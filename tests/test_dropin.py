"""Users of torch.optim find the same names, signatures, groups, states, hooks, schedulers, checkpoints and AMP."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import dracopt_ext

from .cases import CASES, Case, MakeOptimizer, Snapshot, assert_same_bits, classes, inputs, snapshot, torchs

every_case = pytest.mark.parametrize("case", CASES, ids=str)
CLASSES = classes()
every_class = pytest.mark.parametrize("name", CLASSES)
every_fused_class = pytest.mark.parametrize("name", classes(in_torch=True, fused=True))


def class_in(module: Any, name: str) -> Any:
    """Returns our class or torch's, for which ours on the reference stands in if torch has none."""
    return torchs(name) if module is torch.optim else getattr(module, name)


def model_and_data() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    # The parameters consist of whole SIMD blocks, where torch's fused kernels round as ours do.
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Tanh(), nn.Linear(128, 64, bias=False))
    return model, torch.randn(32, 64), torch.randn(32, 64)


def loop(optimizer: torch.optim.Optimizer, model: nn.Module, x: Tensor, y: Tensor, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


# Names and constructors


def test_every_name_of_torch_optim() -> None:
    for name in torch.optim.__all__:
        ours, theirs = getattr(dracopt_ext, name), getattr(torch.optim, name)
        assert ours is theirs or (name in CLASSES and issubclass(ours, theirs) and ours.__name__ == name)
    assert set(torch.optim.__all__) <= set(dir(dracopt_ext))
    with pytest.raises(AttributeError, match="module 'dracopt_ext' has no attribute 'Adan'"):
        _ = dracopt_ext.Adan


def test_submodules_are_torchs() -> None:
    assert importlib.import_module("dracopt_ext.lr_scheduler") is torch.optim.lr_scheduler
    from dracopt_ext.swa_utils import AveragedModel

    assert AveragedModel is torch.optim.swa_utils.AveragedModel


@pytest.mark.parametrize("name", classes(in_torch=True))
def test_signature_is_torchs_and_our_options(name: str) -> None:
    ours = inspect.signature(getattr(dracopt_ext, name)).parameters
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        *((p.name, p.default, p.kind) for p in theirs.values()),
        ("backend", None, inspect.Parameter.KEYWORD_ONLY),
        ("state_dtype", None, inspect.Parameter.KEYWORD_ONLY),
        ("master_weights", None, inspect.Parameter.KEYWORD_ONLY),
        ("stochastic_rounding", False, inspect.Parameter.KEYWORD_ONLY),
        ("rounding_seed", 0, inspect.Parameter.KEYWORD_ONLY),
        ("max_grad_norm", None, inspect.Parameter.KEYWORD_ONLY),
        ("error_if_nonfinite", False, inspect.Parameter.KEYWORD_ONLY),
    ]


@every_case
def test_groups_and_states_have_torchs_keys_and_dtypes(case: Case) -> None:
    (value,), ((grad,),) = inputs([64], torch.float32, 1)
    found = []
    for make in (case.ours, case.torchs):
        p = nn.Parameter(value.clone())
        p.grad = grad.clone()
        optimizer = make([p], **case.options)
        optimizer.step()
        group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        state = {k: (v.dtype, v.shape, v.device) for k, v in optimizer.state[p].items()}
        found.append((list(group.items()), list(state.items()), optimizer.defaults, repr(optimizer)))
    assert found[0] == found[1]


def test_default_dtype_decides_the_dtype_of_step() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        for fused, expected in ((None, torch.float64), (True, torch.float32)):
            p = nn.Parameter(torch.ones(3))
            p.grad = torch.ones(3)
            optimizer = dracopt_ext.Adam([p], fused=fused)
            optimizer.step()
            optimizer.step()
            assert optimizer.state[p]["step"].dtype == expected
            assert optimizer.state[p]["step"] == 2
            assert optimizer.last_backend == {"cpu": frozenset({"native"})}
    finally:
        torch.set_default_dtype(torch.float32)


def test_adamw_is_an_adam() -> None:
    assert issubclass(dracopt_ext.AdamW, dracopt_ext.Adam)
    assert issubclass(dracopt_ext.AdamW, torch.optim.AdamW)


REFUSALS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": -1.0}),
    ("SGD", {"momentum": -0.5}),
    ("SGD", {"weight_decay": -0.5}),
    ("SGD", {"nesterov": True}),
    ("SGD", {"lr": torch.ones(2)}),
    ("SGD", {"fused": True, "foreach": True}),
    ("SGD", {"fused": True, "differentiable": True}),
    ("Adam", {"lr": -1.0}),
    ("Adam", {"eps": -1.0}),
    ("Adam", {"betas": (1.0, 0.5)}),
    ("Adam", {"betas": (0.5, -1.0)}),
    ("Adam", {"betas": (0.5, torch.tensor(0.5))}),
    ("Adam", {"weight_decay": -1.0}),
    ("Adam", {"lr": torch.tensor(0.1), "foreach": True}),
    ("Adam", {"fused": True, "foreach": True}),
    ("NAdam", {"lr": -1.0}),
    ("NAdam", {"eps": -1.0}),
    ("NAdam", {"betas": (0.5, 1.0)}),
    ("NAdam", {"weight_decay": -1.0}),
    ("NAdam", {"momentum_decay": -1.0}),
    ("NAdam", {"lr": torch.ones(2)}),
    ("AdamW", {"lr": -1.0}),
    ("AdamW", {"fused": True, "differentiable": True}),
]


@pytest.mark.parametrize(("name", "options"), REFUSALS, ids=str)
def test_constructor_refuses_with_torchs_words(name: str, options: dict[str, Any]) -> None:
    errors = []
    for module in (dracopt_ext, torch.optim):
        with pytest.raises((ValueError, RuntimeError)) as info:
            class_in(module, name)([nn.Parameter(torch.ones(2))], **options)
        errors.append((info.type, str(info.value)))
    assert errors[0] == errors[1]


@every_class
def test_parameters_are_refused_with_torchs_words(name: str) -> None:
    p = nn.Parameter(torch.ones(2))
    for params in (torch.ones(2), [], ["text"], [{"params": [p]}, {"params": [p]}], [p * 2]):
        errors = []
        for module in (dracopt_ext, torch.optim):
            with pytest.raises((ValueError, TypeError)) as info:
                class_in(module, name)(params)
            errors.append(str(info.value))
        assert errors[0] == errors[1]


def test_backend_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="backend='cuda' is none of 'native', 'triton', 'reference'"):
        dracopt_ext.Adam([p], backend="cuda")
    with monkeypatch.context() as patch:
        patch.setattr("dracopt_ext.backend.why_no_triton", lambda: "there is none")
        with pytest.raises(RuntimeError, match="backend='triton' is not available: there is none"):
            dracopt_ext.Adam([p], backend="triton")
    monkeypatch.setenv("DRACOPT_BACKEND", "reference")
    assert dracopt_ext.SGD([p]).backend == "reference"
    assert dracopt_ext.SGD([p], backend="native").backend == "native"
    monkeypatch.setenv("DRACOPT_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="DRACOPT_BACKEND='nonsense' is none of"):
        dracopt_ext.SGD([p])
    monkeypatch.setenv("DRACOPT_BACKEND", "")
    assert dracopt_ext.SGD([p]).backend is None
    assert "backend" not in dracopt_ext.SGD([p]).param_groups[0]


# Training


@every_case
def test_training_as_torchs_fused(case: Case) -> None:
    found = []
    for make, options in ((case.ours, {}), (case.torchs, case.fused)):
        model, x, y = model_and_data()
        options = {**case.options, **options, "maximize": False}
        optimizer = make([{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(model.parameters())], **options)
        # In a second step the gradient's own sensitivity would multiply the differences of rounding.
        loop(optimizer, model, x, y, steps=3 if case.fused else 1)
        found.append(snapshot(optimizer))
    case.assert_agree(*found, steps=1)


@every_class
def test_closure_and_grad_mode(name: str) -> None:
    model, x, y = model_and_data()
    optimizer = getattr(dracopt_ext, name)(model.parameters(), lr=1e-3)
    seen = []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    with torch.no_grad():
        first, second = optimizer.step(closure), optimizer.step(closure)
    assert seen == [True, True]
    assert second < first
    assert optimizer.last_backend == {"cpu": frozenset({"native"})}


def test_hooks_run_once_each_in_torchs_order() -> None:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    calls: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    try:
        for name in classes():
            optimizer = getattr(dracopt_ext, name)([p])
            optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
            optimizer.register_step_post_hook(lambda *_: calls.append("post"))
            calls.clear()
            optimizer.step()
            assert calls == ["global pre", "pre", "post", "global post"]
    finally:
        for handle in handles:
            handle.remove()


def test_pre_hook_may_replace_the_closure() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = dracopt_ext.SGD([p])
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 7.0), {}))
    assert optimizer.step() == 7.0


SCHEDULERS = [
    lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
]


@every_fused_class
@pytest.mark.parametrize("schedule", range(len(SCHEDULERS)))
def test_schedulers(name: str, schedule: int) -> None:
    options: dict[str, Any] = {"momentum": 0.9} if name == "SGD" else {}
    found = []
    for module, fused in ((dracopt_ext, None), (torch.optim, True)):
        model, x, y = model_and_data()
        optimizer = class_in(module, name)(model.parameters(), lr=0.05, fused=fused, **options)
        scheduler = SCHEDULERS[schedule](optimizer)
        for _ in range(4):
            loop(optimizer, model, x, y, steps=1)
            scheduler.step()
        found.append(snapshot(optimizer))
    Case(name).assert_agree(*found, steps=4)


# Checkpoints


def half_trained(make: MakeOptimizer, case: Case, **more: Any) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    initial, _ = inputs([64, 128], torch.float32, 0)
    params = [nn.Parameter(value.clone()) for value in initial]
    return make([{"params": params[:1], "lr": 0.03}, {"params": params[1:]}], **{**case.options, **more}), params


def feed(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], seed: int) -> None:
    for grads in inputs([64, 128], torch.float32, 3, seed)[1]:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()


@every_case
@pytest.mark.parametrize("direction", ["from torch", "to torch", "to ourselves"])
def test_checkpoints_go_both_ways(case: Case, direction: str) -> None:
    """Training that starts in one library and ends in the other equals training in one."""
    source = case.torchs if direction == "from torch" else case.ours
    target = case.torchs if direction == "to torch" else case.ours

    def fused(make: MakeOptimizer) -> dict[str, Any]:
        return case.fused if make is case.torchs else {}

    whole, params = half_trained(case.torchs, case, **case.fused)
    feed(whole, params, seed=1)
    feed(whole, params, seed=2)
    expected = snapshot(whole)

    first, params = half_trained(source, case, **fused(source))
    feed(first, params, seed=1)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second, new_params = half_trained(target, case, **fused(target))
    with torch.no_grad():
        for new, old in zip(new_params, params, strict=True):
            new.copy_(old)
    loaded = torch.load(saved, weights_only=True)
    for group in loaded["param_groups"]:
        group.update({key: fused(target).get(key) for key in case.fused})
    second.load_state_dict(loaded)
    feed(second, new_params, seed=2)
    case.assert_agree(snapshot(second), expected, steps=6)


@every_class
def test_state_dict_is_torchs(name: str) -> None:
    dicts = []
    for module in (dracopt_ext, torch.optim):
        model, x, y = model_and_data()
        optimizer = class_in(module, name)(model.named_parameters(), lr=0.1)
        loop(optimizer, model, x, y, steps=1)
        dicts.append(optimizer.state_dict())
    assert dicts[0]["param_groups"] == dicts[1]["param_groups"]
    assert dicts[0]["param_groups"][0]["param_names"] == ["0.weight", "2.weight"]
    assert {k: list(v) for k, v in dicts[0]["state"].items()} == {k: list(v) for k, v in dicts[1]["state"].items()}


def test_adam_that_loads_adamw_decouples() -> None:
    p = nn.Parameter(torch.ones(3))
    adam, adamw = dracopt_ext.Adam([p]), dracopt_ext.AdamW([p])
    adam_state = adam.state_dict()
    adam.load_state_dict(adamw.state_dict())
    assert adam.param_groups[0]["decoupled_weight_decay"] is True
    adamw.load_state_dict(adam_state)
    assert adamw.param_groups[0]["decoupled_weight_decay"] is True


def test_old_checkpoints_with_numbers_for_steps() -> None:
    found = []
    for module, fused in ((dracopt_ext, None), (torch.optim, True)):
        optimizer, params = half_trained(getattr(module, "AdamW"), Case("AdamW"), fused=fused)  # noqa: B009
        feed(optimizer, params, seed=1)
        state = optimizer.state_dict()
        for entry, number in zip(state["state"].values(), (3, 3.0), strict=True):
            entry["step"] = number
        optimizer.load_state_dict(state)
        feed(optimizer, params, seed=2)
        found.append(snapshot(optimizer))
    Case("AdamW").assert_agree(*found, steps=6)


@every_class
@pytest.mark.parametrize("through", [pickle, copy], ids=["pickle", "deepcopy"])
def test_pickle_and_deepcopy(name: str, through: Any) -> None:
    """The AMP flag and our options survive (torch loses the flag); hooks do not, as with torch."""
    options: dict[str, Any] = {**Case(name).fused, "backend": "native", "state_dtype": torch.bfloat16}
    optimizer, params = half_trained(getattr(dracopt_ext, name), Case(name), **options)
    feed(optimizer, params, seed=1)
    optimizer.register_step_post_hook(lambda *_: None)
    again = copy.deepcopy(optimizer) if through is copy else pickle.loads(pickle.dumps(optimizer))
    assert getattr(again, "_step_supports_amp_scaling", None) is Case(name).fused.get("fused")
    assert again.backend == "native"
    assert again.state_dtype == torch.bfloat16
    assert not again._optimizer_step_post_hooks
    assert_same_bits(snapshot(again), snapshot(optimizer))
    feed(optimizer, params, seed=2)
    feed(again, [p for group in again.param_groups for p in group["params"]], seed=2)
    assert_same_bits(snapshot(again), snapshot(optimizer))
    assert again.last_backend == {"cpu": frozenset({"native"})}


# AMP


@every_fused_class
@pytest.mark.parametrize("fused", [None, False, True])
def test_amp_flag_is_torchs(name: str, fused: bool | None) -> None:
    p = nn.Parameter(torch.ones(2))
    flags = [
        getattr(class_in(module, name)([p], fused=fused), "_step_supports_amp_scaling", None)
        for module in (dracopt_ext, torch.optim)
    ]
    assert flags[0] == flags[1]


@every_fused_class
@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler(name: str, fused: bool | None) -> None:
    """An overflow in the second step changes nothing. A fused step never writes gradients."""
    options: dict[str, Any] = {"momentum": 0.9} if name == "SGD" else {}
    plain, params = half_trained(getattr(dracopt_ext, name), Case(name, options))
    scaled, scaled_params = half_trained(getattr(dracopt_ext, name), Case(name, options), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, grads in enumerate(inputs([64, 128], torch.float32, 3)[1]):
        overflow = step == 1
        for p, q, grad in zip(params, scaled_params, grads, strict=True):
            p.grad = None if overflow else grad.clone()
            scaler.scale(torch.ones(()))  # a backward would do this first
            q.grad = grad * scaler.get_scale()
        if overflow:
            scaled_params[1].grad[3] = float("inf")  # type: ignore[index]
        kept = [q.grad.clone() for q in scaled_params]  # type: ignore[union-attr]
        plain.step()
        before = snapshot(scaled)
        scaler.step(scaled)
        if overflow:
            assert_same_bits(snapshot(scaled), before)
        if fused:
            for q, grad in zip(scaled_params, kept, strict=True):
                assert torch.equal(q.grad, grad)  # type: ignore[arg-type]
            assert scaled.last_backend == ({} if overflow else {"cpu": frozenset({"native"})})
        scaler.update()
    expected: Snapshot = snapshot(plain)
    assert_same_bits(snapshot(scaled), expected)
    assert not hasattr(scaled, "grad_scale")


def test_grad_scale_set_by_the_user() -> None:
    p = nn.Parameter(torch.ones(64))
    p.grad = torch.full((64,), 8.0)
    optimizer = dracopt_ext.SGD([p], lr=1.0, fused=True)
    optimizer.grad_scale = torch.tensor(4.0)
    optimizer.step()
    assert (p == -1.0).all()
    assert (p.grad == 8.0).all()
    assert optimizer.grad_scale == 4.0


# torch.compile


def test_compiled_training_step_gives_the_eager_result() -> None:
    found = []
    for compiled in (False, True):
        model, x, y = model_and_data()
        optimizer = dracopt_ext.AdamW(model.parameters(), lr=0.01)

        def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
            loop(optimizer, model, x, y, steps=1)

        run = torch.compile(train_step, backend="eager") if compiled else train_step
        for _ in range(3):
            run(model, optimizer, x, y)
        assert optimizer.last_backend == {"cpu": frozenset({"native"})}
        found.append(snapshot(optimizer))
    assert_same_bits(*found)


# Requirements of torch's own suite for every optimizer


@every_class
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # torch 2.10 warns once
def test_profiler_sees_the_step_under_torchs_name(name: str) -> None:
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    optimizer = getattr(dracopt_ext, name)([p])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert f"Optimizer.step#{name}.step" in {event.key for event in profile.key_averages()}


@every_class
@pytest.mark.parametrize("fused", [None, True])
def test_parameters_that_begin_on_meta(name: str, fused: bool | None) -> None:
    """Parameters can be optimized once they have left meta."""
    model = nn.Linear(4, 4, device="meta")
    options: dict[str, Any] = {} if fused is None or name == "NAdam" else {"fused": True}
    optimizer = getattr(dracopt_ext, name)(model.parameters(), **options)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    optimizer = getattr(dracopt_ext, name)(model.parameters(), **options)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert all((p != 1).all() for p in model.parameters())


@every_class
def test_zero_gradients_count_as_steps(name: str) -> None:
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.zeros(4)
    optimizer = getattr(dracopt_ext, name)([p], weight_decay=0.0)
    optimizer.step()
    assert (p == 1).all()
    assert optimizer.state[p].get("step", 1) == 1


@every_class
def test_named_parameters_and_groups_are_torchs(name: str) -> None:
    model, _, _ = model_and_data()
    named = list(model.named_parameters())
    groups = [{"params": named[:1], "lr": 0.5}, {"params": named[1:]}]
    found = [class_in(module, name)(groups).param_groups for module in (dracopt_ext, torch.optim)]
    assert [{k: v for k, v in g.items() if k != "params"} for g in found[0]] == [
        {k: v for k, v in g.items() if k != "params"} for g in found[1]
    ]
    mixed = [{"params": named[:1]}, {"params": [p for _, p in named[1:]]}]
    errors = []
    for module in (dracopt_ext, torch.optim):
        with pytest.raises(ValueError, match="with/without names") as info:
            class_in(module, name)(mixed)
        errors.append(str(info.value))
    assert errors[0] == errors[1]


def test_duplicate_parameters_warn_as_in_torch() -> None:
    p = nn.Parameter(torch.ones(2))
    warned = []
    for module in (dracopt_ext, torch.optim):
        with pytest.warns(UserWarning, match="duplicate parameters") as caught:
            module.SGD([p, p])
        warned.append(str(caught[0].message))
    assert warned[0] == warned[1]


def test_sgd_without_momentum_keeps_no_state() -> None:
    model, x, y = model_and_data()
    optimizer = dracopt_ext.SGD(model.parameters(), lr=0.1)
    loop(optimizer, model, x, y)
    assert not optimizer.state
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("name", classes(in_torch=True, fused=True, counts=True))
def test_capturable_with_fused_runs_on_the_cpu_as_in_torch(name: str) -> None:
    (value,), steps = inputs([64], torch.float32, 3)
    found = []
    for module in (dracopt_ext, torch.optim):
        p = nn.Parameter(value.clone())
        optimizer = class_in(module, name)([p], fused=True, capturable=True)
        for (grad,) in steps:
            p.grad = grad.clone()
            optimizer.step()
        found.append(snapshot(optimizer))
    Case(name).assert_agree(*found, steps=3)


@pytest.mark.parametrize("name", classes(in_torch=True, counts=True))
@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
def test_capturable_without_fused_raises_as_in_torch(name: str) -> None:
    errors = []
    for module in (dracopt_ext, torch.optim):
        p = nn.Parameter(torch.ones(4))
        p.grad = torch.ones(4)
        optimizer = class_in(module, name)([p], capturable=True)
        with pytest.raises(AssertionError) as info:
            optimizer.step()
        errors.append(str(info.value))
        if module is dracopt_ext:
            assert not optimizer.state
    assert errors[0] == errors[1]


@every_class
def test_training_lowers_the_loss_with_every_kind_of_lr_and_scheduler(name: str) -> None:
    for lr in (0.01, torch.tensor(0.01), torch.tensor([0.01]), torch.tensor([[0.01]])):
        model, x, y = model_and_data()
        optimizer = getattr(dracopt_ext, name)(model.parameters(), lr=lr)
        schedulers: list[Any] = [
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
            torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        ]
        first = nn.functional.mse_loss(model(x), y).item()
        for _ in range(10):
            loop(optimizer, model, x, y, steps=1)
            for scheduler in schedulers:
                scheduler.step(*([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
        assert optimizer.last_backend == {"cpu": frozenset({"native"})}
        assert nn.functional.mse_loss(model(x), y).item() < first
