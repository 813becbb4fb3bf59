"""Classes that torch.optim lacks behave as if torch had them. Each rule of torch's classes is tried in such a class,
beside the class that torch has."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dracopt_ext
from dracopt_ext import backend as backend_module
from dracopt_ext import rule as rules
from dracopt_ext.optim._kind import Kind
from dracopt_ext.optim._own import OwnOptimizer
from dracopt_ext.rule import FLAG, RULES

from .cases import (
    BY_RULE,
    CASES,
    FAULTS,
    WHOLE_BLOCKS,
    Case,
    NoOp,
    assert_same_bits,
    classes,
    inputs,
    rule_of,
    snapshot,
    train,
)

NATIVE, REFERENCE = ({"cpu": frozenset({name})} for name in ("native", "reference"))
to_the_reference = pytest.mark.filterwarnings("ignore:.*leaves .* to the reference:RuntimeWarning")
every_class = pytest.mark.parametrize("name", classes(in_torch=False))


def step(optimizer: Any, steps: int = 2) -> dict[str, Tensor]:
    for number in range(steps):
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.linspace(-1 - i, number + 1, p.numel(), dtype=p.dtype).view_as(p)
        optimizer.step()
    return snapshot(optimizer)


def fresh(count: int = 2, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(value.to(dtype)) for value in inputs([64] * count, torch.float32, 0)[0]]


class OwnAdam(OwnOptimizer):
    _dracopt_kind = Kind("adam")

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        decoupled_weight_decay: bool = False,
        **options: Any,
    ) -> None:
        names = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        flags = {"amsgrad": amsgrad, "decoupled_weight_decay": decoupled_weight_decay}
        super().__init__(params, {**names, **flags}, **options)


class OwnAdamW(OwnAdam):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **{"weight_decay": 1e-2, "decoupled_weight_decay": True, **options})


class OwnNAdam(OwnOptimizer):
    _dracopt_kind = Kind("nadam")

    def __init__(
        self,
        params: Any,
        lr: Any = 2e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        **options: Any,
    ) -> None:
        names = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum_decay": momentum_decay}
        super().__init__(params, {**names, "decoupled_weight_decay": decoupled_weight_decay}, **options)


class OwnSGD(OwnOptimizer):
    _dracopt_kind = Kind("sgd")

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        **options: Any,
    ) -> None:
        names = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, {**names, "nesterov": nesterov}, **options)


OWN: dict[str, Any] = {"Adam": OwnAdam, "AdamW": OwnAdamW, "NAdam": OwnNAdam, "SGD": OwnSGD}
of_torchs_rules = [case for case in CASES if case.algorithm in OWN]
every_case = pytest.mark.parametrize("case", of_torchs_rules, ids=str)
one_of_each = pytest.mark.parametrize("case", [case for case in BY_RULE.values() if case.algorithm in OWN], ids=str)


def test_all_rules_of_torchs_classes_are_tried() -> None:
    assert OWN.keys() == set(classes(in_torch=True))


# ---- the same as with torch's class


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_and_states_are_those_of_the_class_with_torchs_base(case: Case, dtype: torch.dtype) -> None:
    initial, steps = inputs(WHOLE_BLOCKS, torch.float32, 3)
    given = [t.to(dtype) for t in initial], [[t.to(dtype) for t in each] for each in steps]
    assert_same_bits(train(OWN[case.algorithm], case.options, *given), train(case.ours, case.options, *given))


@every_case
@pytest.mark.parametrize("fault", FAULTS)
def test_comparisons_with_that_class_bite(case: Case, fault: type[NoOp]) -> None:
    given = inputs(WHOLE_BLOCKS, torch.float32, 3)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(
            train(fault(OWN[case.algorithm]), case.options, *given), train(case.ours, case.options, *given)
        )


@one_of_each
@pytest.mark.parametrize("steps", [0, 2])
def test_checkpoints_move_between_the_two(case: Case, steps: int) -> None:
    own, base = OWN[case.algorithm](fresh(), **case.options), case.ours(fresh(), **case.options)
    step(own, steps)
    step(base, steps)
    own_again, base_again = OWN[case.algorithm](fresh(), **case.options), case.ours(fresh(), **case.options)
    file = io.BytesIO()
    torch.save(own.state_dict(), file)
    file.seek(0)
    base_again.load_state_dict(torch.load(file))
    own_again.load_state_dict(base.state_dict())
    for again, other in ((base_again, own), (own_again, base)):
        for p, q in zip(again.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
            p.data.copy_(q.data)
    found = [step(optimizer) for optimizer in (own, base, own_again, base_again)]
    for other in found[1:]:
        assert_same_bits(found[0], other)


@one_of_each
@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler(case: Case, fused: bool | None) -> None:
    """Flags, states and the step that an overflow skips are those of the class with torch's base."""
    if case.algorithm == "NAdam" and fused:
        pytest.skip("torch's NAdam takes no fused")
    more = {} if fused is None else {"fused": fused}
    found = []
    for make in (OWN[case.algorithm], case.ours):
        optimizer = make(fresh(), **case.options, **more)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        assert getattr(optimizer, "_step_supports_amp_scaling", False) == bool(fused)
        for overflow in (True, False, False):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.full_like(p, torch.inf if overflow else 0.5) * scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
        found.append(snapshot(optimizer))
    assert_same_bits(*found)


@one_of_each
def test_copies_keep_hooks_options_and_flags_as_torchs_do(case: Case) -> None:
    options = {**case.options, "state_dtype": torch.float64}
    for copied in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        found = []
        for make in (OWN[case.algorithm], case.ours):
            optimizer = make(fresh(), **options)
            optimizer.register_step_post_hook(lambda *_: None)
            again = copied(optimizer)
            assert again.state_dtype == torch.float64
            assert again.defaults.items() <= optimizer.defaults.items()
            assert not again._optimizer_step_post_hooks
            found.append(step(again))
        assert_same_bits(*found)


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@one_of_each
@pytest.mark.parametrize("has_kernels", [False, True])
@to_the_reference
def test_what_kernels_do_not_serve_goes_to_the_reference(
    case: Case, has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are no kernels, or a mode sees all operations, so that kernels must not run."""
    optimizer, expected = (OWN[case.algorithm](fresh(), **case.options) for _ in range(2))
    step(expected)
    if not has_kernels:
        monkeypatch.setattr("dracopt_ext.backend.NATIVE_REASON", "switched off")
    with Passing() if has_kernels else contextlib.nullcontext():
        step(optimizer)
    assert (optimizer.last_backend, expected.last_backend) == (REFERENCE, NATIVE)
    assert_same_bits(snapshot(optimizer), snapshot(expected))


# ---- constructors


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ({"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
    ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
    ({"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
    ({"betas": (0.9,)}, ValueError, "betas must be 2 numbers, not 1"),
    ({"betas": (0.9, -0.1)}, ValueError, "Invalid beta parameter at index 1: -0.1"),
    ({"weight_decay": -0.5}, ValueError, "Invalid weight_decay value: -0.5"),
    ({"differentiable": True}, RuntimeError, "does not support differentiable=True"),
    ({"foreach": True, "fused": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together."),
    ({"unknown": 1}, TypeError, r"^NAME.__init__\(\) got an unexpected keyword argument 'unknown'"),
    ({"backend": "cuda"}, ValueError, "backend"),
]


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (name, options, error, message)
        for name in classes(in_torch=False)
        for options, error, message in WRONG
        if not {"betas", "weight_decay"} & options.keys() - rule_of(name).kinds.keys()
    ],
)
def test_constructors_refuse(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("NAME", name)):
        getattr(dracopt_ext, name)(fresh(), **options)


def test_these_are_torchs_words() -> None:
    for options, error, message in WRONG[:7]:
        if "must be 2 numbers" in message:  # torch raises an IndexError
            continue
        with pytest.raises(error, match=message):
            torch.optim.AdamW(fresh(), **options)


@every_class
def test_groups_have_the_keys_that_torchs_classes_share(name: str) -> None:
    optimizer = getattr(dracopt_ext, name)(fresh(), maximize=True)
    shared = {"params", "maximize", "foreach", "capturable", "differentiable", "fused"}
    assert optimizer.param_groups[0].keys() == {*optimizer._dracopt_kind.rule.kinds, *shared}
    assert optimizer.param_groups[0]["maximize"] is True


# ---- declarations that are incomplete


def update(p: Tensor, g: Tensor, state: Any, *, lr: float, other: float) -> Tensor:
    """Formula."""
    return p


def without_annotation(p: Tensor, g: Tensor, state: Any, *, lr) -> Tensor:  # type: ignore[no-untyped-def]
    """Formula."""
    return p


@pytest.mark.parametrize(
    ("function", "declared", "message"),
    [
        (without_annotation, {}, "annotate 'lr' as one of float, tuple"),
        (update, {"moments": {"exp_avg": "momentum"}}, "the switch 'momentum' of 'exp_avg' is no hyperparameter"),
        (update, {"state_scalars": {"mu_product": 1}}, "the first of the state scalars must be 'step'"),
    ],
)
def test_incomplete_rules(function: Callable[..., Any], declared: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        rules.declare_rule(**{"moments": {}, **declared})(function)
    assert function.__name__ not in RULES


def test_a_class_that_names_no_rule() -> None:
    with pytest.raises(TypeError, match=r"no rule is named 'leon'; dracopt_ext/reference.py has adam, lion"):
        Kind("leon")


def test_a_class_that_lacks_a_hyperparameter() -> None:
    class Forgetful(OwnOptimizer):
        _dracopt_kind = Kind("lion")

        def __init__(
            self, params: Any, lr: float = 1e-4, betas: Any = (0.9, 0.99), weight_decay: float = 0, **options: Any
        ) -> None:
            super().__init__(params, {"lr": lr, "betas": betas}, **options)

    with pytest.raises(TypeError, match="the constructor of Forgetful leaves out the hyperparameter 'weight_decay'"):
        Forgetful(fresh())
    with pytest.raises(TypeError, match=r"Incomplete.__init__ must take 'weight_decay', a hyperparameter of 'lion'"):

        class Incomplete(OwnOptimizer):
            _dracopt_kind = Kind("lion")

            def __init__(self, params: Any, lr: float = 1e-4, betas: Any = (0.9, 0.99), **options: Any) -> None:
                super().__init__(params, {"lr": lr, "betas": betas}, **options)


def test_a_class_without_our_options() -> None:
    with pytest.raises(TypeError, match=r"Closed.__init__ must take \*\*options, and pass them on"):

        class Closed(OwnOptimizer):
            _dracopt_kind = Kind("lion")

            def __init__(self, params: Any, lr: float, betas: Any, weight_decay: float) -> None:
                super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})


def test_rules_that_are_not_in_both_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = backend_module._C.rules()  # type: ignore[union-attr]
    assert rules.differences(compiled) == []
    assert rules.differences({name: rule for name, rule in compiled.items() if name != "lion"}) == [
        "csrc/rules/all.h does not list the rule 'lion'"
    ]
    lion = compiled["lion"]
    for change, message in (
        ({"state_keys": ("momentum",)}, "the moments of 'lion' are ['exp_avg'] in dracopt_ext/reference.py and ['mom"),
        (
            {"state_scalar_keys": ("step",)},
            "the state scalars of 'lion' are [] in dracopt_ext/reference.py and ['step']",
        ),
        ({"group_keys": {**lion.group_keys, "lr": FLAG}}, "the hyperparameters of 'lion' are [('lr', 'number'), "),
    ):
        (found,) = rules.differences({**compiled, "lion": lion._replace(**change)})
        assert found.startswith(message)
    monkeypatch.delitem(RULES, "lion")
    assert rules.differences(compiled) == ["dracopt_ext/reference.py has no rule 'lion'"]


def test_the_import_fails_if_the_declarations_differ(tmp_path: Path) -> None:
    source = Path(dracopt_ext.__file__).parent
    shutil.copytree(source, tmp_path / "dracopt_ext", ignore=lambda *_: ["native", "triton_kernels", "__pycache__"])
    (tmp_path / "dracopt_ext/native").symlink_to(source / "native")
    program, environment = [sys.executable, "-c", "import dracopt_ext"], {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert subprocess.run(program, cwd=tmp_path, env=environment).returncode == 0
    reference = tmp_path / "dracopt_ext/reference.py"
    reference.write_text(reference.read_text().replace('moments={"exp_avg": None})', 'moments={"average": None})'))
    run = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (
        "ImportError: the moments of 'lion' are ['average'] in dracopt_ext/reference.py and ['exp_avg'] in csrc"
        in run.stderr
    )


@pytest.mark.parametrize("name", classes(counts=False))
def test_capturable_changes_nothing_without_a_count_of_steps(name: str) -> None:
    optimizer = getattr(dracopt_ext, name)(fresh())
    optimizer.param_groups[0]["capturable"] = True
    step(optimizer)
    assert optimizer.last_backend == NATIVE


# ---- Lion


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lion_is_what_the_paper_says(dtype: torch.dtype) -> None:
    """On whole SIMD blocks torch's operations round as ours do."""
    lr, (beta1, beta2), decay = 0.01, (0.9, 0.99), 0.1
    initial, steps = inputs(WHOLE_BLOCKS, dtype, 5)
    expected: dict[str, Tensor] = {}
    for i, value in enumerate(initial):
        p, exp_avg = value.clone(), torch.zeros_like(value)
        for gradients in steps:
            sign = exp_avg.mul(beta1).add(gradients[i], alpha=1 - beta1).sign()
            p.mul_(1 - lr * decay).add_(sign, alpha=-lr)
            exp_avg.mul_(beta2).add_(gradients[i], alpha=1 - beta2)
        expected.update({f"0.{i}": p, f"0.{i}.exp_avg": exp_avg})
    found = train(dracopt_ext.Lion, {"lr": lr, "weight_decay": decay}, initial, steps)
    assert_same_bits(found, expected)
    for fault in FAULTS:
        wrong = train(fault(dracopt_ext.Lion), {"lr": lr, "weight_decay": decay}, initial, steps)
        with pytest.raises(AssertionError, match="elements differ"):
            assert_same_bits(wrong, expected)


@pytest.mark.parametrize("backend", ["native", "reference", "triton"])
def test_the_sign_of_zero_and_nan(backend: str) -> None:
    """A gradient of zero only decays the parameter, and NaN must not go unnoticed."""
    if backend == "triton" and dracopt_ext.backends()["triton"] is not None and not backend_module.INTERPRETING:
        pytest.skip("needs a GPU or Triton's interpreter")
    p = nn.Parameter(torch.full((5,), 2.0))
    p.grad = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf])
    dracopt_ext.Lion([p], lr=0.5, weight_decay=0.5, backend=backend).step()
    assert torch.equal(p[:2], torch.full((2,), 1.5))
    assert p[2].isnan()
    assert p[3:].tolist() == [1.0, 2.0]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_complex_numbers_that_only_the_reference_takes() -> None:
    """A complex number in 32 bits is a pair of numbers in fp16."""
    p, q = nn.Parameter(torch.ones(4, dtype=torch.complex32)), nn.Parameter(torch.ones(4, 2, dtype=torch.float16))
    q.data[:, 1] = 0
    gradients = torch.linspace(-1, 1, 8, dtype=torch.float16).view(4, 2)
    p.grad, q.grad = torch.view_as_complex(gradients), gradients
    with pytest.warns(RuntimeWarning, match="to the reference implementation"):
        dracopt_ext.Lion([p], lr=0.25).step()
    dracopt_ext.Lion([q], lr=0.25).step()
    assert torch.equal(torch.view_as_real(p.detach()), q.detach())


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_state_that_is_no_tensor(backend: str) -> None:
    optimizer = dracopt_ext.Lion(fresh(), backend=backend)
    step(optimizer, 1)
    optimizer.state[optimizer.param_groups[0]["params"][1]]["exp_avg"] = 0.0
    with pytest.raises(
        ValueError, match=r"the state 'exp_avg' of parameter 1 of group 0 .* must be a Tensor, not float"
    ):
        step(optimizer, 1)


def test_checkpoints_of_other_libraries() -> None:
    """They have the keys of the paper's own code: lr, betas, weight_decay and exp_avg."""
    ours = dracopt_ext.Lion(fresh(), weight_decay=0.1)
    step(ours)
    theirs: Any = ours.state_dict()
    for group in theirs["param_groups"]:
        for key in ("maximize", "foreach", "capturable", "differentiable", "fused"):
            del group[key]
    again = dracopt_ext.Lion(fresh(), maximize=True)
    again.load_state_dict(theirs)
    assert again.param_groups[0]["weight_decay"] == 0.1
    assert again.param_groups[0]["maximize"] is True
    again.param_groups[0]["maximize"] = False
    for p, q in zip(again.param_groups[0]["params"], ours.param_groups[0]["params"], strict=True):
        p.data.copy_(q.data)
    assert_same_bits(step(again), step(ours))
    assert {name for state in ours.state.values() for name in state} == {"exp_avg"}
