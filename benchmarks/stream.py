"""Measures the bandwidth of a GPU's memory, which no optimizer can exceed."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .cases import Case
from .events import make_events

TUNED_OVER = 10  # steps


@triton.jit  # type: ignore[untyped-decorator]
def _stream(p, g, m, v, w, numel, BLOCK: tl.constexpr, MASTERS: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    # All loads come before all stores, so that the loads wait together.
    gradient = tl.load(g + at, inside).to(tl.float32)
    first, second, third = tl.load(p + at, inside), tl.load(m + at, inside), tl.load(v + at, inside)
    fourth = tl.load(w + at, inside) if MASTERS else first
    tl.store(p + at, (first.to(tl.float32) + gradient).to(p.dtype.element_ty), inside)
    tl.store(m + at, (second.to(tl.float32) + gradient).to(m.dtype.element_ty), inside)
    if MASTERS:
        tl.store(w + at, (fourth.to(tl.float32) + gradient).to(w.dtype.element_ty), inside)
    tl.store(v + at, (third.to(tl.float32) + gradient).to(v.dtype.element_ty), inside)


class Stream(torch.optim.Optimizer):
    """Reads the streams of AdamW, with those of masters if there are any, writes all except the gradient's, and
    computes next to nothing. One kernel runs over a tensor of random numbers for each stream, at the best of several
    block sizes."""

    def __init__(self, case: Case, groups: list[dict[str, Any]]) -> None:
        device = groups[0]["params"][0].device
        masters = case.precision.get("master_weights")
        names = [case.storage.param, case.storage.grad, *[case.storage.state] * 2]
        names += [] if masters is None else ["float32" if masters == "fp32" else "bfloat16"]
        dtypes = [getattr(torch, name) for name in names]
        self.streams = [torch.empty(case.parameters, dtype=dtype, device=device).normal_() for dtype in dtypes]
        super().__init__([torch.nn.Parameter(self.streams[0])], {})
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
        numel = self.streams[0].numel()
        masters = len(self.streams) > 4
        streams = (*self.streams[:4], self.streams[-1])
        constants = {"BLOCK": self.block, "MASTERS": masters, "num_warps": self.warps}
        _stream[(triton.cdiv(numel, self.block),)](*streams, numel, **constants)
