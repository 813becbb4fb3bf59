"""One kernel that measures the gradients of a step: the sum of their squares, and what follows from it.

The order of the additions is that of csrc/core/squares.h, and the sum is the one of csrc/core/exact_sum.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import fma, sqrt
from .kernel import (
    AT,
    COUNT,
    FOUND_INF,
    LAYOUT,
    LAYOUT_BYTES,
    NUMEL,
    ROW_BYTES,
    ROWS,
    TILE,
    VECTOR_BYTES,
    WORDS,
    field,
    grad_scale_in,
    load,
    offset_of,
    tile_of,
)

CHUNK, ROW = AT["CHUNK"], AT["CHUNK_ROW"]
DENSE, GRAD_IS_SIMPLE = AT["DENSE"], AT["GRAD_IS_SIMPLE"]
NORM, NORM_OUT, MAX_NORM = AT["NORM"], AT["NORM_OUT"], AT["MAX_NORM"]
BLOCKS_IN_ALL, CHECKS = AT["BLOCKS_IN_ALL"], AT["CHECKS"]
SUMS, SUM_BYTES, DIGITS = AT["SUMS"], AT["SUM_BYTES"], AT["DIGITS"]
NORM_COEFFICIENT, NORM_FINISHED = AT["NORM_COEFFICIENT"], AT["NORM_FINISHED"]
INFINITE, NAN, OTHER = DIGITS, tl.constexpr(DIGITS.value + 1), tl.constexpr(DIGITS.value + 2)


@triton.jit
def sum_of_chunk(address, begin, numel, layout, simple, grad: tl.constexpr, lanes: tl.constexpr):
    """Returns the sum of the squares in a chunk, and whether all its numbers are finite."""
    sums = tl.zeros((ROW,), tl.float64)
    finite = True
    for row in tl.static_range(CHUNK // ROW):
        elements = begin + row * ROW + tl.arange(0, ROW)
        places = elements
        if lanes == 1 and not simple:
            places = offset_of(layout, 1, elements)
        x = load(address, places, elements < numel, grad, lanes, tl.float64)
        if grad == "fp64":
            sums = fma(x, x, sums)
            # The squares of 64-bit numbers may be infinite where the numbers are not.
            finite = finite & (tl.min((x - x == 0).to(tl.int32), 0) != 0)
        else:
            sums += x * x  # the product is exact
    for level in tl.static_range(8):
        sums = tl.sum(tl.reshape(sums, (ROW >> (level + 1), 2)), 1)
    total = tl.sum(sums, 0)
    if grad != "fp64":
        finite = total - total == 0
    return total, finite


@triton.jit
def add_to(words, word, value):
    tl.atomic_add((words + 8 * word).to(tl.pointer_type(tl.int64)), value)


@triton.jit
def add_exactly(words, x):
    """Adds a number that is not negative to an ExactSum."""
    bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    exponent = bits >> 52
    fraction = bits & 0xFFFFFFFFFFFFF
    one = bits * 0 + 1
    if exponent == 2047:
        add_to(words, tl.where(fraction == 0, INFINITE, NAN), one)
    else:
        mantissa = tl.where(exponent == 0, fraction, fraction | 0x10000000000000)
        place = tl.maximum(exponent - 1, 0)
        digit = place // 32
        shift = place % 32
        rest = mantissa >> (32 - shift)
        add_to(words, digit, (mantissa << shift) & 0xFFFFFFFF)
        add_to(words, digit + 1, rest & 0xFFFFFFFF)
        add_to(words, digit + 2, rest >> 32)


@triton.jit
def word_of(norm, word):
    """Returns one word of all sums together."""
    total = field(norm, NORM_FINISHED, tl.int32).to(tl.int64) * 0
    for k in tl.static_range(SUMS):
        total += tl.load((norm + k * SUM_BYTES + 8 * word).to(tl.pointer_type(tl.int64)), volatile=True)
    return total


@triton.jit
def power_of_two(n):
    return ((n + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def rounded(norm):
    """Returns the sum, rounded once. See csrc/core/exact_sum.h."""
    carry = word_of(norm, INFINITE)
    infinite = carry
    carry = carry * 0
    top, high, middle, low = carry, carry, carry, carry
    one_below, two_below, below, sticky = carry, carry, carry, carry
    for k in range(DIGITS + 2):
        if k < DIGITS:
            carry += word_of(norm, k)
        digit = carry & 0xFFFFFFFF
        carry = carry >> 32
        if digit != 0:
            top = carry * 0 + k
            high, middle, low, sticky = digit, one_below, two_below, below
        below = below | two_below
        two_below = one_below
        one_below = digit
    upper = high.to(tl.uint64) << 32 | middle.to(tl.uint64)
    unit = 32 * (top - 1) - 1074
    if upper != 0:
        while upper >> 63 == 0:
            upper = upper << 1 | (low >> 31 & 1).to(tl.uint64)
            low = low << 1
            unit -= 1
    upper = tl.where((low & 0xFFFFFFFF | sticky) != 0, upper | 1, upper)
    wide = (upper >> 32).to(tl.float64) * 4294967296.0 + (upper & 0xFFFFFFFF).to(tl.float64)
    half = unit // 2
    total = wide * power_of_two(half) * power_of_two(unit - half)
    total = tl.where(infinite != 0, float("inf"), total)
    return tl.where(word_of(norm, NAN) != 0, float("nan"), total)


@triton.jit
def finish(arguments, norm):
    """Derives the norm and the coefficient from the sum of all squares."""
    length = sqrt(rounded(norm)) / grad_scale_in(arguments)
    coefficient = field(arguments, MAX_NORM, tl.float64) / (length + 1e-6)
    coefficient = tl.where(coefficient > 1, coefficient * 0 + 1, coefficient)
    tl.store(field(arguments, NORM_OUT, tl.int64).to(tl.pointer_type(tl.float64)), length)
    tl.store((norm + NORM_COEFFICIENT).to(tl.pointer_type(tl.float64)), coefficient)
    others = word_of(norm, OTHER)
    if (others != 0) & (field(arguments, CHECKS, tl.int16) != 0):
        tl.store(field(arguments, FOUND_INF, tl.int64).to(tl.pointer_type(tl.float32)), 1.0)
    # The sums must be zero in the next step. All threads have read them before one writes.
    tl.debug_barrier()
    for k in range(0, SUMS * SUM_BYTES // 8, ROWS):
        words = k + tl.arange(0, ROWS)
        address = (norm + 8 * words).to(tl.pointer_type(tl.int64))
        tl.store(address, tl.zeros((ROWS,), tl.int64), mask=words < SUMS * SUM_BYTES // 8)


@triton.jit(do_not_specialize=["rows", "layouts", "first_tiles", "arguments"])
def squares_kernel(
    rows: tl.int64,
    layouts: tl.int64,
    first_tiles: tl.int64,
    arguments: tl.int64,
    grad: tl.constexpr,
    LANES: tl.constexpr,  # elements in a vector
):
    program = tl.program_id(0)
    index = tile_of(first_tiles, field(arguments, COUNT, tl.int32), program).to(tl.int64)
    row = rows + index * ROW_BYTES
    numel = field(row, NUMEL, tl.int64)
    layout_number = field(row, LAYOUT, tl.int32).to(tl.int64)  # negative if all streams are dense
    simple = (layout_number < 0) | ((field(row, DENSE, tl.int8) >> GRAD_IS_SIMPLE & 1) != 0)
    layout = layouts + (layout_number + 1) * LAYOUT_BYTES
    address = field(arguments, WORDS + 8 * index, tl.int64)
    norm = field(arguments, NORM, tl.int64)
    words = norm + (program % SUMS).to(tl.int64) * SUM_BYTES
    begin = (program - field(first_tiles, 4 * index, tl.int32)).to(tl.int64) * TILE
    for chunk in range(TILE // CHUNK):
        first = begin + chunk * CHUNK
        if first < numel:
            if simple & (address % VECTOR_BYTES == 0):
                total, finite = sum_of_chunk(address, first, numel, layout, True, grad, LANES)
            else:
                total, finite = sum_of_chunk(address, first, numel, layout, simple, grad, 1)
            add_exactly(words, total)
            if not finite:
                add_to(words, OTHER, first * 0 + 1)
    # The last program to come here sees all additions.
    tl.debug_barrier()
    counter = (norm + NORM_FINISHED).to(tl.pointer_type(tl.int32))
    if tl.atomic_add(counter, 1) == field(arguments, BLOCKS_IN_ALL, tl.int32) - 1:
        tl.store(counter, 0)
        finish(arguments, norm)
