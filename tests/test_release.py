"""Gradient release: parameters are stepped inside of backward, and their gradients are freed at once."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dracopt_ext

from .cases import BY_RULE, CASES, FAULTS, UNFUSED_ULPS, Case, assert_close, assert_same_bits, snapshot
from .processes import in_processes

every_case = pytest.mark.parametrize("case", CASES, ids=str)


class Network(nn.Module):
    """Uses one layer twice, and has a parameter that never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.twice(torch.tanh(self.twice(self.first(x)))))
        return found


def made() -> Network:
    torch.manual_seed(0)
    return Network()


def train(model: nn.Module, optimizer: Any, steps: int = 4, scheduler: Any = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 64, generator=generator)).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return snapshot(optimizer)


def groups_of(model: Network) -> list[dict[str, Any]]:
    return [
        {"params": [model.first.weight, model.twice.weight, model.unused]},
        {"params": [model.first.bias, model.twice.bias, *model.last.parameters()], "weight_decay": 0.0},
    ]


@every_case
def test_results(case: Case) -> None:
    """The loop with groups and a schedule is the same, and so are the results."""
    found = []
    for make, releases in ((case.ours, True), (case.ours, False), (case.torchs, False)):
        model = made()
        optimizer = make(groups_of(model), **case.options)
        seen: list[Any] = []
        if releases:
            optimizer.release_gradients()
            model.last.weight.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad))  # type: ignore[misc]
        schedule = dracopt_ext.lr_scheduler.StepLR(optimizer, 2, 0.5)
        found.append(train(model, optimizer, scheduler=schedule))
        if releases:
            assert seen == [None] * 4
            assert all(p.grad is None for p in model.parameters())
            assert optimizer.last_backend == {}
    assert_same_bits(found[0], found[1])
    assert_close(found[0], found[2], 4 * UNFUSED_ULPS)


@pytest.mark.parametrize("fault", FAULTS)
def test_results_bite(fault: Any) -> None:
    """A step() that does nothing is no fault here, so the faults spoil the step of each parameter."""
    case, model = BY_RULE["adam"], made()
    optimizer = case.ours(groups_of(model), **case.options)
    optimizer.release_gradients()
    for p in model.parameters():
        before = p.detach().clone()
        factor = -1.0 if fault is FAULTS[0] else 0.01

        def spoil(p: Tensor, before: Tensor = before, factor: float = factor) -> None:
            with torch.no_grad():
                p.add_(p - before, alpha=factor)
                before.copy_(p)

        p.register_post_accumulate_grad_hook(spoil)
    wrong = train(model, optimizer)
    other = made()
    expected = train(other, case.torchs(groups_of(other), **case.options))
    with pytest.raises(AssertionError, match="ulps"):
        assert_close(wrong, expected, 4 * UNFUSED_ULPS)


def test_gradients_are_freed_one_after_the_other() -> None:
    """No two gradients exist at the same time in a chain of layers."""
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(6)))
    optimizer = dracopt_ext.AdamW(model.parameters())
    alive: list[weakref.ref[Tensor]] = []
    most = []

    def count(p: Tensor) -> None:
        assert p.grad is not None
        alive.append(weakref.ref(p.grad))
        most.append(sum(each() is not None for each in alive))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(count)
    optimizer.release_gradients()
    model(torch.randn(2, 16)).sum().backward()
    assert most == [1] * 6


def test_checkpoints_go_on() -> None:
    """A checkpoint from one way of training continues in the other. Loading replaces the groups' dicts."""
    case, results = BY_RULE["adam"], []
    for first, second in itertools.product((True, False), repeat=2):
        model = made()
        optimizer = case.ours(groups_of(model), **case.options)
        if first:
            optimizer.release_gradients()
        train(model, optimizer, 2)
        saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
        model = made()
        model.load_state_dict(weights)
        optimizer = case.ours(groups_of(model), **case.options)
        if second:
            optimizer.release_gradients()
        optimizer.load_state_dict(saved)
        optimizer.param_groups[0]["lr"] = 0.3
        results.append(train(model, optimizer, 2))
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_switched_off() -> None:
    model = made()
    optimizer = dracopt_ext.SGD(model.parameters(), lr=0.1)
    with optimizer.release_gradients():
        model(torch.ones(1, 64)).sum().backward()
        assert model.first.weight.grad is None
    optimizer.step()
    model(torch.ones(1, 64)).sum().backward()
    assert model.first.weight.grad is not None
    handle = optimizer.release_gradients
    with pytest.raises(ValueError, match=r"has a gradient already.*zero_grad"):
        handle()
    optimizer.zero_grad()
    handle()
    handle().remove()  # a second call takes the place of the first one
    model(torch.ones(1, 64)).sum().backward()
    assert model.first.weight.grad is not None


def test_new_groups() -> None:
    model = made()
    optimizer = dracopt_ext.SGD(model.first.parameters(), lr=0.1)
    optimizer.release_gradients()
    optimizer.add_param_group({"params": list(model.last.parameters())})
    before = model.last.weight.detach().clone()
    model(torch.ones(1, 64)).sum().backward()
    assert model.last.weight.grad is None
    assert not torch.equal(model.last.weight, before)
    assert model.twice.weight.grad is not None
    with pytest.raises(ValueError, match="has a gradient already"):
        optimizer.add_param_group({"params": [model.twice.weight]})
    assert len(optimizer.param_groups) == 2


def test_parameter_that_was_taken_out() -> None:
    model = made()
    optimizer = dracopt_ext.SGD(model.parameters(), lr=0.1)
    optimizer.release_gradients()
    params = optimizer.param_groups[0]["params"]
    params[:] = [p for p in params if p is not model.first.weight]
    before = model.first.weight.detach().clone()
    model(torch.ones(1, 64)).sum().backward()
    assert torch.equal(model.first.weight, before)
    assert model.first.weight.grad is not None
    assert model.last.weight.grad is None


def test_accumulation_is_refused() -> None:
    model = made()
    optimizer = dracopt_ext.SGD(model.named_parameters(), lr=0.1)
    optimizer.release_gradients()
    model(torch.ones(1, 64)).sum().backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"'last.*gets a second gradient since the last step.*cannot accumulate"):
        model(torch.ones(1, 64)).sum().backward()
    assert_same_bits(snapshot(optimizer), before)
    optimizer.step()
    optimizer.zero_grad()
    model(torch.ones(1, 64)).sum().backward()


def test_clipping_is_refused() -> None:
    model = made()
    optimizer = dracopt_ext.SGD(model.parameters(), lr=0.1, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="global norm"):
        optimizer.release_gradients()
    optimizer.max_grad_norm = None
    optimizer.release_gradients()
    with pytest.raises(ValueError, match="global norm"):
        optimizer.max_grad_norm = 1.0
    with pytest.raises(ValueError, match="error_if_nonfinite need their global norm"):
        optimizer.error_if_nonfinite = True
    assert optimizer.max_grad_norm is None
    assert not optimizer.error_if_nonfinite


def test_grad_scaler_is_refused() -> None:
    model = made()
    optimizer = dracopt_ext.AdamW(model.parameters(), fused=True)
    optimizer.release_gradients()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 64)).sum()).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)


def test_errors_name_the_parameter() -> None:
    model = made()
    optimizer = dracopt_ext.AdamW(model.named_parameters())
    optimizer.release_gradients()
    optimizer.state[model.last.bias] = {"step": torch.zeros(()), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    with pytest.raises(ValueError, match=r"gradient release of .*'last\.bias'"):
        model(torch.ones(1, 64)).sum().backward()


def test_methods_that_only_torch_calls_are_refused() -> None:
    class Own(dracopt_ext.AdamW):
        def _init_group(self, *args: Any) -> Any:
            return super()._init_group(*args)

    with pytest.raises(RuntimeError, match="Own overrides _init_group"):
        Own(made().parameters()).release_gradients()


def test_a_refusal_changes_nothing() -> None:
    model = made()
    optimizer = dracopt_ext.SGD(model.parameters(), lr=0.1)
    optimizer.release_gradients()
    model.unused.grad = torch.ones(3)
    with pytest.raises(ValueError, match="has a gradient already"):
        optimizer.release_gradients()
    model(torch.ones(1, 64)).sum().backward()
    assert model.first.weight.grad is None


def test_optimizer_that_is_gone() -> None:
    """A notebook's cell that runs again makes another optimizer."""
    model = made()
    for lr in (1.0, 0.0):
        optimizer = dracopt_ext.SGD(model.parameters(), lr=lr)
        optimizer.release_gradients()
        gc.collect()
    before = model.first.weight.detach().clone()
    model(torch.ones(1, 64)).sum().backward()
    assert torch.equal(model.first.weight, before)
    assert model.first.weight.grad is None
    kept = dracopt_ext.SGD(model.parameters(), lr=1.0)
    kept.release_gradients()
    optimizer.step()
    with pytest.raises(RuntimeError, match="another optimizer has released"):
        model(torch.ones(1, 64)).sum().backward()


def test_closures_and_copies() -> None:
    model = made()
    optimizer = dracopt_ext.AdamW(model.parameters())
    optimizer.release_gradients()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(torch.ones(1, 64)).sum()
        loss.backward()
        return loss

    for _ in range(3):
        assert optimizer.step(closure).item() != 0
    assert {int(s["step"]) for s in optimizer.state.values()} == {3}
    assert copy.deepcopy(optimizer)._dracopt_context.release is None


def test_several_threads() -> None:
    """Backwards of two threads step one optimizer in turn."""
    models = [nn.Linear(200, 200) for _ in range(4)]
    optimizer = dracopt_ext.AdamW([p for model in models for p in model.parameters()])
    optimizer.release_gradients()
    threads = [threading.Thread(target=lambda m=m: m(torch.ones(2, 200)).sum().backward()) for m in models]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(optimizer.state) == 8
    assert all(p.grad is None for model in models for p in model.parameters())


def release_in_processes() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    found = []
    for releases in (True, False):
        model = made()
        for layer in (model.first, model.twice):
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = dracopt_ext.AdamW(model.parameters(), lr=0.1)
        if releases:
            optimizer.release_gradients()
        for step in range(3):
            optimizer.zero_grad()
            model(torch.full((2, 64), 1.0 + step + torch.distributed.get_rank())).square().mean().backward()
            if releases:
                assert all(p.grad is None for p in model.parameters())
            optimizer.step()
        found.append([p.detach().full_tensor() for p in model.parameters()])  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][1], made().first.weight)
    plain = made()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        dracopt_ext.AdamW(DistributedDataParallel(plain).parameters()).release_gradients()


def test_several_processes(tmp_path: Path) -> None:
    """FSDP2 calls the hooks when a gradient is complete, and DDP before."""
    in_processes(2, tmp_path, release_in_processes)


PEAK = r"""
import re, sys, torch, dracopt_ext

def peak():  # getrusage would count what the parent process had
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024

torch.set_num_threads(1)
model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(40)))
optimizer = dracopt_ext.SGD(model.parameters(), lr=1e-3)
if sys.argv[1] == "release":
    optimizer.release_gradients()
before = peak()
for _ in range(2):
    optimizer.zero_grad()
    model(torch.randn(4, 1024)).sum().backward()
    optimizer.step()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts kilobytes as Linux does")
def test_peak_memory() -> None:
    """160 MB of gradients are not there."""
    peaks = []
    for way in ("release", "keep"):
        run = subprocess.run(
            [sys.executable, "-c", PEAK, way],
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(float(run.stdout))
    assert peaks[0] < peaks[1] - 120, peaks
