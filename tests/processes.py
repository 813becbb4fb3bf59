"""Runs a function in several processes, which form a process group of torch.distributed."""

from __future__ import annotations

import faulthandler
import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dracopt_ext import backend

SECONDS = 40
"""The time after which processes that wait for each other are ended."""

# One process imports everything once, and the others are forks of it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "torch.distributed.fsdp", "torch.distributed.checkpoint", "tests.cases"])


def in_processes(count: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls ``function(*args)`` in as many processes, and returns what they return, by rank.

    Args:
        folder: an empty folder, for the group's own file.
        function: must have a name in a module. Other ranks may call it at any other time.

    Raises:
        AssertionError: a process raised something, which is quoted, or ended, or took too long.
    """
    pipes = [FORKS.Pipe(duplex=False) for _ in range(count)]
    by_any_torch = backend._C is not None and backend.ANY_TORCH in (backend._C.__file__ or "")
    processes = [
        FORKS.Process(target=_run, args=(sender, rank, count, folder / "group", by_any_torch, function, args))
        for rank, (_, sender) in enumerate(pipes)
    ]
    try:
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        return _results([receiver for receiver, _ in pipes])
    finally:
        for process in processes:
            process.kill()
            process.join()


def _results(receivers: list[Connection]) -> list[Any]:
    """Returns what was received, and raises as soon as one process has failed, because others may wait for it."""
    results: list[Any] = [None] * len(receivers)
    waiting = dict(zip(receivers, range(len(receivers)), strict=True))
    while waiting:
        ready = wait([*waiting], SECONDS)
        assert ready, f"ranks {[*waiting.values()]} took more than {SECONDS} s"
        for receiver in ready:
            rank = waiting.pop(receiver)  # type: ignore[call-overload]
            try:
                succeeded, results[rank] = receiver.recv()  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} has ended") from None
            assert succeeded, f"rank {rank}:\n{results[rank]}"
    return results


def _run(
    sender: Connection,
    rank: int,
    count: int,
    file: Path,
    by_any_torch: bool,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    faulthandler.enable()
    try:
        if by_any_torch:
            from . import by_any_torch as _  # noqa: F401
        dist.init_process_group(
            "gloo", init_method=f"file://{file}", rank=rank, world_size=count, timeout=timedelta(seconds=SECONDS)
        )
        result = function(*args)
        dist.barrier()
        sender.send((True, result))  # the process is then ended from outside
    except BaseException:
        sender.send((False, traceback.format_exc()))
