"""The optimizer classes."""

from .adam import Adam, AdamW
from .nadam import NAdam
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "NAdam"]
