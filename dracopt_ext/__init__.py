"""Fused optimizers behind torch.optim's interface: ``import dracopt_ext as optim``.

The classes of :mod:`dracopt_ext.optim` are ours; every other name of ``torch.optim`` is torch's own.
"""

from __future__ import annotations

import re
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch.optim
from torch.optim import lr_scheduler as lr_scheduler
from torch.optim import swa_utils as swa_utils

from .backend import backends as backends
from .backend import notice as _notice
from .clip_grad import clip_grad_norm_ as clip_grad_norm_
from .clip_grad import clip_grad_value_ as clip_grad_value_
from .clip_grad import clip_grads_with_norm_ as clip_grads_with_norm_
from .clip_grad import get_total_norm as get_total_norm
from .grad_scaler import GradScaler as GradScaler
from .optim import *  # noqa: F403
from .optim import __all__ as _ours

if TYPE_CHECKING:  # the names that __getattr__ passes on
    from torch.optim import (  # noqa: F401
        ASGD,
        LBFGS,
        Adadelta,
        Adafactor,
        Adagrad,
        Adamax,
        Muon,
        Optimizer,
        RAdam,
        RMSprop,
        Rprop,
        SparseAdam,
        swap_in_optimizer_params_and_state,
    )

__version__ = "0.1.0"

__all__ = [
    *dict.fromkeys((*torch.optim.__all__, *_ours)),
    "GradScaler",
    "backends",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
]


def _with_our_classes(module: ModuleType) -> ModuleType:
    """Returns a submodule of ``torch.optim``, or a module that replaces its classes by ours and passes on the rest."""
    ours = {name: globals()[name] for name in _ours if hasattr(module, name)}
    if not ours:
        return module
    passing_on = ModuleType(module.__name__.replace("torch.optim", __name__), module.__doc__)
    passing_on.__spec__ = ModuleSpec(passing_on.__name__, None)
    passing_on.__package__ = __name__
    vars(passing_on).update(ours, __getattr__=lambda name: getattr(module, name), __dir__=lambda: dir(module))
    return passing_on


# Makes `import dracopt_ext.lr_scheduler` and `from dracopt_ext.adamw import AdamW` work as with torch.optim.
for _path in [path for path in sys.modules if re.fullmatch(r"torch\.optim\.[a-z]\w*", path)]:
    sys.modules[_path.replace("torch.optim", __name__)] = _with_our_classes(sys.modules[_path])

if (_to_know := _notice()) is not None:
    warnings.warn(_to_know, RuntimeWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    try:
        return getattr(torch.optim, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *torch.optim.__all__})
