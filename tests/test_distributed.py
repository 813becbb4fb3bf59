"""The kernels update torch's distributed tensors as they update plain ones. These tests need one process."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication

import dracopt_ext

from .cases import CASES, FAULTS, Case, assert_same_bits, inputs, snapshot, train

NATIVE = {"cpu": frozenset({"native"})}
TORCH = {"cpu": frozenset({"torch"})}

left_to_torch = pytest.mark.filterwarnings("ignore:.*to torch's own implementation:RuntimeWarning")


def local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def shard(tensor: Tensor, mesh: DeviceMesh, dtype: torch.dtype | None = None) -> DTensor:
    return DTensor.from_local(tensor.detach().clone().to(dtype), mesh, [Shard(0)], run_check=False)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results(case: Case, dtype: torch.dtype, mesh: DeviceMesh) -> None:
    given = inputs([0, 1, 17, 1000], dtype, 3)

    def plain(found: dict[str, Tensor]) -> dict[str, Tensor]:
        for tensor in found.values():
            assert isinstance(tensor, DTensor) == (tensor.dim() > 0)
        return {key: local(tensor) for key, tensor in found.items()}

    def place(tensor: Tensor) -> Tensor:
        return shard(tensor, mesh)

    expected = train(case.ours, case.options, *given)
    assert_same_bits(plain(train(case.ours, case.options, *given, place=place)), expected)
    for fault in FAULTS:
        with pytest.raises(AssertionError, match="differ"):
            assert_same_bits(plain(train(fault(case.ours), case.options, *given, place=place)), expected)


def optimizer_of(mesh: DeviceMesh, count: int = 2, **options: Any) -> Any:
    """Returns an optimizer of distributed parameters that has taken a step, and has gradients for the next one."""
    params = [nn.Parameter(shard(torch.ones(3, 4), mesh)) for _ in range(count)]
    optimizer = dracopt_ext.AdamW(params, lr=0.1, **options)
    for _ in range(2):
        for p in params:
            p.grad = shard(torch.ones(3, 4), mesh)
        if not optimizer.state:
            optimizer.step()
    return optimizer


def acting(mesh: DeviceMesh, act: Callable[[], object]) -> DeviceMesh:
    """Copies a mesh. Comparisons of the copy call ``act``, and find that it is equal."""

    class Acting(DeviceMesh):
        def __eq__(self, other: object) -> bool:
            act()
            return True

        __hash__ = DeviceMesh.__hash__

    other = copy.copy(mesh)
    other.__class__ = Acting
    return other


def params_of(optimizer: Any) -> list[Any]:
    return list(optimizer.param_groups[0]["params"])


def test_states_are_those_of_torch(mesh: DeviceMesh) -> None:
    optimizer = optimizer_of(mesh)
    for p in params_of(optimizer):
        state = optimizer.state[p]
        assert {key: type(value) for key, value in state.items()} == {
            "step": Tensor,
            "exp_avg": DTensor,
            "exp_avg_sq": DTensor,
        }
        assert state["exp_avg"].placements == p.placements
        assert state["exp_avg"].device_mesh == p.device_mesh


def test_versions(mesh: DeviceMesh) -> None:
    """A backward through a graph that saved a value from before the step must raise."""
    optimizer = optimizer_of(mesh)
    p, q = params_of(optimizer)
    graphs = [(p * p).sum(), (q.to_local() ** 2).sum()]
    versions = [[t._version for t in (x, local(x))] for x in (p, optimizer.state[p]["exp_avg"])]
    optimizer.step()
    assert [[t._version - 1 for t in (x, local(x))] for x in (p, optimizer.state[p]["exp_avg"])] == versions
    for graph in graphs:
        with pytest.raises(RuntimeError, match="modified"):
            graph.backward()


def test_plain_parameters_beside_distributed_ones(mesh: DeviceMesh) -> None:
    """torch's foreach and fused steps refuse such a group."""
    optimizer = optimizer_of(mesh)
    p, q = params_of(optimizer)
    plain, alone = (nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    optimizer.param_groups[0]["params"] = [p, plain, q]
    other = torch.optim.AdamW([alone], lr=0.1)
    for _ in range(2):
        plain.grad, alone.grad = torch.ones(3, 4), torch.ones(3, 4)
        optimizer.step()
        other.step()
        assert optimizer.last_backend == NATIVE
        torch.testing.assert_close(plain, alone, rtol=1e-6, atol=0)
    # The others are a step ahead.
    alone.grad = torch.ones(3, 4)
    other.step()
    for each in (p, q):
        torch.testing.assert_close(local(each.detach()), alone.detach(), rtol=1e-6, atol=0)


def test_a_plain_parameter_with_distributed_tensors(mesh: DeviceMesh) -> None:
    p = nn.Parameter(torch.ones(3, 4))
    optimizer = dracopt_ext.AdamW([p], lr=0.1)
    p.grad = torch.ones(3, 4)
    optimizer.step()
    before = snapshot(optimizer)
    state = optimizer.state[p]
    moment, state["exp_avg_sq"] = state["exp_avg_sq"], shard(torch.ones(3, 4), mesh)
    with pytest.raises(ValueError, match=r"the state 'exp_avg_sq' of parameter 0 of group 0 .* is distributed over"):
        optimizer.step()
    state["exp_avg_sq"] = moment
    p.grad = shard(torch.ones(3, 4), mesh)
    with pytest.raises(ValueError, match=r"the gradient of parameter 0 of group 0 .* is distributed over"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


@left_to_torch
@pytest.mark.filterwarnings("ignore:Found a non-scalar tensor:UserWarning")
@pytest.mark.parametrize("kind", ["gradient of one element", "implicit replication", "step", "step of a plain one"])
def test_plain_tensors_that_torch_replicates(kind: str, mesh: DeviceMesh) -> None:
    """torch mixes these with distributed tensors, so a step may, too."""
    results = []
    for make in (dracopt_ext.AdamW, torch.optim.AdamW):
        value = torch.ones(()) if kind == "gradient of one element" else torch.ones(3, 4)
        placed = DTensor.from_local(value, mesh, [Replicate()], run_check=False)
        p = nn.Parameter(value.clone() if kind == "step of a plain one" else placed)
        optimizer: Any = make([p], lr=0.1)
        p.grad = torch.ones_like(p)
        optimizer.step()
        if kind.startswith("step"):
            step = optimizer.state[p]["step"]
            optimizer.state[p]["step"] = DTensor.from_local(step, mesh, [Replicate()], run_check=False)
        else:
            p.grad = torch.ones_like(value)
        with implicit_replication() if kind == "implicit replication" else nullcontext():
            optimizer.step()
        results.append(local(p.detach()))
        if make is dracopt_ext.AdamW:
            assert optimizer.last_backend == TORCH
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)
    assert (results[0] < 0.85).all()


@left_to_torch
def test_a_parameter_that_differs_from_its_local_tensor(mesh: DeviceMesh) -> None:
    """torch refuses both, and changes nothing."""
    of_another_dtype, made_in_inference_mode = params_of(optimizer_of(mesh))
    of_another_dtype.data = shard(torch.ones(3, 4), mesh, torch.bfloat16)
    ones = torch.ones(3, 4)
    with torch.inference_mode():
        made_in_inference_mode = DTensor(ones, made_in_inference_mode._spec, requires_grad=False)
    for p in (of_another_dtype, made_in_inference_mode):
        optimizer = dracopt_ext.SGD([p], lr=0.5, backend="native")
        p.grad_dtype = None
        p.grad = shard(torch.ones(3, 4), mesh, p.dtype)
        before = p._local_tensor.clone()
        with pytest.raises(RuntimeError, match="does not serve distributed tensors that differ from their local"):
            optimizer.step()
        assert torch.equal(p._local_tensor, before)


def test_a_local_tensor_of_another_shape(mesh: DeviceMesh) -> None:
    optimizer = optimizer_of(mesh)
    p = params_of(optimizer)[1]
    p.grad._local_tensor = torch.ones(2, 4)
    with pytest.raises(
        ValueError, match=r"parameter 1 .* has a local tensor of another shape, \[2, 4\] beside \[3, 4\]"
    ):
        optimizer.step()


@pytest.mark.parametrize("kind", ["plain", "other mesh"])
def test_the_reference_refuses_mixtures(kind: str, mesh: DeviceMesh) -> None:
    optimizer = optimizer_of(mesh, backend="reference")
    before = {key: local(tensor).clone() for key, tensor in snapshot(optimizer).items()}
    p = params_of(optimizer)[1]
    other = init_device_mesh("cpu", (1, 1))
    both = DTensor.from_local(torch.ones(3, 4), other, [Shard(0), Replicate()], run_check=False)
    p.grad = torch.ones(3, 4) if kind == "plain" else both
    with pytest.raises(ValueError, match="the gradient of parameter 1 of group 0"):
        optimizer.step()
    assert_same_bits({key: local(tensor) for key, tensor in snapshot(optimizer).items()}, before)


def test_an_attribute_that_only_looks_like_a_mesh() -> None:
    p = nn.Parameter(torch.ones(3))
    p.device_mesh = "mine"  # type: ignore[assignment]
    optimizer = dracopt_ext.SGD([p], backend="native")
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"does not serve sparse tensors: parameter 0 of group 0 \(shape \[3\]\)"):
        optimizer.step()


def test_what_the_name_of_a_mesh_may_do(mesh: DeviceMesh) -> None:
    """An error names the meshes, which may run other code."""
    optimizer = optimizer_of(mesh)

    class Named(DeviceMesh):
        def __eq__(self, other: object) -> bool:
            return self is other

        __hash__ = DeviceMesh.__hash__

        def __repr__(self) -> str:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group["params"].clear()
                group.clear()
            optimizer.param_groups.clear()
            gc.collect()
            rubbish.extend(torch.ones(7) for _ in range(1000))
            return "a mesh of mine"

    rubbish: list[Tensor] = []
    other = copy.copy(mesh)
    other.__class__ = Named
    params_of(optimizer)[1].grad = shard(torch.ones(3, 4), other)
    with pytest.raises(
        ValueError, match=r"parameter 1 of group 0 \(shape \[3, 4\] over .* is distributed over a mesh of m"
    ):
        optimizer.step()
    assert rubbish


def test_a_gradient_of_another_whole_shape(mesh: DeviceMesh) -> None:
    """The shards of this process may have one shape although those of others have not."""
    optimizer = optimizer_of(mesh)
    p = params_of(optimizer)[1]
    spec = copy.copy(p._spec)
    spec.tensor_meta = spec.tensor_meta._replace(shape=torch.Size((5, 4)))
    optimizer.state[p]["exp_avg"] = DTensor(torch.ones(3, 4), spec, requires_grad=False)
    with pytest.raises(ValueError, match=r"the state 'exp_avg' of parameter 1 .* has another shape, \[5, 4\]"):
        optimizer.step()


class Subclass(DTensor):
    """A user's own distributed tensor."""


class LocalSubclass(Tensor):
    """A user's own local tensor."""


def as_type(kind: type, tensor: DTensor) -> Any:
    return torch.Tensor._dtensor__new__(kind, tensor._local_tensor, tensor._spec, requires_grad=False)  # type: ignore[attr-defined]


@left_to_torch
@pytest.mark.parametrize(
    "kind", ["subclass", "local subclass", "subclass as gradient", "local subclass as gradient", "partial"]
)
def test_what_torch_steps(kind: str, mesh: DeviceMesh) -> None:
    placement = Partial() if kind == "partial" else Shard(0)
    value = DTensor.from_local(torch.ones(3, 4), mesh, [placement], run_check=False)
    p: Any = as_type(Subclass, value).requires_grad_() if kind == "subclass" else nn.Parameter(value)
    if kind == "local subclass":
        p._local_tensor = torch.ones(3, 4).as_subclass(LocalSubclass)
    grad = DTensor.from_local(torch.ones(3, 4), mesh, [placement], run_check=False)
    if kind == "local subclass as gradient":
        grad._local_tensor = torch.ones(3, 4).as_subclass(LocalSubclass)
    p.grad = as_type(Subclass, grad) if kind == "subclass as gradient" else grad
    optimizer = dracopt_ext.SGD([p], lr=0.25)
    optimizer.step()
    assert optimizer.last_backend == TORCH
    assert (local(p) == 0.75).all()
    optimizer.backend = "native"
    with pytest.raises(RuntimeError, match="does not serve"):
        optimizer.step()


@pytest.mark.usefixtures("mesh")
def test_another_order_of_shards() -> None:
    """A dimension that is sharded twice may be split along the second dimension of the mesh first."""
    both = init_device_mesh("cpu", (1, 1))
    placements = [Shard(0), Shard(0)]
    p = nn.Parameter(DTensor.from_local(torch.ones(3, 4), both, placements, run_check=False))
    optimizer = dracopt_ext.SGD([p], backend="native")
    p.grad = DTensor.from_local(torch.ones(3, 4), both, placements, run_check=False)
    optimizer.step()
    spec = copy.copy(p._spec)
    (entry,) = spec.shard_order
    spec.shard_order = (entry._replace(mesh_dims=(1, 0)),)
    p.grad = DTensor(torch.ones(3, 4), spec, requires_grad=False)
    with pytest.raises(RuntimeError, match="does not serve distributed tensors with a gradient or state of other pl"):
        optimizer.step()


@left_to_torch
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["two sharing", "one sharing with a plain one", "under a mode"])
def test_reasons_that_hold_for_plain_tensors(kind: str, mesh: DeviceMesh) -> None:
    """torch steps parameters that share memory one after the other, and what a mode must see."""
    from torch.utils.flop_counter import FlopCounterMode

    results = []
    for make in (dracopt_ext.AdamW, torch.optim.AdamW):
        p, q = (nn.Parameter(shard(torch.ones(3, 4), mesh)) for _ in range(2))
        if kind == "two sharing":
            q._local_tensor = local(p)
        params = [p, nn.Parameter(local(p).detach())] if kind.startswith("one") else [p, q]
        optimizer: Any = make(params, lr=0.1, foreach=False)
        for each in params:
            each.grad = shard(torch.ones(3, 4), mesh) if isinstance(each, DTensor) else torch.ones(3, 4)
        if kind == "one sharing with a plain one":  # a gradient with which torch must step the distributed one
            p.grad = DTensor.from_local(torch.ones(3, 4), mesh, [Partial()], run_check=False)
        with FlopCounterMode(display=False) if kind == "under a mode" else torch.no_grad():
            optimizer.step()
        results.append([local(each.detach()) for each in params])
        if make is dracopt_ext.AdamW:
            assert optimizer.last_backend == TORCH
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        assert (ours < 0.95).all()


# ---- what a plan remembers


def test_new_specs_at_the_place_of_old_ones(mesh: DeviceMesh) -> None:
    """A plan knows specs that agreed by their addresses, so it must keep them."""
    optimizer = optimizer_of(mesh, 1)
    (p,) = params_of(optimizer)
    for step in range(50):
        placements = [Shard(0)] if step % 2 else [Replicate()]
        p.grad = DTensor.from_local(torch.ones(3, 4), mesh, placements, run_check=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        assert optimizer.last_backend == (NATIVE if step % 2 else TORCH), step


def test_meshes_that_are_equal(mesh: DeviceMesh) -> None:
    """Python compares two meshes once, and a plan then knows them."""
    calls: list[int] = []
    other = acting(mesh, lambda: calls.append(1))
    optimizer = optimizer_of(mesh)
    for step in range(5):
        for p in params_of(optimizer):
            p.grad = shard(torch.ones(3, 4), other)
        calls.clear()
        optimizer.step()
        assert optimizer.last_backend == NATIVE
        assert len(calls) == (2 if step == 0 else 0), step


def test_what_is_remembered_of_new_meshes_in_each_step(mesh: DeviceMesh) -> None:
    optimizer = optimizer_of(mesh, 1)
    (p,) = params_of(optimizer)
    meshes = []
    for _ in range(200):
        other = copy.copy(mesh)
        meshes.append(weakref.ref(other))
        p.grad = shard(torch.ones(3, 4), other)
        del other
        optimizer.step()
        assert optimizer.last_backend == NATIVE
    gc.collect()
    assert sum(found() is not None for found in meshes) < 100


@pytest.mark.parametrize("act", ["raise", "take the gradients away", "replace the parameters"])
def test_what_a_comparison_of_meshes_may_do(act: str, mesh: DeviceMesh) -> None:
    """Python compares the meshes, so that other code may run in the middle of a step."""
    optimizer = optimizer_of(mesh)
    group, (p, q) = optimizer.param_groups[0], params_of(optimizer)

    def act_once() -> None:
        if act == "raise":
            raise RuntimeError("not comparable")
        if act == "take the gradients away":
            p.grad = q.grad = None
        else:
            group["params"] = [q]
        gc.collect()

    before = {key: local(tensor).clone() for key, tensor in snapshot(optimizer).items()}
    p.grad = shard(torch.ones(3, 4), acting(mesh, act_once))
    if act == "raise":
        with pytest.raises(RuntimeError, match="not comparable"):
            optimizer.step()
    else:
        optimizer.step()
    stays = [torch.equal(local(tensor), before[f"0.{i}"]) for i, tensor in enumerate((p, q))]
    assert stays == [True, act != "replace the parameters"]
    group["params"] = [p, q]
    for each in (p, q):
        each.grad = shard(torch.ones(3, 4), mesh)
    optimizer.step()
    assert optimizer.last_backend == NATIVE
    assert not torch.equal(local(p), before["0.0"])


@left_to_torch
def test_classes_of_another_form(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch of the future may keep local tensors elsewhere."""
    monkeypatch.setattr("torch.distributed.tensor.DTensor", type("DTensor", (Tensor,), {}))
    optimizer = optimizer_of(mesh)
    assert optimizer.last_backend == TORCH


@pytest.mark.parametrize("case", CASES, ids=str)
def test_clipping(case: Case, mesh: DeviceMesh) -> None:
    """Parameters of one process have the bits of plain ones, beside plain ones, too."""
    given = inputs([0, 1, 17, 5000], torch.float32, 3)
    options = {**case.options, "max_grad_norm": 3.0}
    expected = train(case.ours, options, *given)
    count = iter(range(1000))
    for every in (1, 2):
        found = train(
            case.ours,
            options,
            *given,
            place=lambda tensor, every=every: shard(tensor, mesh) if next(count) % every == 0 else tensor.clone(),  # type: ignore[misc]
            place_grad=None,
        )
        assert_same_bits({key: local(tensor) for key, tensor in found.items()}, expected)
    for fault in FAULTS:
        found = train(fault(case.ours), options, *given, place=lambda tensor: shard(tensor, mesh))
        with pytest.raises(AssertionError, match="differ"):
            assert_same_bits({key: local(tensor) for key, tensor in found.items()}, expected)


def test_clipping_that_cannot_communicate(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the collective leaves everything as before."""
    optimizer = optimizer_of(mesh, max_grad_norm=1.0)
    before = {key: local(tensor).clone() for key, tensor in snapshot(optimizer).items()}

    def fail(*_: Any) -> float:
        raise RuntimeError("no connection")

    monkeypatch.setattr("dracopt_ext.clip_grad.add_over_meshes", fail)
    with pytest.raises(RuntimeError, match="no connection"):
        optimizer.step()
    assert_same_bits({key: local(tensor) for key, tensor in snapshot(optimizer).items()}, before)
    monkeypatch.undo()
    optimizer.step()
    assert optimizer.last_backend == NATIVE


def test_what_may_happen_while_processes_communicate(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other code takes everything away meanwhile, and the step updates what it has found."""
    expected, optimizer = (optimizer_of(mesh, max_grad_norm=1.0) for _ in range(2))
    expected.step()
    params = optimizer.param_groups[0]["params"]
    kept = [local(p.detach()) for p in params]

    def take_away(parts: list[tuple[Any, int, float]]) -> float:
        for p in params:
            p.grad = None
            optimizer.state.pop(p)
        params.clear()
        gc.collect()
        return sum(part for _, _, part in parts)

    monkeypatch.setattr("dracopt_ext.clip_grad.add_over_meshes", take_away)
    optimizer.step(zero_grad=True)
    for tensor, p in zip(kept, expected.param_groups[0]["params"], strict=True):
        assert torch.equal(tensor, local(p.detach()))
