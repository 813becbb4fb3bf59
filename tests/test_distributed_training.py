"""Distributed training in several processes: all weights and states are those that one process computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as checkpoints
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import dracopt_ext

from .cases import (
    BY_RULE,
    CASES,
    FAULTS,
    RULE_CASES,
    Case,
    NoOp,
    assert_same_bits,
    same_bits,
    snapshot,
)
from .processes import in_processes

NATIVE = {"cpu": frozenset({"native"})}


def local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Copies what all processes hold together."""
    return tensor.detach().full_tensor().clone() if isinstance(tensor, DTensor) else tensor.detach().clone()


class SkipsARank(NoOp):
    """A fault that every test here must notice: one process updates nothing."""

    def __call__(self, params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
        optimizer = self.make(params, **options)
        before: list[Tensor] = []
        optimizer.register_step_pre_hook(lambda *_: before.extend(local(p.detach()).clone() for p in params))

        def undo(*_: Any) -> None:
            for p, value in zip(params, before, strict=True):
                if dist.get_rank() == 0:
                    local(p.detach()).copy_(value)
            before.clear()

        optimizer.register_step_post_hook(undo)
        return optimizer


class Network(nn.Module):
    """Has parameters that four processes cannot share evenly: their first dimensions are 5, 3, 1 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(3, 1)
        self.scale = nn.Parameter(torch.ones(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.third(torch.tanh(self.second(torch.tanh(self.first(x))))) * self.scale.mean()
        return found


class Even(nn.Module):
    """Has dimensions that tensor parallelism can share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.first(x)))
        return found


def made(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    return kind()


def mesh_of(*sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "inner")[: len(sizes)])


def sharded(**options: Any) -> nn.Module:
    """Shards by FSDP2."""
    model = made(Network)
    for layer in (model.first, model.second):
        fully_shard(layer, mesh=mesh_of(dist.get_world_size()), **options)
    fully_shard(model, mesh=mesh_of(dist.get_world_size()), **options)
    return model  # type: ignore[no-any-return]


def sharded_in_bf16() -> nn.Module:
    return sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def sharded_from_meta() -> nn.Module:
    with torch.device("meta"):
        model = Network()
    fully_shard(model, mesh=mesh_of(dist.get_world_size()))
    model.to_empty(device="cpu")
    for p, value in zip(model.parameters(), made(Network).parameters(), strict=True):
        p.detach().copy_(distribute_tensor(value.detach(), p.device_mesh, p.placements))  # type: ignore[attr-defined]
    return model


def hybrid() -> nn.Module:
    model = made(Network)
    fully_shard(model, mesh=mesh_of(2, dist.get_world_size() // 2))
    return model  # type: ignore[no-any-return]


class Sequences(nn.Module):
    """Has a norm and an embedding, whose gradients are placed in another way than the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.last = nn.Embedding(8, 4), nn.LayerNorm(4), nn.Linear(4, 6)

    def forward(self, words: Tensor) -> Tensor:
        found: Tensor = self.last(self.norm(self.words(words)))
        return found


def tensor_parallel(mesh: DeviceMesh | None = None) -> nn.Module:
    mesh = mesh_of(dist.get_world_size()) if mesh is None else mesh
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    return parallelize_module(made(Even), mesh, plan)


def two_dimensional() -> nn.Module:
    mesh = mesh_of(2, dist.get_world_size() // 2)
    model = tensor_parallel(mesh["inner"])
    fully_shard(model, mesh=mesh["outer"])
    return model


def replicated(**options: Any) -> nn.Module:
    return DistributedDataParallel(made(Network), **options)


def sharded_by_the_first_fsdp() -> nn.Module:
    return FullyShardedDataParallel(made(Network), use_orig_params=True, device_id=torch.device("cpu"))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "FSDP2": (sharded, (2, 4)),
    "FSDP2 that keeps whole parameters": (lambda: sharded(reshard_after_forward=False), (2,)),
    "FSDP2 in bf16": (sharded_in_bf16, (2,)),
    "FSDP2 on the host": (lambda: sharded(offload_policy=CPUOffloadPolicy(pin_memory=False)), (2,)),
    "FSDP2 from meta": (sharded_from_meta, (2,)),
    "hybrid FSDP2": (hybrid, (4,)),
    "tensor parallelism": (tensor_parallel, (2,)),
    "FSDP2 and tensor parallelism": (two_dimensional, (4,)),
    "FSDP": (sharded_by_the_first_fsdp, (2,)),
    "DDP": (replicated, (2,)),
    "DDP with views": (lambda: replicated(gradient_as_bucket_view=True), (2,)),
}
"""How to make a distributed model, and the numbers of processes to test it in."""


def raise_on_all(errors: list[str]) -> None:
    """Raises in all processes if one has errors, because the others would wait for it."""
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, errors)
    for rank, of_rank in enumerate(of_all):
        assert not of_rank, f"rank {rank}: {of_rank[0]}"


def follow(name: str, case: Case, make: Any, steps: int = 3) -> None:
    """Trains on data that differ between processes. All tensors must become those of our class on whole tensors."""
    model = MODELS[name][0]()
    params = list(model.parameters())
    plain = [nn.Parameter(whole(p)) for p in params]
    optimizer, other = make(params, **case.options), case.ours(plain, **case.options)
    generator = torch.Generator().manual_seed(dist.get_rank())
    errors: list[str] = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().mean().backward()
        for p, q in zip(params, plain, strict=True):
            q.grad = None if p.grad is None else whole(p.grad)
        optimizer.step()
        other.step()
        errors += differences(snapshot(optimizer), snapshot(other))
        if optimizer.last_backend != NATIVE:
            errors.append(f"{optimizer.last_backend} ran")
    raise_on_all(errors)


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    found = [f"{key} is missing" for key in ours.keys() ^ theirs.keys()]
    for key in ours.keys() & theirs.keys():
        a, b = whole(ours[key]), whole(theirs[key])
        if a.shape != b.shape or a.dtype != b.dtype or not same_bits(a, b).all():
            found.append(f"{key} differs: {a} is not {b}")
    return found


def follow_all(name: str) -> None:
    for case in [CASES[0], *RULE_CASES]:
        follow(name, case, case.ours)
    for fault in [*FAULTS, SkipsARank]:
        with pytest.raises(AssertionError, match="differs"):
            follow(name, BY_RULE["adam"], fault(BY_RULE["adam"].ours))


@pytest.mark.parametrize(("name", "count"), [(name, count) for name, (_, counts) in MODELS.items() for count in counts])
def test_training(name: str, count: int, tmp_path: Path) -> None:
    in_processes(count, tmp_path, follow_all, name)


def train_equally(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Trains on data that are the same in all processes. Means of gradients are then exact for 2 and 4 processes."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().mean().backward()
        optimizer.step()
    return [whole(p) for p in model.parameters()]


def compare_with_one_process(name: str) -> None:
    for case in RULE_CASES:
        for make in (case.torchs, case.ours):  # torch's classes show that the reductions are the same
            model, alone = MODELS[name][0](), made(Network)
            found = train_equally(model, make(model.parameters(), **case.options))
            expected = train_equally(alone, make(alone.parameters(), **case.options))
            raise_on_all([f"{make}" for p, q in zip(found, expected, strict=True) if not torch.equal(p, q)])
    for fault in [*FAULTS, SkipsARank]:
        model = MODELS[name][0]()
        found = train_equally(model, fault(BY_RULE["nadam"].ours)(list(model.parameters()), **BY_RULE["nadam"].options))
        with pytest.raises(AssertionError):
            raise_on_all(["differs" for p, q in zip(found, expected, strict=True) if not torch.equal(p, q)])


@pytest.mark.parametrize(("name", "count"), [("FSDP2", 2), ("FSDP2", 4), ("hybrid FSDP2", 4), ("DDP", 2)])
def test_like_one_process(name: str, count: int, tmp_path: Path) -> None:
    in_processes(count, tmp_path, compare_with_one_process, name)


def keep_moments_in_fp32() -> None:
    model = made(Network).bfloat16()
    fully_shard(model, mesh=mesh_of(2))
    params = list(model.parameters())
    plain = [nn.Parameter(whole(p)) for p in params]
    optimizers = [dracopt_ext.AdamW(each, lr=0.1, state_dtype=torch.float32) for each in (params, plain)]
    for step in range(3):
        model.zero_grad()
        model(torch.full((2, 6), 0.5 + step + dist.get_rank(), dtype=torch.bfloat16)).sum().backward()
        for p, q in zip(params, plain, strict=True):
            q.grad = whole(p.grad)
        for optimizer in optimizers:
            optimizer.step()
    assert optimizers[0].last_backend == NATIVE
    assert {type(s["exp_avg"]) for s in optimizers[0].state.values()} == {DTensor}
    assert {s["exp_avg"].dtype for s in optimizers[0].state.values()} == {torch.float32}
    raise_on_all(differences(snapshot(optimizers[0]), snapshot(optimizers[1])))


def backward_with_overflows(model: nn.Module, scaler: torch.amp.GradScaler, plain: list[Tensor]) -> Iterator[bool]:
    """Computes gradients four times, for plain parameters, too. Yields whether one rank has an overflow."""
    for step in range(4):
        model.zero_grad()
        scaler.scale(model(torch.ones(2, 6) + step).sum()).backward()
        is_overflow = step in (0, 2)
        if is_overflow and dist.get_rank() == 1:
            local(next(model.parameters()).grad).view(-1)[-1] = float("inf")  # type: ignore[arg-type]
        for p, q in zip(model.parameters(), plain, strict=True):
            q.grad = whole(p.grad) / scaler.get_scale()  # type: ignore[arg-type]
        yield is_overflow


def overflow_on_one_rank() -> None:
    for fused in (None, True):
        model = sharded()
        optimizer = dracopt_ext.AdamW(model.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        plain = [nn.Parameter(whole(p)) for p in model.parameters()]
        other = dracopt_ext.AdamW(plain, lr=0.1)
        for is_overflow in backward_with_overflows(model, scaler, plain):
            scaler.step(optimizer)
            scaler.update()
            if not is_overflow:
                other.step()
            raise_on_all(differences(snapshot(optimizer), snapshot(other)))
        assert scaler.get_scale() == 1
        assert optimizer.last_backend == NATIVE


def clip_the_norm() -> None:
    model = sharded()
    optimizer = dracopt_ext.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain = [nn.Parameter(whole(p)) for p in model.parameters()]
    other = dracopt_ext.SGD(plain, lr=0.1, momentum=0.9)
    for step in range(3):
        model.zero_grad()
        model(torch.full((2, 6), 1.0 + step + dist.get_rank())).sum().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert whole(norm) > 0.1
        for p, q in zip(model.parameters(), plain, strict=True):
            q.grad = whole(p.grad)  # type: ignore[arg-type]
        optimizer.step()
        other.step()
    assert optimizer.last_backend == NATIVE
    raise_on_all(differences(snapshot(optimizer), snapshot(other)))


def lack_gradients_on_one_rank() -> None:
    """torch steps a shard that has a gradient, and passes over one that has none."""
    results = []
    for make in (dracopt_ext.AdamW, torch.optim.AdamW):
        model = sharded()
        optimizer = make(model.parameters(), lr=0.1)
        before = [local(p.detach()).clone() for p in model.parameters()]
        for step in range(3):
            model.zero_grad()
            model(torch.ones(2, 6) + step).sum().backward()
            if dist.get_rank() == 1:
                for p in [*model.parameters()][::2]:
                    p.grad = None
            optimizer.step()
        results.append([local(p.detach()).clone() for p in model.parameters()])
    errors = []
    for i, (ours, theirs, old) in enumerate(zip(*results, before, strict=True)):
        stays = dist.get_rank() == 1 and i % 2 == 0
        if not torch.allclose(ours, theirs, rtol=1e-5) or (old.numel() > 0 and torch.equal(ours, old) != stays):
            errors.append(f"{i}: {ours} is not {theirs}")
    raise_on_all(errors)


def redistribute_gradients() -> None:
    """docs/distributed.md describes what torch steps here, and how to let the kernels step it."""
    shards = {"output_layouts": Shard(1)}
    plan = {
        "words": RowwiseParallel(input_layouts=Replicate(), **shards),
        "norm": SequenceParallel(),
        "last": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    weights = []
    for make, redistributes in ((torch.optim.AdamW, False), (dracopt_ext.AdamW, False), (dracopt_ext.AdamW, True)):
        model = parallelize_module(made(Sequences), mesh_of(2), plan)
        params: list[Any] = list(model.parameters())
        optimizer = make(params, lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            model(torch.arange(step, step + 4).view(2, 2)).square().mean().backward()
            assert [p.grad.placements == p.placements for p in params] == [False, False, False, True, True]
            for p in params if redistributes else []:
                p.grad = p.grad.redistribute(placements=p.placements)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
        if redistributes:
            assert optimizer.last_backend == NATIVE
        elif make is dracopt_ext.AdamW:
            assert optimizer.last_backend == {"cpu": frozenset({"native", "torch"})}
        weights.append([whole(p) for p in params])
    theirs, *ours = weights
    for found in ours:
        raise_on_all(
            [f"{p} is not {q}" for p, q in zip(found, theirs, strict=True) if not torch.allclose(p, q, rtol=1e-5)]
        )


def share_states_by_zero() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for case in RULE_CASES:
        found = []
        for make in (case.torchs, case.ours):
            model = replicated()
            optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=make, **case.options)
            alone = made(Network)
            expected = train_equally(alone, make(alone.parameters(), **case.options))
            found.append(train_equally(model, optimizer))
            raise_on_all([str(make) for p, q in zip(found[-1], expected, strict=True) if not torch.equal(p, q)])
            assert len(optimizer.optim.state) < len(expected)  # each process has only some states
        assert optimizer.optim.last_backend == NATIVE
        theirs, ours = found
        raise_on_all([str(case) for p, q in zip(ours, theirs, strict=True) if not torch.allclose(p, q, rtol=1e-4)])


@pytest.mark.parametrize(
    "program",
    [
        keep_moments_in_fp32,
        overflow_on_one_rank,
        clip_the_norm,
        lack_gradients_on_one_rank,
        redistribute_gradients,
        share_states_by_zero,
    ],
    ids=lambda program: program.__name__,
)
def test_options(program: Callable[[], None], tmp_path: Path) -> None:
    in_processes(2, tmp_path, program)


PRECISIONS: list[dict[str, Any]] = [
    {"master_weights": "fp32", "state_dtype": torch.float32},
    {"master_weights": "split16"},
    {"stochastic_rounding": True, "rounding_seed": 5},
    {"stochastic_rounding": "all"},
]


def round_like_one_process(name: str) -> None:
    """Masters, their halves, and the random bits of each element are those of whole tensors."""
    torch.set_default_dtype(torch.bfloat16)
    for options in PRECISIONS:
        for case in RULE_CASES:
            follow(name, Case(case.algorithm, {**case.options, **options}), case.ours)
    for options in PRECISIONS[1:3]:
        with pytest.raises(AssertionError, match="differs"):
            follow(name, Case("SGD", {"lr": 0.1, **options}), SkipsARank(dracopt_ext.SGD))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("FSDP2", 4),
        ("hybrid FSDP2", 4),
        ("tensor parallelism", 2),
        ("FSDP2 and tensor parallelism", 4),
        ("DDP", 2),
    ],
)
def test_rounding(name: str, count: int, tmp_path: Path) -> None:
    in_processes(count, tmp_path, round_like_one_process, name)


# ---- checkpoints


def as_lists(weights: list[Tensor]) -> list[Any]:
    return [p.tolist() for p in weights]


def begin(folder: Path, make: Any) -> list[Any]:
    """Trains, saves checkpoints of all kinds, and goes on. Returns the weights at the end."""
    import torch.distributed.checkpoint as dcp

    model = sharded()
    optimizer = make(model.parameters(), lr=0.1)
    train_equally(model, optimizer)
    of_model, of_optimizer = checkpoints.get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder / "sharded")
    dcp.async_save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder / "async").result()
    whole_options = checkpoints.StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = checkpoints.get_state_dict(model, optimizer, options=whole_options)
    if dist.get_rank() == 0:
        torch.save(full, folder / "full")
    return as_lists(train_equally(model, optimizer))


def go_on(folder: Path, kind: str, make: Any) -> list[Any]:
    """Loads a checkpoint and goes on. Returns the weights at the end."""
    import torch.distributed.checkpoint as dcp

    model = sharded()
    optimizer = make(model.parameters(), lr=0.1)
    options = checkpoints.StateDictOptions(full_state_dict=kind == "full")
    if kind == "full":
        saved = torch.load(folder / kind, weights_only=True)
    else:
        found = dict(zip(("model", "optimizer"), checkpoints.get_state_dict(model, optimizer), strict=True))
        dcp.load(found, checkpoint_id=folder / kind)
        saved = found["model"], found["optimizer"]
    checkpoints.set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
    weights = train_equally(model, optimizer)
    if make is dracopt_ext.AdamW:
        assert optimizer.last_backend == NATIVE
    return as_lists(weights)


def begin_with_both(folder: Path) -> list[list[Any]]:
    return [begin(folder / make.__module__, make) for make in (dracopt_ext.AdamW, torch.optim.AdamW)]


def go_on_with_both(folder: Path) -> list[list[Any]]:
    ours, theirs = (folder / make.__module__ for make in (dracopt_ext.AdamW, torch.optim.AdamW))
    by_ours = [go_on(ours, kind, dracopt_ext.AdamW) for kind in ("sharded", "async", "full")]
    return [*by_ours, go_on(ours, "sharded", torch.optim.AdamW), go_on(theirs, "sharded", dracopt_ext.AdamW)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [2, 4])
def test_checkpoints_for_other_numbers_of_processes(count: int, tmp_path: Path) -> None:
    for name in ("first", "second", dracopt_ext.AdamW.__module__, torch.optim.AdamW.__module__):
        (tmp_path / name).mkdir()
    ours, theirs = in_processes(6 - count, tmp_path / "first", begin_with_both, tmp_path)[0]
    *by_ours, ours_by_theirs, theirs_by_ours = in_processes(count, tmp_path / "second", go_on_with_both, tmp_path)[0]
    assert by_ours == [ours] * 3
    for found in (ours_by_theirs, theirs_by_ours, ours):
        for p, q in zip(found, theirs, strict=True):
            torch.testing.assert_close(torch.tensor(p), torch.tensor(q), rtol=1e-5, atol=1e-6)


def begin_in_bf16(folder: Path) -> list[list[Any]]:
    torch.set_default_dtype(torch.bfloat16)
    return [begin(folder / str(i), partial(dracopt_ext.AdamW, **options)) for i, options in enumerate(PRECISIONS)]


def go_on_in_bf16(folder: Path) -> list[list[list[Any]]]:
    torch.set_default_dtype(torch.bfloat16)
    return [
        [go_on(folder / str(i), kind, partial(dracopt_ext.AdamW, **options)) for kind in ("sharded", "full")]
        for i, options in enumerate(PRECISIONS)
    ]


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_in_bf16_for_other_numbers_of_processes(tmp_path: Path) -> None:
    """Masters and the count of steps come with the checkpoint, so that all bits are those of training on."""
    for name in ("first", "second", *map(str, range(len(PRECISIONS)))):
        (tmp_path / name).mkdir()
    expected = in_processes(2, tmp_path / "first", begin_in_bf16, tmp_path)[0]
    found = in_processes(4, tmp_path / "second", go_on_in_bf16, tmp_path)[0]
    assert found == [[weights] * 2 for weights in expected]


# ---- what cannot be right, and what torch steps


def gradients_of_all_kinds(p: Any) -> dict[str, Tensor]:
    """Returns gradients of ones that are distributed in other ways than the parameter, which is sharded by rows."""
    mesh, ones = p.device_mesh, torch.ones(4, 6)
    partial = torch.ones(4, 6) / dist.get_world_size()
    return {
        "columns": distribute_tensor(ones, mesh, [Shard(1)]),
        "replicated": distribute_tensor(ones, mesh, [Replicate()]),
        "partial": DTensor.from_local(partial, mesh, [Partial()], run_check=False),
        "other mesh": distribute_tensor(ones, mesh_of(1, dist.get_world_size()), [Replicate(), Shard(0)]),
        "plain": ones,
    }


def refuse_and_redistribute() -> None:
    for name in ("columns", "replicated", "partial", "other mesh", "plain"):
        for where in ("gradient", "exp_avg"):
            mesh, value = mesh_of(dist.get_world_size()), torch.arange(24.0).view(4, 6)
            p, untouched = (nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])) for _ in range(2))
            q = nn.Parameter(value.clone())
            optimizer, other = dracopt_ext.AdamW([untouched, p], lr=0.1), torch.optim.AdamW([q], lr=0.1)
            for each in (p, untouched, q):
                each.grad = torch.ones_like(each)
            for each in (optimizer, other):
                each.step()
            given = gradients_of_all_kinds(p)[name]
            if where == "gradient":
                p.grad = given
            else:
                optimizer.state[p][where] = given
                other.state[q][where] = torch.ones(4, 6)
            before = {key: whole(tensor) for key, tensor in snapshot(optimizer).items() if where not in key}
            if name in ("other mesh", "plain") or (name == "partial" and where == "exp_avg"):
                with pytest.raises(ValueError, match=r"is distributed over|is not distributed") as raised:
                    optimizer.step()
                assert "parameter 1 of group 0 (shape [4, 6] over DeviceMesh((outer=2), 'cpu'" in str(raised.value)
                assert "by (Shard(dim=0),)) is" in str(raised.value)
                assert_same_bits({key: whole(snapshot(optimizer)[key]) for key in before}, before)
                continue
            with pytest.warns(RuntimeWarning, match="leaves distributed tensors with a gradient or state of other pl"):
                optimizer.step()
            dracopt_ext.backend._warned.clear()
            other.step()
            assert optimizer.last_backend == {"cpu": frozenset({"native", "torch"})}
            torch.testing.assert_close(whole(p), q.detach(), rtol=1e-6, atol=1e-6)
            if where == "gradient":
                torch.testing.assert_close(whole(untouched), whole(p), rtol=1e-6, atol=1e-6)


def test_other_placements(tmp_path: Path) -> None:
    in_processes(2, tmp_path, refuse_and_redistribute)


def step_where_placements_differ() -> None:
    """torch's fused kernel loses what it writes into moments of other placements, and communicates in another way than
    torch's other code, so that no process may choose it by its own shards."""
    mesh = mesh_of(2, 2)
    rows, columns = [Shard(0), Replicate()], [Replicate(), Shard(0)]
    for kind in ("moments", "gradient that is contiguous in some processes"):
        results = []
        for make, fused in ((torch.optim.AdamW, None), (dracopt_ext.AdamW, True)):
            p = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, rows))
            optimizer: Any = make([p], lr=0.1, fused=fused)
            for step in range(3):
                p.grad = distribute_tensor(torch.full((4, 4), 1.0 + step), mesh, rows)
                if step == 1 and kind == "moments":
                    state = optimizer.state[p]
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = state[name].redistribute(placements=columns)
                elif step > 0 and kind != "moments":
                    p.grad = p.grad.redistribute(placements=columns)
                    if dist.get_rank() == 1:
                        p.grad._local_tensor = local(p.grad).t().contiguous().t()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    optimizer.step()
            moments = [whole(optimizer.state[p][name]) for name in ("exp_avg", "exp_avg_sq")]
            results.append([whole(p), *moments])
        raise_on_all([f"{kind}: {a} is not {b}" for a, b in zip(*results, strict=True) if not torch.allclose(a, b)])


def test_fused_where_placements_differ(tmp_path: Path) -> None:
    in_processes(4, tmp_path, step_where_placements_differ)


def clip_in_the_step(name: str) -> None:
    """The norm is that of whole gradients, the same on all ranks, and each rank clips its part by it."""
    for case in RULE_CASES:
        follow_clipped(name, case, case.ours)
    for fault in [*FAULTS, SkipsARank, ClipsByItself]:
        with pytest.raises(AssertionError, match="is not"):
            follow_clipped(name, BY_RULE["sgd"], fault(BY_RULE["sgd"].ours))


class ClipsByItself(NoOp):
    """A fault that the test must notice: one process uses another norm."""

    def __call__(self, params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
        factor = 1 - 0.01 * (dist.get_rank() == 1)
        return self.make(params, **{**options, "max_grad_norm": factor * options["max_grad_norm"]})


def follow_clipped(name: str, case: Case, make: Any) -> None:
    model = MODELS[name][0]()
    params = list(model.parameters())
    plain = [nn.Parameter(whole(p)) for p in params]
    largest = 0.05
    optimizer = make(params, **case.options, max_grad_norm=largest)
    other = case.torchs(plain, **case.options)
    generator = torch.Generator().manual_seed(dist.get_rank())
    errors: list[str] = []
    for step in range(4):
        optimizer.zero_grad()
        scale = 1e-4 if step == 2 else 1.0
        (scale * model(torch.randn(8, 6, generator=generator)).square().mean()).backward()
        for p, q in zip(params, plain, strict=True):
            q.grad = None if p.grad is None else whole(p.grad)
        norm = nn.utils.clip_grad_norm_(plain, largest)
        assert (norm > largest) == (step != 2), "the test must clip in all steps except one"
        optimizer.step()
        other.step()
        ours = optimizer.grad_norm  # type: ignore[attr-defined]
        of_all = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
        dist.all_gather(of_all, ours)
        errors += [f"{a} is not {ours}" for a in of_all if a != ours]
        errors += [] if torch.allclose(ours.float(), norm, rtol=1e-6) else [f"{ours} is not {norm}"]
        for p, q in zip(params, plain, strict=True):
            if not torch.allclose(whole(p), q.detach(), rtol=1e-5, atol=1e-6):
                errors.append(f"{whole(p)} is not {q}")
        if optimizer.last_backend != NATIVE:  # type: ignore[attr-defined]
            errors.append(f"{optimizer.last_backend} ran")  # type: ignore[attr-defined]
    raise_on_all(errors)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("FSDP2", 2),
        ("FSDP2", 4),
        ("hybrid FSDP2", 4),
        ("tensor parallelism", 2),
        ("FSDP2 and tensor parallelism", 4),
        ("DDP", 2),
    ],
)
def test_clipping_in_the_step(name: str, count: int, tmp_path: Path) -> None:
    in_processes(count, tmp_path, clip_in_the_step, name)


def clip_by_functions() -> None:
    """Our functions have torch's results, for parts of 2 x 2 meshes and for partial gradients."""
    mesh = mesh_of(2, 2)
    generator = torch.Generator().manual_seed(0)
    for placements in (
        [Shard(0), Shard(1)],
        [Replicate(), Shard(0)],
        [Shard(1), Replicate()],
        [Replicate(), Partial()],
    ):
        found = []
        for library in (dracopt_ext, nn.utils):
            generator.manual_seed(1)
            params = []
            for _ in range(3):
                p = nn.Parameter(distribute_tensor(torch.zeros(5, 6), mesh, [Replicate(), Replicate()]))
                grad = torch.randn(5, 6, generator=generator)
                if placements[1] == Partial():
                    p.grad = DTensor.from_local(grad, mesh, placements, run_check=False)
                else:
                    p.grad = distribute_tensor(grad, mesh, placements)
                params.append(p)
            norm = library.clip_grad_norm_(params, 0.5)
            assert isinstance(norm, DTensor)
            total = library.get_total_norm([p.grad for p in params])
            if placements[1] != Partial():  # torch limits no terms of a sum
                library.clip_grad_value_(params, 0.05)
            found.append([whole(norm), whole(total), *(whole(p.grad) for p in params)])
        raise_on_all([f"{a} is not {b}" for a, b in zip(*found, strict=True) if not torch.allclose(a, b, rtol=1e-5)])


def test_clipping_by_functions(tmp_path: Path) -> None:
    in_processes(4, tmp_path, clip_by_functions)


def overflow_while_clipping() -> None:
    """All ranks notice an overflow on one of them, whoever looks for it, and change nothing."""
    for scaler_class in (torch.amp.GradScaler, dracopt_ext.GradScaler):
        for fused in (None, True):
            model = sharded()
            optimizer = dracopt_ext.AdamW(model.parameters(), lr=0.1, fused=fused, max_grad_norm=0.5)
            scaler = scaler_class("cpu", init_scale=4.0)
            plain = [nn.Parameter(whole(p)) for p in model.parameters()]
            other = torch.optim.AdamW(plain, lr=0.1)
            for is_overflow in backward_with_overflows(model, scaler, plain):
                scaler.step(optimizer)
                scaler.update()
                if not is_overflow:
                    nn.utils.clip_grad_norm_(plain, 0.5)
                    other.step()
                errors = [
                    f"{whole(p)} is not {q}"
                    for p, q in zip(model.parameters(), plain, strict=True)
                    if not torch.allclose(whole(p), q.detach(), rtol=1e-5, atol=1e-6)
                ]
                raise_on_all(errors)
            assert scaler.get_scale() == 1
            assert optimizer.last_backend == NATIVE


def test_overflow_while_clipping(tmp_path: Path) -> None:
    in_processes(2, tmp_path, overflow_while_clipping)
