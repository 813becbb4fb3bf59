"""Computes the momentum of NAdam, by which the host multiplies a ``mu_product`` that it holds.

The computation uses Python floats and rounds as csrc/core/math.h does.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache


def fma(a: float, b: float, c: float) -> float:
    """Returns a * b + c for finite numbers with one rounding, which Python itself has only since 3.13."""
    return float(Fraction(a) * Fraction(b) + Fraction(c))


def exponential(x: float, correction: float) -> float:
    """Returns e^(x + correction) for -708 < x <= 709 and a tiny correction."""
    round_to_integer = 6755399441055744.0
    n = (x * 1.4426950408889634 + round_to_integer) - round_to_integer
    rest = fma(-n, 0.6931471805599453, x)
    r = rest + fma(-n, 2.3190468138462996e-17, correction)
    series = 1.0
    for k in range(14, 1, -1):
        series = fma(series, r * (1.0 / k), 1.0)
    return fma(series, r, 1.0) * 2.0 ** int(n)


@lru_cache(maxsize=64)
def momentum(step: float, beta1: float, momentum_decay: float) -> float:
    """Returns the momentum of a step: beta1 (1 - 0.96^(step * momentum_decay) / 2)."""
    ln, ln_rest = -0.040821994520255166, -8.893492737632459e-19  # the logarithm of 0.96, and its rest
    decays = step * momentum_decay
    x = decays * ln
    if x <= -708.0:  # -inf included
        return beta1
    if x > 709.0:
        return -math.inf if beta1 > 0 else math.nan
    return beta1 * (1 - 0.5 * exponential(x, fma(decays, ln, -x) + decays * ln_rest))
