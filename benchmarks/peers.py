"""The optimizers that are compared, each at its best setting."""

from __future__ import annotations

import atexit
import contextlib
import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import dracopt_ext

from .cases import CLIP, CLIP_AND_STEP, STEP, STEP_AND_ZERO, UNSCALE_CLIP_AND_STEP, Case, Shape, moments_of

Groups = list[dict[str, Any]]
Make = Callable[[Case, Groups], torch.optim.Optimizer]

OURS = {
    **dict.fromkeys(("dracopt", "dracopt plain", "dracopt step", "dracopt nearest", "dracopt sibling"), "native"),
    "dracopt triton": "triton",
}
"""Our optimizers, with their backends."""
SLOW = {"torch foreach", "torch for-loop"}
"""Peers that take only every fourth round if a case is large."""


def make_groups(case: Case, device: str) -> Groups:
    """Makes new parameters with gradients, whose values are the same in each call."""
    generator = torch.Generator(device).manual_seed(0)
    storage = case.storage

    def tensor(shape: Shape, dtype: str, layout: str = "contiguous") -> torch.Tensor:
        found = torch.randn(shape, generator=generator, device=device).to(getattr(torch, dtype))
        if storage.distributed:
            return distributed(found)
        if storage.layout == "channels_last" and len(shape) == 4:
            return found.to(memory_format=torch.channels_last)
        if layout == "transposed gradient":
            return found.mT.contiguous().mT
        return found[:1].expand(shape) if layout == "expanded gradient" else found

    params = [torch.nn.Parameter(tensor(shape, storage.param)) for shape in case.shapes]
    for p in params:
        p.grad = tensor(tuple(p.shape), storage.grad, storage.layout)
        if case.zero_gradients:
            p.grad.zero_()
    lr, size = case.options["lr"], len(params) // case.groups
    return [{"params": params[i : i + size], "lr": lr * (1 + i / len(params))} for i in range(0, len(params), size)]


def distributed(tensor: torch.Tensor) -> torch.Tensor:
    """Makes a DTensor whose only shard is in this process."""
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(tensor, _mesh(), [Shard(0)], run_check=False)


@functools.cache
def _mesh() -> Any:
    store = torch._C._distributed_c10d.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    atexit.register(torch.distributed.destroy_process_group)
    return torch.distributed.device_mesh.init_device_mesh("cpu", (1,))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor that holds a tensor's elements in this process."""
    found: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return found


def _dracopt(backend: str | None = None) -> Make:
    def make(case: Case, groups: Groups) -> torch.optim.Optimizer:
        state_dtype = None if case.storage.state == case.storage.param else getattr(torch, case.storage.state)
        options = {**case.options, **case.precision, **({"fused": True} if case.tail == UNSCALE_CLIP_AND_STEP else {})}
        optimizer: torch.optim.Optimizer = getattr(dracopt_ext, case.optimizer)(
            groups, **options, state_dtype=state_dtype, backend=backend
        )
        return optimizer

    return make


def _sibling(case: Case, groups: Groups) -> torch.optim.Optimizer:
    """Makes our SGD with momentum, or our AdamW: whichever has as many moments as the case's class."""
    name, options = {1: ("SGD", {"momentum": 0.9}), 2: ("AdamW", {})}[moments_of(case.optimizer)]
    return _dracopt()(replace(case, optimizer=name, options={"lr": case.options["lr"], **options}), groups)


class ForeachLion(torch.optim.Optimizer):
    """Lion in torch's operations on lists of tensors."""

    def __init__(self, params: Groups, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.99)})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            params, lr, (beta1, beta2) = group["params"], group["lr"], group["betas"]
            grads = [p.grad for p in params]
            averages = [self.state[p]["exp_avg"] for p in params]
            signs = torch._foreach_mul(averages, beta1)
            torch._foreach_add_(signs, grads, alpha=1 - beta1)
            torch._foreach_sign_(signs)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, signs, alpha=-lr)
            torch._foreach_mul_(averages, beta2)
            torch._foreach_add_(averages, grads, alpha=1 - beta2)


FOREACH: dict[str, Any] = {"Lion": ForeachLion}
"""Optimizers that torch.optim lacks, in torch's operations on lists of tensors."""


def _torch(**implementation: bool) -> Make:
    def make(case: Case, groups: Groups) -> torch.optim.Optimizer:
        options = case.options if case.optimizer in FOREACH else {**case.options, **implementation}
        maker = FOREACH.get(case.optimizer) or getattr(torch.optim, case.optimizer)
        optimizer: torch.optim.Optimizer = maker(groups, **options)
        return optimizer

    return make


def _deepspeed(case: Case, groups: Groups) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, **case.options, adamw_mode=case.optimizer == "AdamW")
    return optimizer


def _stream(case: Case, groups: Groups) -> torch.optim.Optimizer:
    from .stream import Stream

    return Stream(case, groups)


PEERS: dict[str, Make] = {
    "dracopt": _dracopt(),
    "dracopt triton": _dracopt("triton"),
    "dracopt plain": _dracopt(),  # on contiguous fp32 tensors; see measure.Stepped
    "dracopt step": _dracopt(),  # only step(), whatever the case times
    "dracopt nearest": lambda case, groups: _dracopt()(replace(case, precision={}), groups),  # rounds to nearest
    "dracopt sibling": _sibling,
    "torch fused": _torch(fused=True),
    "torch foreach": _torch(foreach=True),
    "torch for-loop": _torch(foreach=False, fused=False),
    "DeepSpeed CPUAdam": _deepspeed,
    "stream": _stream,
}

BANDWIDTHS = {"stream"}
"""Peers that only move bytes, as many as the optimizer must."""


def work_of(peer: str, case: Case, optimizer: Any) -> Callable[[], object]:
    """Returns the function that does the work of a case with an optimizer, each library in its best way."""
    if case.tail == STEP or peer == "dracopt step":
        return optimizer.step  # type: ignore[no-any-return]
    ours = peer in OURS
    if case.tail == STEP_AND_ZERO:
        if ours:
            return lambda: optimizer.step(zero_grad=True)
        return lambda: (optimizer.step(), optimizer.zero_grad(set_to_none=False))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norm: Any = torch.nn.utils.get_total_norm([p.grad for p in params])
    largest = getattr(norm, "full_tensor", lambda: norm)().item() / 2
    if case.tail == CLIP:
        clip = dracopt_ext.clip_grad_norm_ if ours else torch.nn.utils.clip_grad_norm_
        return lambda: clip(params, largest, foreach=None if ours else True)
    if ours:
        optimizer.max_grad_norm = largest
    if case.tail == CLIP_AND_STEP:
        if ours:
            return optimizer.step  # type: ignore[no-any-return]
        return lambda: (torch.nn.utils.clip_grad_norm_(params, largest, foreach=True), optimizer.step())
    scaler = (dracopt_ext.GradScaler if ours else torch.amp.GradScaler)(params[0].device.type, init_scale=1.0)
    scaler.scale(torch.zeros((), device=params[0].device))

    def train() -> None:
        if not ours:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, largest, foreach=True)
        scaler.step(optimizer)
        scaler.update()

    return train


def runs(peer: str, case: Case) -> bool:
    if peer == "torch foreach":
        return case.optimizer in FOREACH or hasattr(torch.optim, case.optimizer)
    return peer != "DeepSpeed CPUAdam" or case.optimizer in ("Adam", "AdamW")


def deepspeed_missing() -> str | None:
    """Says why DeepSpeed's optimizer cannot run here; None if it can."""
    # DeepSpeed compiles its kernel when the first optimizer is made, and prints to stdout, where our table goes.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            from deepspeed.ops.adam import DeepSpeedCPUAdam
        except ImportError as error:
            return f"not installed ({error})"
        try:
            DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(1))])
        except Exception as error:
            return f"its kernel does not compile or load ({str(error).splitlines()[0]})"
    return None


def require_ours(optimizers: dict[str, torch.optim.Optimizer], device: str) -> None:
    """Raises unless the last step of each of our optimizers ran in the kernels of its backend and nowhere else."""
    for name in OURS.keys() & optimizers.keys():
        ran = getattr(optimizers[name], "last_backend", None)
        if ran != {device: frozenset({OURS[name]})}:
            raise RuntimeError(f"{name} was to be measured with its {OURS[name]} kernels, but {ran} ran")


def require_equal_work(optimizers: dict[str, torch.optim.Optimizer], case: Case) -> None:
    """Raises unless all optimizers arrived at the same parameters after as many steps."""
    # Classes that torch lacks may have no baseline, and one that rounds in another way goes another way.
    if case.baseline is None or not runs(case.baseline, case) or case.baseline == "dracopt nearest":
        return
    expected = _params(optimizers[case.baseline])
    # In bf16 torch's foreach rounds after each operation, while ours rounds once.
    exact = case.storage.param == "float32"
    # torch adds the squares of one tensor of 64M in fp32, and finds a norm that is too small by half a percent.
    rtol, atol = (0.03, 0.01) if not exact else (1e-5, 1e-6) if case.tail == STEP else (1e-4, 1e-4)
    for name, optimizer in optimizers.items():
        if name in ("dracopt plain", "dracopt step", "dracopt sibling") or name in BANDWIDTHS:
            continue
        for ours, theirs in zip(_params(optimizer), expected, strict=True):
            if not torch.allclose(ours, theirs, rtol=rtol, atol=atol):
                raise RuntimeError(f"{name} computes something else than {case.baseline}")


def _params(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [local(p) for group in optimizer.param_groups for p in group["params"]]
