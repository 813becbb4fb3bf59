"""Bad input raises an error that names the parameter and the remedy. Nothing has changed then, and the next correct
step works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dracopt_ext
from dracopt_ext.rule import NUMBER

from .cases import RULE_CASES, Case, assert_same_bits, classes, inputs, snapshot


class Broken:
    """An optimizer in the middle of its training, with a good parameter before and after the one that is broken."""

    def __init__(self, name: str = "AdamW", **options: Any) -> None:
        self.params = [nn.Parameter(value) for value in inputs([64, 64, 64], torch.float32, 0)[0]]
        named = [("first", self.params[0]), ("layer.weight", self.params[1])]
        groups = [{"params": named}, {"params": [("last", self.params[2])]}]
        self.backend = options.get("backend") or "native"
        self.optimizer = getattr(dracopt_ext, name)(groups, lr=0.1, **options)
        self.give_gradients()
        self.optimizer.step()
        self.give_gradients()

    def give_gradients(self) -> None:
        for p in self.params:
            p.grad = torch.ones_like(p)

    def assert_refuses(self, error: type[Exception], message: str) -> None:
        before = snapshot(self.optimizer)
        with pytest.raises(error, match=message):
            self.optimizer.step()
        assert_same_bits(snapshot(self.optimizer), before)

    def assert_recovers(self) -> None:
        before = [p.detach().clone() for p in self.params]
        self.give_gradients()
        self.optimizer.step()
        for p, value in zip(self.params, before, strict=True):
            assert not torch.equal(p, value)
        assert self.optimizer.last_backend == {"cpu": frozenset({self.backend})}


every_backend = pytest.mark.parametrize("backend", ["native", "reference"])
WHERE = r"parameter 1 of group 0 \('layer.weight', shape \[64\]\)"


def test_gradient_of_another_shape() -> None:
    broken = Broken()
    good = broken.params[1].data
    broken.params[1].data = torch.ones(8, 8)
    broken.assert_refuses(ValueError, r"the gradient of .*\('layer.weight', shape \[8, 8\]\) has another shape, \[64\]")
    broken.params[1].data = good
    broken.assert_recovers()


def test_state_of_another_shape() -> None:
    broken = Broken()
    state = broken.optimizer.state[broken.params[1]]
    good, state["exp_avg"] = state["exp_avg"], torch.zeros(8, 8)
    broken.assert_refuses(ValueError, rf"the state 'exp_avg' of {WHERE} has another shape, \[8, 8\]. Delete")
    state["exp_avg"] = good
    broken.assert_recovers()


@every_backend
def test_part_of_a_state(backend: str) -> None:
    broken = Broken(backend=backend)
    broken.optimizer.param_groups[0]["amsgrad"] = True
    broken.assert_refuses(KeyError, r"the state of parameter 0 of group 0 .* has no 'max_exp_avg_sq'. Was an option")
    broken.optimizer.state.pop(broken.params[0])
    broken.assert_refuses(KeyError, "parameter 1 of group 0")
    broken.optimizer.state.pop(broken.params[1])
    broken.assert_recovers()


def test_expanded_parameter() -> None:
    p = torch.zeros(1).expand(4).requires_grad_()
    p.grad = torch.ones(4)
    good = nn.Parameter(torch.ones(2))
    good.grad = torch.ones(2)
    for name in classes():
        optimizer = getattr(dracopt_ext, name)([good, p])
        with pytest.raises(ValueError, match=r"parameter 1 of group 0 \(shape \[4\]\) is expanded: .* clone\(\)"):
            optimizer.step()
        assert not optimizer.state
        assert (good == 1).all()


def wrong_gradients() -> dict[str, tuple[Callable[[nn.Parameter], None], str]]:
    def set_grad(grad: torch.Tensor) -> Callable[[nn.Parameter], None]:
        def change(p: nn.Parameter) -> None:
            # torch checks a tensor that is assigned to .grad, but not its later changes.
            p.grad = torch.zeros_like(p)
            p.grad.data = grad

        return change

    return {
        "shape": (set_grad(torch.ones(8, 8)), r"has another shape, \[8, 8\]"),
        "one element for all": (set_grad(torch.ones(1)), r"has another shape, \[1\]"),
        "more": (set_grad(torch.ones(65)), r"has another shape, \[65\]"),
        "integers": (set_grad(torch.ones(64, dtype=torch.int64)), "has a dtype that does not fit, torch.int64"),
        "complex": (set_grad(torch.ones(64, dtype=torch.complex64)), "has a dtype that does not fit, torch.complex64"),
    }


@every_backend
@pytest.mark.parametrize("name", classes())
@pytest.mark.parametrize("kind", wrong_gradients())
def test_gradients_that_do_not_fit(name: str, kind: str, backend: str) -> None:
    change, message = wrong_gradients()[kind]
    broken = Broken(name, backend=backend)
    change(broken.params[1])
    broken.assert_refuses(ValueError, f"the gradient of {WHERE} {message}. Set .grad to None")
    broken.params[1].grad = None
    broken.assert_recovers()


WRONG_STATES: dict[str, tuple[str, Any, str]] = {
    "shape": ("moment", torch.zeros(8, 8), r"has another shape, \[8, 8\]"),
    "integers": ("moment", torch.zeros(64, dtype=torch.int32), "has a dtype that does not fit, torch.int32"),
    "complex": ("moment", torch.zeros(64, dtype=torch.complex64), "has a dtype that does not fit, torch.complex64"),
    "expanded": (
        "moment",
        torch.zeros(1).expand(64),
        "is expanded: several of its elements share one memory location",
    ),
    "device": ("moment", torch.zeros(64, device="meta"), "is on another device, meta"),
    "number": ("moment", 0.0, "must be a Tensor, not float"),
    "step as a number": ("step", 1, "must be a Tensor, not int"),
    "step of two elements": ("step", torch.ones(2), r"has another shape, \[2\]"),
    "step on another device": ("step", torch.ones((), device="meta"), "is on another device, meta"),
}


@every_backend
@pytest.mark.parametrize("case", RULE_CASES, ids=str)
@pytest.mark.parametrize("kind", WRONG_STATES)
def test_states_that_do_not_fit(case: Case, kind: str, backend: str) -> None:
    key, value, message = WRONG_STATES[kind]
    if key == "step" and not case.rule.state_scalars:
        pytest.skip("there is no count of steps")
    key = case.moments()[-1] if key == "moment" else key
    options = {name: value for name, value in case.options.items() if name != "lr"}
    broken = Broken(case.algorithm, **options, backend=backend)
    state = broken.optimizer.state[broken.params[1]]
    good, state[key] = state[key], value
    params = [p.detach().clone() for p in broken.params]
    others = snapshot_of_states(broken, without=broken.params[1])
    with pytest.raises(ValueError, match=f"the state '{key}' of {WHERE} {message}. Delete this parameter's state"):
        broken.optimizer.step()
    assert state[key] is value
    for p, before in zip(broken.params, params, strict=True):
        assert torch.equal(p, before)
    assert_same_bits(snapshot_of_states(broken, without=broken.params[1]), others)
    state[key] = good
    broken.assert_recovers()


def snapshot_of_states(broken: Broken, without: nn.Parameter) -> dict[str, torch.Tensor]:
    return {
        f"{i}.{name}": value.clone()
        for i, p in enumerate(broken.params)
        if p is not without
        for name, value in broken.optimizer.state[p].items()
    }


def test_momentum_buffer_that_does_not_fit() -> None:
    broken = Broken("SGD", momentum=0.9)
    state = broken.optimizer.state[broken.params[1]]
    good, state["momentum_buffer"] = state["momentum_buffer"], torch.zeros(63)
    broken.assert_refuses(ValueError, f"the state 'momentum_buffer' of {WHERE} has another shape")
    state["momentum_buffer"] = good
    broken.assert_recovers()


BAD_GROUPS: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "text for lr": (lambda g: g.update(lr="fast"), TypeError, r"param_groups\[1\]\['lr'\] must be a number, not str"),
    "None for eps": (
        lambda g: g.update(eps=None),
        TypeError,
        r"\['eps'\] must be a number, not NoneType",
    ),
    "three betas": (
        lambda g: g.update(betas=(0.9, 0.9, 0.9)),
        ValueError,
        r"param_groups\[1\]\['betas'\] must be 2 numbers, not 3",
    ),
    "not a number for lr": (
        lambda g: g.update(lr=float("nan")),
        ValueError,
        r"param_groups\[1\]\['lr'\] is nan; it must be finite",
    ),
    "infinite weight decay": (lambda g: g.update(weight_decay=float("inf")), ValueError, r"\['weight_decay'\] is inf"),
    "a beta of 1": (
        lambda g: g.update(betas=(1.0, 0.9)),
        ValueError,
        r"\['betas'\] is 1.0; it must be at least 0 and less than 1",
    ),
    "a negative beta": (lambda g: g.update(betas=(0.5, -0.9)), ValueError, r"\['betas'\] is -0.9"),
    "a tensor of two for lr": (
        lambda g: g.update(lr=torch.ones(2)),
        ValueError,
        r"\['lr'\] must be a tensor of one element, not of shape \[2\]",
    ),
    "no maximize": (lambda g: g.pop("maximize"), KeyError, r"param_groups\[1\]\['maximize'\] is missing"),
    "no lr": (lambda g: g.pop("lr"), KeyError, r"param_groups\[1\]\['lr'\] is missing"),
    "one beta": (lambda g: g.update(betas=0.9), TypeError, r"\['betas'\] must be 2 numbers, not a float"),
    "an iterator of params": (
        lambda g: g.update(params=iter(g["params"])),
        TypeError,
        r"param_groups\[1\]\['params'\] must be a list of tensors or another sequence, not list_iterator",
    ),
    "text in params": (lambda g: g["params"].append("p"), TypeError, r"\['params'\]\[1\] must be a Tensor, not str"),
}


@every_backend
@pytest.mark.parametrize("kind", BAD_GROUPS)
def test_groups_edited_to_nonsense(kind: str, backend: str) -> None:
    edit, error, message = BAD_GROUPS[kind]
    broken = Broken(backend=backend)
    before = snapshot(broken.optimizer)
    good = dict(broken.optimizer.param_groups[1], params=list(broken.optimizer.param_groups[1]["params"]))
    edit(broken.optimizer.param_groups[1])
    with pytest.raises(error, match=message):
        broken.optimizer.step()
    broken.optimizer.param_groups[1] = good
    assert_same_bits(snapshot(broken.optimizer), before)
    broken.assert_recovers()


def test_closure_that_raises() -> None:
    broken = Broken()

    def closure() -> float:
        raise ZeroDivisionError("in the closure")

    before = snapshot(broken.optimizer)
    with pytest.raises(ZeroDivisionError, match="in the closure"):
        broken.optimizer.step(closure)
    assert_same_bits(snapshot(broken.optimizer), before)
    broken.assert_recovers()


@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
def test_sparse_gradient_for_nadam() -> None:
    broken = Broken("NAdam")
    broken.params[1].grad = torch.ones(64).to_sparse()
    broken.assert_refuses(RuntimeError, "NAdam does not support sparse gradients")
    broken.assert_recovers()


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.filterwarnings("ignore:.*leaves .* to torch's own:RuntimeWarning")
def test_sparse_gradient_for_adam(fused: bool | None) -> None:
    """torch raises the same error, but only after it has created the first parameter's state or counted its step."""
    broken = Broken(fused=fused)
    broken.params[1].grad = torch.ones(64).to_sparse()
    broken.assert_refuses(RuntimeError, "Adam does not support sparse gradients, please consider SparseAdam instead")
    broken.assert_recovers()
    fresh = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    fresh[0].grad, fresh[1].grad = torch.ones(4), torch.ones(4).to_sparse()
    optimizer = dracopt_ext.Adam(fresh, fused=fused)
    with pytest.raises(RuntimeError, match="SparseAdam"):
        optimizer.step()
    assert not optimizer.state


def test_sparse_gradient_for_fused_sgd() -> None:
    broken = Broken("SGD", momentum=0.9, fused=True)
    broken.params[1].grad = torch.ones(64).to_sparse()
    broken.assert_refuses(RuntimeError, "`_fused_sgd` does not support sparse gradients")
    broken.assert_recovers()


def test_torch_steps_nothing_where_a_later_group_is_wrong() -> None:
    """The plan's own parameters are looked at to the end before torch steps the others."""
    sparse, dense = (nn.Parameter(torch.ones(3)) for _ in range(2))
    sparse.grad, dense.grad = torch.ones(3).to_sparse(), torch.ones(3)
    optimizer = dracopt_ext.SGD([{"params": [sparse]}, {"params": [dense], "lr": 1e39}], lr=0.1)
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['lr'\] is 1e\+39: it makes the update infinite"):
        optimizer.step()
    assert torch.equal(sparse.detach(), torch.ones(3))
    assert torch.equal(dense.detach(), torch.ones(3))


@pytest.mark.parametrize("name", classes())
def test_native_backend_refuses_what_it_does_not_serve(name: str) -> None:
    broken = Broken(name, backend="native")
    broken.optimizer.param_groups[0]["differentiable"] = True
    broken.assert_refuses(
        RuntimeError,
        r"backend='native' does not serve differentiable=True: parameter 0 .*\('first', shape \[64\]\). Leave",
    )
    broken.optimizer.param_groups[0]["differentiable"] = False
    broken.assert_recovers()


def test_interrupted_creation_of_states_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones(4)
    optimizer = dracopt_ext.SGD([{"params": params[:1]}, {"params": params[1:]}], momentum=0.9, dampening=0.5, lr=1.0)
    optimizer.state[params[0]]["mine"] = torch.ones(1)
    create = dracopt_ext.SGD._dracopt_kind.create_state

    def interrupted(optimizer: Any, group: dict[str, Any]) -> None:
        create(optimizer, group)
        if group["params"][0] is params[1]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dracopt_ext.SGD._dracopt_kind, "create_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert {p: list(s) for p, s in optimizer.state.items()} == {params[0]: ["mine"]}
    optimizer.step()
    for p in params:
        assert (p == 0).all()  # only a first step is undampened


def test_freed_memory() -> None:
    """Sharded training frees memory. Nothing may be written to memory that is freed."""
    p, q = (nn.Parameter(torch.ones(10)) for _ in range(2))
    p.grad, q.grad = torch.ones(10), torch.ones(10)
    optimizer = dracopt_ext.AdamW([p, q])
    optimizer.step()
    named = {
        "parameter 1 of group 0": q,
        "the gradient of parameter 1 of group 0": q.grad,
        "the state 'exp_avg_sq' of parameter 1 of group 0": optimizer.state[q]["exp_avg_sq"],
        "the state 'step' of parameter 1 of group 0": optimizer.state[q]["step"],
    }
    for name, tensor in named.items():
        before = p.detach().clone()
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        for left in (0, size - 1):
            storage.resize_(left)
            with pytest.raises(ValueError, match=rf"{name} .* in a storage that is too small for it, of {left} bytes"):
                optimizer.step()
        storage.resize_(size)
        tensor.data.fill_(1.0)
        assert torch.equal(p, before)
        assert optimizer.state[p]["step"].item() == 1
    optimizer.step()
    lr = torch.tensor(0.1)
    optimizer.param_groups[0]["lr"] = lr
    lr.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['lr'\] is a tensor whose storage was freed"):
        optimizer.step()


# Refusals of whole groups


def of_three_groups(name: str, **options: Any) -> Any:
    """An optimizer whose groups hold a parameter that kernels step, two in shared memory, and one that changes."""
    whole = torch.ones(8)
    params = [nn.Parameter(t) for t in (torch.ones(8), whole[:6], whole[2:], torch.ones(8))]
    groups = [{"params": params[:1]}, {"params": params[1:3]}, {"params": params[3:]}]
    optimizer = getattr(dracopt_ext, name)(groups, lr=0.1, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    return optimizer


def last_of(optimizer: Any) -> Any:
    return optimizer.param_groups[2]["params"][0]


def set_key(optimizer: Any, key: str) -> None:
    optimizer.param_groups[2][key] = True


UNSERVED: dict[str, tuple[Callable[[Any], object], str]] = {
    "sparse": (lambda o: setattr(last_of(o), "grad", torch.ones(8).to_sparse()), "sparse"),
    "complex gradient": (
        lambda o: setattr(last_of(o).grad, "data", torch.ones(8, dtype=torch.complex64)),
        "has a dtype that does not fit, torch.complex64",
    ),
    "capturable": (lambda o: set_key(o, "capturable"), "capturable"),
    "differentiable": (lambda o: set_key(o, "differentiable"), "differentiable"),
}
"""How to make the last parameter one that no class serves, or only torch's classes, and what the error says."""


@pytest.mark.parametrize("name", classes())
@pytest.mark.parametrize("kind", UNSERVED)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore:.*leaves .* to:RuntimeWarning")
def test_a_group_that_is_refused_leaves_the_others_alone(
    name: str, kind: str, warm: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, in_torch = name in classes(counts=True), name in classes(in_torch=True)
    serves = {
        "sparse": name == "SGD",  # which refuses only with fused=True
        "capturable": not counts,
        "differentiable": in_torch,
    }
    optimizer = of_three_groups(name)
    if not compiled:
        monkeypatch.setattr("dracopt_ext.backend.NATIVE_REASON", "switched off")
    if warm:
        optimizer.step()
    change, message = UNSERVED[kind]
    change(optimizer)
    before = snapshot(optimizer)
    if serves.get(kind):
        optimizer.step()
        assert not torch.equal(snapshot(optimizer)["2.0"], before["2.0"])
        return
    with pytest.raises((RuntimeError, ValueError, AssertionError), match=message):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)
    for key in ("capturable", "differentiable"):
        if key in optimizer.param_groups[2]:
            optimizer.param_groups[2][key] = False
    last_of(optimizer).grad = torch.ones(8)
    optimizer.step()
    assert not any(
        torch.equal(value, before[key]) for key, value in snapshot(optimizer).items() if key in {"0.0", "1.0", "2.0"}
    )


def test_fused_sgd_takes_no_sparse_gradient() -> None:
    optimizer = of_three_groups("SGD", fused=True)
    UNSERVED["sparse"][0](optimizer)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="`_fused_sgd` does not support sparse gradients"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


@pytest.mark.parametrize("case", RULE_CASES, ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_numbers_that_fp32_does_not_hold(case: Case, backend: str) -> None:
    """The rule's finite() looks at each scalar that comes from a plain number."""
    for key, kind in case.rule.kinds.items():
        if kind != NUMBER or (case.rule.name, key) in NEVER_INFINITE:
            continue
        broken = Broken(
            case.algorithm, **{name: o for name, o in case.options.items() if name != "lr"}, backend=backend
        )
        broken.optimizer.param_groups[1][key] = 1e42
        broken.assert_refuses(
            ValueError, rf"param_groups\[1\]\['{key}'\] is 1e\+42: it makes the update infinite in fp32"
        )


NEVER_INFINITE = {("nadam", "momentum_decay")}  # it is the exponent of a power of 0.96
