"""Studies what learning rate, schedule, optimizer and weight decay do to a small model of handwritten digits.

    python -m benchmarks.study_digits [--seeds N] [--out DIR] [--quick]

Every configuration is trained from several seeds. A seed gives all configurations the same first weights and batches.
The accuracies, mean ± standard deviation over the seeds, are printed as Markdown and saved as ``study.csv`` in
``--out``. The script needs the extra ``train``: ``pip install .[train]``.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from statistics import mean, pstdev
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

import dracopt_ext as optim

from .digits import CLASSES, Data, accuracy, load, residual_mlp

BATCH = 64
NOISE = 0.4


class Config(NamedTuple):
    name: str
    make: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
    cosine: bool = False
    """Says whether the learning rate falls to 0 along a cosine, or else is constant."""


@dataclass
class Block:
    title: str
    about: str
    configs: list[Config]
    epochs: int = 10
    width: int = 64
    depth: int = 4
    noise: float = 0.0
    """The share of training labels that are drawn at random."""


def sgd(lr: float, momentum: float = 0.9, nesterov: bool = False, cosine: bool = False, name: str = "") -> Config:
    return Config(name or f"SGD, lr {lr:g}", lambda p: optim.SGD(p, lr, momentum=momentum, nesterov=nesterov), cosine)


def adam(lr: float, cosine: bool = False, name: str = "") -> Config:
    return Config(name or f"Adam, lr {lr:g}", lambda p: optim.Adam(p, lr), cosine)


def adamw(lr: float, decay: float) -> Config:
    return Config(f"AdamW, lr {lr:g}, weight decay {decay:g}", lambda p: optim.AdamW(p, lr, weight_decay=decay), True)


STUDY = [
    Block(
        "Learning rate",
        "SGD has momentum 0.9; the learning rate is constant.",
        [*(sgd(lr) for lr in (0.001, 0.01, 0.1)), *(adam(lr) for lr in (0.0001, 0.001, 0.01))],
    ),
    Block(
        "Schedule for SGD",
        "Momentum 0.9; a constant learning rate, and one that `CosineAnnealingLR` takes to 0.",
        [sgd(0.03, name="SGD, lr 0.03, constant"), sgd(0.03, cosine=True, name="SGD, lr 0.03, cosine")],
    ),
    Block(
        "Schedule for Adam",
        "A constant learning rate, and one that `CosineAnnealingLR` takes to 0.",
        [adam(0.01, name="Adam, lr 0.01, constant"), adam(0.01, cosine=True, name="Adam, lr 0.01, cosine")],
    ),
    Block(
        "Optimizer",
        "All with `CosineAnnealingLR`.",
        [
            sgd(0.03, momentum=0, cosine=True, name="SGD, lr 0.03"),
            sgd(0.03, cosine=True, name="SGD, lr 0.03, momentum 0.9"),
            sgd(0.03, nesterov=True, cosine=True, name="SGD, lr 0.03, Nesterov momentum 0.9"),
            adam(0.001, cosine=True),
            adamw(0.001, 0.01),
        ],
    ),
    Block(
        "Weight decay",
        f"With `CosineAnnealingLR`. {NOISE:.0%} of the training labels are drawn at random, and the "
        "model is large enough to learn many of them by heart; the test labels are right.",
        [adamw(0.003, decay) for decay in (0, 0.1, 1, 3, 10)],
        epochs=25,
        width=128,
        depth=2,
        noise=NOISE,
    ),
]


class Result(NamedTuple):
    """The accuracies of a configuration, one per seed."""

    config: Config
    train: list[float]
    test: list[float]


def with_noise(data: Data, share: float, seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.rand(len(data.labels), generator=generator) < share
    random = torch.randint(CLASSES, data.labels.shape, generator=generator)
    return Data(data.images, torch.where(noisy, random, data.labels))


def fit(block: Block, config: Config, epochs: int, seed: int, data: Data) -> nn.Module:
    torch.manual_seed(seed)
    model = residual_mlp(block.width, block.depth)
    optimizer = config.make(model.parameters())
    scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for images, labels in data.batches(BATCH, generator):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if config.cosine:
            scheduler.step()
    return model


def study(block: Block, epochs: int, seeds: int, train: Data, test: Data, bar: tqdm) -> list[Result]:
    results = [Result(config, [], []) for config in block.configs]
    for seed in range(seeds):
        data = with_noise(train, block.noise, seed)
        for result in results:
            model = fit(block, result.config, epochs, seed, data)
            result.train.append(accuracy(model, data))
            result.test.append(accuracy(model, test))
            bar.update()
        if bar.disable:  # because there is no terminal
            print(f"{block.title}: seed {seed + 1}/{seeds}", file=sys.stderr)
    return results


def markdown(block: Block, results: list[Result]) -> str:
    lowest, *_, highest = sorted(results, key=lambda result: mean(result.test))
    gap = 100 * (mean(highest.test) - mean(lowest.test))
    tied = [result for result in results if isclose(mean(result.test), mean(highest.test))]
    ahead = sum(min(high) > low for *high, low in zip(*(result.test for result in tied), lowest.test, strict=True))
    rows = [f"| {result.config.name} | {percent(result.train)} | {percent(result.test)} |" for result in results]
    names = " and ".join(result.config.name for result in tied)
    return "\n".join(
        [
            f"### {block.title}\n",
            f"{block.about}\n",
            "| configuration | train accuracy, % | test accuracy, % |",
            "| --- | ---: | ---: |",
            *rows,
            f"\nHighest on the test images: {names}. That is {gap:.1f} points above the lowest, "
            f"{lowest.config.name}; ahead of it with {ahead} of {len(highest.test)} seeds.\n",
        ]
    )


def percent(accuracies: list[float]) -> str:
    return f"{100 * mean(accuracies):.1f} ± {100 * pstdev(accuracies):.1f}"


def save(table: list[tuple[Block, list[Result]]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["study", "configuration", "seeds", "train_mean", "train_std", "test_mean", "test_std"])
        for block, results in table:
            for config, train, test in results:
                numbers = [f"{f(accuracies):.5f}" for accuracies in (train, test) for f in (mean, pstdev)]
                writer.writerow([block.title, config.name, len(test), *numbers])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, help="default: 5, with --quick 1")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the table (default: out)")
    parser.add_argument("--quick", action="store_true", help="a smoke test of a few seconds: 2 epochs only")
    args = parser.parse_args()
    seeds = args.seeds or (1 if args.quick else 5)

    torch.set_num_threads(1)  # the layers are too small for several threads to help
    train, test = load()
    with tqdm(total=seeds * sum(len(block.configs) for block in STUDY), unit="run", disable=None) as bar:
        table = [(block, study(block, 2 if args.quick else block.epochs, seeds, train, test, bar)) for block in STUDY]
    print(f"{len(train.labels)} images to train on, {len(test.labels)} to test on", end="; ")
    print(f"accuracies are mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}.\n")
    for block, results in table:
        print(markdown(block, results))
    args.out.mkdir(parents=True, exist_ok=True)
    save(table, args.out / "study.csv")
    print(f"Table: {args.out / 'study.csv'}")


if __name__ == "__main__":
    main()
