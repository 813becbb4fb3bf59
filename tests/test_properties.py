"""The native kernels and the reference hold the same bits after each action. Shapes, strides, dtypes, options and
actions between the steps are arbitrary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from .cases import CASES, NoOp, assert_same_bits, snapshot

# fp64 is tested in test_dtypes.py because the reference has no fused multiply-add there.
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, 1.0, float("inf"), -float("inf"), float("nan"), 1e-40, 65504.0, 1e30]


@dataclass(frozen=True)
class Placement:
    """Places the elements of a tensor: the order of its dimensions, the gaps in them, and the first place."""

    order: tuple[int, ...]
    steps: tuple[int, ...]
    offset: int
    expanded: tuple[bool, ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        strides, stride = [0] * tensor.dim(), 1
        for d in reversed(self.order):
            stride *= self.steps[d]
            strides[d] = stride
            stride *= max(tensor.shape[d], 1)
        buffer = torch.full((stride + self.offset + 1,), 7.5, dtype=tensor.dtype, device=tensor.device)
        placed = buffer.as_strided(tensor.shape, strides, self.offset).copy_(tensor)
        for d, expanded in enumerate(self.expanded):
            if expanded and tensor.shape[d] > 0:
                placed = placed.narrow(d, 0, 1).expand(tensor.shape)
        return placed


def placements(dims: int, expanded: bool = False) -> st.SearchStrategy[Placement]:
    return st.builds(
        Placement,
        order=st.permutations(range(dims)).map(tuple),
        steps=st.tuples(*[st.integers(1, 3)] * dims),
        offset=st.integers(0, 5),
        expanded=st.tuples(*[st.booleans() if expanded else st.just(False)] * dims),
    )


@dataclass(frozen=True)
class Spec:
    """One parameter and its gradients."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    grad_dtype: torch.dtype
    place: Placement
    place_grad: Placement
    seed: int
    special: bool

    def numbers(self, seed: int, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        found = torch.randn(self.shape, generator=generator)
        if self.special and found.numel() > 0:
            found.view(-1)[torch.randint(found.numel(), (1,), generator=generator)] = SPECIAL[seed % len(SPECIAL)]
        return found.to(dtype)


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    return Spec(
        shape,
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(DTYPES)),
        draw(placements(len(shape))),
        draw(placements(len(shape), expanded=True)),
        draw(st.integers(0, 999)),
        draw(st.booleans()),
    )


def actions() -> st.SearchStrategy[tuple[Any, ...]]:
    return st.one_of(
        st.tuples(st.just("step"), st.sets(st.integers(0, 5))),
        st.tuples(st.just("step"), st.just(set())),
        st.tuples(st.just("set"), st.sampled_from(["lr", "weight_decay"]), st.sampled_from([0.0, 0.01, 0.5, 1.0])),
        st.tuples(st.just("set"), st.just("maximize"), st.booleans()),
        st.tuples(st.just("scale"), st.sampled_from([1.0, 2.0, 3.0, 65536.0])),
        st.tuples(st.just("add"), specs()),
        st.tuples(st.just("reverse"), st.none()),
        st.tuples(st.just("cast"), st.integers(0, 5), st.sampled_from(DTYPES)),
        st.tuples(st.just("place states"), st.integers(1, 3), st.booleans()),
        st.tuples(st.just("cast states"), st.sampled_from(DTYPES)),
        st.tuples(st.just("forget"), st.integers(0, 5)),
    )


class Trained:
    """An optimizer with the actions on it. ``bring`` decides where its tensors lie."""

    def __init__(
        self,
        make: Any,
        options: dict[str, Any],
        parameters: list[Spec],
        bring: Callable[[Tensor], Tensor] = Tensor.clone,
    ) -> None:
        self.bring = bring
        self.specs: dict[nn.Parameter, Spec] = {}
        self.seed = 0
        self.optimizer = make([self.parameter(spec) for spec in parameters], **options)

    def parameter(self, spec: Spec) -> nn.Parameter:
        p = nn.Parameter(spec.place(self.bring(spec.numbers(0, spec.dtype))))
        p.grad_dtype = spec.grad_dtype
        self.specs[p] = spec
        return p

    @property
    def params(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def act(self, action: str, *arguments: Any) -> None:
        getattr(self, action.replace(" ", "_"))(*arguments)

    def step(self, without: set[int]) -> None:
        self.seed += 1
        for i, p in enumerate(self.params):
            spec = self.specs[p]
            p.grad = None
            if i not in without:
                p.grad = spec.place_grad(self.bring(spec.numbers(self.seed, spec.grad_dtype)))
        self.optimizer.step()

    def set(self, key: str, value: Any) -> None:
        self.optimizer.param_groups[-1][key] = value

    def scale(self, scale: float) -> None:
        self.optimizer.grad_scale = self.bring(torch.tensor(scale))

    def add(self, spec: Spec) -> None:
        self.optimizer.add_param_group({"params": [self.parameter(spec)], "lr": 0.25})

    def reverse(self, _: None) -> None:
        self.optimizer.param_groups.reverse()
        self.optimizer.param_groups[0]["params"].reverse()

    def cast(self, index: int, dtype: torch.dtype) -> None:
        p = self.params[index % len(self.params)]
        p.grad = None
        p.data = p.data.to(dtype)

    def place_states(self, step: int, backwards: bool) -> None:
        for p in self.params:
            order = tuple(range(p.dim()))[:: -1 if backwards else 1]
            place = Placement(order, (step,) * p.dim(), step, (False,) * p.dim())
            self.change_states(p, place)

    def cast_states(self, dtype: torch.dtype) -> None:
        for p in self.params:
            self.change_states(p, lambda moment: moment.to(dtype))

    def change_states(self, p: nn.Parameter, change: Any) -> None:
        for name, value in self.optimizer.state.get(p, {}).items():
            if name not in ("step", "mu_product"):
                self.optimizer.state[p][name] = change(value)

    def forget(self, index: int) -> None:
        self.optimizer.state.pop(self.params[index % len(self.params)], None)


programs = given(
    case=st.sampled_from(CASES),
    state_dtype=st.sampled_from([None, *DTYPES]),
    parameters=st.lists(specs(), min_size=1, max_size=4),
    program=st.lists(actions(), min_size=1, max_size=8),
)


@pytest.mark.long
@programs
@settings(max_examples=600, deadline=None, derandomize=True)
def test_native_and_reference_agree(
    case: Any, state_dtype: torch.dtype | None, parameters: list[Spec], program: list[tuple[Any, ...]]
) -> None:
    options = {**case.options, "state_dtype": state_dtype}
    native = Trained(case.ours, {**options, "backend": "native"}, parameters)
    reference = Trained(case.ours, {**options, "backend": "reference"}, parameters)
    for action in [*program, ("step", set())]:
        native.act(*action)
        reference.act(*action)
        assert_same_bits(snapshot(native.optimizer), snapshot(reference.optimizer))


def test_these_programs_bite() -> None:
    """The first program that steps a tensor with elements finds out an optimizer that does nothing."""
    case = CASES[9]
    shape = (3, 4)
    place = Placement((1, 0), (2, 1), 1, (False, False))
    spec = Spec(shape, torch.bfloat16, torch.float32, place, place, 1, special=True)
    native = Trained(NoOp(case.ours), case.options, [spec])
    reference = Trained(case.ours, {**case.options, "backend": "reference"}, [spec])
    native.step(set())
    reference.step(set())
    try:
        assert_same_bits(snapshot(native.optimizer), snapshot(reference.optimizer))
    except AssertionError as error:
        assert "elements differ" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a no-op passes")
