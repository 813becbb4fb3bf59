"""Times ``step()``."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .cases import CLIP, STEP, STEP_AND_ZERO, Case, Suite
from .events import make_events
from .peers import OURS, PEERS, SLOW, make_groups, require_equal_work, require_ours, runs, work_of

WARM_UP = 5
CYCLES_PER_SECOND = 2e9
"""The fastest clock that a GPU may have."""
LONGEST_SLEEP = 0.1
"""Seconds within which the host certainly makes the launches of a step."""

HOST, DEVICE, END_TO_END, FIRST, TRAINING = "host", "device", "end to end", "first step", "training step"
"""HOST runs until step() returns, DEVICE between two events on the GPU's stream, END_TO_END until the GPU has done its
work. FIRST is END_TO_END of the first step, which creates the states and, with Triton, compiles. TRAINING is a whole
step of the training: forward, backward and step()."""
Times = dict[str, float]
QUEUE = 900
"""Launches that a GPU certainly queues. With more of them the host waits for the GPU, and then the GPU for the host."""


@dataclass(frozen=True)
class Result:
    """The steps of one peer in one case, in milliseconds."""

    suite: str
    case: Case
    peer: str
    clock: str
    launches: int | None
    """Kernels on a GPU in one step, as the profiler counts them."""
    rounds: int
    median: float
    p10: float
    p90: float
    others: float | None
    """The share of the processors that other processes took meanwhile; None if the system does not tell."""

    @classmethod
    def of(
        cls,
        suite: str,
        case: Case,
        peer: str,
        clock: str,
        launches: int | None,
        seconds: list[float],
        others: float | None,
    ) -> Result:
        milliseconds = torch.tensor(seconds, dtype=torch.float64) * 1e3
        p10, median, p90 = milliseconds.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        return cls(suite, case, peer, clock, launches, len(seconds), median, p10, p90, others)

    @property
    def floor_bytes(self) -> int:
        return (self.case.plain if self.peer == "dracopt plain" else self.case).floor_bytes

    @property
    def gb_per_s(self) -> float:
        """The bandwidth for the bytes that must move, however many did."""
        return self.floor_bytes / self.median / 1e6


def measure(suite_name: str, suite: Suite, case: Case, rounds: int, left_out: set[str]) -> list[Result]:
    """Times all peers of a suite in one case."""
    if case.processes > 1:
        from .fsdp2 import measure_training

        return measure_training(suite_name, suite, case, rounds, left_out)
    if suite.device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()  # the case before left the memory in pieces
    peers = suite.peers if case.peers is None else case.peers
    names = [name for name in peers if (name not in left_out or name == case.baseline) and runs(name, case)]
    stepped = {name: Stepped(name, case, suite.device) for name in names}
    optimizers = {name: stepped[name].optimizer for name in names}
    first = {name: stepped[name].step()[END_TO_END] for name in names}
    for _ in range(WARM_UP):
        for name in names:
            stepped[name].step()
    if case.tail != CLIP:
        require_ours(optimizers, suite.device)
    require_equal_work(optimizers, case)
    launches = {name: stepped[name].count_launches() for name in names}
    if case.large:
        rounds = max(rounds // 5, 2)
    begin, used_by_others = time.perf_counter(), _used_by_others()
    if suite.interleaved:
        times = _in_turn(stepped, rounds, {name: 4 if case.large and name in SLOW else 1 for name in names})
    else:
        before: Callable[[], object] = Caches().fill if case.cold else lambda: None
        times = {name: _alone(stepped[name], rounds, before) for name in names}
    others = None
    if used_by_others is not None:
        others = (_used_by_others() or 0.0) - used_by_others
        others = max(others, 0.0) / (time.perf_counter() - begin) / (os.cpu_count() or 1)
    if case.tail != CLIP:
        require_ours(optimizers, suite.device)
    results = []
    for name in names:
        seconds = {clock: [t[clock] for t in times[name]] for clock in times[name][0]}
        if (launches[name] or 0) >= QUEUE:
            del seconds[DEVICE]
        if suite.device != "cpu":
            seconds[FIRST] = [first[name]]
        results += [
            Result.of(suite_name, case, name, clock, launches[name], of_clock, others)
            for clock, of_clock in seconds.items()
        ]
    return results


class Stepped:
    """Steps one optimizer, with the same gradients in each step."""

    def __init__(self, peer: str, case: Case, device: str) -> None:
        if peer == "dracopt plain":
            case = case.plain
        groups = make_groups(case, device)
        self.optimizer = PEERS[peer](case, groups)
        self.on_gpu = device != "cpu"
        self._gradients: list[torch.Tensor] = []
        if peer == "torch foreach" and case.options.get("nesterov"):
            # torch's foreach SGD adds the momentum to the gradients themselves.
            self._gradients = [p.grad for group in groups for p in group["params"]]
        if case.tail != STEP and (peer not in OURS or case.tail in (CLIP, STEP_AND_ZERO)) and peer != "dracopt step":
            # Gradients that were clipped need no clipping again, and zeros would make other work.
            self._gradients = [p.grad for group in groups for p in group["params"]]
        self._work = work_of(peer, case, self.optimizer)
        self._originals = [gradient.clone() for gradient in self._gradients]

    def step(self) -> Times:
        """Takes a step and returns the seconds that it took, by clock."""
        times = self._step_on_gpu() if self.on_gpu else self._step_on_cpu()
        self._restore()
        return times

    def _restore(self) -> None:
        for gradient, original in zip(self._gradients, self._originals, strict=True):
            gradient.copy_(original)

    def _step_on_cpu(self) -> Times:
        begin = time.perf_counter()
        self._work()
        return {END_TO_END: time.perf_counter() - begin}

    def _step_on_gpu(self) -> Times:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self._work()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        end = time.perf_counter()
        # A second step takes the GPU's own time. The GPU sleeps until the launch, and so never waits for the host. The
        # first step may have compiled a kernel, which the second does not.
        self._restore()
        first, last = make_events()
        sleep: Callable[[int], None] = torch.cuda._sleep
        sleep(int(min(2 * (returned - begin), LONGEST_SLEEP) * CYCLES_PER_SECOND))
        first.record()
        self._work()
        last.record()
        torch.cuda.synchronize()
        return {HOST: returned - begin, DEVICE: first.elapsed_time(last) / 1e3, END_TO_END: end - begin}

    def count_launches(self) -> int | None:
        if not self.on_gpu:
            return None
        steps = 3  # the profiler may lose events at the edges of its window
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(steps):
                self._work()
                torch.cuda.synchronize()
        self._restore()
        return round(sum(not name.startswith(("Memcpy", "Memset")) for name in on_gpu(profile)) / steps)


def on_gpu(profile: Any) -> list[str]:
    """Returns the names of the kernels and copies that ran, without the marks by which torch labels a step there."""
    events = profile.events() or []
    return [event.name for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]


def _in_turn(stepped: Mapping[str, Stepped], rounds: int, every: Mapping[str, int]) -> dict[str, list[Times]]:
    """Steps all in each round, with another one first. A peer whose ``every`` is 4 takes only each fourth round."""
    times: dict[str, list[Times]] = {name: [] for name in stepped}
    with _no_collection():
        for index in range(rounds):
            taking_part = [name for name in stepped if index % every[name] == 0]
            first = index % len(taking_part)
            for name in taking_part[first:] + taking_part[:first]:
                times[name].append(stepped[name].step())
    return times


class Caches:
    """Fills the processor's caches with other data."""

    BYTES = 256 * 2**20
    """More than the caches of nearly all processors hold."""

    def __init__(self) -> None:
        self._data = torch.zeros(self.BYTES // 4)

    def fill(self) -> None:
        self._data.add_(1)


def _alone(stepped: Stepped, rounds: int, before: Callable[[], object]) -> list[Times]:
    """Steps one optimizer, after calling ``before`` each time."""
    times = []
    with _no_collection():
        for _ in range(WARM_UP + rounds):
            before()
            times.append(stepped.step())
    return times[WARM_UP:]


def _used_by_others() -> float | None:
    """Returns the processor time, in seconds, that other processes took since the system started."""
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
