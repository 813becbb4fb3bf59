"""``python -m tests.digest``: prints the instruction set and a digest of all results, to compare across processes."""

from __future__ import annotations

import hashlib

import torch

from dracopt_ext.backend import isa

from .cases import CASES, SIZES, STORAGE, inputs, train


def digest() -> str:
    found = hashlib.sha256()
    for param, grad, state in (*zip(STORAGE, STORAGE, STORAGE, strict=True), (torch.bfloat16, torch.float16, None)):
        initial, gradients = inputs(SIZES, torch.float32, steps=4)
        initial.append(torch.tensor([float("nan"), float("inf"), -0.0, 1e-42]))
        for step in gradients:
            step.append(torch.tensor([1.0, float("inf"), 0.0, 1e-42]))
        given = [t.to(param) for t in initial], [[t.to(grad) for t in step] for step in gradients]
        for case in CASES:
            for tensor in train(case.ours, {**case.options, "state_dtype": state}, *given).values():
                found.update(tensor.double().nan_to_num(nan=123.0).numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    print(isa(), digest())
