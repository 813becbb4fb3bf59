"""The base class of all optimizers: step(), the options beyond torch's, and checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT, StateDict

from .. import backend as backend_module
from ..clip_grad import zero_gradients
from ..containers import Group
from . import _precision, _release
from ._checkpoints import check_loaded, take_over, without_masters
from ._context import Context, checked_norm, context_of
from ._foreign import translated
from ._kind import Kind
from ._step import Step


class FusedOptimizer(torch.optim.Optimizer):
    """Mixed in before a ``torch.optim`` class: keeps its constructor, state and checkpoints, and replaces its step.

    ``OwnOptimizer`` stands in for a class that torch.optim lacks. A subclass names its kind. Each step decides for
    every parameter which engine updates it: the native kernels if they can, otherwise torch's own implementation.

    Our names must not clash with those of users' subclasses. Every name that is not torch's begins with ``_dracopt``,
    except ``backend``, ``state_dtype``, ``last_backend``, ``max_grad_norm``, ``error_if_nonfinite``, ``grad_norm``,
    ``master_params`` and ``release_gradients``.
    """

    _dracopt_kind: ClassVar[Kind]
    _dracopt_context: Context  # context_of() finds it, or makes it if the constructor was skipped

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "_dracopt_kind" in vars(cls):
            cls._dracopt_kind.belong_to(cls)

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        # A subclass may call super(Adam, self).__init__(params, defaults), which initializes an Optimizer in torch.
        torch.optim.Optimizer.__init__(self, params, defaults)

    @property
    def backend(self) -> Any:
        """The backend that was asked for; None if each step may choose.

        A value that is none of ours (a subclass's own ``self.backend = "nccl"``) is kept and means nothing to us.
        """
        return self.__dict__.get("backend", context_of(self).backend)

    @backend.setter
    def backend(self, value: Any) -> None:
        if value is None or (isinstance(value, str) and value in backend_module.NAMES):
            context_of(self).backend = backend_module.resolve(value)
            self.__dict__.pop("backend", None)
        else:
            self.__dict__["backend"] = value

    @property
    def state_dtype(self) -> Any:
        """The dtype of the moments that are created or loaded from now on; None stands for each parameter's own.

        A mapping with a wrong name or dtype raises a ValueError. Another value that is none of ours is kept and means
        nothing to us.
        """
        dtype = context_of(self).precision.state_dtype
        return self.__dict__.get("state_dtype", dict(dtype) if isinstance(dtype, Mapping) else dtype)

    @state_dtype.setter
    def state_dtype(self, value: Any) -> None:
        precision = replace(
            context_of(self).precision, state_dtype=dict(value) if isinstance(value, Mapping) else value
        )
        try:
            precision.check(self._dracopt_kind.rule.moments)
        except ValueError:
            if isinstance(value, Mapping):
                raise
            self.__dict__["state_dtype"] = value
            return
        for index in range(len(self.__dict__.get("param_groups", ()))):
            _precision.check_group(self, precision, index)
        context_of(self).precision = precision
        self.__dict__.pop("state_dtype", None)

    @property
    def max_grad_norm(self) -> float | None:
        """The largest global L2 norm of the gradients; None clips nothing. It may change between steps."""
        return context_of(self).max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        most = checked_norm(value)
        if most is not None and context_of(self).release is not None:
            raise ValueError(_release.CLIPPING)
        context_of(self).max_grad_norm = most

    @property
    def error_if_nonfinite(self) -> bool:
        """If this is true, a step raises where the norm of the gradients is not finite."""
        return context_of(self).error_if_nonfinite

    @error_if_nonfinite.setter
    def error_if_nonfinite(self, value: bool) -> None:
        if value and context_of(self).release is not None:
            raise ValueError(_release.CLIPPING)
        context_of(self).error_if_nonfinite = bool(value)

    @property
    def grad_norm(self) -> Any:
        """The global L2 norm of all gradients, before clipping, in the last step that had to find it.

        A number in fp64 on the gradients' device; None before a step with ``max_grad_norm`` or ``error_if_nonfinite``.
        Reading its value waits for a GPU; a step that only clips does not.
        """
        return self.__dict__.get("grad_norm", context_of(self).grad_norm)

    @grad_norm.setter
    def grad_norm(self, value: Any) -> None:
        self.__dict__["grad_norm"] = value  # a subclass may keep a norm of its own

    @property
    def last_backend(self) -> dict[str, frozenset[str]]:
        """The backends that updated parameters in the last step, by device type.

        ``native``, ``triton``, ``reference`` or ``torch`` (torch's own implementation, where ours does not serve the
        parameter). Empty before the first step, and after a step that updated nothing. A GPU's kernels also count if
        they found an overflow, because the host does not know that.
        """
        context = context_of(self)
        ran = {device: set(names) for device, names in context.others_ran.items()}
        for device, name in context.plan_ran.updated if context.plan_ran is not None else ():
            ran.setdefault(device, set()).add(name)
        return {device: frozenset(names) for device, names in ran.items()}

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        try:
            _precision.check_group(self, context_of(self).precision, len(self.param_groups) - 1)
            release = context_of(self).release
            if release is not None:
                release.check(len(self.param_groups) - 1)
                release.watch(len(self.param_groups) - 1)
        except (ValueError, RuntimeError):
            self.param_groups.pop()
            raise

    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None, *, zero_grad: bool = False) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss, which ``step`` then returns.
            zero_grad: sets the gradients to zero in place, in the pass that updates (default False). Captured graphs
                need gradients that stay. After an overflow a GradScaler calls ``step`` only with ``fused=True``, and
                then the gradients are zeroed, too.

        Returns:
            What ``closure`` returned; None without one.

        Raises:
            ValueError, TypeError, KeyError: for a parameter, state or hyperparameter that cannot be right.
            RuntimeError: the ``backend`` does not serve a parameter; the norm is not finite and ``error_if_nonfinite``
                is set; a CUDA graph could not replay this step; a gradient is sparse and torch's class takes none; a
                step of this optimizer is running; or a GPU fails.

        Parameters, states and step counts are then as before, except after a GPU has failed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        step = Step(self, zeroes=zero_grad)
        if step.context.release is not None:
            step.context.release.begin_again()
        counts_for_rounding = bool(step.context.precision.stochastic_rounding)
        for group in self.param_groups if counts_for_rounding else ():
            _precision.advance(group, 0)  # a group that takes no entry must raise before the update
        step.take()
        for group in self.param_groups if counts_for_rounding else ():
            _precision.advance(group, 1)
        return loss

    def master_params(self) -> list[torch.Tensor]:
        """Returns for each parameter, in the order of the groups, the tensor from which it is rounded.

        For averages, norms and exports: a parameter that has no master stands for itself, and a master is an fp32 copy.
        Change the parameter instead of the copy. The next step begins from the parameter, whatever its master was.
        """
        with torch.no_grad():
            return _precision.master_params(self, context_of(self).precision)

    def release_gradients(self) -> _release.GradientRelease:
        """Steps each parameter inside of ``backward()`` from now on, and frees its gradient at once.

        No more than the gradients of a few layers exist at any time. Everything else stays as it is: the training loop,
        which must still call ``step()`` after each backward, parameter groups, schedulers and checkpoints. Hooks of the
        optimizer run in ``step()``.

        Returns:
            A handle whose ``remove()`` switches this off, as does the end of its ``with`` block.

        Raises:
            ValueError: ``max_grad_norm`` or ``error_if_nonfinite`` is set, or some parameter has a gradient already.
            RuntimeError: there are other processes, and some parameter is not distributed over them; or the class
                overrides a method that only torch's step calls. A backward raises it as well if a parameter gets a
                second gradient before ``step()``, and so does ``step()`` under a GradScaler.
        """
        context, new = context_of(self), _release.GradientRelease(self)
        if context.release is not None:
            context.release.remove()
        context.release = new
        return new

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Removes all gradients, or with ``set_to_none=False`` sets them to zero in place, in one pass."""
        if set_to_none:
            super().zero_grad()
            return
        optimizer: Any = self
        if not hasattr(optimizer, "_zero_grad_profile_name"):
            optimizer._patch_step_function()
        with torch.autograd.profiler.record_function(optimizer._zero_grad_profile_name):
            zero_gradients([p for group in self.param_groups for p in group["params"]])

    def __getstate__(self) -> dict[str, Any]:
        # torch drops all attributes, because hooks among them may not pickle. The user asked for these.
        kept: dict[str, Any] = {"_dracopt_context": copy.copy(context_of(self))}
        if "_step_supports_amp_scaling" in self.__dict__:
            kept["_step_supports_amp_scaling"] = self.__dict__["_step_supports_amp_scaling"]
        return {**super().__getstate__(), **kept}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Loads what :meth:`state_dict` of this class or of torch's returned. Differs from torch's in four points:

        - Masters keep their dtype. They begin from the parameters if the dict has none, and are left out if the
          optimizer has none. Load the model first. Dicts of TransformerEngine's optimizers, and of the wrappers of
          apex, DeepSpeed (without ZeRO) and Megatron (without its distributed optimizer), load with their masters.
        - The moments take the dtype ``state_dtype`` if that was given, otherwise the parameter's, as in torch.
        - NAdam's ``mu_product`` is not rounded to the parameter's dtype.
        - No tensor is shared with the dict.

        Raises:
            ValueError: masters have other shapes or dtypes than the optimizer's, or are too few. Nothing is loaded
                then.
        """
        saved: StateDict = {}

        def take(final: StateDict) -> StateDict:
            saved.update(check_loaded(self, translated(self, final)))
            return without_masters(self, saved)

        handles = [
            # These run after the user's pre-hooks, which may have replaced the dict, and before the post-hooks.
            self.register_load_state_dict_pre_hook(lambda _, final: take(final)),
            self.register_load_state_dict_post_hook(lambda _: take_over(self, saved), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
