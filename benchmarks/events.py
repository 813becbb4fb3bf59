"""Events on a GPU's stream."""

from __future__ import annotations

from collections.abc import Callable

import torch


def make_events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Makes events that take the time between two points of the current stream."""
    make: Callable[..., torch.cuda.Event] = torch.cuda.Event
    return make(enable_timing=True), make(enable_timing=True)
