"""The words that a launch is given, whoever makes it: what lies where, and what puts it there.

There are two arrays of 64-bit words. The table holds what stays the same from step to step, the arguments what is new
in each.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from .rules import Rule

MAX_STATES = 3
MAX_CARRIED = 2
DTYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}

TILE = 8192  # elements that a program of a GPU updates

# The table: rows, then layouts, then a counter of finished programs.
ROW = NUMEL, FIRST_TILE, LAYOUT, FLAGS, CARRIED, PARAM, STATES = 0, 1, 2, 3, 4, 6, 7
ROW_WORDS = 7 + MAX_STATES
"""Of a row: elements; its first tile's number; where its layout lies, 0 if every stream is dense; flags; addresses of
the carried scalars, 0 for those on the host; of the parameter; and of the states, 0 where there is none.

A layout: the number of dimensions, their sizes, and for each stream (parameter, gradient, states) their strides.
"""
MAXIMIZE, CARRIED_FP32 = 1, 2  # flags; the second is of the first carried scalar, the third follows

# The arguments: a header, a pair of words for each row (its gradient's address, its recipe's place), then recipes.
HEADER = FOUND_INF, GRAD_SCALE, DIVISOR, FINISHED, COUNT, PROGRAMS = 0, 1, 2, 3, 4, 5
HEADER_WORDS = 6
"""Addresses of GradScaler's numbers, 0 if there are none; what gradients are divided by, if the second is 0; address of
a counter of finished programs, 0 if no carried scalar lies on the device; the number of rows; the number of programs.

A recipe is what scalars are prepared from: flags, the hyperparameters, the carried scalars of the host; each number as
the bits of an fp64 number or as an address. Or it is flags and the scalars themselves, as csrc/rules has them.
"""
RECIPE_FLAGS = FP32_ADDRESS, FP64_ADDRESS, FIRST, PREPARED = 0, 16, 32, 33  # bits; the first two of number 0


def number_bits(*numbers: float) -> tuple[int, ...]:
    """The words in which these are found."""
    return struct.unpack(f"<{len(numbers)}q", struct.pack(f"<{len(numbers)}d", *numbers))


class Launch:
    """The tensors that one launch updates: those of one device whose streams are stored alike."""

    def __init__(self, rule: Rule, device: torch.device, dtypes: tuple[str, ...]) -> None:
        self.rule = rule
        self.device = device
        self.dtypes = dtypes
        """Of the parameter, the gradient and the states, as in :data:`DTYPES`."""
        self.counts_steps = False  # some carried scalar lies on the device
        self._rows: list[list[int]] = []
        self._layouts: list[tuple[int, list[int]]] = []  # with the row
        self._programs = 0

    def add(
        self, numel: int, layout: list[int] | None, maximize: bool, carried: list[Tensor], streams: list[int]
    ) -> None:
        """Append a tensor.

        Args:
            numel: of real numbers.
            layout: its words; None if every stream is dense.
            maximize: whether the gradient is to be negated.
            carried: the scalars of the state, on the device or on the CPU.
            streams: addresses of the parameter and its states.
        """
        flags = MAXIMIZE * maximize
        addresses = [0] * MAX_CARRIED
        for k, scalar in enumerate(carried):
            flags |= (scalar.dtype == torch.float32) * CARRIED_FP32 << k
            if scalar.device.type != "cpu":
                self.counts_steps = True
                addresses[k] = scalar.data_ptr()
        streams = streams + [0] * (1 + MAX_STATES - len(streams))
        if layout is not None:
            self._layouts.append((len(self._rows), layout))
        self._rows.append([numel, self._programs, 0, flags, *addresses, *streams])
        # An empty tensor has a tile, too: a launch must have a program to count its step.
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
        """The words of a step, given the address of each tensor's gradient and its recipe.

        Args:
            gradients: their addresses.
            recipes: one for each; equal ones are written once.
            divisor: what gradients are divided by.
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

    def run(
        self,
        gradients: list[int],
        recipes: list[tuple[int, ...]],
        divisor: float,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> list[Any]:
        """Update the tensors.

        Returns what the kernel refers to, which must live as long as a graph in which this is captured.
        """
        raise NotImplementedError

    @property
    def is_loaded(self) -> bool:
        """Whether the kernel is on the device, which it cannot be brought to while a graph is captured."""
        return True
