"""The base of the classes that torch.optim lacks."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..containers import as_number, as_tuple
from ..rule import DECAY_RATES, NUMBER
from ._base import FusedOptimizer
from ._context import Options, given_context


class TorchOptions(Options, total=False):
    """The options of ``Options``, and those that the classes of torch.optim share."""

    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None


class OwnOptimizer(FusedOptimizer):
    """Base of a class that torch.optim lacks, which behaves as if torch had it.

    The reference steps the parameters that the kernels do not serve. It refuses ``capturable=True`` for a class that
    counts steps, as torch does on the CPU. Sparse gradients and ``differentiable=True`` raise. Complex parameters count
    as pairs of real numbers; ``fused=True`` does not take them, as in torch.

    Args:
        params: tensors, named parameters or groups to optimize.
        hyperparameters: the defaults of all hyperparameters of the rule, by the keys of a parameter group.
        maximize: ascend instead of descending (default False).
        foreach, fused: None (default), True or False, but not both True. ``fused=True`` sets what GradScaler looks for;
            neither chooses the engine.
        capturable: keep the count of steps, if there is one, on the parameter's device (default False).
        differentiable: must be False.
        options: as for :class:`dracopt_ext.Adam`.

    Raises:
        ValueError: a number is negative or NaN, or one of a pair of decay rates is not at least 0 and less than 1.
        RuntimeError: ``differentiable`` is true, or ``foreach`` and ``fused`` are.
        TypeError: ``hyperparameters`` are incomplete, one is no number, or an option is unknown.
    """

    def __init__(
        self,
        params: ParamsT,
        hyperparameters: dict[str, Any],
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._dracopt_check(hyperparameters)
        if differentiable:
            raise RuntimeError(f"{type(self).__name__} does not support differentiable=True")
        if foreach and fused:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        shared = {"maximize": maximize, "foreach": foreach, "capturable": capturable, "fused": fused}
        with given_context(self, options):
            super().__init__(params, {**hyperparameters, **shared, "differentiable": False})
        if fused:
            self._step_supports_amp_scaling = True

    def _dracopt_check(self, hyperparameters: dict[str, Any]) -> None:
        """Raises for a hyperparameter that is missing or cannot be right, where possible in torch's words."""
        for name, kind in self._dracopt_kind.rule.kinds.items():
            if name not in hyperparameters:
                raise TypeError(f"the constructor of {type(self).__name__} leaves out the hyperparameter {name!r}")
            value = hyperparameters[name]
            if kind == NUMBER:
                if isinstance(value, Tensor) and value.numel() != 1:
                    raise ValueError(f"Tensor {name} must be 1-element")
                if not as_number(value, name) >= 0:
                    words = {"lr": "learning rate", "eps": "epsilon value"}.get(name, f"{name} value")
                    raise ValueError(f"Invalid {words}: {value}")
            elif kind == DECAY_RATES:
                rates = as_tuple(value, name)
                if len(rates) != 2:
                    raise ValueError(f"{name} must be 2 numbers, not {len(rates)}")
                for index, rate in enumerate(rates):
                    if not 0 <= as_number(rate, name) < 1:
                        raise ValueError(f"Invalid beta parameter at index {index}: {rate}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key in self.defaults.keys() - self._dracopt_kind.rule.kinds.keys():
                group.setdefault(key, self.defaults[key])
