"""One kernel for a whole step, which updates all tensors that have equally many streams of the same dtypes.

The kernel reads what csrc/cuda/launch.h describes: rows, layouts and first tiles in the table, and the arguments. They
are given by address, because they are structs, whose fields have several types.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dracopt_ext._C import launch_layout

from .arithmetic import (
    current_master,
    divisor_of,
    narrow,
    power,
    quotient_by,
    random_bits,
    rest_of_master,
    round_at_random,
    round_master,
    widen,
)

TILE = tl.constexpr(8192)  # elements that a program updates
ROWS = tl.constexpr(128)  # rows that a program advances at once, or elements outside vectors that it updates at once
VECTOR_BYTES = tl.constexpr(16)  # the widest access
VECTOR = tl.constexpr(16)  # elements: a multiple of the number of any dtype in such a vector

AT = {name: tl.constexpr(at) for name, at in launch_layout().items()}  # offsets and sizes, in bytes
ROW_BYTES, STREAMS, STATE_SCALARS = AT["ROW_BYTES"], AT["STREAMS"], AT["STATE_SCALARS"]
NUMEL, SLOT, LAYOUT = AT["NUMEL"], AT["SLOT"], AT["LAYOUT"]
ROW_FIRST, ROW_NUMBERS, PARAM = AT["ROW_FIRST"], AT["ROW_NUMBERS"], AT["PARAM"]
SEED = AT["SEED"]
STATE_SCALAR_FP32, MAXIMIZE, HAS_RECIPE = AT["STATE_SCALAR_FP32"], AT["MAXIMIZE"], AT["HAS_RECIPE"]
LAYOUT_BYTES, DIMS, SIZES = AT["LAYOUT_BYTES"], AT["DIMS"], AT["SIZES"]
STRIDES, STRIDES_BYTES = AT["STRIDES"], AT["STRIDES_BYTES"]
FOUND_INF, GRAD_SCALE, DIVISOR, FINISHED = AT["FOUND_INF"], AT["GRAD_SCALE"], AT["DIVISOR"], AT["FINISHED"]
TABLE, LAYOUTS, FIRST_TILES = AT["ROWS"], AT["LAYOUTS"], AT["FIRST_TILES"]
MULTIPLIER, COEFFICIENT, ZEROES = AT["MULTIPLIER"], AT["COEFFICIENT"], AT["ZEROES"]
COUNT, BLOCKS, WORDS = AT["COUNT"], AT["BLOCKS"], AT["WORDS"]
FP32_ADDRESS, FP64_ADDRESS = AT["FP32_ADDRESS"], AT["FP64_ADDRESS"]
RECIPE_FIRST, RECIPE_WORDS = AT["RECIPE_FIRST"], AT["RECIPE_WORDS"]


@triton.jit
def field(address, at, dtype: tl.constexpr, mask=True):
    """Reads a field of a struct: a number of this dtype."""
    return tl.load((address + at).to(tl.pointer_type(dtype)), mask=mask, other=0)


@triton.jit
def number_at(address, is_fp32, is_fp64):
    fp32 = tl.load(address.to(tl.pointer_type(tl.float32)), mask=is_fp32, other=0)
    fp64 = tl.load(address.to(tl.pointer_type(tl.float64)), mask=is_fp64, other=0)
    return tl.where(is_fp32, fp32.to(tl.float64), fp64)


@triton.jit
def has_overflow(arguments):
    found_inf = field(arguments, FOUND_INF, tl.int64)
    return number_at(found_inf, found_inf != 0, False) != 0


@triton.jit
def grad_scale_in(arguments):
    """Returns what divides the gradients, in fp64."""
    address = field(arguments, GRAD_SCALE, tl.int64)
    return tl.where(address != 0, number_at(address, address != 0, False), field(arguments, DIVISOR, tl.float64))


@triton.jit
def tile_of(first_tiles, count, program):
    """Finds the row that holds a program's tile: the last one whose first tile is not beyond that tile."""
    low = count * 0
    high = count
    while high - low > 1:
        middle = low + (high - low) // 2
        beyond = field(first_tiles, 4 * middle, tl.int32) > program
        low = tl.where(beyond, low, middle)
        high = tl.where(beyond, middle, high)
    return low


@triton.jit
def number_in(recipe, fp32_address, fp64_address, k: tl.constexpr, mask):
    """Reads number k of a recipe: as it is, or where it lies on the device."""
    bits = field(recipe, RECIPE_WORDS + 8 * k, tl.int64, mask)
    is_fp32 = (fp32_address >> k & 1) != 0
    is_fp64 = (fp64_address >> k & 1) != 0
    stored = number_at(bits, is_fp32, is_fp64)
    return tl.where(is_fp32 | is_fp64, stored, bits.to(tl.float64, bitcast=True))


@triton.jit
def state_scalar_number(recipe, k: tl.constexpr, address, is_fp32, mask):
    on_host = field(recipe, RECIPE_WORDS + 8 * k, tl.float64, mask)
    there = address != 0
    return tl.where(there, number_at(address, there & is_fp32, there & (is_fp32 == 0)), on_host)


@triton.jit
def prepare_row(
    row,
    recipe,
    mask,
    prepare: tl.constexpr,
    hyperparameters: tl.constexpr,
    state_scalar_count: tl.constexpr,
    power: tl.constexpr,
    T: tl.constexpr,
):
    """Returns the state scalars of this step, the step's scalars, and the state scalars' addresses and dtypes."""
    fp32 = field(recipe, FP32_ADDRESS, tl.int16, mask)
    fp64 = field(recipe, FP64_ADDRESS, tl.int16, mask)
    h = ()
    for k in tl.static_range(hyperparameters):
        h = h + (number_in(recipe, fp32, fp64, k, mask),)
    first = field(recipe, RECIPE_FIRST, tl.int8, mask) != 0
    bits = field(row, STATE_SCALAR_FP32, tl.int8, mask)
    is_fp32 = (bits & 1) != 0, (bits & 2) != 0
    address0 = field(row, STATE_SCALARS, tl.int64, mask)
    address1 = field(row, STATE_SCALARS + 8, tl.int64, mask)
    scalar0, scalar1 = recipe, recipe  # if the rule has none
    if state_scalar_count > 0:
        scalar0 = state_scalar_number(recipe, hyperparameters, address0, is_fp32[0], mask)
    if state_scalar_count > 1:
        scalar1 = state_scalar_number(recipe, hyperparameters + 1, address1, is_fp32[1], mask)
    state_scalars, scalars = prepare((scalar0, scalar1), is_fp32, first, h, power, T)
    return state_scalars, scalars, (address0, address1), is_fp32


@triton.jit
def offset_of(layout, stream, element):
    """Returns where elements of a stream lie, in elements from the stream's first."""
    offset = element * 0
    d = field(layout, DIMS, tl.int32) - 1
    while d >= 0:
        size = field(layout, SIZES + 8 * d, tl.int64)
        offset += element % size * field(layout, STRIDES + STRIDES_BYTES * stream + 8 * d, tl.int64)
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
    return widen(tl.load(pointer_of(address, dtype, lanes) + offsets, mask=mask, other=0), dtype, T)


@triton.jit
def store(address, offsets, x, mask, dtype: tl.constexpr, lanes: tl.constexpr):
    tl.store(pointer_of(address, dtype, lanes) + offsets, narrow(x, dtype), mask=mask)


@triton.jit
def store_at_random(
    address, offsets, x, mask, dtype: tl.constexpr, lanes: tl.constexpr, elements, rounding, stream: tl.constexpr
):
    """Rounds numbers at random and stores them, as ``store`` does with those that are not in 16 bits."""
    if dtype == "bf16" or dtype == "fp16":
        first, layouts, layout_number, param, step, seed = rounding
        element = elements.to(tl.int64)
        if layout_number >= 0:
            element = offset_of(layouts + layout_number * LAYOUT_BYTES, 1, element)
        random = random_bits(first + element, stream, param, step, seed)
        tl.store(pointer_of(address, dtype, lanes) + offsets, round_at_random(x, random, dtype), mask=mask)
    else:
        store(address, offsets, x, mask, dtype, lanes)


@triton.jit
def place(layout, is_strided, stream, elements, lanes: tl.constexpr):
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
    dtypes: tl.constexpr,
    master: tl.constexpr,
    at_random: tl.constexpr,
    lanes: tl.constexpr,  # elements that are accessed at once
    fast: tl.constexpr,
    T: tl.constexpr,
):
    """Updates those of the elements that are below the limit, and returns True; or does nothing.

    The function does nothing if ``fast`` is true and the fast arithmetic is not proved for one of the elements.
    """
    addresses, layout, is_strided, divisor, coefficient, scalars, rounding = tensor
    streams: tl.constexpr = len(dtypes)
    param: tl.constexpr = dtypes[0]
    grad: tl.constexpr = dtypes[1]
    mask = elements < limit
    at = ()
    for k in tl.static_range(len(addresses)):
        at = at + (place(layout, is_strided, k, elements, lanes),)

    p = load(addresses[0], at[0], mask, param, lanes, T)
    g = load(addresses[1], at[1], mask, grad, lanes, T)
    states = ()
    for k in tl.static_range(2, streams):
        states = states + (load(addresses[k], at[k], mask, tl.constexpr(dtypes[k]), lanes, T),)
    masters = p
    if master is not None:
        stored: tl.constexpr = "fp32" if master == "fp32" else "bf16"  # 16 bits of any kind
        masters = tl.load(pointer_of(addresses[streams], stored, lanes) + at[streams], mask=mask, other=0)
    if lanes > 1:
        tl.debug_barrier()  # ptxas would put loads behind arithmetic, and wait for memory several times
    if master is not None:
        p = current_master(p, masters, master, param, T)
    if divisor[0] != 1:
        g = quotient_by(g, divisor, fast)
    p, states = update(scalars, p, coefficient * g, states, fast)
    done = True
    if fast:
        done = tl.min((p == p).to(tl.int32), 0) != 0
    if done:
        if master is not None:
            tl.store(pointer_of(addresses[0], param, lanes) + at[0], round_master(p, param), mask=mask)
            if master == "fp32":
                store(addresses[streams], at[streams], p, mask, "fp32", lanes)
            else:
                tl.store(pointer_of(addresses[streams], "bf16", lanes) + at[streams], rest_of_master(p), mask=mask)
        elif at_random & 1:
            store_at_random(addresses[0], at[0], p, mask, param, lanes, elements, rounding, 0)
        else:
            store(addresses[0], at[0], p, mask, param, lanes)
        for k in tl.static_range(2, streams):
            if at_random & 2:
                store_at_random(
                    addresses[k], at[k], states[k - 2], mask, tl.constexpr(dtypes[k]), lanes, elements, rounding, k
                )
            else:
                store(addresses[k], at[k], states[k - 2], mask, tl.constexpr(dtypes[k]), lanes)
    return done


@triton.jit
def zero_tile(arguments, grad: tl.constexpr):
    """Sets a program's part of the gradient to zero. All is read again, because registers are scarce before."""
    program = tl.program_id(0)
    first_tiles = field(arguments, FIRST_TILES, tl.int64)
    layouts = field(arguments, LAYOUTS, tl.int64)
    index = tile_of(first_tiles, field(arguments, COUNT, tl.int32), program).to(tl.int64)
    row = field(arguments, TABLE, tl.int64) + index * ROW_BYTES
    begin = (program - field(first_tiles, 4 * index, tl.int32)).to(tl.int64) * TILE
    end = tl.minimum(begin + TILE, field(row, NUMEL, tl.int64))
    address = field(arguments, WORDS + 8 * index, tl.int64)
    layout_number = field(row, LAYOUT, tl.int32).to(tl.int64)
    for i in range(0, TILE, ROWS):
        if begin + i < end:
            elements = begin + i + tl.arange(0, ROWS)
            at = place(layouts + layout_number * LAYOUT_BYTES, layout_number >= 0, 1, elements, 1)
            store(address, at, tl.zeros((ROWS,), tl.float32), elements < end, grad, 1)


@triton.jit
def no_power(x, n):
    return x * 0 + 0.5


@triton.jit
def advance(
    rows, arguments, count, prepare: tl.constexpr, hyperparameters: tl.constexpr, state_scalar_count: tl.constexpr
):
    """Advances the state scalars on the device to the step that has been done."""
    begin = count * 0
    while begin < count:
        index = begin + tl.arange(0, ROWS)
        row = rows + index.to(tl.int64) * ROW_BYTES
        mask = index < count
        mask = mask & (field(row, HAS_RECIPE, tl.int8, mask) != 0)
        recipe = arguments + WORDS + 8 * field(row, SLOT, tl.int32, mask).to(tl.int64)
        state_scalars, _, addresses, is_fp32 = prepare_row(
            row, recipe, mask, prepare, hyperparameters, state_scalar_count, no_power, tl.float64
        )
        for k in tl.static_range(state_scalar_count):
            there = mask & (addresses[k] != 0)
            as_fp32 = addresses[k].to(tl.pointer_type(tl.float32))
            as_fp64 = addresses[k].to(tl.pointer_type(tl.float64))
            tl.store(as_fp32, state_scalars[k].to(tl.float32), mask=there & is_fp32[k])
            tl.store(as_fp64, state_scalars[k], mask=there & (is_fp32[k] == 0))
        begin += ROWS


@triton.jit(do_not_specialize=["rows", "layouts", "first_tiles", "arguments"])
def step_kernel(
    rows: tl.int64,
    layouts: tl.int64,
    first_tiles: tl.int64,
    arguments: tl.int64,
    prepare: tl.constexpr,
    scalar_count: tl.constexpr,
    update: tl.constexpr,
    hyperparameters: tl.constexpr,
    state_scalar_count: tl.constexpr,
    dtypes: tl.constexpr,  # of the parameter, the gradient and the states
    master: tl.constexpr,  # the form of masters, or None
    at_random: tl.constexpr,  # 1 if the parameter is rounded at random, plus 2 if states are
    T: tl.constexpr,
    fast: tl.constexpr,  # try the fast arithmetic first
    LANES: tl.constexpr,  # elements in a vector of the widest dtype
    BLOCK: tl.constexpr,  # elements that are updated at once
):
    skips = has_overflow(arguments)
    if skips & (field(arguments, ZEROES, tl.int16) == 0):
        return
    program = tl.program_id(0)
    count = field(arguments, COUNT, tl.int32)
    index = tile_of(first_tiles, count, program).to(tl.int64)
    row = rows + index * ROW_BYTES
    slot = arguments + WORDS + 8 * field(row, SLOT, tl.int32).to(tl.int64)
    if field(row, HAS_RECIPE, tl.int8) != 0:
        _, scalars, _, _ = prepare_row(row, slot, True, prepare, hyperparameters, state_scalar_count, power, T)
    else:
        scalars = ()
        for k in tl.static_range(scalar_count):
            scalars = scalars + (tl.load(slot.to(tl.pointer_type(T)) + k),)

    numel = field(row, NUMEL, tl.int64)
    begin = (program - field(first_tiles, 4 * index, tl.int32)).to(tl.int64) * TILE
    end = tl.minimum(begin + TILE, tl.where(skips, begin, numel))
    divisor = divisor_of(grad_scale_in(arguments).to(T))
    multiplier = field(arguments, MULTIPLIER, tl.int64)
    coefficient = field(arguments, COEFFICIENT, tl.float64)
    coefficient = tl.where(multiplier != 0, number_at(multiplier, False, multiplier != 0), coefficient).to(T)
    coefficient = tl.where(field(row, MAXIMIZE, tl.int8) != 0, -coefficient, coefficient)
    addresses = field(row, STREAMS, tl.int64), field(arguments, WORDS + 8 * index, tl.int64)
    for k in tl.static_range(2, len(dtypes) + (master is not None)):
        addresses = addresses + (field(row, STREAMS + 8 * k, tl.int64),)
    rounding = (numel,)
    if at_random:
        first, number = field(row, ROW_FIRST, tl.int64), field(row, ROW_NUMBERS, tl.int32).to(tl.int64)
        index_in_all, step = field(row, PARAM, tl.int32), field(slot - 8, 0, tl.int64)
        rounding = first, layouts, number, index_in_all, step, field(arguments, SEED, tl.int64)
    layout_number = field(row, LAYOUT, tl.int32).to(tl.int64)  # negative if all streams are dense
    layout = layouts + layout_number * LAYOUT_BYTES

    # Vectors come first, then the tensor's last elements. Misaligned and strided tensors have no vectors.
    begins = addresses[0]
    for k in tl.static_range(1, len(addresses)):
        begins = begins | addresses[k]
    misaligned = begins % VECTOR_BYTES != 0
    in_vectors = tl.where(misaligned | (layout_number >= 0), begin, end - (end - begin) % VECTOR)
    in_vectors = tl.multiple_of(in_vectors, VECTOR)
    tensor = addresses, layout, layout_number >= 0, divisor, coefficient, scalars, rounding
    for i in range(0, TILE, BLOCK):
        if begin + i < in_vectors:
            elements = begin + i + tl.arange(0, BLOCK)
            if not update_block(tensor, elements, in_vectors, update, dtypes, master, at_random, LANES, fast, T):
                update_block(tensor, elements, in_vectors, update, dtypes, master, at_random, LANES, False, T)
    for i in range(0, TILE, ROWS):
        if in_vectors + i < end:
            elements = in_vectors + i + tl.arange(0, ROWS)
            update_block(tensor, elements, end, update, dtypes, master, at_random, 1, False, T)

    if field(arguments, ZEROES, tl.int16) != 0:
        tl.debug_barrier()
        zero_tile(arguments, tl.constexpr(dtypes[1]))
    finished = field(arguments, FINISHED, tl.int64)
    if (finished != 0) & (has_overflow(arguments) == 0):
        # The last program to come here advances the state scalars, because all others have read them.
        tl.debug_barrier()
        counter = finished.to(tl.pointer_type(tl.int32))
        if tl.atomic_add(counter, 1) == field(arguments, BLOCKS, tl.int32) - 1:
            tl.store(counter, 0)
            advance(rows, arguments, count, prepare, hyperparameters, state_scalar_count)
