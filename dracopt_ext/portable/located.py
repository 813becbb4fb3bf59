"""The parameter groups and parameters that a plan finds, and facts about their tensors."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import devices
from ..containers import NotPlainError, is_plain_flag
from ..reference import DECAY_RATES, FLAGS, are_modest
from ..todo import Index
from .layouts import extent_of
from .packed import DTYPES, FP32_ADDRESS, FP64_ADDRESS, number_bits
from .rules import Rule

PLAIN = (Tensor, torch.nn.Parameter)
NATIVE = (*DTYPES, torch.complex64, torch.complex128)
MISALIGNED = "addresses that are no multiples of an element's size"
MAX_STEP = 2.0**53  # a double cannot count beyond this


class Group:
    """A parameter group as this step finds it."""

    def __init__(self, index: int, values: dict[str, Any], rule: Rule) -> None:
        self.index = index
        self.values = values
        if type(values) is not dict or type(values.get("params")) is not list:
            raise NotPlainError
        self.params: list[Tensor] = values["params"]
        self.maximize = _flag(values.get("maximize"))
        self.fused = _flag(values.get("fused"))
        self.capturable = _flag(values.get("capturable"))
        self.unsupported = "differentiable=True" if _flag(values.get("differentiable")) else None
        self.read: list[tuple[int, int]] = []  # address ranges of hyperparameters that are tensors
        self.reads_host = False  # some hyperparameter is a tensor on the CPU
        self.device: torch.device | None = None  # the device of hyperparameters that are tensors on a GPU
        self.numbers: list[float] = []
        self._flags = 0  # the flags of the recipe
        self._addresses: dict[int, int] = {}  # addresses of numbers on the GPU
        for key in rule.group_keys:
            if key not in values:
                raise KeyError(f"{self._name(key)} is missing")
            value = values[key]
            if key in FLAGS:
                self.numbers.append(float(_flag(value)))
            elif key not in DECAY_RATES:
                self._append(key, value, is_decay_rate=False)
            elif type(value) not in (tuple, list):
                raise NotPlainError
            elif len(value) != 2:
                raise ValueError(f"{self._name(key)} must be 2 numbers, not {len(value)}")
            else:
                for number in value:
                    self._append(key, number, is_decay_rate=True)
        words = number_bits(*self.numbers)
        self.recipe = self._flags, *(self._addresses.get(k, word) for k, word in enumerate(words))
        self.is_modest = are_modest(self.hyperparameters(rule).values())
        self.states = rule.states(self.numbers)
        self.facts = (
            *(index, self.states, self.maximize, self.fused, self.capturable, self.unsupported, self.device),
            *self.read,
        )

    def hyperparameters(self, rule: Rule) -> dict[str, Any]:
        """Returns the numbers by their keys."""
        numbers = iter(self.numbers)
        return {key: (next(numbers), next(numbers)) if key in DECAY_RATES else next(numbers) for key in rule.group_keys}

    def _name(self, key: str) -> str:
        return f"param_groups[{self.index}][{key!r}]"

    def _append(self, key: str, number: Any, is_decay_rate: bool) -> None:
        value = number
        if isinstance(number, Tensor):
            value = self._number_in(key, number)
            if value is None:
                return
        if not isinstance(value, (float, int)):
            raise NotPlainError
        try:
            value = float(value)
        except OverflowError:
            raise ValueError(f"{self._name(key)} is too large for a float") from None
        if not math.isfinite(value) or (is_decay_rate and not 0 <= value < 1):
            must = "at least 0 and less than 1" if is_decay_rate else "finite"
            raise ValueError(f"{self._name(key)} is {number!r}; it must be {must}")
        self.numbers.append(value)

    def _number_in(self, key: str, tensor: Tensor) -> float | None:
        """Returns the number if the host reads it, or None if only the kernel or torch does."""
        if type(tensor) in PLAIN and tensor.numel() != 1:
            raise ValueError(f"{self._name(key)} must be a tensor of one element, not of shape {list(tensor.shape)}")
        is_plain = why_not_plain(tensor) is None and tensor.dtype in DTYPES
        if is_plain and lacks_memory(tensor):
            raise ValueError(f"{self._name(key)} is a tensor whose storage was freed")
        if is_plain and tensor.device.type == "cpu":
            self.reads_host = True
            self.read.append(range_of(tensor))
            return tensor.item()
        known_here = self.device in (None, tensor.device) and tensor.dtype in (torch.float32, torch.float64)
        if not is_plain or tensor.device.type != devices.GPU or not known_here or is_misaligned(tensor):
            self.unsupported = "hyperparameters that are tensors on another device or of another dtype"
            self.numbers.append(math.nan)  # only torch reads this number
            return None
        self.read.append(range_of(tensor))
        self.device = tensor.device
        k = len(self.numbers)
        self._flags |= 1 << k + (FP32_ADDRESS if tensor.dtype == torch.float32 else FP64_ADDRESS)
        self._addresses[k] = tensor.data_ptr()
        self.numbers.append(math.nan)  # only the kernel reads this number
        return None


class Located(NamedTuple):
    """A parameter that has a gradient, and what was found in its state."""

    group: Group
    number: int  # the parameter's index in the group
    param: Tensor
    grad: Tensor
    entries: dict[str, Any]  # the parameter's state
    state_scalars: list[Any]  # in the order of the rule's state_scalar_keys, None where missing
    states: list[Any]  # in the order of the rule's state_keys, None where missing

    @property
    def where(self) -> Index:
        return self.group.index, self.number

    @property
    def written(self) -> tuple[Any, ...]:
        """The tensors that a step changes, with None in place of missing ones."""
        return self.param, *self.state_scalars, *self.states

    def describe(self) -> str:
        names = self.group.values.get("param_names")
        name = f"{names[self.number]!r}, " if names else ""
        return f"parameter {self.number} of group {self.group.index} ({name}shape {list(self.param.shape)})"


def lacks_memory(tensor: Tensor) -> bool:
    """Says whether the storage has become too small, as resize_(0) makes it."""
    extent = extent_of(tensor)
    return extent > 0 and (tensor.storage_offset() + extent) * tensor.itemsize > tensor.untyped_storage().nbytes()


def is_misaligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % real(tensor).itemsize != 0


def _flag(value: Any) -> bool:
    if not is_plain_flag(value):
        raise NotPlainError
    return bool(value)


def why_not_plain(tensor: Tensor) -> str | None:
    if type(tensor) not in PLAIN:
        return "tensor subclasses"
    if tensor.layout is not torch.strided:
        return "sparse tensors"
    if tensor.is_conj() or tensor.is_neg() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "lazily transformed tensors"
    return None


Numbers = tuple[float | None, ...]


def numbers_on_host(located: Located) -> Numbers:
    """Returns the state scalars that the host holds, with None in place of the others."""
    return tuple([value.item() if value.is_cpu else None for value in located.state_scalars])


def is_step(number: float | None) -> bool:
    return number is None or (0 <= number < MAX_STEP and number.is_integer())


def range_of(tensor: Tensor) -> tuple[int, int]:
    """Returns the range of addresses that a tensor covers."""
    return tensor.data_ptr(), tensor.data_ptr() + extent_of(tensor) * tensor.itemsize


def real(tensor: Tensor) -> torch.dtype:
    return tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype
