"""Times the training of a model like GPT-2 that FSDP2 shards over several processes, and the optimizer's part of it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from .cases import Case, Shape, Suite
from .measure import END_TO_END, TRAINING, Result, Times
from .peers import PEERS, require_equal_work, require_ours

TOKENS, HEAD = 64, 64
WARM_UP = 2
Timed = Mapping[str, list[Times]]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.ModuleList([nn.Linear(width, 3 * width), nn.Linear(width, width)])
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attention[0](self.norms[0](x)).view(*x.shape[:2], 3, -1, min(HEAD, x.shape[2]))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention[1](attended.transpose(1, 2).flatten(2))
        found: Tensor = x + self.perceptron(self.norms[1](x))
        return found


class Model(nn.Module):
    """A transformer whose parameters have these shapes: two embeddings, twelve for each block, and a norm."""

    def __init__(self, shapes: list[Shape]) -> None:
        super().__init__()
        (words, width), (positions, _) = shapes[:2]
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range((len(shapes) - 4) // 12)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.positions.weight[: tokens.shape[1]]
        found: Tensor = self.norm(self.blocks(x))
        return found @ self.words.weight.T

    def loss(self, tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def measure_training(suite_name: str, suite: Suite, case: Case, rounds: int, left_out: set[str]) -> list[Result]:
    """Trains with each peer of a case in turn, in processes of one thread. Times are those of the slowest process."""
    names = [name for name in case.peers or suite.peers if name not in left_out or name == case.baseline]
    rounds = max(rounds // 20, 2)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "times"
        start: Any = start_processes
        start(_train, (case, names, rounds, str(file)), nprocs=case.processes)
        timed: Timed = torch.load(file)
    return [
        Result.of(suite_name, case, name, clock, None, [times[clock] for times in timed[name]], None)
        for name in names
        for clock in (END_TO_END, TRAINING)
    ]


def _train(rank: int, case: Case, names: list[str], rounds: int, file: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}.group", rank=rank, world_size=case.processes)
    models: dict[str, Any] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name in names:
        torch.manual_seed(0)
        models[name] = model = Model(list(case.shapes))
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        optimizers[name] = PEERS[name](case, [{"params": list(model.parameters())}])
    generator = torch.Generator().manual_seed(rank)
    words = case.shapes[0][0]
    times: dict[str, list[Times]] = {name: [] for name in names}
    for number in range(WARM_UP + rounds):
        tokens = torch.randint(words, (1, min(TOKENS, case.shapes[1][0])), generator=generator)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found = _step(models[name], optimizers[name], tokens)
            if number >= WARM_UP:
                times[name].append(found)
        if number == 0:  # later, differences in rounding grow with the gradients that they change
            require_equal_work(optimizers, case)
    require_ours(optimizers, "cpu")
    if rank == 0:
        torch.save(times, file)
    dist.barrier()
    # The models keep gloo's threads. Rarely, these abort a process that ends in the usual way (PyTorch #179291).
    os._exit(0)


def _step(model: Any, optimizer: torch.optim.Optimizer, tokens: Tensor) -> Times:
    """Takes a training step."""
    dist.barrier()
    begin = time.perf_counter()
    optimizer.zero_grad()
    model.loss(tokens).backward()
    dist.barrier()
    before = time.perf_counter()
    optimizer.step()
    end = time.perf_counter()
    slowest = torch.tensor([end - before, end - begin], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return {END_TO_END: float(slowest[0]), TRAINING: float(slowest[1])}
