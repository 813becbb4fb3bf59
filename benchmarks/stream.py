"""Measures the bandwidth of a GPU's memory, which no optimizer can exceed."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .cases import Case, moments_of
from .events import make_events

TUNED_OVER = 10  # steps


@triton.jit
def _stream(grad, written, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    # All loads come before all stores, so that the loads wait together.
    gradient = tl.load(grad + at, inside).to(tl.float32)
    numbers = ()
    for k in tl.static_range(len(written)):
        numbers = numbers + (tl.load(written[k] + at, inside),)
    for k in tl.static_range(len(written)):
        tl.store(written[k] + at, (numbers[k].to(tl.float32) + gradient).to(written[k].dtype.element_ty), inside)


class Stream(torch.optim.Optimizer):
    """Reads the streams of an optimizer, with those of masters if there are any, writes all except the gradient's, and
    computes next to nothing. One kernel runs over a tensor of random numbers for each stream, at the best of several
    block sizes."""

    def __init__(self, case: Case, groups: list[dict[str, Any]]) -> None:
        device = groups[0]["params"][0].device
        masters = case.precision.get("master_weights")
        names = [case.storage.grad, case.storage.param, *[case.storage.state] * moments_of(case.optimizer)]
        names += [] if masters is None else ["float32" if masters == "fp32" else "bfloat16"]
        dtypes = [getattr(torch, name) for name in names]
        grad, *written = [torch.empty(case.parameters, dtype=dtype, device=device).normal_() for dtype in dtypes]
        self.grad, self.written = grad, tuple(written)
        super().__init__([torch.nn.Parameter(written[0])], {})
        choices = [(block, warps) for block in (1024, 2048, 4096) for warps in (4, 8)]
        self.block, self.warps = min(choices, key=self._time)

    def _time(self, choice: tuple[int, int]) -> float:
        self.block, self.warps = choice
        self.step()
        begin, end = make_events()
        begin.record()
        for _ in range(TUNED_OVER):
            self.step()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        programs = (triton.cdiv(self.grad.numel(), self.block),)
        _stream[programs](self.grad, self.written, self.grad.numel(), BLOCK=self.block, num_warps=self.warps)
