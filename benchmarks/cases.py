"""What is measured: the tensors, the optimizer and the bytes that no implementation can avoid to move."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One optimizer over a set of fp32 tensors."""

    name: str
    optimizer: str
    """The class's name, the same in torch.optim and in dracopt_ext."""
    options: Mapping[str, Any]
    bytes_per_parameter: int
    """Read the parameter, its gradient and states once; write the parameter and states once."""
    shapes: Sequence[Shape]
    group_each: bool = False
    """One parameter group for each tensor, with a learning rate of its own."""

    @property
    def groups(self) -> int:
        return len(self.shapes) if self.group_each else 1

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def floor_bytes(self) -> int:
        return self.bytes_per_parameter * self.parameters

    @property
    def large(self) -> bool:
        """Whether a step takes so long that fewer rounds have to do."""
        return self.parameters > 10_000_000

    def shrunk(self) -> Case:
        """The same case in a size that only shows that it runs."""
        return replace(self, shapes=[tuple(min(size, 32) for size in shape) for shape in self.shapes[:4]])


@dataclass(frozen=True)
class Suite:
    """Cases that are measured in the same way by the same peers."""

    cases: Sequence[Case]
    peers: Sequence[str]
    interleaved: bool
    """Step the peers in turn, so that each finds the caches filled by the others. Else each is measured on its own."""


def adamw(name: str, shapes: Sequence[Shape], group_each: bool = False) -> Case:
    return Case(name, "AdamW", {"lr": 1e-3, "weight_decay": 1e-2}, 28, shapes, group_each)


def sgd(name: str, shapes: Sequence[Shape]) -> Case:
    return Case(name, "SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True}, 20, shapes)


_NORM: list[Shape] = [(768,), (768,)]
_BLOCK: list[Shape] = [
    *_NORM,
    *[(768, 2304), (2304,), (768, 768), (768,)],
    *_NORM,
    *[(768, 3072), (3072,), (3072, 768), (768,)],
]
GPT2_SMALL: list[Shape] = [(50257, 768), (1024, 768), *_BLOCK * 12, *_NORM]

ONE_LARGE = adamw("AdamW, 1 tensor of 64M", [(64 * 2**20,)])
"""As close to the memory's speed as a step gets: what the other cases' bandwidth is compared with."""

SUITES = {
    "cpu": Suite(
        cases=[
            adamw("AdamW, 1000 tensors of 256", [(256,)] * 1000),
            adamw("AdamW, 1000 of 256, a group each", [(256,)] * 1000, group_each=True),
            adamw("AdamW, 256 LoRA matrices", [(8, 1024), (1024, 8)] * 128),
            adamw("AdamW, GPT-2 small", GPT2_SMALL),
            ONE_LARGE,
            sgd("SGD Nesterov, 1000 of 256", [(256,)] * 1000),
        ],
        peers=["dracopt", "torch fused", "torch foreach", "torch for-loop", "DeepSpeed CPUAdam"],
        interleaved=True,
    ),
    "host": Suite(
        cases=[
            adamw("AdamW, 1000 tensors of 1", [(1,)] * 1000),
            adamw("AdamW, 1000 of 1, a group each", [(1,)] * 1000, group_each=True),
        ],
        peers=["dracopt", "torch fused"],
        interleaved=False,
    ),
}
