"""Finds out where torch keeps what its stable C interface does not tell: key sets, gradients, versions, lazy clones.

The module for any torch (csrc/bindings/tensor_of_any_torch.h) reads these facts in torch's objects. Each place is found
by value: there, and nowhere else, all of many different tensors hold what torch's own functions say of them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import devices

WORD = 8
"""The bytes of a word. All places are whole words."""
TENSOR_IMPL, PART = 208, 64
"""The bytes that are searched of a TensorImpl, which holds a tensor's facts, and of an object to which it points."""

T = TypeVar("T")


class UnknownTorchError(ImportError):
    """Raised if a place is not certain. The message says which one."""


class _Memory:
    """The memory of this process."""

    def __init__(self) -> None:
        self._file = os.open("/proc/self/mem", os.O_RDONLY)

    def close(self) -> None:
        os.close(self._file)

    def words(self, address: int, size: int) -> tuple[int, ...]:
        """Reads words. Returns none where there is no memory, because a file cannot crash."""
        try:
            return struct.unpack(f"<{size // WORD}Q", os.pread(self._file, size, address))
        except (OSError, OverflowError, struct.error):
            return ()

    def word(self, address: int) -> int:
        return self.words(address, WORD)[0]

    def places(self, value: int, address: int, size: int) -> set[int]:
        """Returns the offsets at which a value lies."""
        return {WORD * i for i, word in enumerate(self.words(address, size)) if word == value}

    def places_in_parts(self, tensor: Tensor, is_value: Callable[[int], bool]) -> set[tuple[int, int]]:
        """Returns where a TensorImpl's pointers lead to a value: the pointer's offset, and the value's offset there."""
        return {
            (WORD * i, WORD * k)
            for i, pointer in enumerate(self.words(tensor._cdata, TENSOR_IMPL))
            for k, word in enumerate(self.words(pointer, PART))
            if is_value(word)
        }


def find_places() -> dict[str, Any]:
    """Returns what ``set_places`` of the module for any torch takes.

    Raises:
        UnknownTorchError: some place is not certain.
    """
    # A new thread is in no mode of torch, whatever the program has switched on before the import.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_search).result()


def _search() -> dict[str, Any]:
    memory = None
    try:
        memory = _Memory()
        facts = (_facts_of_tensors(memory), _gradients(memory), _versions(memory), _lazy_clones(memory))
        return {name: value for found in (*facts, _keys(), _objects()) for name, value in found.items()}
    except UnknownTorchError:
        raise
    except Exception as error:  # a torch of the future may refuse in any way
        raise UnknownTorchError(f"{type(error).__name__}: {error}".split("\n")[0]) from None
    finally:
        if memory is not None:
            memory.close()


def _only(what: str, found: Iterable[set[T]]) -> T:
    """Returns the one place that all of these sets have in common."""
    common = set.intersection(*found)
    if len(common) != 1:
        raise UnknownTorchError(f"torch {torch.__version__} keeps its {what} in {len(common)} known places")
    return common.pop()


def _facts_of_tensors(memory: _Memory) -> dict[str, int]:
    tensors = _tensors()
    objects = (memory.places(t._cdata, id(t), type(t).__basicsize__) for t in tensors)
    keys = (memory.places(torch._C._dispatch_keys(t).raw_repr(), t._cdata, TENSOR_IMPL) for t in tensors)
    pythons = (memory.places(id(t), t._cdata, TENSOR_IMPL) for t in tensors)
    dense = (t for t in tensors if t.layout is torch.strided)
    storages = (memory.places(t.untyped_storage()._cdata, t._cdata, TENSOR_IMPL) for t in dense)
    return {
        "tensor": _only("tensors", objects),
        "keys": _only("key sets", keys),
        "object": _only("Python objects", pythons),
        "storage": _only("storages", storages),
    }


def _tensors() -> list[Tensor]:
    """Returns tensors with different key sets."""
    plain = torch.ones(3, device="cpu")
    with torch.inference_mode():
        of_inference = torch.ones(5, device="cpu")
    return [
        plain,
        torch.empty(0, device="cpu"),
        torch.nn.Parameter(torch.ones(2, 2, device="cpu")),
        torch.ones(2, device="cpu", dtype=torch.complex64).conj(),
        torch._neg_view(plain),
        of_inference,
        plain.to_sparse(),
        torch.empty(4, device="meta"),
    ]


def _gradients(memory: _Memory) -> dict[str, int]:
    tensors = [torch.nn.Parameter(torch.ones(size, device="cpu")) for size in range(1, 6)]
    found = []
    for p in tensors:
        p.grad = torch.ones_like(p)
        address = p.grad._cdata
        found.append(memory.places_in_parts(p, lambda word, address=address: word == address))  # type: ignore[misc]
    autograd, grad = _only("gradients", found)
    without = [torch.empty(size, device="cpu", requires_grad=True) for size in (1, 2, 3)]
    undefined = {memory.word(memory.word(p._cdata + autograd) + grad) for p in without}
    return {"autograd": autograd, "grad": grad, "undefined": _only("missing gradients", [undefined])}


def _versions(memory: _Memory) -> dict[str, int]:
    found = []
    for number, size in enumerate((1, 7, 100, 3000)):
        tensor = torch.ones(size, device="cpu", requires_grad=number == 1)
        for _ in range(41 + 5 * number):
            torch._C._increment_version([tensor])
        count = tensor._version  # 32 bits
        found.append(memory.places_in_parts(tensor, lambda word, count=count: word % 2**32 == count))  # type: ignore[misc]
    version, count = _only("versions", found)
    return {"version": version, "count": count}


def _lazy_clones(memory: _Memory) -> dict[str, int]:
    """Finds the function that frees a storage. All lazy clones have one function, and all plain tensors another one."""
    plain, cloned = ([torch.ones(size, device="cpu") for size in (1, 50, 3000)] for _ in range(2))
    lazy = [*cloned, *map(torch._lazy_clone, cloned)]  # the originals are lazy now, too
    columns = (
        zip(*(memory.words(t.untyped_storage()._cdata, PART) for t in tensors), strict=True)
        for tensors in (lazy, plain)
    )
    found = {
        (WORD * k, of_lazy[0])
        for k, (of_lazy, of_plain) in enumerate(zip(*columns, strict=True))
        if len({*of_lazy}) == len({*of_plain}) == 1 and of_lazy[0] != of_plain[0]
        if memory.words(of_lazy[0], WORD) and memory.words(of_plain[0], WORD)
    }
    deleter, lazy_deleter = _only("marks of lazy clones", [found])
    return {"deleter": deleter, "lazy_deleter": lazy_deleter}


def _keys() -> dict[str, int]:
    gpu = "CUDA" if devices.GPU == "cuda" else "PrivateUse1"
    names = {
        "cpu": ["CPU"],
        "cpu_keys": ["CPU", "AutogradCPU", "AutocastCPU"],
        "gpu": [gpu],
        "gpu_keys": [gpu, f"Autograd{gpu}", f"Autocast{gpu}"],
        "python": ["Python"],
        "conjugated": ["Conjugate"],
        "in_place": ["ADInplaceOrView"],
    }
    found = dict.fromkeys(names, 0)
    for name, keys in names.items():
        for key in keys:
            parsed: Any = torch._C._parse_dispatch_key(key)
            found[name] |= torch._C.DispatchKeySet(parsed).raw_repr()
    plain = torch._C._dispatch_keys(torch.empty(0, device="cpu")).raw_repr()
    if plain != found["cpu_keys"] | found["in_place"]:
        raise UnknownTorchError(f"torch {torch.__version__} has other keys for plain tensors")
    return found


def _objects() -> dict[str, Any]:
    return {
        "type": Tensor,
        "parameter": torch.nn.Parameter,
        "in_inference_mode": torch.is_inference_mode_enabled,
        "mode_count": torch._C._len_torch_dispatch_stack,
        "has_key": torch._C._dispatch_tls_is_dispatch_key_included,
        "pre_dispatch": torch._C._parse_dispatch_key("PreDispatch"),
    }
