"""The clock around ``step()``."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .cases import Case, Suite
from .peers import PEERS, SLOW, make_groups, require_equal_work, require_native, runs

WARM_UP = 5


@dataclass(frozen=True)
class Result:
    """The steps of one peer in one case, in milliseconds."""

    suite: str
    case: Case
    peer: str
    rounds: int
    median: float
    p10: float
    p90: float
    others: float | None
    """The share of the processors that other processes took meanwhile; None where the system does not tell."""

    @classmethod
    def of(cls, suite: str, case: Case, peer: str, seconds: list[float], others: float | None) -> Result:
        milliseconds = torch.tensor(seconds, dtype=torch.float64) * 1e3
        p10, median, p90 = milliseconds.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        return cls(suite, case, peer, len(seconds), median, p10, p90, others)

    @property
    def floor_bytes(self) -> int:
        return (self.case.plain if self.peer == "dracopt plain" else self.case).floor_bytes

    @property
    def gb_per_s(self) -> float:
        """Of the bytes that have to move, however many did."""
        return self.floor_bytes / self.median / 1e6


def measure(suite_name: str, suite: Suite, case: Case, rounds: int, left_out: set[str]) -> list[Result]:
    """Time all peers of a suite in one case."""
    peers = suite.peers if case.peers is None else case.peers
    names = [name for name in peers if (name not in left_out or name == case.baseline) and runs(name, case)]
    stepped = {name: Stepped(name, case) for name in names}
    optimizers = {name: stepped[name].optimizer for name in names}
    for _ in range(WARM_UP):
        for name in names:
            stepped[name].step()
    require_native(optimizers["dracopt"])
    require_equal_work(optimizers, case)
    if case.large:
        rounds = max(rounds // 5, 2)
    begin, used_by_others = time.perf_counter(), _used_by_others()
    if suite.interleaved:
        times = _in_turn(stepped, rounds, {name: 4 if case.large and name in SLOW else 1 for name in names})
    else:
        times = {name: _alone(stepped[name], rounds) for name in names}
    others = None
    if used_by_others is not None:
        others = (_used_by_others() or 0.0) - used_by_others
        others = max(others, 0.0) / (time.perf_counter() - begin) / (os.cpu_count() or 1)
    require_native(optimizers["dracopt"])
    return [Result.of(suite_name, case, name, times[name], others) for name in names]


class Stepped:
    """One optimizer, whose gradients are the same in each step."""

    def __init__(self, peer: str, case: Case) -> None:
        if peer == "dracopt plain":
            case = case.plain
        groups = make_groups(case)
        self.optimizer = PEERS[peer](case, groups)
        self._gradients: list[torch.Tensor] = []
        if peer == "torch foreach" and case.options.get("nesterov"):
            # That one adds the momentum to the gradients themselves.
            self._gradients = [p.grad for group in groups for p in group["params"]]
        self._originals = [gradient.clone() for gradient in self._gradients]

    def step(self) -> float:
        """The seconds that it took."""
        begin = time.perf_counter()
        self.optimizer.step()
        seconds = time.perf_counter() - begin
        for gradient, original in zip(self._gradients, self._originals, strict=True):
            gradient.copy_(original)
        return seconds


def _in_turn(stepped: Mapping[str, Stepped], rounds: int, every: Mapping[str, int]) -> dict[str, list[float]]:
    """Step all in each round, each round beginning with another; one whose ``every`` is 4 takes each fourth round."""
    times: dict[str, list[float]] = {name: [] for name in stepped}
    with _no_collection():
        for index in range(rounds):
            taking_part = [name for name in stepped if index % every[name] == 0]
            first = index % len(taking_part)
            for name in taking_part[first:] + taking_part[:first]:
                times[name].append(stepped[name].step())
    return times


def _alone(stepped: Stepped, rounds: int) -> list[float]:
    with _no_collection():
        for _ in range(WARM_UP):
            stepped.step()
        return [stepped.step() for _ in range(rounds)]


def _used_by_others() -> float | None:
    """Seconds of processor time that were not this process's, since the system started."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stat.read_text().split(maxsplit=9)[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
