"""``python -m tests.digest``: the instruction set and a digest of all cases' results, to compare across processes."""

from __future__ import annotations

import hashlib

import torch

from dracopt_ext import _C

from .cases import CASES, DTYPES, SIZES, inputs, train


def digest() -> str:
    found = hashlib.sha256()
    for dtype in DTYPES:
        initial, gradients = inputs(SIZES, dtype, steps=4)
        initial.append(torch.tensor([float("nan"), float("inf"), -0.0, 1e-42], dtype=dtype))
        for step in gradients:
            step.append(torch.tensor([1.0, float("inf"), 0.0, 1e-42], dtype=dtype))
        for case in CASES:
            for tensor in train(case.ours, case.options, initial, gradients).values():
                found.update(tensor.nan_to_num(nan=123.0).numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    print(_C.isa(), digest())
