"""One kernel for a whole step, which updates every tensor of every group whose streams have the same dtypes.

The kernel reads the two arrays of words of :mod:`dracopt_ext.portable.packed`, which also says what lies where.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dracopt_ext.portable import packed

from .arithmetic import divisor_of, narrow, power, quotient_by, widen

ROWS = tl.constexpr(128)  # rows that a program advances at once, or elements outside vectors that it updates at once
VECTOR_BYTES = tl.constexpr(16)  # the widest access
VECTOR = tl.constexpr(16)  # elements: a multiple of the number of any dtype in such a vector

NUMEL, FIRST_TILE, LAYOUT, FLAGS, STATE_SCALARS, PARAM, STATES = map(tl.constexpr, packed.ROW)
FOUND_INF, GRAD_SCALE, DIVISOR, FINISHED, COUNT, PROGRAMS = map(tl.constexpr, packed.HEADER)
FP32_ADDRESS, FP64_ADDRESS, FIRST, PREPARED = map(tl.constexpr, packed.RECIPE_FLAGS)
TILE, ROW_WORDS, HEADER_WORDS = map(tl.constexpr, (packed.TILE, packed.ROW_WORDS, packed.HEADER_WORDS))
MAXIMIZE, STATE_SCALAR_FP32 = map(tl.constexpr, (packed.MAXIMIZE, packed.STATE_SCALAR_FP32))


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
    """Finds the row that holds a program's tile: the last one whose first tile is not beyond that tile."""
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
def state_scalar_number(recipe, address, is_fp32, at: tl.constexpr, mask):
    on_host = word(recipe, at, mask).to(tl.float64, bitcast=True)
    there = address != 0
    return tl.where(there, number_at(address, there & is_fp32, there & (is_fp32 == 0)), on_host)


@triton.jit
def prepare_row(row, recipe, mask, rule: tl.constexpr, numbers: tl.constexpr, power: tl.constexpr, T: tl.constexpr):
    """Returns the state scalars of this step, the step's scalars, and the state scalars' addresses and dtypes."""
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
    addresses = word(row, STATE_SCALARS, mask), word(row, STATE_SCALARS + 1, mask)
    is_fp32 = (row_flags & STATE_SCALAR_FP32) != 0, (row_flags & 2 * STATE_SCALAR_FP32) != 0
    state_scalars = (
        state_scalar_number(recipe, addresses[0], is_fp32[0], 1 + numbers, mask),
        state_scalar_number(recipe, addresses[1], is_fp32[1], 2 + numbers, mask),
    )
    state_scalars, scalars = rule(state_scalars, is_fp32, (flags >> FIRST & 1) != 0, h, power, T)
    return state_scalars, scalars, addresses, is_fp32


@triton.jit
def offset_of(layout, stream: tl.constexpr, element):
    """Returns where elements of a stream lie, in elements from the stream's first."""
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
    """Updates those of the elements that are below the limit, and returns True; or does nothing.

    The function does nothing if ``fast`` is true and the fast arithmetic is not proved for one of the elements.
    """
    addresses, layout, is_strided, sign, divisor, scalars = tensor
    at_param, at_grad, at_state0, at_state1, at_state2 = addresses
    states = (at_state0 != 0).to(tl.int32) + (at_state1 != 0).to(tl.int32) + (at_state2 != 0).to(tl.int32)
    mask = elements < limit
    # A missing state is never accessed.
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
    """Advances the state scalars on the device to the step that has been done."""
    begin = count * 0
    while begin < count:
        rows = begin + tl.arange(0, ROWS)
        mask = rows < count
        row = table + rows * ROW_WORDS
        mask = mask & ((word(row, STATE_SCALARS, mask) | word(row, STATE_SCALARS + 1, mask)) != 0)
        recipes = word(arguments, HEADER_WORDS + 2 * rows + 1, mask)
        state_scalars, _, addresses, is_fp32 = prepare_row(
            row, arguments + recipes, mask, rule, numbers, no_power, tl.float64
        )
        for k in tl.static_range(carries):
            there = mask & (addresses[k] != 0)
            as_fp32 = addresses[k].to(tl.pointer_type(tl.float32))
            as_fp64 = addresses[k].to(tl.pointer_type(tl.float64))
            tl.store(as_fp32, state_scalars[k].to(tl.float32), mask=there & is_fp32[k])
            tl.store(as_fp64, state_scalars[k], mask=there & (is_fp32[k] == 0))
        begin += ROWS


@triton.jit
def step_kernel(
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
        _, scalars, _, _ = prepare_row(row, recipe, True, rule, numbers, power, T)

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

    # Vectors come first, then the tensor's last elements. Misaligned and strided tensors have no vectors.
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
        # The last program to come here advances the state scalars, because all others have read them.
        tl.debug_barrier()
        counter = finished.to(tl.pointer_type(tl.int32))
        programs = tl.load(arguments + PROGRAMS)
        if tl.atomic_add(counter, 1) == programs - 1:
            tl.store(counter, 0)
            advance(table, arguments, count, rule, numbers, carries)
