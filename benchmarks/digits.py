"""The data and the model that both scripts on digits share: scikit-learn's handwritten digits and a residual MLP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

CLASSES = 10
PIXELS = 64


class Data(NamedTuple):
    """Images as rows of pixels from 0 to 1, and the digits that they show."""

    images: Tensor
    labels: Tensor

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Data]:
        """Yields the batches of one epoch, in an order drawn from the generator."""
        order = torch.randperm(len(self.labels), generator=generator)
        for start in range(0, len(order), size):
            index = order[start : start + size]
            yield Data(self.images[index], self.labels[index])


def load() -> tuple[Data, Data]:
    """Returns the 1437 images to train on and the 360 to test on, which are the same in every run."""
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=digits, random_state=0)
    return Data(images[train], labels[train]), Data(images[test], labels[test])


class Block(nn.Module):
    """A residual block: adds the result of two linear layers to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        # A block that begins as the identity keeps the training of a deep stack steady.
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + h


def residual_mlp(width: int, depth: int) -> nn.Module:
    """Makes ``depth`` residual blocks of six parameter tensors each, between two linear layers."""
    blocks = [Block(width) for _ in range(depth)]
    return nn.Sequential(nn.Linear(PIXELS, width), *blocks, nn.LayerNorm(width), nn.Linear(width, CLASSES))


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Returns the share of the images that the model names correctly."""
    return float((model(data.images).argmax(1) == data.labels).float().mean())
