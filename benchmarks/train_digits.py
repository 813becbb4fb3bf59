"""Trains one model on handwritten digits twice, with ``dracopt_ext.AdamW`` and with ``torch.optim.AdamW(fused=True)``.

    python -m benchmarks.train_digits [--epochs N] [--seed N] [--threads N] [--out DIR] [--quick]

Both runs begin with the same weights and see the same batches. At the end the script prints the test accuracies, how
far apart the weights are, and the time spent in ``step()``. ``digits.png`` in ``--out`` shows the losses and the step
times. The script needs the extra ``train``: ``pip install .[train]``.
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from tqdm import tqdm

import dracopt_ext as optim

from .digits import Data, accuracy, load, residual_mlp

WIDTH, DEPTH = 100, 20
BATCH = 128
LEARNING_RATE = 5e-4
SIMD_BLOCK = 16  # float32 elements in 512 bits, the widest block; tails of narrower blocks lie within its tail
OURS, THEIRS = "dracopt_ext.AdamW", "torch.optim.AdamW(fused=True)"
COLORS = {OURS: "#1f5f99", THEIRS: "#f2a65a"}


@dataclass
class Run:
    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)

    def train_on(self, batch: Data) -> None:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(batch.images), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        start = perf_counter()
        self.optimizer.step()
        self.step_ms.append((perf_counter() - start) * 1e3)
        self.losses.append(loss.item())


class Difference(NamedTuple):
    """How far apart the weights of two models are."""

    weights: int
    differing: int
    in_tails: int
    """Differing weights that lie beyond the last whole SIMD block of their tensor."""
    max_ulps: int
    max_absolute: float

    @classmethod
    def between(cls, one: nn.Module, other: nn.Module) -> Difference:
        pairs = [(p.detach(), q.detach()) for p, q in zip(one.parameters(), other.parameters(), strict=True)]
        ulps = [(rank(p) - rank(q)).abs().flatten() for p, q in pairs]
        return cls(
            weights=sum(u.numel() for u in ulps),
            differing=sum(int(u.count_nonzero()) for u in ulps),
            in_tails=sum(int(u[u.numel() // SIMD_BLOCK * SIMD_BLOCK :].count_nonzero()) for u in ulps),
            max_ulps=max(int(u.max()) for u in ulps),
            max_absolute=max(float((p - q).abs().max()) for p, q in pairs),
        )

    def __str__(self) -> str:
        if self.differing == 0:
            return f"all {self.weights:,} are the same, bit for bit"
        return (
            f"{self.differing:,} of {self.weights:,} differ, by {self.max_ulps:,} ulps at most"
            f" (at most {self.max_absolute:.1g} in absolute terms)"
        )


def rank(x: Tensor) -> Tensor:
    """Ranks each float32 number among all of them, so that neighbours, which are an ulp apart, differ by 1."""
    bits = x.view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def train(epochs: int, seed: int, data: Data) -> tuple[Run, Run, list[Difference]]:
    """Returns the two runs, and their difference after each step up to the first that sets them apart."""
    torch.manual_seed(seed)
    model = residual_mlp(WIDTH, DEPTH)
    twin = copy.deepcopy(model)
    ours = Run(OURS, model, optim.AdamW(model.parameters(), LEARNING_RATE))
    theirs = Run(THEIRS, twin, torch.optim.AdamW(twin.parameters(), LEARNING_RATE, fused=True))
    schedulers = [optim.lr_scheduler.CosineAnnealingLR(run.optimizer, epochs) for run in (ours, theirs)]
    generator = torch.Generator().manual_seed(seed)
    early: list[Difference] = []
    # The runs take turns on each batch and in going first, so that other load on the machine slows both alike.
    turn = [ours, theirs]
    with tqdm(total=epochs * -(-len(data.labels) // BATCH), unit="batch", disable=None) as bar:
        for epoch in range(epochs):
            bar.set_description(f"epoch {epoch + 1}/{epochs}")
            for batch in data.batches(BATCH, generator):
                for run in turn:
                    run.train_on(batch)
                turn.reverse()
                if not early or early[-1].differing == 0:
                    early.append(Difference.between(ours.model, theirs.model))
                bar.set_postfix_str(f"loss {ours.losses[-1]:.4f}, torch's {theirs.losses[-1]:.4f}", refresh=False)
                bar.update()
            for scheduler in schedulers:
                scheduler.step()
            if bar.disable:  # because there is no terminal
                losses = f"loss {ours.losses[-1]:.4f}, torch's {theirs.losses[-1]:.4f}"
                print(f"epoch {epoch + 1}/{epochs}: {losses}", file=sys.stderr)
    return ours, theirs, early


def report(ours: Run, theirs: Run, early: list[Difference], test: Data) -> None:
    parameters = list(ours.model.parameters())
    assert isinstance(ours.optimizer, optim.AdamW)
    backend = ", ".join(f"{' and '.join(sorted(names))} ({on})" for on, names in ours.optimizer.last_backend.items())
    print(f"\nResidual MLP of {sum(p.numel() for p in parameters):,} weights in {len(parameters)} tensors")
    print(f"{OURS} ran on the backend: {backend}")

    print(f"\nTest accuracy (one image is {1 / len(test.labels):.2%})")
    for run in (ours, theirs):
        print(f"  {run.name:<30} {accuracy(run.model, test):7.2%}")

    print("\nThe weights of one run against those of the other (1 ulp: from a float32 number to the next)")
    print(f"  after step {1:<6} {early[0]}")
    if len(early) > 1:
        print(f"  after step {len(early):<6} {early[-1]}; {early[-1].in_tails:,} of these are in tails")
    print(f"  after step {len(ours.losses):<6} {Difference.between(ours.model, theirs.model)}")
    if early[-1].in_tails == early[-1].differing > 0:
        print(
            "  Why: torch rounds the tail of a tensor, beyond its last whole SIMD block, differently; all else is the"
        )
        print("  same arithmetic. Then the gradients differ too, and training magnifies that as it would any rounding.")

    print(f"\nTime in step(), with {torch.get_num_threads()} thread(s)")
    for run in (ours, theirs):
        print(f"  {run.name:<30} median {median(run.step_ms):7.3f} ms, sum {sum(run.step_ms) / 1e3:7.3f} s")
    sums = sum(theirs.step_ms) / sum(ours.step_ms)
    print(f"  torch's time over ours: {speedup(ours, theirs):.2f} by the medians, {sums:.2f} by the sums")


def speedup(ours: Run, theirs: Run) -> float:
    return median(theirs.step_ms) / median(ours.step_ms)


def draw(ours: Run, theirs: Run, epochs: int, path: Path) -> None:
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    draw_losses(left, ours, theirs, epochs)
    draw_step_times(right, ours, theirs)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_losses(axes: Axes, ours: Run, theirs: Run, epochs: int) -> None:
    for run, linewidth in ((theirs, 7.0), (ours, 1.8)):
        means = np.array(run.losses).reshape(epochs, -1).mean(axis=1)
        axes.semilogy(range(1, epochs + 1), means, label=run.name, color=COLORS[run.name], linewidth=linewidth)
    axes.set(title="Training loss, mean of each epoch", xlabel="epoch", ylabel="cross entropy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25)


def draw_step_times(axes: Axes, ours: Run, theirs: Run) -> None:
    # The axis ends here, because the few steps that other load held up would squeeze all others into one bin.
    end = 2 * max(median(ours.step_ms), median(theirs.step_ms))
    longer = sum(ms > end for ms in ours.step_ms + theirs.step_ms)
    for run in (theirs, ours):
        color, middle = COLORS[run.name], median(run.step_ms)
        counts, _, _ = axes.hist(run.step_ms, bins=100, range=(0, end), color=color)
        axes.annotate(
            f"median {middle:.2f} ms", (middle, np.max(counts)), (0, 4), textcoords="offset points", ha="center"
        )
    axes.set(
        title=f"Time in one step(): torch's median is {speedup(ours, theirs):.1f} times ours",
        xlabel=f"ms ({longer} of {2 * len(ours.step_ms)} steps took longer than shown)",
        ylabel="steps",
    )
    axes.set_xlim(0, end)
    axes.margins(y=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, help="default: 60, with --quick 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=1, help="threads for both runs (default: 1, as the model is small)"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture (default: out)")
    parser.add_argument("--quick", action="store_true", help="a smoke test of a few seconds")
    args = parser.parse_args()
    epochs = args.epochs or (4 if args.quick else 60)

    torch.set_num_threads(args.threads)
    train_data, test_data = load()
    ours, theirs, early = train(epochs, args.seed, train_data)
    report(ours, theirs, early, test_data)
    args.out.mkdir(parents=True, exist_ok=True)
    draw(ours, theirs, epochs, args.out / "digits.png")
    print(f"\nPicture: {args.out / 'digits.png'}")


if __name__ == "__main__":
    main()
