"""Subclasses, wrappers, containers and modes that people have built work with our classes as with torch's."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import inspect
import pickle
import types
import warnings
from collections import ChainMap, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dracopt_ext
from dracopt_ext.rule import FLAG

from .cases import FAULTS, WHOLE_BLOCKS, NoOp, Snapshot, assert_same_bits, classes, inputs, rule_of, snapshot, torchs

NATIVE = {"cpu": frozenset({"native"})}
TORCH = {"cpu": frozenset({"torch"})}
CLASSES = classes()
FUSED = classes(in_torch=True, fused=True)
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"lr": 0.1, "momentum": 0.9}}
every_class = pytest.mark.parametrize("name", CLASSES)
TORCHS = classes(in_torch=True)
every_class_of_torch = pytest.mark.parametrize("name", TORCHS)
left_to_torch = pytest.mark.filterwarnings("ignore:.*(leaves .* to|is stepped by) torch's own:RuntimeWarning")

Build = Callable[[Any], Any]
"""Makes an optimizer class from one of torch's classes or ours."""


def ours(name: str) -> Any:
    return getattr(dracopt_ext, name)


def options_of(name: str) -> dict[str, Any]:
    return OPTIONS.get(name, {"lr": 0.1})


def oracle(name: str, **options: Any) -> dict[str, Any]:
    """Options that make torch's class give our kernels' bits on whole SIMD blocks, or ours use the reference."""
    return {**options_of(name), **options, **({"fused": True} if name in FUSED else {"backend": "reference"})}


def oracle_class(name: str) -> Any:
    return torchs(name) if name in FUSED else ours(name)


def params_of(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def fresh() -> list[nn.Parameter]:
    return [nn.Parameter(value) for value in inputs(WHOLE_BLOCKS, torch.float32, 0)[0]]


def step(optimizer: Any, times: int = 3) -> Snapshot:
    """Takes steps, each with gradients of its own."""
    _, gradients = inputs(WHOLE_BLOCKS, torch.float32, times)
    for of_step in gradients:
        for p, grad in zip(params_of(optimizer), of_step, strict=True):
            p.grad = grad.as_subclass(type(p)) if isinstance(p, Tagged) else grad
        optimizer.step()
    return snapshot(optimizer)


def assert_native_like(name: str, change: Callable[[Any], object], make: Any = None, **options: Any) -> Any:
    """Makes a change to ours and to the oracle; asserts equal training, ours by the kernels."""
    optimizer = (make or ours(name))(fresh(), **options_of(name), **options)
    other = oracle_class(name)(fresh(), **oracle(name, **options))
    for each in (optimizer, other):
        change(each)
    assert_same_bits(step(optimizer), step(other))
    assert optimizer.last_backend == NATIVE
    return optimizer


@every_class
@pytest.mark.parametrize("fault", FAULTS)
def test_comparisons_bite(name: str, fault: type[NoOp]) -> None:
    with pytest.raises(AssertionError, match="elements differ"):
        assert_native_like(name, lambda optimizer: None, fault(ours(name)))
    with pytest.raises(AssertionError, match="elements differ"):
        assert_steps_as_torchs(name, lambda base: base, fault)


# Methods that torch's step calls


def assert_steps_as_torchs(name: str, build: Build, fault: Any = lambda make: make, **options: Any) -> Any:
    optimizer = fault(build(ours(name)))(fresh(), **options_of(name), **options)
    other = build(torchs(name))(fresh(), **options_of(name), **options)
    assert_same_bits(step(optimizer), step(other))
    return optimizer


def cautious(base: Any) -> Any:
    """Masks the gradients that have another sign than the update before (Liang et al. 2024)."""

    class Cautious(base):  # type: ignore[misc]
        def _init_group(self, group: Any, params: Any, grads: Any, buffers: Any, *more: Any) -> Any:
            found = super()._init_group(group, params, grads, buffers, *more)
            grads[:] = [
                g if b is None else g * (g * b >= 0) / (g * b >= 0).float().mean().clamp(min=1e-3)
                for g, b in zip(grads, buffers, strict=True)
            ]
            return found

    return Cautious


def partial(base: Any) -> Any:
    """Leaves the first parameter of each group out, and keeps a state of its own."""

    class Partial(base):  # type: ignore[misc]
        def _init_group(self, group: Any, *lists: Any) -> Any:
            found = super()._init_group({**group, "params": group["params"][1:]}, *lists)
            self.state[group["params"][0]]["left_out"] = torch.ones(1)
            return found

    return Partial


@every_class_of_torch
@pytest.mark.parametrize("build", [cautious, partial])
def test_init_group_overridden(name: str, build: Build) -> None:
    plain = step(torchs(name)(fresh(), **options_of(name)))
    with pytest.warns(RuntimeWarning, match=r"\w+ overrides _init_group, which only torch's own step calls") as caught:
        optimizer = assert_steps_as_torchs(name, build)
    assert len(caught) == 1
    assert optimizer.last_backend == TORCH
    assert not torch.equal(snapshot(optimizer)["0.0"], plain["0.0"])


@left_to_torch
@pytest.mark.parametrize("where", ["instance", "our class", "torch's class"])
@every_class_of_torch
def test_init_group_replaced(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some users replace the method without a subclass."""
    init_group = torchs(name)._init_group

    @functools.wraps(init_group)
    def halved(self: Any, group: Any, params: Any, grads: Any, *more: Any) -> Any:
        found = init_group(self, group, params, grads, *more)
        grads[:] = [grad / 2 for grad in grads]
        return found

    optimizers = [module(fresh(), **options_of(name)) for module in (ours(name), torchs(name))]
    if where == "instance":
        for optimizer in optimizers:
            optimizer._init_group = types.MethodType(halved, optimizer)
    else:
        monkeypatch.setattr(torchs(name), "_init_group", halved)
        if where == "our class":
            monkeypatch.setattr(ours(name), "_init_group", halved, raising=False)
    assert_same_bits(*map(step, optimizers))
    assert optimizers[0].last_backend == TORCH
    monkeypatch.undo()
    vars(optimizers[0]).pop("_init_group", None)
    step(optimizers[0], 1)
    assert optimizers[0].last_backend == NATIVE


@left_to_torch
@every_class_of_torch
def test_init_group_replaced_in_wrappers_of_torchs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapped function counts as torch's only if the original is inside. torch.compile wraps the original."""
    init_group = torchs(name)._init_group

    def halved(self: Any, group: Any, params: Any, grads: Any, *more: Any) -> Any:
        found = init_group(self, group, params, grads, *more)
        grads[:] = [grad / 2 for grad in grads]
        return found

    for wrap in (torch.no_grad(), torch._dynamo.disable):
        with monkeypatch.context() as patch:
            patch.setattr(torchs(name), "_init_group", wrap(halved))  # type: ignore[operator]
            optimizers = [module(fresh(), **options_of(name)) for module in (ours(name), torchs(name))]
            assert_same_bits(*map(step, optimizers))
            assert optimizers[0].last_backend == TORCH
            patch.setattr(torchs(name), "_init_group", wrap(init_group))  # type: ignore[operator]
            step(optimizers[0], 1)
            assert optimizers[0].last_backend == NATIVE
    step(optimizers[0], 1)
    assert optimizers[0].last_backend == NATIVE


@left_to_torch
@pytest.mark.parametrize("name", classes(in_torch=True, counts=True))
def test_every_method_that_torchs_step_calls(name: str) -> None:
    """The methods are those of the installed version of torch."""
    methods = ours(name)._dracopt_kind.methods
    assert {"_init_group"} < set(methods)
    for method in methods:
        called = []

        def spy(self: Any, *args: Any, method: str = method, called: list[str] = called) -> Any:
            called.append(method)
            return getattr(torchs(name), method)(self, *args)

        optimizer = type("Spying", (ours(name),), {method: spy})(fresh())
        step(optimizer, 1)
        assert called == [method]
        assert optimizer.last_backend == TORCH


@pytest.mark.parametrize("option", [{"backend": "native"}, {"backend": "reference"}, {"state_dtype": torch.float64}])
def test_what_torchs_step_cannot_keep_is_refused(option: dict[str, Any]) -> None:
    optimizer = cautious(dracopt_ext.AdamW)(fresh(), **option)
    before = snapshot(optimizer)
    with pytest.raises(
        RuntimeError, match=r"(backend|state_dtype)=\S+ is not for Cautious, which overrides _init_group"
    ):
        step(optimizer, 1)
    assert_same_bits(snapshot(optimizer), before)


@left_to_torch
@pytest.mark.parametrize("name", classes(in_torch=True, fused=True))
def test_init_group_overridden_with_grad_scaler(name: str) -> None:
    found = []
    for base in (ours(name), torchs(name)):
        optimizer = cautious(base)(fresh(), **options_of(name), fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for overflow in (False, True, False):
            _, (gradients,) = inputs(WHOLE_BLOCKS, torch.float32, 1)
            for p, grad in zip(params_of(optimizer), gradients, strict=True):
                p.grad = grad * scaler.scale(torch.ones(())) * (float("inf") if overflow else 1)
            scaler.step(optimizer)
            scaler.update()
        found.append(snapshot(optimizer))
    assert_same_bits(*found)


# Names


def test_no_name_of_ours_is_one_that_a_subclass_would_choose() -> None:
    ours_by_contract = {"backend", "state_dtype", "last_backend", "master_params", "release_gradients"}
    ours_by_contract |= {"max_grad_norm", "error_if_nonfinite", "grad_norm"}
    for name in CLASSES:
        known = set(dir(getattr(torch.optim, name, torch.optim.Optimizer)))
        for cls in ours(name).__mro__:
            if not cls.__module__.startswith("dracopt_ext"):
                continue
            for attribute in vars(cls):
                added = attribute not in known | ours_by_contract and not attribute.startswith("__")
                assert not added or attribute.startswith("_dracopt_"), f"{cls.__name__}.{attribute}"
        if name not in TORCHS:
            continue
        optimizer, other = ours(name)(fresh()), torchs(name)(fresh())
        for each in (optimizer, other):
            step(each, 1)
        assert set(vars(optimizer)) - set(vars(other)) == {"_dracopt_context"}
        assert set(dir(optimizer)) - known - set(dir(other)) == {*ours_by_contract, "_dracopt_context", "_dracopt_kind"}


EVERYDAY = [
    *("_update", "_select", "_plan", "_plans", "_rule", "_find", "_describe", "_backends", "_create_state"),
    *("_lacks_state", "_torch_step", "_for_torch", "_unscaled", "_indices", "_is_on_gpu", "_with_gradients"),
    *("_counts_steps", "_others_ran", "_restored_on_error", "run", "groups", "kind", "context"),
]


@every_class
def test_everyday_names_are_free(name: str) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("not ours to call")

    busy = type("Busy", (ours(name),), dict.fromkeys(EVERYDAY, refuse))
    assert_native_like(name, lambda optimizer: None, busy)

    def set_attributes(optimizer: Any) -> None:
        vars(optimizer).update(dict.fromkeys(EVERYDAY, "mine"))

    assert_native_like(name, set_attributes)


@pytest.mark.parametrize("value", ["nccl", ["a", "list"], 3])
@every_class
def test_attributes_of_a_subclass_are_not_taken_for_our_options(name: str, value: Any) -> None:
    class Own(ours(name)):  # type: ignore[misc]
        def __init__(self, params: Any, **options: Any) -> None:
            self.backend = value
            super().__init__(params, **options)
            self.state_dtype = value

    optimizer = assert_native_like(name, lambda optimizer: None, Own)
    assert optimizer.backend == optimizer.state_dtype == value
    optimizer.backend = optimizer.state_dtype = None
    assert optimizer.backend is optimizer.state_dtype is None
    of_class = type("OfClass", (ours(name),), {"backend": value, "state_dtype": property(lambda self: value)})
    assert assert_native_like(name, lambda optimizer: None, of_class).backend == value


def test_our_options_set_before_the_constructor() -> None:
    class Before(dracopt_ext.AdamW):
        def __init__(self, params: Any, **options: Any) -> None:
            self.backend, self.state_dtype = "reference", torch.float64
            super().__init__(params, **options)

    assert (Before(fresh()).backend, Before(fresh()).state_dtype) == ("reference", torch.float64)
    assert Before(fresh(), backend="native").backend == "native"


def test_our_options_can_be_changed_between_steps() -> None:
    optimizer = dracopt_ext.AdamW(fresh())
    step(optimizer, 1)
    optimizer.backend = "reference"
    step(optimizer, 1)
    assert optimizer.last_backend == {"cpu": frozenset({"reference"})}
    optimizer.backend = None
    context = optimizer._dracopt_context
    assert len(context.plans) == 1  # captured graphs refer to memory that a plan holds
    optimizer.state_dtype = torch.float64
    optimizer.load_state_dict(optimizer.state_dict())
    step(optimizer, 1)
    assert optimizer.last_backend == NATIVE
    assert optimizer.state[params_of(optimizer)[0]]["exp_avg"].dtype == torch.float64
    of_complex = dracopt_ext.AdamW([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match=r"serves real parameters only, but parameter 0 of group 0 \(shape \[2\]\)"):
        of_complex.state_dtype = torch.float32
    assert of_complex.state_dtype is None


# Constructors


@every_class
def test_constructor_of_the_base_class(name: str) -> None:
    """A subclass passes our constructor by and gives the base class the defaults."""
    defaults = oracle_class(name)(fresh(), **options_of(name)).defaults

    class Base(ours(name)):  # type: ignore[misc]
        def __init__(self, params: Any, **_: Any) -> None:
            torch.optim.Optimizer.__init__(self, params, dict(defaults))

    optimizer = assert_native_like(name, lambda optimizer: None, Base)
    assert optimizer.backend is None
    assert optimizer.defaults == defaults


@pytest.mark.parametrize("name", [name for name in TORCHS if name != "AdamW"])
def test_constructor_after_our_class(name: str) -> None:
    """``super(Adam, self)`` is the base class with torch's Adam. The next test has AdamW, a subclass of Adam."""
    defaults = torchs(name)(fresh(), **options_of(name)).defaults

    def after(cls: Any) -> Any:
        class After(cls):  # type: ignore[misc]
            def __init__(self, params: Any, **_: Any) -> None:
                super(cls, self).__init__(params, dict(defaults))

        return After

    after(torchs(name))(fresh())
    assert_native_like(name, lambda optimizer: None, after(ours(name)))


def test_constructor_after_adamw() -> None:
    found = []
    for module in (dracopt_ext, torch.optim):

        class Decoupled(module.AdamW):  # type: ignore[name-defined, misc]
            def __init__(self, params: Any, module: Any = module, **options: Any) -> None:
                super(module.AdamW, self).__init__(params, decoupled_weight_decay=True, **options)

        optimizer = Decoupled(fresh(), lr=0.1, weight_decay=0.5, fused=True)
        found.append((step(optimizer), optimizer.defaults))
    assert_same_bits(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@every_class
def test_constructor_passed_by(name: str) -> None:
    def bare(params: Any, **options: Any) -> Any:
        optimizer = object.__new__(ours(name))
        made = torchs(name)(params, **options)
        optimizer.__setstate__({"defaults": made.defaults, "state": made.state, "param_groups": made.param_groups})
        assert optimizer.last_backend == {}
        return optimizer

    assert_native_like(name, lambda optimizer: None, bare)


def test_constructor_passed_by_heeds_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRACOPT_BACKEND", "reference")

    class Base(dracopt_ext.Adam):
        def __init__(self, params: Any) -> None:
            torch.optim.Optimizer.__init__(self, params, torch.optim.Adam(fresh()).defaults)

    optimizer = Base(fresh())
    step(optimizer, 1)
    assert optimizer.last_backend == {"cpu": frozenset({"reference"})}


class Registry:
    found: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, key: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.found[key] = cls


@every_class
def test_keywords_in_the_class_statement(name: str) -> None:
    class First(ours(name), Registry, key="first"):  # type: ignore[misc]
        pass

    class Last(Registry, ours(name), key="last"):  # type: ignore[misc]
        pass

    for key, cls in (("first", First), ("last", Last)):
        assert Registry.found[key] is cls
        assert_native_like(name, lambda optimizer: None, cls)


def test_constructors_of_several_bases_run_once_each() -> None:
    for module in (dracopt_ext, torch.optim):
        ran: list[str] = []

        class A(module.Adam):  # type: ignore[name-defined, misc]
            def __init__(self, *args: Any, ran: list[str] = ran, **kwargs: Any) -> None:
                ran.append("A")
                super().__init__(*args, **kwargs)

        class B(torch.optim.Adam):
            def __init__(self, *args: Any, ran: list[str] = ran, **kwargs: Any) -> None:
                ran.append("B")
                super().__init__(*args, **kwargs)

        class Both(A, B):
            pass

        step(Both(fresh(), lr=0.5), 1)
        assert ran == ["A", "B"]


@every_class
def test_instances_that_pickle_all_their_attributes(name: str) -> None:
    optimizer = Attributed(fresh()) if name == "AdamW" else ours(name)(fresh())
    step(optimizer, 1)
    for again in (copy.deepcopy(optimizer), copy.copy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert again._dracopt_context is not optimizer._dracopt_context
        assert not again._dracopt_context.plans
        step(again, 1)
        assert again.last_backend == NATIVE


class Attributed(dracopt_ext.AdamW):
    def __getstate__(self) -> dict[str, Any]:
        return {key: copy.copy(value) for key, value in self.__dict__.items()}


# Wrappers


@every_class
def test_average_of_the_weights(name: str) -> None:
    """A subclass keeps a state of its own beside torch's and fills this state after each step."""

    def averaging(base: Any) -> Any:
        class Averaging(base):  # type: ignore[misc]
            def step(self, closure: Any = None) -> Any:
                loss = super().step(closure)
                for p in params_of(self):
                    average = self.state[p].setdefault("average", p.detach().clone())
                    average.lerp_(p.detach(), 0.25)
                return loss

        return Averaging

    optimizer = averaging(ours(name))(fresh(), **options_of(name))
    other = averaging(oracle_class(name))(fresh(), **oracle(name))
    assert_same_bits(step(optimizer), step(other))
    assert optimizer.last_backend == NATIVE
    again = averaging(ours(name))([p.detach().clone().requires_grad_() for p in params_of(optimizer)])
    again.load_state_dict(optimizer.state_dict())
    assert_same_bits(step(again), step(other))


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "AdamW"])
def test_rebuilt_from_defaults_and_groups(name: str) -> None:
    """Wrappers make the same optimizer again for other parameters. torch's AdamW cannot be made like this."""
    found = []
    for make, options in ((ours(name), options_of(name)), (oracle_class(name), oracle(name))):
        first = make(fresh(), **options)
        first.param_groups[0]["lr"] = 0.3
        again = type(first)(first.param_groups, **first.defaults)
        if name == "NAdam" and make is ours(name):
            again.backend = options.get("backend")
        found.append(step(again))
    assert_same_bits(*found)


@every_class
def test_lookahead(name: str) -> None:
    """A wrapper shares its groups and state with the optimizer inside, like Lookahead (Zhang et al. 2019)."""

    class Lookahead(torch.optim.Optimizer):
        def __init__(self, inner: Any) -> None:
            self.inner = inner
            self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults
            self.slow = [p.detach().clone() for p in params_of(inner)]
            self.count = 0

        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            self.inner.step(closure)
            self.count += 1
            for p, slow in zip(params_of(self), self.slow, strict=True):
                if self.count % 2 == 0:
                    p.data.copy_(slow.lerp_(p.detach(), 0.5))

    found = [
        step(Lookahead(ours(name)(fresh(), **options_of(name)))),
        step(Lookahead(oracle_class(name)(fresh(), **oracle(name)))),
    ]
    assert_same_bits(*found)


# Numbers


class Numbers:
    """A sequence that is no list, as in configuration libraries."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> float:
        return self.numbers[index]


BETAS = {
    "list": [0.5, 0.75],
    "array": np.array([0.5, 0.75]),
    "tensor of two": torch.tensor([0.5, 0.75], dtype=torch.float64),
    "sequence": Numbers(0.5, 0.75),
    "deque": deque([0.5, 0.75]),
}


@pytest.mark.parametrize("form", BETAS)
@pytest.mark.parametrize("name", [name for name in CLASSES if "betas" in rule_of(name).kinds])
def test_betas_in_any_form(name: str, form: str) -> None:
    expected = step(oracle_class(name)(fresh(), **oracle(name, betas=(0.5, 0.75))))

    def assigned(optimizer: Any) -> Any:
        optimizer.param_groups[0]["betas"] = BETAS[form]
        return optimizer

    def loaded(optimizer: Any) -> Any:
        saved = optimizer.state_dict()
        saved["param_groups"][0]["betas"] = BETAS[form]
        optimizer.load_state_dict(saved)
        return optimizer

    options = options_of(name)
    found = [
        assigned(ours(name)(fresh(), **options)),
        loaded(ours(name)(fresh(), **options)),
        ours(name)([{"params": fresh(), "betas": BETAS[form]}], **options),
        assigned(ours(name)(fresh(), **options, backend="reference")),
    ]
    if form in ("array", "sequence", "deque", "list") and name == "NAdam":
        torch.optim.NAdam(fresh(), betas=BETAS[form])  # type: ignore[arg-type]
        found.append(ours(name)(fresh(), **options, betas=BETAS[form]))
    for optimizer in found:
        assert_same_bits(step(optimizer), expected)
    assert found[0].last_backend == NATIVE
    assert found[0].param_groups[0]["betas"] is BETAS[form]


FLAGS = {name: ["maximize", *(key for key, kind in rule_of(name).kinds.items() if kind == FLAG)] for name in CLASSES}
FLAGS["AdamW"].remove("decoupled_weight_decay")  # which is always on
TRUTHS: list[Any] = [None, 0, 1, "", "yes", [], [0], np.True_, np.False_, torch.tensor(True), torch.tensor(0)]


@pytest.mark.parametrize(("name", "flag"), [(name, flag) for name in CLASSES for flag in FLAGS[name]])
def test_flags_are_asked_for_their_truth(name: str, flag: str) -> None:
    more = {"weight_decay": 0.3}
    expected = {
        truth: step(oracle_class(name)([{"params": fresh(), flag: truth}], **oracle(name, **more)))
        for truth in (False, True)
    }
    assert not torch.equal(expected[False]["0.0"], expected[True]["0.0"])
    for value in TRUTHS:
        for more_of_ours in ({}, {"backend": "reference"}):
            optimizer = ours(name)([{"params": fresh(), flag: value}], **options_of(name), **more, **more_of_ours)
            assert_same_bits(step(optimizer), expected[bool(value)])
            if not more_of_ours:
                assert optimizer.last_backend == NATIVE


# Containers


class Params(UserDict[str, Any]):
    """A mapping that is no dict."""


class Upper(dict[str, Any]):
    """A dict whose own storage knows its entries by other names."""

    def __init__(self, entries: Any = ()) -> None:
        super().__init__({f"MY_{key}": value for key, value in dict(entries).items()})

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(f"MY_{key}")

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(f"MY_{key}", value)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(f"MY_{key}")

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix("MY_") for key in super().__iter__())

    def keys(self) -> Any:
        return list(self)

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if self.__contains__(key) else default

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(f"MY_{key}", *default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        return super().setdefault(f"MY_{key}", default)

    def update(self, other: Any = (), **more: Any) -> None:
        for key, value in dict(other, **more).items():
            self[key] = value


def twice_the_lr(entries: Any) -> Any:
    """Makes a dict whose method answers with another learning rate than it stores."""

    class Twice(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            value = super().__getitem__(key)
            return value * 2 if key == "lr" else value

    return Twice({**entries, "lr": entries["lr"] / 2})


class Knowing(dict[str, Any]):
    """A dict that knows keys without listing them."""

    def __init__(self, entries: Any) -> None:
        super().__init__({"lr": entries["lr"]})
        self.rest = {key: value for key, value in entries.items() if key not in self}

    def __missing__(self, key: str) -> Any:
        return self.rest[key]


GROUPS: dict[str, Callable[[Any], Any]] = {
    "OrderedDict": OrderedDict,
    "defaultdict": lambda group: defaultdict(lambda: None, group),
    "UserDict": Params,
    "ChainMap": lambda group: ChainMap({"lr": group["lr"]}, {k: v for k, v in group.items() if k != "lr"}),
    "other names": Upper,
    "twice the lr": twice_the_lr,
    "keys not listed": Knowing,
}


@pytest.mark.parametrize("kind", GROUPS)
@every_class
def test_groups_in_other_mappings(name: str, kind: str) -> None:
    def change(optimizer: Any) -> None:
        optimizer.param_groups[0] = GROUPS[kind](dict(optimizer.param_groups[0], maximize=True))

    assert_native_like(name, change)


@pytest.mark.parametrize("kind", [tuple, deque, lambda groups: dict(enumerate(groups)).values()])
@every_class
def test_groups_in_other_sequences(name: str, kind: Any) -> None:
    def change(optimizer: Any) -> None:
        optimizer.param_groups = kind(optimizer.param_groups)

    assert_native_like(name, change)


class Hiding(list[Any]):
    """A list that stores one parameter more than it shows."""

    def __iter__(self) -> Iterator[Any]:
        return iter(list.__getitem__(self, slice(1, None)))


OTHER_SEQUENCES: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "deque": deque,
    "ParameterList": nn.ParameterList,
    "values": lambda params: {str(i): p for i, p in enumerate(params)}.values(),
    "hiding": lambda params: Hiding([nn.Parameter(torch.ones(64)), *params]),
}


@pytest.mark.parametrize("kind", OTHER_SEQUENCES)
@every_class
def test_parameters_in_other_sequences(name: str, kind: str) -> None:
    def change(optimizer: Any) -> None:
        params = OTHER_SEQUENCES[kind](optimizer.param_groups[0]["params"])
        if kind == "hiding":
            list.__getitem__(params, 0).grad = torch.ones(64)
        optimizer.param_groups[0]["params"] = params

    optimizer = assert_native_like(name, change)
    params = optimizer.param_groups[0]["params"]
    if kind == "hiding":
        assert (list.__getitem__(params, 0) == 1).all()
        assert list.__getitem__(params, 0) not in optimizer.state
    optimizer.backend = "reference"
    step(optimizer, 1)
    assert optimizer.last_backend == {"cpu": frozenset({"reference"})}


STATES: dict[str, Callable[[Any], Any]] = {
    "OrderedDict": OrderedDict,
    "defaultdict": lambda entries: defaultdict(lambda: None, entries),
    "UserDict": Params,
    "other names": Upper,
    "ChainMap": lambda entries: ChainMap({}, entries),
}


def entries_of(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entries[key] for key in entries}


@pytest.mark.parametrize("kind", STATES)
@every_class
def test_states_in_other_mappings(name: str, kind: str) -> None:
    def change(optimizer: Any) -> None:
        step(optimizer, 1)
        for p, entries in list(optimizer.state.items()):
            optimizer.state[p] = STATES[kind](entries)

    optimizer = ours(name)(fresh(), **options_of(name))
    other = oracle_class(name)(fresh(), **oracle(name))
    for each in (optimizer, other):
        change(each)
    found = []
    for each in (optimizer, other):
        step(each, 2)
        each.state = {p: entries_of(entries) for p, entries in each.state.items()}
        found.append(snapshot(each))
    assert_same_bits(*found)
    assert optimizer.last_backend == NATIVE


class Keyed(Mapping[Tensor, Any]):
    """An optimizer's state that is no dict."""

    def __init__(self) -> None:
        self.entries: list[tuple[Tensor, dict[str, Any]]] = []

    def __getitem__(self, p: Tensor) -> dict[str, Any]:
        for q, entries in self.entries:
            if q is p:
                return entries
        self.entries.append((p, {}))
        return self.entries[-1][1]

    def __contains__(self, p: object) -> bool:
        return any(q is p for q, _ in self.entries)

    def get(self, p: Tensor, default: Any = None) -> Any:
        return self[p] if self.__contains__(p) else default

    def __iter__(self) -> Iterator[Tensor]:
        return (p for p, _ in self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@pytest.mark.parametrize("kind", [dict, OrderedDict, Keyed])
@every_class
def test_the_state_in_another_mapping(name: str, kind: Any) -> None:
    def change(optimizer: Any) -> None:
        optimizer.state = defaultdict(dict) if kind is not Keyed else Keyed()
        if kind is not Keyed:
            optimizer.state = kind({p: {} for p in params_of(optimizer)})

    optimizer = assert_native_like(name, change)
    optimizer.backend = "reference"
    step(optimizer, 1)
    assert optimizer.last_backend == {"cpu": frozenset({"reference"})}


@left_to_torch
def test_the_error_is_seen_where_a_state_deletes_nothing() -> None:
    optimizer = dracopt_ext.AdamW([*fresh(), *tagged()])
    optimizer.state = Keyed()
    for p in params_of(optimizer):
        p.grad = torch.ones_like(p)
    last = params_of(optimizer)[-1]
    last.grad = torch.ones(len(last)).to_sparse()
    before = [p.detach().clone() for p in params_of(optimizer)]
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        optimizer.step()
    assert all(map(torch.equal, params_of(optimizer), before))
    assert not any(len(entries) for entries in optimizer.state.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.param_groups.__setitem__(0, 3), r"param_groups\[0\] must be a dict or another mapping, not int"),
        (
            lambda o: o.param_groups[0].update(params=(p for p in fresh())),
            r"param_groups\[0\]\['params'\] must be a list of tensors or another sequence, not generator",
        ),
        (
            lambda o: setattr(o, "param_groups", iter(o.param_groups)),
            "param_groups must be a list of dicts or another sequence, not list_iterator",
        ),
        (lambda o: o.param_groups[0].update(params=fresh()[0]), r"must be a list of tensors .*, not Parameter"),
        (
            lambda o: o.state.__setitem__(params_of(o)[1], 3),
            "the state of parameter 1 of group 0 must be a dict or another mapping, not int",
        ),
        (
            lambda o: o.state.__setitem__(params_of(o)[1], None),
            "the state of parameter 1 of group 0 must be a dict or another mapping, not NoneType",
        ),
    ],
)
def test_containers_that_nobody_can_read(change: Any, message: str) -> None:
    """An iterator, for example, is empty in the next step."""
    optimizer = dracopt_ext.AdamW(fresh())
    group, state = optimizer.param_groups[0], dict(optimizer.state)
    params = list(group["params"])
    for p in params:
        p.grad = torch.ones_like(p)
    change(optimizer)
    with pytest.raises(TypeError, match=message):
        optimizer.step()
    optimizer.param_groups, optimizer.state = [{**group, "params": params}], defaultdict(dict, state)
    assert all(torch.equal(p, q) for p, q in zip(params, fresh(), strict=True))
    assert not optimizer.state
    optimizer.step()


def test_an_iterator_of_parameters_is_not_exhausted_for_a_class_that_torch_steps() -> None:
    optimizer = cautious(dracopt_ext.AdamW)(fresh())
    params = params_of(optimizer)
    optimizer.param_groups[0]["params"] = iter(params)
    with pytest.raises(TypeError, match="must be a list of tensors or another sequence, not list_iterator"):
        optimizer.step()
    assert list(optimizer.param_groups[0]["params"]) == params


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        ({"betas": (0.9, 0.9, 0.9)}, ValueError, r"param_groups\[1\]\['betas'\] must be 2 numbers, not 3"),
        ({"lr": "0.1"}, TypeError, r"param_groups\[1\]\['lr'\] must be a number, not str"),
    ],
)
def test_the_reference_looks_at_all_groups_first(edit: dict[str, Any], error: type[Exception], message: str) -> None:
    optimizer = dracopt_ext.AdamW([{"params": [p]} for p in fresh()], backend="reference")
    step(optimizer, 1)
    before = snapshot(optimizer)
    optimizer.param_groups[1].update(edit)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


# Tensors that go to torch, with fused=True


class Tagged(torch.Tensor):
    """A subclass of the kind that adds a method or a name."""


def tagged(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().to(dtype).as_subclass(Tagged)) for p in fresh()]


@left_to_torch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_fused_is_kept_where_it_is_right(
    name: str, amsgrad: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    kernel = torch._fused_adamw_ if name == "AdamW" else torch._fused_adam_
    found = []
    for module in (dracopt_ext, torch.optim):
        optimizer = getattr(module, name)(tagged(dtype), lr=0.1, amsgrad=amsgrad, fused=True)
        with monkeypatch.context() as patch:
            patch.setattr(torch, kernel.__name__, lambda *args, **more: calls.append(1) or kernel(*args, **more))
            for _ in range(3):
                for p in params_of(optimizer):
                    p.grad = torch.full_like(p, 0.5)
                optimizer.step()
        found.append(snapshot(optimizer))
        if module is dracopt_ext:
            assert optimizer.last_backend == TORCH  # type: ignore[attr-defined]
    assert_same_bits(*found)
    assert len(calls) == 6
    plain = ours(name)([p.detach().as_subclass(Tensor).clone() for p in tagged(dtype)], lr=0.1, amsgrad=amsgrad)
    for _ in range(3):
        for p in params_of(plain):
            p.grad = torch.full_like(p, 0.5)
        plain.step()
    for key, value in snapshot(plain).items():  # torch's fused kernel agrees with the rule here
        torch.testing.assert_close(found[0][key].as_subclass(Tensor), value, rtol=2 * torch.finfo(dtype).eps, atol=0)


@left_to_torch
@pytest.mark.parametrize("what", ["parameter", "gradient", "state", "dtype"])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_fused_is_dropped_where_it_is_wrong(name: str, what: str) -> None:
    """For different strides or dtypes, the result is that of torch's other implementations or of the reference."""

    def transposed(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride()[::-1], dtype=tensor.dtype).copy_(tensor)

    results = []
    for make, options in ((ours(name), {"fused": True}), (ours(name), {"backend": "reference"})):
        value, grad = inputs([48, 48], torch.float32, 0)[0]
        value, grad = value.view(6, 8), grad.view(6, 8)
        if what == "dtype":
            value = value.bfloat16()
        wrap = (lambda t: t) if "backend" in options else (lambda t: t.as_subclass(Tagged))
        p = nn.Parameter(wrap(transposed(value) if what == "parameter" else value))
        optimizer = make([p], lr=0.1, **options)
        for _ in range(3):
            p.grad_dtype = grad.dtype  # type: ignore[attr-defined]
            p.grad = wrap(transposed(grad) if what == "gradient" else grad)
            optimizer.step()
            if what == "state":
                entries = optimizer.state[p]
                entries["exp_avg_sq"] = wrap(transposed(entries["exp_avg_sq"].as_subclass(Tensor)))
        results.append(p.detach().as_subclass(Tensor).clone())
    start = inputs([48, 48], torch.float32, 0)[0][0].view(6, 8).to(results[0].dtype)
    if what == "dtype":
        assert torch.equal(*results)
        return
    torch.testing.assert_close(*results)
    for error in (-1, 0.01):  # no update at all; one that is 1% too large
        with pytest.raises(AssertionError):
            torch.testing.assert_close(results[0] + error * (results[0] - start), results[1])


def as_tagged(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tagged)


@left_to_torch
@pytest.mark.parametrize("what", ["parameter", "gradient", "state"])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_shapes_that_torchs_fused_kernels_would_not_look_at(name: str, what: str) -> None:
    """A fused kernel would write beyond the end. torch's other implementations refuse."""
    optimizer = ours(name)(tagged()[:1], fused=True)
    (p,) = params_of(optimizer)
    p.grad = torch.ones_like(p)
    optimizer.step()
    if what == "parameter":
        p.data = torch.ones(2 * len(p))
    elif what == "gradient":
        p.grad.data = torch.ones(len(p) // 2)
    else:
        optimizer.state[p]["exp_avg"] = as_tagged(torch.ones(len(p) // 2))
    with pytest.raises(RuntimeError, match="must match"):
        optimizer.step()


@left_to_torch
@pytest.mark.parametrize("dtype", [torch.int64, torch.float16])
def test_step_counts_that_torchs_fused_kernels_refuse(dtype: torch.dtype) -> None:
    for params in (fresh(), tagged()):
        found = []
        for fused in (True, None):
            optimizer = dracopt_ext.AdamW([p.detach().clone() for p in params], fused=fused)
            for p in params_of(optimizer):
                p.grad = torch.ones_like(p)
            optimizer.step()
            for entries in optimizer.state.values():
                entries["step"] = entries["step"].to(dtype)
            optimizer.step()
            assert optimizer.last_backend == TORCH
            found.append(snapshot(optimizer))
        assert_same_bits(*found)


@left_to_torch
def test_fused_is_dropped_for_memory_that_is_shared() -> None:
    """torch's fused kernel would read elements of the gradient that it has updated."""
    found = []
    for module, fused in ((dracopt_ext, True), (torch.optim, None)):
        base = inputs([4097], torch.float32, 0)[0][0]
        p = nn.Parameter(base[1:])
        p.grad = base[:-1]
        optimizer = module.AdamW([p], lr=0.5, fused=fused, foreach=None if fused else False)  # type: ignore[attr-defined]
        optimizer.step()
        found.append(snapshot(optimizer))
    assert_same_bits(*found)


@left_to_torch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_sgd_of_torch_is_not_used(dtype: torch.dtype) -> None:
    """torch's fused SGD leaves whole vectors as they are in bf16."""
    results = []
    for module, fused in ((dracopt_ext, True), (torch.optim, None)):
        params = tagged(dtype)
        optimizer = module.SGD(params, lr=0.1, momentum=0.9, fused=fused)  # type: ignore[attr-defined]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        results.append(snapshot(optimizer))
    assert_same_bits(*results)


@left_to_torch
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", classes(in_torch=True, fused=True))
def test_distributed_tensors_with_fused(name: str, mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch steps shards whose gradients are partial, and not with its fused kernel."""
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    kernel = torch._fused_adamw_ if name == "AdamW" else torch._fused_adam_
    calls = []
    monkeypatch.setattr(torch, kernel.__name__, lambda *args, **more: calls.append(1) or kernel(*args, **more))
    values, gradients = inputs(WHOLE_BLOCKS, torch.float32, 3)
    params = [nn.Parameter(distribute_tensor(value.view(8, -1), mesh, [Shard(0)])) for value in values]
    optimizer = ours(name)(params, **options_of(name), fused=True)
    plain = [nn.Parameter(value.view(8, -1).clone()) for value in values]
    other = torchs(name)(plain, **options_of(name))
    for of_step in gradients:
        for p, q, grad in zip(params, plain, of_step, strict=True):
            q.grad = grad.view(8, -1)
            p.grad = DTensor.from_local(q.grad.clone(), mesh, [Partial()], run_check=False)
        optimizer.step()
        other.step()
    assert optimizer.last_backend == TORCH
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p.to_local(), q, rtol=1e-5, atol=1e-6)
    assert not calls


@left_to_torch
def test_partial_gradients_and_buffers(mesh: Any) -> None:
    """In some versions of torch, such as 2.11, a buffer that SGD begins with a partial gradient is partial, too."""
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    (value,), gradients = inputs([64], torch.float32, 3)
    p = nn.Parameter(distribute_tensor(value.view(8, -1), mesh, [Shard(0)]))
    plain = nn.Parameter(value.view(8, -1).clone())
    options = options_of("SGD")
    optimizer, other = ours("SGD")([p], **options), torchs("SGD")([plain], **options)
    for (grad,) in gradients:
        plain.grad = grad.view(8, -1)
        p.grad = DTensor.from_local(plain.grad.clone(), mesh, [Partial()], run_check=False)
        optimizer.step()
        other.step()
        state = optimizer.state[p]
        whole = state["momentum_buffer"].full_tensor()
        state["momentum_buffer"] = DTensor.from_local(whole, mesh, [Partial()], run_check=False)
    assert optimizer.last_backend == TORCH
    torch.testing.assert_close(p.to_local(), plain, rtol=1e-5, atol=1e-6)


# Lookups by type or by module


@pytest.mark.parametrize("module", ["adam", "adamw", "nadam", "sgd", "optimizer", "rmsprop", "lr_scheduler", "lbfgs"])
def test_submodules_have_our_classes(module: str) -> None:
    found = importlib.import_module(f"dracopt_ext.{module}")
    assert importlib.util.find_spec(f"dracopt_ext.{module}") is not None
    theirs = importlib.import_module(f"torch.optim.{module}")
    for name, value in vars(theirs).items():
        if not name.startswith("__"):
            assert getattr(found, name) is (ours(name) if name in CLASSES else value)
    assert dir(found) == dir(theirs)
    names: dict[str, Any] = {}
    exec(f"from dracopt_ext.{module} import *", names)
    assert set(theirs.__all__) <= set(names)
    with pytest.raises(AttributeError, match="Adan"):
        _ = found.Adan


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_functional_optimizers_can_be_registered() -> None:
    """docs/torch.md describes this registration."""
    from torch.distributed.optim.utils import as_functional_optim, functional_optim_map, register_functional_optim

    register_functional_optim(dracopt_ext.AdamW, functional_optim_map[torch.optim.AdamW])
    try:
        with pytest.warns(DeprecationWarning, match="functional optimizers is deprecated"):
            made = as_functional_optim(dracopt_ext.AdamW, lr=0.1)
        assert type(made).__name__ == "_FunctionalAdamW"
    finally:
        del functional_optim_map[dracopt_ext.AdamW]


def test_signatures_of_methods_are_torchs() -> None:
    for name in TORCHS:
        for method in ("add_param_group", "load_state_dict", "step", "state_dict", "zero_grad"):
            found, theirs = (inspect.signature(getattr(cls, method)).parameters for cls in (ours(name), torchs(name)))
            assert list(found) == [*theirs, *(["zero_grad"] if method == "step" else [])]


# Modes


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "fused"), [(name, None) for name in TORCHS] + [("Adam", True), ("AdamW", True)])
def test_modes_see_the_operations(name: str, fused: bool | None) -> None:
    options = options_of(name) if fused is None else {**options_of(name), "fused": fused}
    optimizers = [base(fresh(), **options) for base in (ours(name), torchs(name))]
    found = []
    for optimizer in optimizers:
        for p in params_of(optimizer):
            p.grad = torch.ones_like(p)
        says = pytest.warns(RuntimeWarning, match="leaves steps under a TorchDispatchMode to torch's own")
        with Counting() as mode, says if optimizer is optimizers[0] else nullcontext():
            optimizer.step()
        with mode:  # the warning comes once
            optimizer.step()
        found.append(mode.operations)
    assert optimizers[0].last_backend == TORCH
    assert found[0] == found[1]
    assert len(found[0]) > 0
    assert_same_bits(*map(snapshot, optimizers))
    optimizers[0].step()
    assert optimizers[0].last_backend == NATIVE


@left_to_torch
def test_flops_are_counted_as_torchs() -> None:
    found = []
    for module in (dracopt_ext, torch.optim):
        model = nn.Linear(64, 64)
        optimizer = module.AdamW(model.parameters())  # type: ignore[attr-defined]
        with FlopCounterMode(display=False) as counter, Counting() as operations:
            model(torch.ones(4, 64)).sum().backward()
            optimizer.step()
        found.append((counter.get_flop_counts(), operations.operations))
    assert found[0] == found[1]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_modes_and_an_explicit_backend(backend: str) -> None:
    """The reference consists of torch's operations, which modes see."""
    optimizer = dracopt_ext.AdamW(fresh(), backend=backend)
    before = snapshot(optimizer)
    for p in params_of(optimizer):
        p.grad = torch.ones_like(p)
    if backend == "reference":
        with Counting() as mode:
            optimizer.step()
        assert len(mode.operations) > 0
        return
    with Counting(), pytest.raises(RuntimeError, match="backend='native' does not serve steps under a TorchDispatchM"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)
    optimizer.step()
    assert optimizer.last_backend == NATIVE


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("what", ["freed gradient", "state of another shape", "expanded state", "part of a state"])
def test_bad_input_under_a_mode(what: str, fused: bool | None) -> None:
    """Bad input is refused as without a mode, and nothing has changed."""
    optimizer = dracopt_ext.AdamW(fresh(), fused=fused)
    step(optimizer, 1)
    p = params_of(optimizer)[-1]
    entries = optimizer.state[p]
    if what == "freed gradient":
        p.grad = torch.ones_like(p)
        p.grad.untyped_storage().resize_(0)
    elif what == "state of another shape":
        entries["exp_avg_sq"] = torch.ones(3)
    elif what == "expanded state":
        entries["exp_avg"] = torch.ones(1).expand(len(p))
    else:
        del entries["exp_avg"]
    before = snapshot(optimizer)
    with Counting(), pytest.raises((ValueError, KeyError), match="parameter 4 of group 0"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


@left_to_torch
@every_class
def test_real_parameters_under_a_fake_mode(name: str) -> None:
    """torch refuses these parameters, and so do we. Nothing has changed."""
    optimizer = ours(name)(fresh(), **options_of(name))
    for p in params_of(optimizer):
        p.grad = torch.ones_like(p)
    before = snapshot(optimizer)
    with torch._subclasses.FakeTensorMode(), pytest.raises(Exception, match="convert all Tensors to FakeTensors first"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)
    optimizer.step()
    assert optimizer.last_backend == NATIVE


@left_to_torch
@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("name", classes(in_torch=True, fused=True))
def test_a_traced_training_step_trains(name: str, pre_dispatch: bool) -> None:
    """The step follows torch.optim.swap_in_optimizer_params_and_state. torch's NAdam cannot be traced."""
    swap_in = getattr(torch.optim, "swap_in_optimizer_params_and_state", None)
    if swap_in is None:
        pytest.skip("this torch lacks it")

    def trace(optimizer: Any, model: nn.Module, *data: Tensor) -> Any:
        def training_step(params: dict[str, Tensor], state: Any, x: Tensor, y: Tensor) -> Any:
            loss = nn.functional.mse_loss(torch.func.functional_call(model, params, (x,)), y)
            for p, grad in zip(params.values(), torch.autograd.grad(loss, list(params.values())), strict=True):
                p.grad = grad
            with swap_in(optimizer, params, state):
                optimizer.step()
            return [p.detach() for p in params.values()]

        return make_fx(training_step, tracing_mode="real", pre_dispatch=pre_dispatch)(*copies(optimizer, model), *data)

    def copies(optimizer: Any, model: nn.Module) -> Any:
        params = {key: p.detach().clone().requires_grad_() for key, p in model.named_parameters()}
        return params, copy.deepcopy(optimizer.state_dict())

    fused = {} if name == "SGD" else {"fused": True}  # else torch reads step counts, which cannot be traced
    trained = []
    for module in (dracopt_ext, torch.optim):
        torch.manual_seed(0)
        model, x, y = nn.Linear(16, 16), torch.randn(8, 16), torch.randn(8, 16)
        optimizer = getattr(module, name)(model.parameters(), **options_of(name), **fused)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()  # creates the state
        graph = trace(optimizer, model, x, y)
        params, state = copies(optimizer, model)
        for _ in range(2):
            with torch.no_grad():  # no_grad is not a part of the graph
                graph(params, state, x, y)
        assert all((p != params[key]).any() for key, p in model.named_parameters())
        trained.append({key: p.detach() for key, p in params.items()})
    assert_same_bits(*trained)


def test_modes_for_functions_do_not_slow_a_step_down() -> None:
    """torch.set_default_device is such a mode."""

    class Passing(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    with torch.device("cpu"), Passing(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_native_like("AdamW", lambda optimizer: None)
