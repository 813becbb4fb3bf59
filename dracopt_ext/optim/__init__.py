"""The optimizer classes. This is the only list of them."""

from .adam import Adam, AdamW
from .lion import Lion
from .nadam import NAdam
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Lion", "NAdam"]
