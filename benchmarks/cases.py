"""Defines what is measured: the tensors, the optimizer and the bytes that every implementation must move."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import dracopt_ext
from dracopt_ext.rule import FLAG

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Storage:
    """How a case's tensors are stored: dtypes by their names in torch, and the order of their elements."""

    param: str = "float32"
    grad: str = "float32"
    state: str = "float32"
    layout: str = "contiguous"
    """``contiguous``, ``channels_last`` (for tensors of four dimensions), ``transposed gradient`` or
    ``expanded gradient`` (one row for all)."""
    distributed: bool = False
    """Each tensor is a DTensor whose only shard is in this process."""


STEP, CLIP_AND_STEP, UNSCALE_CLIP_AND_STEP, CLIP = "step", "clip and step", "unscale, clip and step", "clip alone"
STEP_AND_ZERO = "step and zero"
"""Parts of the tail of a training step. Some clip the gradients by their global norm, to half of it. The last one sets
the gradients to zero in place."""

PLAIN = Storage()
BF16 = Storage("bfloat16", "bfloat16", "bfloat16")
FP16 = Storage("float16", "float16", "float16")
DISTRIBUTED = Storage(distributed=True)


@dataclass(frozen=True)
class Case:
    """One optimizer over a set of tensors."""

    name: str
    optimizer: str
    """The name of the class, in torch.optim and in dracopt_ext."""
    options: Mapping[str, Any]
    bytes_per_parameter: int
    """Bytes to read the parameter, its gradient and states once, and to write the parameter and states once."""
    shapes: Sequence[Shape]
    groups: int = 1
    """How many parameter groups there are, each with as many tensors and a learning rate of its own."""
    storage: Storage = PLAIN
    zero_gradients: bool = False
    """Makes all gradients zeros, not random. A processor's roots and quotients of zeros may take a slower path."""
    baseline: str | None = "torch fused"
    """The peer that the others are compared with; None if no other peer does this work."""
    peers: Sequence[str] | None = None
    """The peers that take part; None if all of the suite do."""
    tail: str = STEP
    """The part of a training step that is timed: the step alone, or more of the tail."""
    cold: bool = False
    """Each step finds other data in the processor's caches, as after a backward pass over a large model."""
    precision: Mapping[str, Any] = field(default_factory=dict)
    """Options of ours beyond torch's, on what becomes of parameters in 16 bits."""
    processes: int = 1
    """With more than one, FSDP2 shards a model of these shapes, and whole training steps are timed, too."""

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def floor_bytes(self) -> int:
        return self.bytes_per_parameter * self.parameters

    @property
    def large(self) -> bool:
        """Says whether a step takes so long that fewer rounds must suffice."""
        return self.parameters > 10_000_000

    @property
    def plain(self) -> Case:
        """This case in contiguous fp32 tensors that are not distributed."""
        return replace(self, storage=PLAIN, precision={}, bytes_per_parameter=FP32_BYTES[self.optimizer])

    def shrunk(self) -> Case:
        """Shrinks the case to a size that only shows that it runs."""
        shapes = [tuple(min(size, 32) for size in shape) for shape in self.shapes[:4]]
        return replace(self, shapes=shapes, groups=min(self.groups, len(shapes)))


@dataclass(frozen=True)
class Suite:
    """Cases that are measured in the same way by the same peers."""

    cases: Sequence[Case]
    peers: Sequence[str]
    interleaved: bool
    """Steps the peers in turn, so that each finds caches that the others filled. Otherwise measures each alone."""
    device: str = "cpu"
    """The type of the device that holds the tensors. Each type has a CSV file and a plot of its own."""


def moments_of(optimizer: str) -> int:
    """Returns how many moments a parameter has: with SGD's momentum, but without those that a flag adds."""
    rule = getattr(dracopt_ext, optimizer)._dracopt_kind.rule
    return len([switch for switch in rule.moments.values() if switch is None or rule.kinds[switch] != FLAG])


FP32_BYTES = {name: 4 * (3 + 2 * moments_of(name)) for name in dracopt_ext.optim.__all__}
OWN = [name for name in dracopt_ext.optim.__all__ if not hasattr(torch.optim, name)]
"""Our classes that torch.optim lacks."""


def adamw(name: str, shapes: Sequence[Shape], options: Mapping[str, Any] | None = None, **more: Any) -> Case:
    bytes_per_parameter = more.pop("bytes_per_parameter", FP32_BYTES["AdamW"])
    options = {"lr": 1e-3, "weight_decay": 1e-2, **(options or {})}
    return Case(name, "AdamW", options, bytes_per_parameter, shapes, **more)


TAIL_BYTES = {CLIP_AND_STEP: 32, UNSCALE_CLIP_AND_STEP: 32, CLIP: 12, STEP_AND_ZERO: 32}


def tail(work: str, tensors: str, shapes: Sequence[Shape], **more: Any) -> Case:
    """Describes the tail of a training step by AdamW. One pass updates, and may zero; one before finds the norm."""
    return adamw(f"{work}, {tensors}", shapes, bytes_per_parameter=TAIL_BYTES[work], tail=work, **more)


def sgd(name: str, shapes: Sequence[Shape], nesterov: bool = True, **more: Any) -> Case:
    bytes_per_parameter = more.pop("bytes_per_parameter", FP32_BYTES["SGD"])
    options = {"lr": 1e-2, "momentum": 0.9, "nesterov": nesterov}
    return Case(name, "SGD", options, bytes_per_parameter, shapes, **more)


def own(name: str, tensors: str, shapes: Sequence[Shape], **more: Any) -> Case:
    """Describes a class that torch lacks, beside a class of ours with as many moments, and written in torch's own
    operations if PEERS has that."""
    storage: Storage = more.get("storage", PLAIN)
    itemsize = 4 if storage == PLAIN else 2
    options = {"lr": 1e-4, "weight_decay": 1e-2}
    bytes_per_parameter = itemsize * FP32_BYTES[name] // 4
    return Case(f"{name}, {tensors}", name, options, bytes_per_parameter, shapes, baseline="torch foreach", **more)


_NORM: list[Shape] = [(768,), (768,)]
_BLOCK: list[Shape] = [
    *_NORM,
    *[(768, 2304), (2304,), (768, 768), (768,)],
    *_NORM,
    *[(768, 3072), (3072,), (3072, 768), (768,)],
]
GPT2_SMALL: list[Shape] = [(50257, 768), (1024, 768), *_BLOCK * 12, *_NORM]


def _bottleneck(inputs: int, width: int, projects: bool) -> list[Shape]:
    norm, wide = [(width,), (width,)], [(4 * width,), (4 * width,)]
    block: list[Shape] = [(width, inputs, 1, 1), *norm, (width, width, 3, 3), *norm, (4 * width, width, 1, 1), *wide]
    return [*block, (4 * width, inputs, 1, 1), *wide] if projects else block


def _resnet50() -> list[Shape]:
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _bottleneck(inputs, width, projects=block == 0)
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


RESNET50 = _resnet50()
SQUARE: list[Shape] = [(8192, 8192)]

ONE_LARGE = adamw("AdamW, 1 tensor of 64M", [(64 * 2**20,)])
"""The case whose step comes closest to the memory's speed. Later cases are compared with its bandwidth."""

# The shapes of a detector: many small tensors and some large ones, in groups by the depth of the layer.
DETECTOR: list[Shape] = [
    *[(256, 256, 3, 3), (256,), (256,)] * 30,
    *[(384, 384), (384,), (384,), (1536, 384), (1536,)] * 12,
    *[(256, 256), (256,)] * 60,
    *[(256,)] * 195,
]
BILLION: list[Shape] = [(4096, 813)] * 300

CAPTURABLE, FUSED = {"capturable": True}, {"fused": True}
"""Options that put the step counts on the GPU."""
COUNTING = ["dracopt", "dracopt triton", "torch fused"]
"""Peers that take these options."""

SUITES = {
    "cpu": Suite(
        cases=[
            ONE_LARGE,
            adamw("AdamW, 1000 tensors of 256", [(256,)] * 1000),
            adamw("AdamW, 1000 of 256, a group each", [(256,)] * 1000, groups=1000),
            adamw("AdamW, 256 LoRA matrices", [(8, 1024), (1024, 8)] * 128),
            adamw("AdamW, GPT-2 small", GPT2_SMALL),
            sgd("SGD Nesterov, 1000 of 256", [(256,)] * 1000),
        ],
        peers=["dracopt", "torch fused", "torch foreach", "torch for-loop", "DeepSpeed CPUAdam"],
        interleaved=True,
    ),
    "storage": Suite(
        cases=[
            adamw("AdamW, all bf16, 64M", SQUARE, storage=BF16, bytes_per_parameter=14),
            adamw("AdamW, all fp16, 64M", SQUARE, storage=FP16, bytes_per_parameter=14),
            *[
                adamw(
                    f"AdamW, {name} with fp32 states, 64M",
                    SQUARE,
                    storage=replace(storage, state="float32"),
                    bytes_per_parameter=22,
                    baseline=None,  # torch's CPU kernels refuse it
                    peers=["dracopt", "dracopt plain"],
                )
                for name, storage in (("bf16", BF16), ("fp16", FP16))
            ],
            *[
                adamw(
                    f"AdamW, {form}, 64M",
                    SQUARE,
                    storage=replace(BF16, state="float32"),
                    precision={"master_weights": masters},
                    bytes_per_parameter=bytes_per_parameter,
                    baseline=None,
                    peers=["dracopt", "dracopt plain"],
                )
                for form, masters, bytes_per_parameter in (
                    ("bf16 with split masters", "split16", 26),
                    ("bf16 with fp32 masters", "fp32", 30),
                )
            ],
            *[
                adamw(
                    f"AdamW, {form} rounded at random, 64M",
                    SQUARE,
                    storage=replace(BF16, state=state),
                    precision={"stochastic_rounding": True},
                    bytes_per_parameter=bytes_per_parameter,
                    baseline="dracopt nearest",
                    peers=["dracopt", "dracopt nearest", "dracopt plain"],
                )
                for form, state, bytes_per_parameter in (
                    ("all bf16,", "bfloat16", 14),
                    ("bf16 with fp32 states,", "float32", 22),
                )
            ],
            *[
                sgd(
                    f"SGD momentum, all {name}, 64M",
                    SQUARE,
                    nesterov=False,
                    storage=storage,
                    bytes_per_parameter=10,
                    baseline="torch for-loop",  # torch's fused kernel leaves whole vectors out
                    peers=["dracopt", "dracopt plain", "torch foreach", "torch for-loop"],
                )
                for name, storage in (("bf16", BF16), ("fp16", FP16))
            ],
            Case(
                "NAdam, 1000 tensors of 256",
                "NAdam",
                {"lr": 1e-3},
                FP32_BYTES["NAdam"],
                [(256,)] * 1000,
                baseline="torch foreach",  # torch has no fused NAdam
                peers=["dracopt", "torch foreach"],
            ),
            adamw("AdamW, ResNet-50 in channels_last", RESNET50, storage=Storage(layout="channels_last")),
            adamw(
                "AdamW, transposed gradient, 64M",
                SQUARE,
                storage=Storage(layout="transposed gradient"),
                peers=["dracopt", "dracopt plain", "torch foreach"],
                baseline="torch foreach",  # torch's fused kernel applies the wrong elements
            ),
            *[
                Case(
                    f"SGD, {gradient}, 64M",
                    "SGD",
                    {"lr": 1e-2},
                    bytes_per_parameter,
                    SQUARE,
                    storage=Storage(layout=gradient),
                    baseline="torch for-loop",
                    peers=["dracopt", "torch foreach", "torch for-loop"],
                )
                for gradient, bytes_per_parameter in (("transposed gradient", 12), ("expanded gradient", 8))
            ],
        ],
        peers=["dracopt", "dracopt plain", "torch fused"],
        interleaved=True,
    ),
    "own": Suite(
        cases=[
            case
            for name in OWN
            for case in (
                own(name, "1 tensor of 64M", SQUARE),
                own(name, "all bf16, 64M", SQUARE, storage=BF16),
                own(name, "all fp16, 64M", SQUARE, storage=FP16),
                own(name, "1000 tensors of 256", [(256,)] * 1000),
            )
        ],
        peers=["dracopt", "dracopt sibling", "torch foreach"],
        interleaved=True,
    ),
    "host": Suite(
        cases=[
            replace(case, name=f"{case.name}{', cold' if cold else ''}", cold=cold)
            for cold in (False, True)
            for case in (
                adamw("AdamW, 1000 tensors of 1", [(1,)] * 1000),
                adamw("AdamW, 1000 of 1, a group each", [(1,)] * 1000, groups=1000),
                adamw(
                    "AdamW, 1000 DTensors of 1",
                    [(1,)] * 1000,
                    storage=DISTRIBUTED,
                    peers=["dracopt", "dracopt plain", "torch fused"],
                ),
            )
        ],
        peers=["dracopt", "torch fused"],
        interleaved=False,
    ),
    "tail": Suite(
        cases=[
            *[tail(work, "1 tensor of 64M", [(64 * 2**20,)]) for work in (CLIP_AND_STEP, UNSCALE_CLIP_AND_STEP)],
            tail(CLIP_AND_STEP, "GPT-2 small", GPT2_SMALL),
            tail(UNSCALE_CLIP_AND_STEP, "GPT-2 small", GPT2_SMALL),
            tail(STEP_AND_ZERO, "GPT-2 small", GPT2_SMALL),
            # A third peer would leave less of the small tensors in the caches.
            *[
                tail(work, "1000 tensors of 256", [(256,)] * 1000, peers=["dracopt", "torch fused"])
                for work in (CLIP_AND_STEP, CLIP)
            ],
            tail(
                CLIP_AND_STEP,
                "500 DTensors of 64 x 64",
                [(64, 64)] * 500,
                storage=DISTRIBUTED,
                peers=["dracopt", "torch fused"],
            ),
        ],
        peers=["dracopt", "dracopt step", "torch fused"],
        interleaved=True,
    ),
    "distributed": Suite(
        cases=[
            adamw("AdamW, 500 DTensors of 64 x 64", [(64, 64)] * 500, storage=DISTRIBUTED),
            adamw("AdamW, 500 DTensors of 1", [(1,)] * 500, storage=DISTRIBUTED),
            sgd(
                "SGD Nesterov, 500 DTensors of 64 x 64",
                [(64, 64)] * 500,
                storage=DISTRIBUTED,
                baseline="torch foreach",  # torch's fused SGD takes no DTensors
                peers=["dracopt", "dracopt plain", "torch foreach"],
            ),
            adamw(
                "AdamW, GPT-2 small by FSDP2",
                GPT2_SMALL,
                processes=2,
                peers=["dracopt", "torch fused", "torch foreach"],
            ),
        ],
        peers=["dracopt", "dracopt plain", "torch fused", "torch foreach"],
        interleaved=True,
    ),
    "gpu tail": Suite(
        cases=[
            tail(UNSCALE_CLIP_AND_STEP, "1B in 300 tensors", BILLION, options=FUSED),
            tail(CLIP_AND_STEP, "1B in 300 tensors", BILLION, options=FUSED),
            tail(STEP_AND_ZERO, "1B in 300 tensors", BILLION, options=FUSED),
            tail(UNSCALE_CLIP_AND_STEP, "1000 tensors of 1024", [(1024,)] * 1000, options=FUSED),
        ],
        peers=["dracopt", "dracopt triton", "dracopt step", "torch fused"],
        interleaved=True,
        device="cuda",
    ),
    "gpu": Suite(
        cases=[
            adamw("AdamW, 1B in 300 tensors", BILLION, peers=["dracopt", "dracopt triton", "torch fused", "stream"]),
            adamw(
                "AdamW, 1B in bf16 with fp32 states",
                BILLION,
                storage=replace(BF16, state="float32"),
                bytes_per_parameter=22,
                baseline=None,  # torch's kernels refuse it
                peers=["dracopt", "dracopt triton", "stream"],
            ),
            adamw(
                "AdamW, 1B in bf16",
                BILLION,
                storage=BF16,
                bytes_per_parameter=14,
                peers=["dracopt", "dracopt triton", "torch fused", "stream"],
            ),
            *[
                adamw(
                    f"AdamW, 1B in bf16 with fp32 states{name}",
                    BILLION,
                    storage=replace(BF16, state="float32"),
                    precision=precision,
                    bytes_per_parameter=bytes_per_parameter,
                    baseline=None,
                    peers=["dracopt", "dracopt triton", "stream"],
                )
                for name, precision, bytes_per_parameter in (
                    (" and split masters", {"master_weights": "split16"}, 26),
                    (" and fp32 masters", {"master_weights": "fp32"}, 30),
                    (", rounded at random", {"stochastic_rounding": True}, 22),
                )
            ],
            adamw(
                "AdamW, 1B, gradients of zeros",
                BILLION,
                zero_gradients=True,
                peers=["dracopt", "dracopt triton", "torch fused", "stream"],
            ),
            *[adamw(f"AdamW, {count} tensors of 1024", [(1024,)] * count) for count in (1, 10, 100, 1000)],
            adamw("AdamW, 1000 of 1024, capturable", [(1024,)] * 1000, options=CAPTURABLE, peers=COUNTING),
            adamw("AdamW, 1000 tensors of 1", [(1,)] * 1000),
            adamw("AdamW, detector, a group for each of 465", DETECTOR, groups=len(DETECTOR)),
            adamw(
                "AdamW, detector, a group each, fused=True",
                DETECTOR,
                groups=len(DETECTOR),
                options=FUSED,
                peers=COUNTING,
            ),
            *[
                own(
                    name,
                    "1B in 300 tensors",
                    BILLION,
                    peers=["dracopt", "dracopt triton", "dracopt sibling", "torch foreach", "stream"],
                )
                for name in OWN
            ],
            adamw("AdamW, 3900 tensors in 30 groups", [(1024,)] * 3900, groups=30),
            adamw("AdamW, ResNet-50", RESNET50),
            sgd("SGD Nesterov, ResNet-50", RESNET50),
            Case(
                "NAdam, ResNet-50",
                "NAdam",
                {"lr": 1e-3},
                FP32_BYTES["NAdam"],
                RESNET50,
                baseline="torch foreach",  # torch has no fused NAdam
                peers=["dracopt", "dracopt triton", "torch foreach"],
            ),
        ],
        peers=["dracopt", "dracopt triton", "torch fused", "torch foreach"],
        interleaved=True,
        device="cuda",
    ),
}
