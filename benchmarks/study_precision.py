"""Studies what becomes of training in bf16: with plain updates, with rounding at random, and with master weights.

    python -m benchmarks.study_precision [--seeds N] [--out DIR] [--quick]

Two models are trained from several seeds: a residual network on handwritten digits, and a small model that predicts the
next character of Python's own reference (the text that ``help()`` shows). A seed gives all ways the same first weights
and batches. The losses at the end, mean ± standard deviation over the seeds, are printed as Markdown, and
``precision.png`` in ``--out`` shows all curves. The script needs the extra ``train``: ``pip install .[train]``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, pstdev
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import dracopt_ext as optim

from .digits import load, residual_mlp


class Way(NamedTuple):
    """A way to keep parameters, and the options that it needs beside the learning rate."""

    name: str
    dtype: torch.dtype
    options: dict[str, Any]
    style: dict[str, Any]
    """The style of its curve. Curves that lie upon each other must all be seen."""


WAYS = [
    Way("fp32", torch.float32, {}, {"color": "#b0b7bf", "linewidth": 6}),
    Way("bf16, plain", torch.bfloat16, {"state_dtype": torch.float32}, {"color": "#c44e52"}),
    Way(
        "bf16, rounded at random",
        torch.bfloat16,
        {"state_dtype": torch.float32, "stochastic_rounding": True},
        {"color": "#f2a65a", "linewidth": 2.5},
    ),
    Way(
        "bf16 with master weights",
        torch.bfloat16,
        {"state_dtype": torch.float32, "master_weights": "split16"},
        {"color": "#1f5f99", "linestyle": (0, (2, 3))},
    ),
]

Batch = tuple[Tensor, Tensor]


@dataclass
class Task:
    title: str
    make: Callable[[], nn.Module]
    batches: Callable[[torch.Generator, int], Iterator[Batch]]
    """Yields so many batches of inputs and labels."""
    lr: float
    steps: int
    scale: str
    """The scale of the loss in the plot."""
    losses: dict[str, list[list[float]]] = field(default_factory=dict)
    """By the way's name and seed, the loss of each step."""


class Characters(nn.Module):
    """Predicts a character from those before it, by a hidden layer over their embeddings (Bengio et al. 2003)."""

    CONTEXT, EMBEDDING, HIDDEN, VOCABULARY = 16, 32, 256, 128

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(self.VOCABULARY, self.EMBEDDING)
        self.hidden = nn.Linear(self.CONTEXT * self.EMBEDDING, self.HIDDEN)
        self.output = nn.Linear(self.HIDDEN, self.VOCABULARY)

    def forward(self, characters: Tensor) -> Tensor:
        found: Tensor = self.output(torch.tanh(self.hidden(self.embedding(characters).flatten(1))))
        return found


def text() -> Tensor:
    """Returns Python's reference as numbers of ASCII characters."""
    from pydoc_data.topics import topics

    whole = "".join(topics[name] for name in sorted(topics))
    return torch.tensor(list(whole.encode("ascii", "ignore")), dtype=torch.int64)


def character_batches(generator: torch.Generator, steps: int) -> Iterator[Batch]:
    numbers = text()
    for _ in range(steps):
        first = torch.randint(len(numbers) - Characters.CONTEXT, (256, 1), generator=generator)
        windows = numbers[first + torch.arange(Characters.CONTEXT + 1)]
        yield windows[:, :-1], windows[:, -1]


def digit_batches(generator: torch.Generator, steps: int) -> Iterator[Batch]:
    data, _ = load()
    while True:
        for batch in data.batches(128, generator):
            if steps == 0:
                return
            steps -= 1
            yield batch.images, batch.labels


def train(task: Task, way: Way, seed: int, steps: int) -> list[float]:
    torch.manual_seed(seed)
    model = task.make().to(way.dtype)
    optimizer = optim.AdamW(model.parameters(), lr=task.lr, weight_decay=0, **way.options)
    losses = []
    for inputs, labels in task.batches(torch.Generator().manual_seed(seed), steps):
        optimizer.zero_grad()
        outputs = model(inputs.to(way.dtype) if inputs.is_floating_point() else inputs)
        loss = nn.functional.cross_entropy(outputs.float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def last(losses: list[float]) -> float:
    """Returns the mean loss of the last twentieth of the steps."""
    return mean(losses[-max(1, len(losses) // 20) :])


def markdown(task: Task) -> str:
    rows = []
    for way in WAYS:
        ends = [last(losses) for losses in task.losses[way.name]]
        rows.append(f"| {way.name} | {mean(ends):.4f} ± {pstdev(ends):.4f} |")
    return "\n".join([f"### {task.title}\n", "| parameters | loss at the end |", "| --- | ---: |", *rows, ""])


def plot(tasks: list[Task], path: Path) -> None:
    figure, axes = plt.subplots(1, len(tasks), figsize=(11, 4), layout="constrained")
    for ax, task in zip(axes, tasks, strict=True):
        for way in WAYS:
            curves = np.array(task.losses[way.name])
            width = max(1, curves.shape[1] // 50)
            smooth = np.array([np.convolve(curve, np.ones(width) / width, "valid") for curve in curves])
            steps = np.arange(smooth.shape[1]) + width
            ax.plot(steps, smooth.mean(0), label=way.name, **way.style)
            ax.fill_between(steps, smooth.min(0), smooth.max(0), color=way.style["color"], alpha=0.15, linewidth=0)
        ax.set(title=task.title, xlabel="step", ylabel="training loss", yscale=task.scale)
        ax.grid(alpha=0.3)
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


TASKS = [
    Task("Digits, lr 1e-4", lambda: residual_mlp(100, 6), digit_batches, lr=1e-4, steps=1500, scale="log"),
    Task("Characters, lr 1e-4", Characters, character_batches, lr=1e-4, steps=3000, scale="linear"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, help="default: 5, with --quick 1")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot (default: out)")
    parser.add_argument("--quick", action="store_true", help="a smoke test of a few seconds: 30 steps only")
    args = parser.parse_args()
    seeds = args.seeds or (1 if args.quick else 5)

    torch.set_num_threads(1)  # the layers are too small for several threads to help
    with tqdm(total=len(TASKS) * len(WAYS) * seeds, unit="run", disable=None) as bar:
        for task in TASKS:
            for seed in range(seeds):
                for way in WAYS:
                    losses = train(task, way, seed, 30 if args.quick else task.steps)
                    task.losses.setdefault(way.name, []).append(losses)
                    bar.update()
                if bar.disable:  # because there is no terminal
                    print(f"{task.title}: seed {seed + 1}/{seeds}", file=sys.stderr)
    for task in TASKS:
        print(markdown(task))
    plot(TASKS, args.out / "precision.png")
    print(f"Plot: {args.out / 'precision.png'}")


if __name__ == "__main__":
    main()
