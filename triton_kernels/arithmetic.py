"""Arithmetic that rounds like csrc/core: one rounding for each ``fma``, IEEE division and square root.

Every launch turns contraction off. The functions take scalars of a program and blocks alike.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.random import philox_impl


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


# ---- divisions and roots in fewer instructions: csrc/cuda/fast_math.h says why they are exact. The result is NaN where
# no proof holds.

INTERPRETED = not isinstance(fma, triton.runtime.JITFunction)

if INTERPRETED:

    @triton.jit
    def estimate_reciprocal(x):
        return 1 / x

    @triton.jit
    def estimate_reciprocal_root(x):
        return 1 / tl.sqrt(x)

else:

    @triton.jit
    def estimate_reciprocal(x):
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)

    @triton.jit
    def estimate_reciprocal_root(x):
        return tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


LEAST_NUMERATOR = tl.constexpr(2.0**-80)
LEAST_RADICAND = tl.constexpr(2.0**-100)
MOST_DIVISOR = tl.constexpr(2.0**40)


@triton.jit
def unless_proved(proved, x):
    return tl.where(proved, x, float("nan"))


@triton.jit
def is_zero_or_from(x, least: tl.constexpr):
    return (x == 0) | (tl.abs(x) >= least)


@triton.jit
def divide_by(x, d, inverse):
    """Returns x / d, given the correctly rounded reciprocal of d."""
    q = x * inverse
    return fma(fma(d, q, -x), -inverse, q)


@triton.jit
def divisor_of(d):
    """Returns a number that divides others, with its reciprocal."""
    return d, unless_proved((d > 0) & (d <= MOST_DIVISOR), divide(d * 0 + 1, d))


@triton.jit
def quotient_by(x, divisor, fast: tl.constexpr):
    d, inverse = divisor
    if fast:
        quotient = unless_proved(is_zero_or_from(x, LEAST_NUMERATOR), divide_by(x, d, inverse))
    else:
        quotient = divide(x, d)
    return quotient


@triton.jit
def quotient(x, d, fast: tl.constexpr):
    if fast:
        estimate = estimate_reciprocal(d)
        inverse = fma(estimate, fma(-d, estimate, 1.0), estimate)
        proved = is_zero_or_from(x, LEAST_NUMERATOR) & (d > 0) & (d <= MOST_DIVISOR)
        quotient = unless_proved(proved, divide_by(x, d, inverse))
    else:
        quotient = divide(x, d)
    return quotient


@triton.jit
def root_over(x, divisor, fast: tl.constexpr):
    d, inverse = divisor
    if fast:
        y = estimate_reciprocal_root(x + 1.1754943508222875e-38)
        root, half = x * y, 0.5 * y
        quotient = divide_by(fma(fma(-root, root, x), half, root), d, inverse)
        quotient = unless_proved(is_zero_or_from(x, LEAST_RADICAND), quotient)
    else:
        quotient = divide(sqrt(x), d)
    return quotient


@triton.jit
def maximum(a, b):
    """Returns the larger of two numbers, or NaN if either is NaN, like torch.maximum."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def power(x, n):
    """Returns x^n in fp64 for 0 <= x <= 1 and a natural n, both scalars, like csrc/core/math.h."""
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
    """Returns e^(x + correction) in fp64 for a correction that is tiny beside x, like csrc/core/math.h."""
    # Triton would round a number to fp32 that has a name or is written in a call.
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
    found = tl.where(x > 709.0, float("inf"), series * scale)
    return tl.where(x > -708.0, found, tl.where(x != x, x, 0.0))


# ---- how numbers are stored


@triton.jit
def widen(stored, dtype: tl.constexpr, T: tl.constexpr):
    """Converts a number to the arithmetic's dtype, T. A bf16 number comes as its 16 bits."""
    if dtype == "bf16":
        stored = (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return stored.to(T)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Rounds to nearest, ties to even. 64-bit numbers are rounded to float first, as in torch."""
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


# ---- masters of parameters in 16 bits: csrc/core/master.h


@triton.jit
def bits_of(x):
    return x.to(tl.float32).to(tl.uint32, bitcast=True)


@triton.jit
def current_master(param, stored, master: tl.constexpr, dtype: tl.constexpr, T: tl.constexpr):
    """Returns the master of a widened parameter, given what the stream of masters holds of it."""
    wide = param.to(tl.float32)
    if master == "split16":
        taken = stored.to(tl.int16, bitcast=True).to(tl.int32)
        joined = (wide.to(tl.int32, bitcast=True) + taken).to(tl.float32, bitcast=True)
        found = tl.where(joined == joined, joined, wide)
    elif dtype == "bf16":
        is_near = bits_of(stored) - bits_of(wide) + 0x8000 <= 0x10000
        found = tl.where(is_near & (stored == stored), stored, wide)
    else:
        found = tl.where(stored.to(tl.float16).to(tl.float32) == wide, stored, wide)
    return found.to(T)


@triton.jit
def round_master(x, dtype: tl.constexpr):
    """Rounds masters to the dtype of their parameters."""
    if dtype == "bf16":
        stored = (tl.where(x != x, 0x7FC00000, bits_of(x) + 0x8000) >> 16).to(tl.uint16)
    else:
        stored = narrow(x, dtype)
    return stored


@triton.jit
def rest_of_master(x):
    """Returns what rounding to bf16 takes from masters."""
    return tl.where(x != x, 0, bits_of(x) & 0xFFFF).to(tl.uint16)


# ---- rounding at random: csrc/core/stochastic.h


@triton.jit
def random_bits(element, stream: tl.constexpr, param, step, seed):
    """Returns 16 random bits for elements, which are in int64."""
    block = element // 8
    zero = (block * 0).to(tl.uint32)
    w1 = (block >> 32).to(tl.uint32) | stream << 24
    key0, key1 = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32 & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = philox_impl(
        block.to(tl.uint32), w1, zero + param.to(tl.uint32), zero + step.to(tl.uint32), zero + key0, zero + key1, 7
    )
    at = (element % 8).to(tl.uint32)
    word = tl.where(at < 4, tl.where(at < 2, w0, w1), tl.where(at < 6, w2, w3))
    return word >> 16 * (at % 2) & 0xFFFF


@triton.jit
def round_at_random(x, random, dtype: tl.constexpr):
    x = x.to(tl.float32)
    bits = bits_of(x)
    if dtype == "bf16":
        stored = (tl.where(x != x, 0x7FC00000, bits + random) >> 16).to(tl.uint16)
    else:
        magnitude = bits & 0x7FFFFFFF
        is_subnormal = magnitude < 0x38800000
        normal = (magnitude + (random >> 3) - 0x38000000) >> 13
        small = tl.where(is_subnormal, magnitude, 0).to(tl.float32, bitcast=True)
        subnormal = ((small * 1099511627776.0).to(tl.int32).to(tl.uint32) + random) >> 16
        rounded = tl.where(magnitude >= 0x47800000, 0x7C00, tl.where(is_subnormal, subnormal, normal))
        rounded = tl.where(x != x, 0x7E00, rounded) | (bits >> 16 & 0x8000)
        stored = rounded.to(tl.uint16).to(tl.float16, bitcast=True)
    return stored
