"""Arithmetic that rounds as csrc/core does: one rounding where an ``fma`` is written, IEEE division and square root.

Contraction is off in every launch. The functions take scalars of a program and blocks alike.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fma(a, b, c):
    return tl.fma(a, b, c)


@triton.jit
def divide(a, b):
    if a.dtype == tl.float32:
        quotient = tl.div_rn(a, b)
    else:
        quotient = a / b
    return quotient


@triton.jit
def sqrt(x):
    if x.dtype == tl.float32:
        root = tl.sqrt_rn(x)
    else:
        root = tl.sqrt(x)
    return root


@triton.jit
def maximum(a, b):
    """The larger of two; NaN if either is, as torch.maximum."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def power(x, n):
    """x^n in fp64 for 0 <= x <= 1 and a natural n, both scalars; as csrc/core/math.h has it."""
    n = n.to(tl.int64)
    hi, lo = x * 0 + 1, x * 0
    base, base_lo = x, x * 0
    while n > 0:
        if n % 2 == 1:
            product = hi * base
            lo = fma(hi, base, -product) + (hi * base_lo + lo * base)
            hi = product + lo
            lo = (product - hi) + lo
        square = base * base
        base_lo = fma(base, base, -square) + 2.0 * base * base_lo
        base = square + base_lo
        base_lo = (square - base) + base_lo
        n //= 2
    return hi


@triton.jit
def exponential(x, correction):
    """e^(x + correction) in fp64 for x <= 0 and a tiny correction; as csrc/core/math.h has it."""
    # A number that is given a name or is written in a call would be rounded to fp32.
    ln2 = tl.full((), 0.6931471805599453, tl.float64)
    ln2_rest = tl.full((), 2.3190468138462996e-17, tl.float64)
    round_to_integer = 6755399441055744.0
    n = (x * 1.4426950408889634 + round_to_integer) - round_to_integer
    rest = fma(-n, ln2, x)
    r = rest + fma(-n, ln2_rest, correction)
    series = x * 0 + 1
    for k in tl.static_range(14, 1, -1):
        series = fma(series, r * (1.0 / k), 1.0)
    series = fma(series, r, 1.0)
    scale = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    return tl.where(x > -708.0, series * scale, tl.where(x != x, x, 0.0))


# ---- how numbers are stored


@triton.jit
def widen(stored, dtype: tl.constexpr, T: tl.constexpr):
    """To the arithmetic's dtype, T. A number in bf16 comes as its 16 bits."""
    if dtype == "bf16":
        stored = (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return stored.to(T)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """To the nearest, ties to even; 64-bit numbers take the way over float, as in torch."""
    if dtype == "fp64":
        stored = x
    elif dtype == "fp32":
        stored = x.to(tl.float32)
    elif dtype == "fp16":
        stored = x.to(tl.float32).to(tl.float16)
    else:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        stored = (tl.where(x != x, 0x7FC00000, bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to(tl.uint16)
    return stored
