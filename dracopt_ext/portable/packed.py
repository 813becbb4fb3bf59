"""Packs the words that every launch takes, of compiled or of Triton kernels, and says what each word means.

There are two arrays of 64-bit words. The table holds what stays the same from step to step. The arguments hold what is
new in each step.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from .rules import Rule

MAX_STATES = 3
MAX_STATE_SCALARS = 2
DTYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}

TILE = 8192  # elements that one program on a GPU updates

# The table: rows, then layouts, then a counter of finished programs.
ROW = NUMEL, FIRST_TILE, LAYOUT, FLAGS, STATE_SCALARS, PARAM, STATES = 0, 1, 2, 3, 4, 6, 7
ROW_WORDS = 7 + MAX_STATES
"""A row holds the number of elements, its first tile's number, its layout's place (0 if every stream is dense), flags,
and addresses: of the state scalars (0 for those on the host), the parameter and the states (0 for missing ones).

A layout holds the number of dimensions, their sizes, and their strides for each stream (parameter, gradient, states).
"""
MAXIMIZE, STATE_SCALAR_FP32 = 1, 2  # flags; the second is for the first state scalar, the next bit for the second

# The arguments: a header, a pair of words for each row (its gradient's address, its recipe's place), then recipes.
HEADER = FOUND_INF, GRAD_SCALE, DIVISOR, FINISHED, COUNT, PROGRAMS = 0, 1, 2, 3, 4, 5
HEADER_WORDS = 6
"""The header holds the addresses of GradScaler's two numbers (0 if there are none), the divisor of gradients (used if
the second address is 0), the address of a counter of finished programs (0 if no state scalar lies on the device), the
number of rows and the number of programs.

A recipe holds what scalars are prepared from: flags, the hyperparameters and the host's state scalars. Each number is
the bits of an fp64 number, or an address. A prepared recipe holds flags and the scalars themselves, as in csrc/rules.
"""
RECIPE_FLAGS = FP32_ADDRESS, FP64_ADDRESS, FIRST, PREPARED = 0, 16, 32, 33  # bits; the first two are for number 0


def number_bits(*numbers: float) -> tuple[int, ...]:
    """Returns numbers as words: the bits of fp64 numbers."""
    return struct.unpack(f"<{len(numbers)}q", struct.pack(f"<{len(numbers)}d", *numbers))


class PackedLaunch:
    """The tensors that one launch updates: tensors of one device whose streams are stored alike."""

    def __init__(self, rule: Rule, device: torch.device, dtypes: tuple[str, ...]) -> None:
        self.rule = rule
        self.device = device
        self.dtypes = dtypes
        """The dtypes of the parameter, the gradient and the states, named as in :data:`DTYPES`."""
        self.counts_steps = False  # whether a state scalar lies on the device
        self._rows: list[list[int]] = []
        self._layouts: list[tuple[int, list[int]]] = []  # each with the index of its row
        self._programs = 0

    def add(
        self, numel: int, layout: list[int] | None, maximize: bool, state_scalars: list[Tensor], streams: list[int]
    ) -> None:
        """Appends a tensor.

        Args:
            numel: the number of real numbers.
            layout: the words of the layout; None if every stream is dense.
            maximize: whether to negate the gradient.
            state_scalars: the scalars of the state, on the device or on the CPU.
            streams: addresses of the parameter and its states.
        """
        flags = MAXIMIZE * maximize
        addresses = [0] * MAX_STATE_SCALARS
        for k, scalar in enumerate(state_scalars):
            flags |= (scalar.dtype == torch.float32) * STATE_SCALAR_FP32 << k
            if scalar.device.type != "cpu":
                self.counts_steps = True
                addresses[k] = scalar.data_ptr()
        streams = streams + [0] * (1 + MAX_STATES - len(streams))
        if layout is not None:
            self._layouts.append((len(self._rows), layout))
        self._rows.append([numel, self._programs, 0, flags, *addresses, *streams])
        # An empty tensor has a tile too, because a launch needs a program that counts its step.
        self._programs += max(1, -(-numel // TILE))

    def table(self) -> list[int]:
        words = [word for row in self._rows for word in row]
        for row, layout in self._layouts:
            words[row * ROW_WORDS + LAYOUT] = len(words)
            words += layout
        return [*words, 0]

    def arguments(
        self, gradients: list[int], recipes: list[tuple[int, ...]], divisor: float, scaler: list[int], finished: int
    ) -> list[int]:
        """Returns the argument words of a step.

        Args:
            gradients: the address of each tensor's gradient.
            recipes: each tensor's recipe; equal ones are written once.
            divisor: the number by which gradients are divided.
            scaler: addresses of GradScaler's numbers, 0 if there are none.
            finished: address of the table's last word, if the device counts steps.
        """
        places: dict[tuple[int, ...], int] = {}
        place = HEADER_WORDS + 2 * len(gradients)
        pairs: list[int] = []
        for gradient, recipe in zip(gradients, recipes, strict=True):
            if recipe not in places:
                places[recipe] = place
                place += len(recipe)
            pairs += (gradient, places[recipe])
        header = [*scaler, *number_bits(divisor), finished, len(self._rows), self._programs]
        return [*header, *pairs, *(word for recipe in places for word in recipe)]

    def launch(
        self,
        gradients: list[int],
        recipes: list[tuple[int, ...]],
        divisor: float,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> list[Any]:
        """Updates the tensors.

        Returns the objects that the kernel refers to. They must live as long as a graph that captures this launch.
        """
        raise NotImplementedError

    @property
    def is_loaded(self) -> bool:
        """Says whether the kernel is on the device. It cannot be loaded there while a graph is captured."""
        return True
