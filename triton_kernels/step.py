"""One kernel for a whole step: every tensor of every group whose streams are stored alike.

Its input are the two arrays of words of :mod:`dracopt_ext.portable.words`, which also says what lies where.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dracopt_ext.portable import compiled, words
from dracopt_ext.portable.rules import Rule

from .arithmetic import divisor_of, narrow, power, quotient_by, widen
from .rules import FUNCTIONS

ROWS = tl.constexpr(128)  # of the table that a program moves on at once
WARPS = 4
VECTOR_BYTES = tl.constexpr(16)  # the widest access there is
VECTOR = tl.constexpr(16)  # elements: a multiple of every dtype's in such a vector
ITEMSIZE = {"fp32": 4, "fp64": 8, "bf16": 2, "fp16": 2}

NUMEL, FIRST_TILE, LAYOUT, FLAGS, CARRIED, PARAM, STATES = map(tl.constexpr, words.ROW)
FOUND_INF, GRAD_SCALE, DIVISOR, FINISHED, COUNT, PROGRAMS = map(tl.constexpr, words.HEADER)
FP32_ADDRESS, FP64_ADDRESS, FIRST, PREPARED = map(tl.constexpr, words.RECIPE_FLAGS)
TILE, ROW_WORDS, HEADER_WORDS = map(tl.constexpr, (words.TILE, words.ROW_WORDS, words.HEADER_WORDS))
MAXIMIZE, CARRIED_FP32 = map(tl.constexpr, (words.MAXIMIZE, words.CARRIED_FP32))


@triton.jit
def word(base, at, mask):
    return tl.load(base + at, mask=mask, other=0)


@triton.jit
def number_at(address, is_fp32, is_fp64):
    fp32 = tl.load(address.to(tl.pointer_type(tl.float32)), mask=is_fp32, other=0)
    fp64 = tl.load(address.to(tl.pointer_type(tl.float64)), mask=is_fp64, other=0)
    return tl.where(is_fp32, fp32.to(tl.float64), fp64)


@triton.jit
def tile_of(table, count, program):
    """The row that holds a program's tile: the last one whose first tile is not beyond it."""
    low = count * 0
    high = count
    while high - low > 1:
        middle = low + (high - low) // 2
        beyond = tl.load(table + middle * ROW_WORDS + FIRST_TILE) > program
        low = tl.where(beyond, low, middle)
        high = tl.where(beyond, middle, high)
    return low


@triton.jit
def hyperparameter(recipe, flags, k: tl.constexpr, mask):
    bits = word(recipe, 1 + k, mask)
    is_fp32 = (flags >> FP32_ADDRESS + k & 1) != 0
    is_fp64 = (flags >> FP64_ADDRESS + k & 1) != 0
    stored = number_at(bits, is_fp32, is_fp64)
    return tl.where(is_fp32 | is_fp64, stored, bits.to(tl.float64, bitcast=True))


@triton.jit
def carried_number(recipe, address, is_fp32, at: tl.constexpr, mask):
    on_host = word(recipe, at, mask).to(tl.float64, bitcast=True)
    there = address != 0
    return tl.where(there, number_at(address, there & is_fp32, there & (is_fp32 == 0)), on_host)


@triton.jit
def prepare(row, recipe, mask, rule: tl.constexpr, numbers: tl.constexpr, power: tl.constexpr, T: tl.constexpr):
    """The carried scalars of this step, with their addresses and dtypes, and the step's scalars."""
    flags = word(recipe, 0, mask)
    h0 = hyperparameter(recipe, flags, 0, mask)
    h1 = hyperparameter(recipe, flags, 1, mask)
    h2 = hyperparameter(recipe, flags, 2, mask)
    h3 = hyperparameter(recipe, flags, 3, mask)
    h4 = hyperparameter(recipe, flags, 4, mask)
    if numbers == 7:
        h = (h0, h1, h2, h3, h4, hyperparameter(recipe, flags, 5, mask), hyperparameter(recipe, flags, 6, mask))
    else:
        h = (h0, h1, h2, h3, h4)  # type: ignore[assignment]
    row_flags = word(row, FLAGS, mask)
    addresses = word(row, CARRIED, mask), word(row, CARRIED + 1, mask)
    is_fp32 = (row_flags & CARRIED_FP32) != 0, (row_flags & 2 * CARRIED_FP32) != 0
    carried = (
        carried_number(recipe, addresses[0], is_fp32[0], 1 + numbers, mask),
        carried_number(recipe, addresses[1], is_fp32[1], 2 + numbers, mask),
    )
    carried, scalars = rule(carried, is_fp32, (flags >> FIRST & 1) != 0, h, power, T)
    return carried, scalars, addresses, is_fp32


@triton.jit
def offset_of(layout, stream: tl.constexpr, element):
    """Where elements of a stream lie, in elements from its first."""
    dims = tl.load(layout)
    strides = layout + 1 + (1 + stream) * dims
    offset = element * 0
    d = dims - 1
    while d >= 0:
        size = tl.load(layout + 1 + d)
        offset += element % size * tl.load(strides + d)
        element = element // size
        d -= 1
    return offset


@triton.jit
def pointer_of(address, dtype: tl.constexpr, lanes: tl.constexpr):
    if dtype == "fp32":
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 4 * lanes)
    elif dtype == "fp64":
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.float64)), 8 * lanes)
    elif dtype == "fp16":
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.float16)), 2 * lanes)
    else:
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.uint16)), 2 * lanes)
    return pointer


@triton.jit
def load(address, offsets, mask, dtype: tl.constexpr, lanes: tl.constexpr, T: tl.constexpr):
    if dtype is None:
        x = tl.full(offsets.shape, 0, T)
    else:
        x = widen(tl.load(pointer_of(address, dtype, lanes) + offsets, mask=mask, other=0), dtype, T)
    return x


@triton.jit
def store(address, offsets, x, mask, dtype: tl.constexpr, lanes: tl.constexpr):
    if dtype is not None:
        tl.store(pointer_of(address, dtype, lanes) + offsets, narrow(x, dtype), mask=mask)


@triton.jit
def place(layout, is_strided, stream: tl.constexpr, elements, lanes: tl.constexpr):
    if lanes > 1:
        return elements
    if is_strided:
        elements = offset_of(layout, stream, elements)
    return elements


@triton.jit
def update_block(
    tensor,
    elements,
    limit,
    update: tl.constexpr,
    param: tl.constexpr,
    grad: tl.constexpr,
    state0: tl.constexpr,
    state1: tl.constexpr,
    state2: tl.constexpr,
    lanes: tl.constexpr,  # elements that are accessed at once
    fast: tl.constexpr,
    T: tl.constexpr,
):
    """Updates these elements of a tensor, as far as they are below the limit, and returns True; or does nothing.

    It does nothing where ``fast`` is true and the fast arithmetic is not proved for one of them.
    """
    addresses, layout, is_strided, sign, divisor, scalars = tensor
    at_param, at_grad, at_state0, at_state1, at_state2 = addresses
    states = (at_state0 != 0).to(tl.int32) + (at_state1 != 0).to(tl.int32) + (at_state2 != 0).to(tl.int32)
    mask = elements < limit
    # No access where there is no such state.
    mask0 = elements < tl.where(at_state0 != 0, limit, limit * 0)
    mask1 = elements < tl.where(at_state1 != 0, limit, limit * 0)
    mask2 = elements < tl.where(at_state2 != 0, limit, limit * 0)
    in_param = place(layout, is_strided, 0, elements, lanes)
    in_grad = place(layout, is_strided, 1, elements, lanes)
    in_state0 = place(layout, is_strided, 2, elements, lanes)
    in_state1 = place(layout, is_strided, 3, elements, lanes)
    in_state2 = place(layout, is_strided, 4, elements, lanes)

    p = load(at_param, in_param, mask, param, lanes, T)
    g = load(at_grad, in_grad, mask, grad, lanes, T)
    s0 = load(at_state0, in_state0, mask0, state0, lanes, T)
    s1 = load(at_state1, in_state1, mask1, state1, lanes, T)
    s2 = load(at_state2, in_state2, mask2, state2, lanes, T)
    if divisor[0] != 1:
        g = quotient_by(g, divisor, fast)
    p, s0, s1, s2 = update(scalars, p, sign * g, s0, s1, s2, states, fast)
    done = True
    if fast:
        done = tl.min((p == p).to(tl.int32), 0) != 0
    if done:
        store(at_param, in_param, p, mask, param, lanes)
        store(at_state0, in_state0, s0, mask0, state0, lanes)
        store(at_state1, in_state1, s1, mask1, state1, lanes)
        store(at_state2, in_state2, s2, mask2, state2, lanes)
    return done


@triton.jit
def no_power(x, n):
    return x * 0 + 0.5


@triton.jit
def advance(table, arguments, count, rule: tl.constexpr, numbers: tl.constexpr, carries: tl.constexpr):
    """Moves what tensors carry on the device on to the step that has been done."""
    begin = count * 0
    while begin < count:
        rows = begin + tl.arange(0, ROWS)
        mask = rows < count
        row = table + rows * ROW_WORDS
        mask = mask & ((word(row, CARRIED, mask) | word(row, CARRIED + 1, mask)) != 0)
        recipes = word(arguments, HEADER_WORDS + 2 * rows + 1, mask)
        carried, _, addresses, is_fp32 = prepare(row, arguments + recipes, mask, rule, numbers, no_power, tl.float64)
        for k in tl.static_range(carries):
            there = mask & (addresses[k] != 0)
            as_fp32 = addresses[k].to(tl.pointer_type(tl.float32))
            as_fp64 = addresses[k].to(tl.pointer_type(tl.float64))
            tl.store(as_fp32, carried[k].to(tl.float32), mask=there & is_fp32[k])
            tl.store(as_fp64, carried[k], mask=there & (is_fp32[k] == 0))
        begin += ROWS


@triton.jit
def step(
    table,
    arguments,
    rule: tl.constexpr,
    load_scalars: tl.constexpr,
    update: tl.constexpr,
    numbers: tl.constexpr,
    carries: tl.constexpr,
    param: tl.constexpr,
    grad: tl.constexpr,
    state0: tl.constexpr,
    state1: tl.constexpr,
    state2: tl.constexpr,
    T: tl.constexpr,
    fast: tl.constexpr,  # try the fast arithmetic first
    LANES: tl.constexpr,  # elements in a vector of the widest dtype
    BLOCK: tl.constexpr,  # elements that are updated at once
):
    found_inf = tl.load(arguments + FOUND_INF)
    if number_at(found_inf, found_inf != 0, False) != 0:
        return
    program = tl.program_id(0)
    count = tl.load(arguments + COUNT)
    index = tile_of(table, count, program)
    row = table + index * ROW_WORDS
    pair = arguments + HEADER_WORDS + 2 * index
    recipe = arguments + tl.load(pair + 1)
    if (tl.load(recipe) >> PREPARED & 1) != 0:
        scalars = load_scalars((recipe + 1).to(tl.int64), T)
    else:
        _, scalars, _, _ = prepare(row, recipe, True, rule, numbers, power, T)

    numel = tl.load(row + NUMEL)
    begin = (program - tl.load(row + FIRST_TILE)) * TILE
    end = tl.minimum(begin + TILE, numel)
    sign = tl.where(tl.load(row + FLAGS) & MAXIMIZE != 0, -1.0, 1.0).to(T)
    grad_scale = tl.load(arguments + GRAD_SCALE)
    divisor = tl.load(arguments + DIVISOR).to(tl.float64, bitcast=True)
    divisor = divisor_of(tl.where(grad_scale != 0, number_at(grad_scale, grad_scale != 0, False), divisor).to(T))
    at_layout = tl.load(row + LAYOUT)
    at_param, at_grad = tl.load(row + PARAM), tl.load(pair)
    at_state0, at_state1, at_state2 = tl.load(row + STATES), tl.load(row + STATES + 1), tl.load(row + STATES + 2)
    addresses = at_param, at_grad, at_state0, at_state1, at_state2

    # In vectors as far as they go; then the tensor's last elements, or all where no vector begins.
    misaligned = (at_param | at_grad | at_state0 | at_state1 | at_state2) % VECTOR_BYTES != 0
    in_vectors = tl.where(misaligned | (at_layout != 0), begin, end - (end - begin) % VECTOR)
    in_vectors = tl.multiple_of(in_vectors, VECTOR)
    tensor = addresses, table + at_layout, at_layout != 0, sign, divisor, scalars
    for i in range(0, TILE, BLOCK):
        if begin + i < in_vectors:
            elements = begin + i + tl.arange(0, BLOCK)
            if not update_block(
                tensor, elements, in_vectors, update, param, grad, state0, state1, state2, LANES, fast, T
            ):
                update_block(tensor, elements, in_vectors, update, param, grad, state0, state1, state2, LANES, False, T)
    for i in range(0, TILE, ROWS):
        if in_vectors + i < end:
            elements = in_vectors + i + tl.arange(0, ROWS)
            update_block(tensor, elements, end, update, param, grad, state0, state1, state2, 1, False, T)

    finished = tl.load(arguments + FINISHED)
    if finished != 0:
        # The last program to come here moves the step counts on: all others have read them.
        tl.debug_barrier()
        counter = finished.to(tl.pointer_type(tl.int32))
        programs = tl.load(arguments + PROGRAMS)
        if tl.atomic_add(counter, 1) == programs - 1:
            tl.store(counter, 0)
            advance(table, arguments, count, rule, numbers, carries)


# ---- the launcher

TARGET = "cuda" if torch.version.hip is None else "hip"
INTERPRETED = not isinstance(step, triton.runtime.JITFunction)
GPU = "cuda"
"""The type of the devices that Triton compiles for, NVIDIA's and AMD's alike."""
IN_MEMORY = ("cpu",)
"""The types of the devices whose memory Triton's interpreter reaches."""


@cache
def estimates_well(device: torch.device) -> bool:
    """The fast arithmetic was made for the estimates of this device, the current one, or of the interpreter."""
    if INTERPRETED:
        return True
    architecture = triton.runtime.driver.active.get_current_target().arch
    return isinstance(architecture, int) and architecture // 10 in (8, 9, 10, 12)  # AMD's have names


def specialization(rule: Rule, dtypes: tuple[str, ...], target: str = TARGET, fast: bool = True) -> dict[str, Any]:
    """All that the kernel is compiled again for.

    Args:
        rule: its functions.
        dtypes: of parameter, gradient and states.
        target: ``cuda`` or ``hip``.
        fast: whether the fast arithmetic may be tried.
    """
    streams = ("param", "grad", *(f"state{k}" for k in range(words.MAX_STATES)))
    fp64 = "fp64" in dtypes
    threads = WARPS * (32 if target == "cuda" else 64)
    prepare, load_scalars, update, divides = FUNCTIONS[rule.name]
    return {
        "rule": prepare,
        "load_scalars": load_scalars,
        "update": update,
        "numbers": rule.hyperparameters,
        "carries": len(rule.carried_keys),
        **dict(zip_longest(streams, dtypes)),
        "T": tl.float64 if fp64 else tl.float32,
        "fast": fast and divides and not fp64 and target == "cuda",
        # Every stream is accessed by as many elements: otherwise Triton would exchange them between threads.
        "LANES": VECTOR_BYTES.value // max(ITEMSIZE[dtype] for dtype in dtypes),
        "BLOCK": threads * (4 if fp64 else 8),  # so that a thread has a vector of the narrowest dtype beside T
    }


def options(rule: Rule, dtypes: tuple[str, ...], target: str = TARGET) -> dict[str, Any]:
    """The compiler's options. The bits depend on the first of them."""
    chosen: dict[str, Any] = {"enable_fp_fusion": False, "num_warps": WARPS}
    if target == "cuda":
        # These limits spill nothing. With 96 registers five programs run at once. NAdam takes a few more, and so does a
        # gradient that is stored unlike the parameter, which is rare.
        is_usual = rule.name != "nadam" and dtypes[0] == dtypes[1]
        chosen["maxnreg"] = 168 if "fp64" in dtypes else 96 if is_usual else 104
    return chosen


def upload(array: list[int], device: torch.device, referred: list[Any]) -> Tensor:
    """These words on a device. Nobody waits: the copy is made in the current stream, from pinned memory.

    Appends to ``referred`` what must live as long as a graph in which the copy is captured.
    """
    source = torch.tensor(array, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    copy = source.to(device, non_blocking=True)
    referred += (source, copy)
    return copy


_launched: set[Any] = set()  # for which the kernel has been compiled and loaded


class Launch(words.Launch):
    """One by Triton."""

    functions: compiled.Library | None  # they prepare scalars on the host; without them the kernel does
    _table: Tensor | None = None
    _stream: Any = None  # in which the table was written

    def run(
        self,
        gradients: list[int],
        recipes: list[tuple[int, ...]],
        divisor: float,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
    ) -> list[Any]:
        on_gpu = self.device.type == "cuda"
        referred: list[Any] = []
        with torch.cuda.device(self.device) if on_gpu else nullcontext():
            table = self._placed_table(referred)
            if on_gpu and self._stream != torch.cuda.current_stream():
                table.record_stream(torch.cuda.current_stream())
            scaler = []
            for number in (found_inf, grad_scale):
                here = None if number is None else number.to(self.device, non_blocking=True)
                referred.append(here)
                scaler.append(0 if here is None else here.data_ptr())
            # The counter is behind the rows and layouts.
            finished = table.data_ptr() + 8 * (table.numel() - 1) if self.counts_steps else 0
            array = self.arguments(gradients, self._prepared(recipes), divisor, scaler, finished)
            arguments = upload(array, self.device, referred)
            constants = specialization(self.rule, self.dtypes, fast=estimates_well(self.device))
            step[(self._programs,)](table, arguments, **constants, **options(self.rule, self.dtypes))
            _launched.add(self._compiled_for)
        return referred

    def _prepared(self, recipes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The recipes, or what they lead to where nothing that they need lies on the GPU."""
        if self.functions is None:
            return recipes
        is_fp64 = "fp64" in self.dtypes
        prepared: dict[Any, tuple[int, ...]] = {}
        found = []
        for recipe, row in zip(recipes, self._rows, strict=True):
            has_address = recipe[0] & (1 << words.FIRST) - 1 or any(row[words.CARRIED : words.PARAM])
            key = recipe, row[words.FLAGS]
            if not has_address and key not in prepared:
                prepared[key] = self.functions.scalars(self.rule.name, is_fp64, *key)
            found.append(recipe if has_address else prepared[key])
        return found

    @property
    def is_loaded(self) -> bool:
        return self._compiled_for in _launched

    @property
    def _compiled_for(self) -> Any:
        return self.device, self.rule, self.dtypes

    def _placed_table(self, referred: list[Any]) -> Tensor:
        referred.append(self._table)
        if self._table is None:
            self._table = upload(self.table(), self.device, referred)
            self._stream = torch.cuda.current_stream() if self.device.type == "cuda" else None
        return self._table


class Kernels:
    """What a plan is to know of Triton: which devices it serves, and what a launch is.

    Args:
        on_cpu: whether its interpreter, if the kernels are in it, is to serve parameters on the CPU as well.
        unavailable: why the kernels cannot run on the GPU of an index; None if they can.
        functions: those of the compiled kernels, which prepare scalars on the host; None lets the kernel prepare them.
    """

    def __init__(
        self,
        on_cpu: bool = False,
        unavailable: Callable[[int], str | None] = lambda index: None,
        functions: compiled.Library | None = None,
    ) -> None:
        self.launch = type("Launch", (Launch,), {"functions": functions})
        self._devices = {GPU} if not INTERPRETED else set(IN_MEMORY) - (set() if on_cpu else {"cpu"})
        self._unavailable = unavailable

    def why_not(self, device: torch.device) -> str | None:
        """Which tensors a device's are that are not served; None if they are."""
        if device.type == "cuda" and (why := self._unavailable(device.index)) is not None:
            return f"tensors on a GPU without Triton kernels ({why})"
        if device.type not in self._devices:
            return "tensors on the CPU" if device.type == "cpu" else "tensors on a device without Triton kernels"
        return None
