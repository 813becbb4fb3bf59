"""The global norm of gradients, and the functions of ``torch.nn.utils`` that clip them, on the compiled kernels."""

from __future__ import annotations

import functools
import math
import types
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import utils

from . import backend, devices

_Tensors = Tensor | Iterable[Tensor]


def _kernels() -> Any:
    """Returns the compiled module; None if there is none."""
    return backend._C if backend.NATIVE_REASON is None else None


def is_distributed(tensor: Any) -> bool:
    """Says whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def check_finite(norm: Tensor, *, clips: bool = True) -> None:
    """Raises torch's error if the norm is not finite."""
    if norm.isfinite():
        return
    found = "The total norm of order 2.0 for gradients from `parameters` is non-finite"
    if not clips:
        raise RuntimeError(f"{found}. To disable this error, set `error_if_nonfinite=False`")
    raise RuntimeError(
        f"{found}, so it cannot be clipped. To disable this error and scale the gradients by the non-finite norm "
        "anyway, set `error_if_nonfinite=False`"
    )


@torch.no_grad()
def global_norm(gradients: list[Tensor], grad_scale: Tensor | None = None) -> Tensor:
    """Returns the L2 norm of all gradients together, divided by ``grad_scale``.

    The result is a number in fp64. It lies on the gradients' device, and the host does not wait for it. If there are
    several devices, it lies on one of them. Distributed gradients count as wholes: all processes of their mesh must
    call this function, and each gets the same norm.
    """
    return _measure(gradients, grad_scale, of_parameters=False)[0]


def _measure(
    items: list[Tensor], grad_scale: Tensor | None, *, of_parameters: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Returns the norm for a list of gradients, or of parameters, of which those without a gradient do not count.

    Also returns gradients that have, among them, every dtype that occurs, and all that the CPU's kernels do not serve.
    """
    kernels = _kernels()
    total, samples, others = 0.0, [], items
    if kernels is not None:
        total, samples, others = kernels.sum_of_squares(items, of_parameters)
    if of_parameters:
        samples, others = _gradients_of(samples), _gradients_of(others)
    beside = _Others(kernels, others)
    if not samples and beside.are_on_one_gpu:
        return beside.norm_on_gpu(others[0].device, grad_scale), others, others
    device = (samples or others or [torch.zeros(())])[0].device
    parts = beside.sums()
    if parts and device.type != "cpu":
        norm = torch.stack([part.to(device, non_blocking=True) for part in parts]).sum().sqrt()
    else:
        # torch does not round square roots correctly on the CPU.
        root = math.sqrt(sum((part.item() for part in parts), total))
        norm = torch.tensor(root, dtype=torch.float64, device=device)
    return norm if grad_scale is None else norm / grad_scale.to(norm), [*samples, *others], others


def _gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [grad for p in parameters if (grad := p.grad) is not None]


class _Others:
    """Gradients that the CPU's kernels do not serve, sorted by what does."""

    def __init__(self, kernels: Any, gradients: list[Tensor]) -> None:
        self.kernels = kernels
        self.by_device: dict[torch.device, list[Tensor]] = {}
        self.by_spec: dict[int, list[Any]] = {}  # distributed gradients, by the identity of their specs
        self.unusual: list[Tensor] = []
        for gradient in gradients:
            spec = getattr(gradient, "_spec", None)
            if spec is not None and is_distributed(gradient):
                self.by_spec.setdefault(id(spec), []).append(gradient)
            elif gradient.layout == torch.strided and not _has_dispatch_of_its_own(gradient):
                self.by_device.setdefault(gradient.device, []).append(gradient)
            else:
                self.unusual.append(gradient)

    @property
    def are_on_one_gpu(self) -> bool:
        """Says whether one launch can find the norm."""
        if len(self.by_device) != 1 or self.by_spec or self.unusual:
            return False
        (device,) = self.by_device
        return self._has_kernels(device)

    def _has_kernels(self, device: torch.device) -> bool:
        is_gpu = self.kernels is not None and device.type == devices.GPU
        return is_gpu and self.kernels.cuda_unavailable(device.index) is None

    def norm_on_gpu(self, device: torch.device, grad_scale: Tensor | None) -> Tensor:
        norm = torch.zeros((), dtype=torch.float64, device=device)
        scale = grad_scale if grad_scale is None else grad_scale.to(device, torch.float32, non_blocking=True)
        left = self.kernels.measure_on_gpu(self.by_device[device], norm, scale)
        if not left:
            return norm
        others = _norm_by_torch(left)
        return (norm.square() + (others if scale is None else others / scale).square()).sqrt()

    def sums(self) -> list[Tensor]:
        """Returns sums of squares, which together are those of all these gradients."""
        sums = [torch.linalg.vector_norm(gradient, dtype=torch.float64).square() for gradient in self.unusual]
        for device, gradients in self.by_device.items():
            with_kernels = self._has_kernels(device)
            sums.append((self.norm_on_gpu(device, None) if with_kernels else _norm_by_torch(gradients)).square())
        by_mesh: dict[Any, list[Tensor]] = {}
        for gradients in self.by_spec.values():
            wholes = list(map(_without_partial, gradients))
            mesh, placements = wholes[0].device_mesh, wholes[0].placements
            local = by_mesh.setdefault(mesh, [])
            if _counts_here(mesh, sum(placement.is_replicate() << d for d, placement in enumerate(placements))):
                local += [whole._local_tensor for whole in wholes]
        sums += [_add_over(mesh, global_norm(local).square().to(mesh.device_type)) for mesh, local in by_mesh.items()]
        return sums


def add_over_meshes(parts: list[tuple[Any, int, float]]) -> float:
    """Returns a sum over all processes.

    Args:
        parts: meshes, along which of their dimensions the processes hold equal numbers (bit d: dimension d), and sums
            of numbers in this process.
    """
    by_mesh: dict[Any, float] = {}
    for mesh, replicated, part in parts:
        by_mesh[mesh] = by_mesh.get(mesh, 0.0) + (part if _counts_here(mesh, replicated) else 0.0)
    return sum(_add_over(mesh, torch.tensor(part, dtype=torch.float64)).item() for mesh, part in by_mesh.items())


def _norm_by_torch(gradients: list[Tensor]) -> Tensor:
    real = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in gradients]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(real, 2, torch.float64)))
    return norm


def _has_dispatch_of_its_own(tensor: Tensor) -> bool:
    return bool(type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl)


def _without_partial(gradient: Any) -> Any:
    """Returns a distributed gradient whose local tensors are parts of it, and not terms of a sum."""
    placements = gradient.placements
    if not any(placement.is_partial() for placement in placements):
        return gradient
    from torch.distributed.tensor import Replicate

    return gradient.redistribute(placements=[Replicate() if p.is_partial() else p for p in placements])


def _counts_here(mesh: Any, replicated: int) -> bool:
    """Says whether this process counts its part. Of processes with equal parts, the first ones of their rows do."""
    coordinate = mesh.get_coordinate()
    return coordinate is not None and not any(at > 0 and replicated >> d & 1 for d, at in enumerate(coordinate))


def _add_over(mesh: Any, part: Tensor) -> Tensor:
    """Adds the parts of all processes of a mesh, in one collective if these are all processes there are."""
    from torch import distributed

    if mesh.size() == 1 or mesh.get_coordinate() is None:
        return part
    if mesh.size() == distributed.get_world_size():
        distributed.all_reduce(part)
        return part
    for dim in range(mesh.ndim):
        distributed.all_reduce(part, group=mesh.get_group(dim))
    return part


def get_total_norm(
    tensors: _Tensors, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> Tensor:
    """Returns the norm of all tensors together, like :func:`torch.nn.utils.get_total_norm`.

    The L2 norm is computed in fp64, within 10 units of 2^-53, and rounded once. Other norms are torch's.

    Args:
        tensors: a tensor, or tensors of any shapes, dtypes and devices.
        norm_type: p of the p-norm (default 2), or infinity.
        error_if_nonfinite: raise if the norm is not finite (default False).
        foreach: chooses nothing for the L2 norm.

    Returns:
        A tensor of shape ``()`` in the widest dtype of the tensors, on the first one's device; 0.0 in fp32 if there are
        none.

    Raises:
        RuntimeError: the norm is not finite, or a tensor is sparse.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if float(norm_type) != 2.0:
        return utils.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
    return _total_norm(tensors, error_if_nonfinite, of_parameters=False)


@torch.no_grad()
def _total_norm(items: list[Tensor], error_if_nonfinite: bool, *, of_parameters: bool) -> Tensor:
    norm, samples, others = _measure(items, None, of_parameters=of_parameters)
    if not samples:
        return torch.tensor(0.0)
    dtype = functools.reduce(torch.promote_types, {sample.dtype.to_real() for sample in samples})
    norm = norm.to(dtype)
    if error_if_nonfinite:
        check_finite(norm)
    distributed: list[Any] = [gradient for gradient in others if is_distributed(gradient)]
    meshes = {gradient.device_mesh for gradient in distributed}
    if len(meshes) == 1 and len(distributed) == len(samples):
        from torch.distributed.tensor import DTensor, Replicate

        (mesh,) = meshes
        return DTensor.from_local(norm, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return norm


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: _Tensors, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Scales gradients in place by ``max_norm / (total_norm + 1e-6)``, but by 1 at most.

    Like :func:`torch.nn.utils.clip_grads_with_norm_`.

    Args:
        parameters: a parameter, or parameters, of which some may have no gradient.
        max_norm: the largest norm.
        total_norm: the norm of all gradients, of shape ``()``.
        foreach: concerns what the kernels leave to torch (default None).
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    norm: Any = total_norm
    if is_distributed(norm):
        norm = norm.full_tensor()
    kernels = _kernels()
    if kernels is None or not isinstance(norm, Tensor) or not norm.is_cpu:  # a factor on a GPU stays there
        utils.clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
        return
    factor = torch.clamp(float(max_norm) / (norm + 1e-6), max=1.0).item()
    if factor != 1:
        others = _changed(kernels.multiply_gradients, parameters, factor)
        utils.clip_grads_with_norm_(others, max_norm, norm, foreach)


@torch.no_grad()
def clip_grad_norm_(
    parameters: _Tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clips the gradients to a norm of all of them together, in place, and returns the norm before.

    Like :func:`torch.nn.utils.clip_grad_norm_`: :func:`get_total_norm`, then :func:`clip_grads_with_norm_`. The
    arguments are theirs.

    Returns:
        The norm, as from :func:`get_total_norm`. Its dtype is the widest of the gradients'.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is true, or a gradient is sparse. No gradient
            has changed then.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    else:
        is_generator = isinstance(parameters, types.GeneratorType)
        parameters = list(parameters)
        if is_generator and not parameters:
            warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    if float(norm_type) != 2.0:
        return utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    norm = _total_norm(parameters, error_if_nonfinite, of_parameters=True)
    clip_grads_with_norm_(parameters, max_norm, norm, foreach)
    return norm


@torch.no_grad()
def clip_grad_value_(parameters: _Tensors, clip_value: float, foreach: bool | None = None) -> None:
    """Limits each element of the gradients to ``[-clip_value, clip_value]``, in place.

    Like :func:`torch.nn.utils.clip_grad_value_`.

    Args:
        parameters: a parameter, or parameters, of which some may have no gradient.
        clip_value: the largest absolute value of an element.
        foreach: concerns what the kernels leave to torch (default None).
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    others, kernels, most = parameters, _kernels(), float(clip_value)
    if kernels is not None and most == most and not any(map(_refuses_limits, parameters)):
        others = _changed(kernels.limit_gradients, parameters, most)
    if others:
        utils.clip_grad_value_(others, clip_value, foreach)


@torch.no_grad()
def zero_gradients(parameters: list[Tensor]) -> None:
    """Sets all elements of the gradients to zero, in place. Gradients with a graph are detached, as in torch."""
    for grad in [grad for p in parameters if (grad := p.grad) is not None and grad.requires_grad]:
        grad.requires_grad_(False) if grad.grad_fn is None else grad.detach_()
    others, kernels = parameters, _kernels()
    if kernels is not None:
        others = _changed(kernels.zero_gradients, parameters)
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in _gradients_of(others):
        if gradient.is_sparse:
            gradient.zero_()
        else:
            by_kind.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for gradients in by_kind.values():
        torch._foreach_zero_(gradients)


def _refuses_limits(p: Tensor) -> bool:
    """Says whether torch raises for a gradient, before it has changed another."""
    return p.grad is not None and (p.grad.is_complex() or p.grad.layout != torch.strided)


def _changed(change: Any, parameters: list[Tensor], *number: float) -> list[Tensor]:
    """Changes the gradients by a kernel and returns the parameters whose gradients the kernels do not serve."""
    others: list[Tensor] = change(parameters, True, *number)
    left = [p for p in others if not is_distributed(p.grad)]
    distributed: list[Any] = [p for p in others if is_distributed(p.grad)]
    if distributed:
        whole = [p for p in distributed if not any(placement.is_partial() for placement in p.grad.placements)]
        unserved = set(map(id, change([p.grad._local_tensor for p in whole], False, *number)))
        done = {id(p) for p in whole if id(p.grad._local_tensor) not in unserved}
        torch.autograd.graph.increment_version([p.grad for p in whole if id(p) in done])
        left += [p for p in distributed if id(p) not in done]
    return left
