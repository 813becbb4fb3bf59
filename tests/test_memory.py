"""A plan that remembers the step before does what a plan without a memory does, whatever a user changed in between."""

from __future__ import annotations

import collections
import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .cases import RULE_CASES, Case
from .test_gpu import Gpu, gpu  # noqa: F401


class Run:
    """An optimizer over two groups of square parameters, one of which is bound to be edited."""

    def __init__(self, case: Case, place: Callable[[Tensor], Tensor]) -> None:
        self.place = place
        self.generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(self.random()) for _ in range(4)]
        groups = [{"params": self.params[:3]}, {"params": self.params[3:], "lr": 0.02}]
        self.optimizer: Any = case.ours(groups, **case.options)
        self.p = self.params[1]
        self.context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        self.change: Callable[[Run], object] = lambda _: None
        """Edits the gradients of each step."""

    def random(self, *shape: int) -> Tensor:
        return self.place(torch.randn(shape or (4, 4), generator=self.generator))

    def misaligned(self) -> Tensor:
        misaligned = torch.frombuffer(bytearray(69), dtype=torch.float32, offset=1, count=16).view(4, 4)
        return misaligned if self.p.device.type == "cpu" else self.place(misaligned)

    @property
    def state(self) -> Any:
        return self.optimizer.state[self.p]

    @property
    def moment(self) -> str:
        return "momentum_buffer" if "momentum_buffer" in self.state else "exp_avg"

    @property
    def group(self) -> Any:
        return self.optimizer.param_groups[0]

    def step(self) -> str | None:
        """Takes a step and returns the error, if there is one."""
        for p in self.params:
            grad = self.random(*p.shape)
            if p.dtype == grad.dtype:  # otherwise torch takes no new gradient
                p.grad = None
                p.grad = grad
        self.change(self)
        try:
            with self.context:
                self.optimizer.step()
        except Exception as error:  # ours or torch's own
            return f"{type(error).__name__}: {error}"
        return None

    def numbers(self) -> str:
        """Shows all memory of what the step may change: parameters, gradients and states."""
        found = []
        for p in self.params:
            state = self.optimizer.state.get(p, {})
            for value in (p, p.grad, *state.values()):
                is_there = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta"
                if is_there and value.untyped_storage().nbytes() > 0:
                    count = value.untyped_storage().nbytes() // value.itemsize
                    found.append(value.detach().as_strided((count,), (1,), 0).cpu().tolist())
        return str(found)  # NaN equals nothing


def set_state(key: str | None, make: Callable[[Run, Tensor], object]) -> Callable[[Run], None]:
    """Returns an edit that replaces a value of the state: the moment, or the one of a key if the state has it."""

    def edit(run: Run) -> None:
        name = key or run.moment
        if name in run.state:
            run.state[name] = make(run, run.state[name])

    return edit


def on_state(key: str | None, change: Callable[[Run, Tensor], object]) -> Callable[[Run], None]:
    """Returns an edit that changes a value of the state in place."""

    def edit(run: Run) -> None:
        name = key or run.moment
        if name in run.state:
            change(run, run.state[name])

    return edit


def set_group(**options: Any) -> Callable[[Run], None]:
    def edit(run: Run) -> None:
        run.group.update({key: value for key, value in options.items() if key in run.group})

    return edit


def set_grad(make: Callable[[Run, Tensor], Tensor | None]) -> Callable[[Run], None]:
    """Returns an edit that replaces the gradient of each step from now on."""

    def change(run: Run) -> None:
        assert run.p.grad is not None
        grad, run.p.grad = run.p.grad, None
        with contextlib.suppress(RuntimeError):  # torch refuses some gradients itself
            run.p.grad = grad
            run.p.grad = make(run, grad)

    return lambda run: setattr(run, "change", change)


def set_data(make: Callable[[Run, Tensor], Tensor]) -> Callable[[Run], None]:
    def edit(run: Run) -> None:
        run.p.data = make(run, run.p.data)

    return edit


class Subclass(Tensor):
    pass


class Parameter(nn.Parameter):
    pass


def swap_states(run: Run) -> None:
    state = run.optimizer.state
    state[run.p], state[run.params[0]] = state[run.params[0]], state[run.p]


def swap_parameters(run: Run) -> None:
    run.group["params"][0], run.group["params"][1] = run.group["params"][1], run.group["params"][0]


def replace_states(run: Run) -> None:
    run.optimizer.state = collections.defaultdict(dict, {p: dict(s) for p, s in run.optimizer.state.items()})


def move_parameter(run: Run) -> None:
    """Moves a parameter to a group that torch must step. The parameter's place in the step stays the same."""
    first, second = run.optimizer.param_groups
    second["differentiable"] = True
    run.step()
    run.step()
    second["params"].insert(0, first["params"].pop())


def change_betas_in_place(run: Run) -> None:
    """Changes a list, which torch accepts."""
    if "betas" not in run.group:
        return
    run.group["betas"] = [0.9, 0.99]
    run.step()
    run.step()
    run.group["betas"][0] = 0.5


def change_lr_in_place(run: Run) -> None:
    run.group["lr"] = torch.tensor(0.01)
    run.step()
    run.step()
    run.group["lr"].fill_(0.5)


def switch_amsgrad(run: Run) -> None:
    """Switches amsgrad off and on, while all its states stay. In between the states are read once more."""
    if "amsgrad" not in run.group:
        return
    run.group["amsgrad"] = False
    run.state["of the user"] = 1
    run.step()
    run.step()
    run.group["amsgrad"] = True


def set_all(make: Callable[[Tensor], Tensor]) -> Callable[[Run], None]:
    """Returns an edit that gives a parameter and its states other views of their memory, which has room for 32."""

    def edit(run: Run) -> None:
        tensors = [run.p, *(value for value in run.state.values() if value.dim() == 2)]
        memory = [run.random(32) for _ in tensors]
        for tensor, of_it in zip(tensors, memory, strict=True):
            of_it[:16] = tensor.data.flatten()
            tensor.data = of_it[:16].view(4, 4)
        run.step()
        run.step()
        for tensor, of_it in zip(tensors, memory, strict=True):
            tensor.data = make(of_it)
        set_grad(lambda *_: make(run.random(32)))(run)

    return edit


def grow_step(run: Run) -> None:
    """Makes a step count one of two elements at its address."""
    if "step" not in run.state:
        return
    step = run.state["step"]
    both = torch.stack([step, step])
    step.data = both[0]
    run.step()
    run.step()
    step.data = both


def see_integers(run: Run) -> None:
    run.p.requires_grad_(False)
    run.p.data = run.p.data.view(torch.int32)


def grow(run: Run) -> None:
    run.params.append(nn.Parameter(run.random()))
    run.optimizer.add_param_group({"params": run.params[-1:]})


def shrink_and_grow(run: Run) -> None:
    group = run.optimizer.param_groups.pop()
    run.step()
    group["differentiable"] = True
    run.optimizer.param_groups.append(group)


def enter_inference_mode(run: Run) -> None:
    with torch.inference_mode():
        run.params[1] = run.p = run.group["params"][1] = nn.Parameter(run.random(), requires_grad=False)
        run.optimizer.state[run.p] = {
            key: run.place(value.cpu().clone()) for key, value in run.optimizer.state[run.params[0]].items()
        }
    run.context = torch.inference_mode()
    run.step()
    run.step()
    run.context = contextlib.nullcontext()


def count_far(run: Run) -> None:
    """Makes step counts so large that their scalars are equal in some of the next steps.

    In the others they differ in the last bit, which shows because AdamW's decay leaves nothing of the parameters.
    """
    run.group["lr"] = 100.0
    for p, step in zip(run.params, (12000, 3, 12001, 12000), strict=True):
        if "step" in run.optimizer.state[p]:
            run.optimizer.state[p]["step"].fill_(step)


EDITS: dict[str, Callable[[Run], object]] = {
    "nothing": lambda _: None,
    # Hyperparameters and groups
    "lr": set_group(lr=0.5),
    "lr in place": change_lr_in_place,
    "betas in place": change_betas_in_place,
    "weight decay": set_group(weight_decay=0.3),
    "maximize": set_group(maximize=True),
    "amsgrad off and on": switch_amsgrad,
    "amsgrad": set_group(amsgrad=False),
    "momentum": set_group(momentum=0.0),
    "fused": set_group(fused=True),
    "differentiable": set_group(differentiable=True),
    "capturable": set_group(capturable=True),
    "a copy of the group": lambda run: run.optimizer.param_groups.__setitem__(0, {**run.group, "lr": 0.3}),
    "another list": lambda run: run.group.update(params=run.group["params"][:2]),
    "no list": lambda run: run.group.update(params=[1]),
    "groups reversed": lambda run: run.optimizer.param_groups.reverse(),
    "group added": grow,
    "group taken away and back": shrink_and_grow,
    "parameters swapped": swap_parameters,
    "parameter moved": move_parameter,
    # Parameters
    "data": set_data(lambda run, _: run.random()),
    "data transposed": set_data(lambda _, x: x.t()),
    "data of another shape": set_data(lambda run, _: run.random(16)),
    "data in fp64": set_data(lambda run, _: run.place(torch.ones(4, 4, dtype=torch.float64))),
    "data that is complex": set_data(lambda run, _: run.place(torch.ones(4, 2, dtype=torch.complex64))),
    "data seen as integers": see_integers,
    "all of another shape": set_all(lambda memory: memory[:8].view(2, 4)),
    "all with gaps": set_all(lambda memory: memory.as_strided((4, 4), (5, 1))),
    "data with gaps": set_data(lambda run, _: run.random(4, 8)[:, ::2]),
    "data freed": lambda run: run.p.untyped_storage().resize_(0),
    "class of a parameter": lambda run: setattr(run.p, "__class__", Parameter),
    "inference mode": enter_inference_mode,
    # States
    "states swapped": swap_states,
    "states replaced": replace_states,
    "a state deleted": lambda run: run.optimizer.state.pop(run.p),
    "a state emptied": lambda run: run.state.clear(),
    "a state copied": lambda run: run.optimizer.state.update({run.p: dict(run.state)}),
    "moment": set_state(None, lambda run, _: run.random()),
    "moment deleted": lambda run: run.state.pop(run.moment),
    "moment is None": set_state(None, lambda *_: None),
    "moment is a number": set_state(None, lambda *_: 1.0),
    "moment in bf16": set_state(None, lambda _, x: x.bfloat16()),
    "moment in fp64": set_state(None, lambda _, x: x.double()),
    "moment of integers": set_state(None, lambda _, x: x.int()),
    "moment elsewhere": set_state(None, lambda _, x: x.cpu() if x.device.type != "cpu" else x.to("meta")),
    "moment is a parameter's": set_state(None, lambda run, _: run.params[0].data),
    "moment in a subclass": set_state(None, lambda _, x: x.as_subclass(Subclass)),
    "moment lazily cloned": on_state(None, lambda run, x: setattr(run, "kept", torch._lazy_clone(x))),
    "moment's class": on_state(None, lambda _, x: setattr(x, "__class__", Subclass)),
    "moment's data": on_state(None, lambda run, x: setattr(x, "data", run.random())),
    "moment's dtype": on_state(None, lambda run, x: setattr(x, "data", run.random().bfloat16())),
    "moment seen as integers": on_state(None, lambda _, x: setattr(x, "data", x.data.view(torch.int32))),
    "moment transposed": on_state(None, lambda _, x: x.t_()),
    "moment of another shape": on_state(None, lambda run, x: setattr(x, "data", run.random(2, 8))),
    "moment shortened": on_state(None, lambda _, x: setattr(x, "data", x.data[:2])),
    "moment with gaps": on_state(None, lambda run, x: setattr(x, "data", run.random(4, 8)[:, ::2])),
    "moment freed": on_state(None, lambda _, x: x.untyped_storage().resize_(0)),
    "moment swapped": on_state(None, lambda run, x: torch.utils.swap_tensors(x, run.random())),
    "step": on_state("step", lambda _, x: x.add_(5)),
    "step of its own": set_state("step", lambda _, x: x + 3),
    "step in fp64": set_state("step", lambda _, x: x.double()),
    "step in half": on_state("step", lambda _, x: x.add_(0.5)),
    "step seen as an integer": on_state("step", lambda _, x: setattr(x, "data", x.data.view(torch.int32))),
    "step of two": grow_step,
    "step is negative": on_state("step", lambda _, x: x.fill_(-3)),
    "step is a number": set_state("step", lambda *_: 3),
    "steps": set_state("step", lambda _, x: x.expand(2).clone()),
    "step freed": on_state("step", lambda _, x: x.untyped_storage().resize_(0)),
    "step lazily cloned": on_state("step", lambda run, x: setattr(run, "kept", torch._lazy_clone(x))),
    "steps that nearly agree": count_far,
    "product": on_state("mu_product", lambda _, x: x.mul_(0.5)),
    # Gradients
    "no gradient": set_grad(lambda *_: None),
    "gradient in bf16": set_grad(lambda _, g: (setattr(g, "data", g.bfloat16()), g)[1]),
    "gradient in fp64": set_grad(lambda _, g: (setattr(g, "data", g.double()), g)[1]),
    "gradient transposed": set_grad(lambda _, g: g.t()),
    "gradient with gaps": set_grad(lambda run, _: run.random(4, 8)[:, ::2]),
    "gradient expanded": set_grad(lambda run, _: run.random(4, 1).expand(4, 4)),
    "gradient misaligned": set_grad(lambda run, _: run.misaligned()),
    "gradient that is sparse": set_grad(lambda _, g: g.to_sparse() if g.device.type == "cpu" else None),
    "gradient is a parameter": set_grad(lambda run, _: run.params[0].data),
    "gradient is the next moment": set_grad(lambda run, _: run.optimizer.state[run.params[2]][run.moment]),
    "gradient freed": set_grad(lambda _, g: (g.untyped_storage().resize_(0), g)[1]),
}


def compare(name: str, case: Case, place: Callable[[Tensor], Tensor]) -> None:
    remembers, forgets = (Run(case, place) for _ in range(2))

    def step() -> None:
        forgets.optimizer._dracopt_context.plans.clear()
        before = remembers.numbers()
        error = remembers.step()
        assert error == forgets.step()
        assert remembers.numbers() == forgets.numbers()
        if error is None:
            assert remembers.optimizer.last_backend == forgets.optimizer.last_backend
            assert remembers.numbers() != before

    for _ in range(3):
        step()
    for run in (remembers, forgets):
        try:
            EDITS[name](run)
        except NotImplementedError as error:  # the simulated GPU cannot do everything
            pytest.skip(str(error))
    for _ in range(30 if EDITS[name] is count_far else 3):
        step()


edits = pytest.mark.parametrize("name", EDITS)
cases = pytest.mark.parametrize("case", RULE_CASES, ids=str)
pytestmark = pytest.mark.filterwarnings("ignore")  # that torch steps some parameters


@cases
@edits
def test_edits(name: str, case: Case) -> None:
    compare(name, case, torch.clone)


@pytest.mark.parametrize("gpu", ["simulated"], indirect=True)
@cases
@edits
def test_edits_on_a_gpu(name: str, case: Case, gpu: Gpu) -> None:  # noqa: F811
    compare(name, case, gpu)


@pytest.mark.parametrize("gone", ["the first gradient", "a gradient", "a group"])
@pytest.mark.parametrize("gpu", ["simulated"], indirect=True)
@pytest.mark.parametrize(
    "case", [case for case in RULE_CASES if case.rule.state_scalars], ids=str
)  # the host counts their steps
def test_calls_that_take_no_step(case: Case, gone: str, gpu: Gpu) -> None:  # noqa: F811
    """A plan says that the host must read the scaler. Before that call, a parameter or a gradient has gone."""
    for place in (torch.clone, gpu):
        remembers, forgets = (Run(case, place) for _ in range(2))
        for run in (remembers, forgets):
            for _ in range(3):
                run.step()
            removed = run.params[0 if gone == "the first gradient" else 1]
            if gone == "a group":
                run.optimizer.param_groups.pop()
            else:
                removed.grad = None
            (plan,) = run.optimizer._dracopt_context.plans.values()
            one = torch.ones(1)
            todo = plan.step(run.optimizer.param_groups, run.optimizer.state, scaler=(0 * one, one))
            assert tuple(todo) == ([], [], True, False)
            if run is forgets:
                run.optimizer._dracopt_context.plans.clear()
            before = run.numbers()
            run.optimizer.step()
            assert run.numbers() != before
        assert remembers.numbers() == forgets.numbers()


@cases
def test_other_states_in_a_step_that_fails(case: Case) -> None:
    """A step finds other states and fails. The next one finds the first states where they were."""
    found = []
    for fails in (True, False):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(4, generator=generator)) for _ in range(40)]
        for p in params:
            p.grad = torch.ones(4)
        optimizer = case.ours(params, **case.options)
        optimizer.step()
        optimizer.step()
        if fails:
            states, group = optimizer.state, optimizer.param_groups[0]
            optimizer.state = collections.defaultdict(
                dict, zip(params, copy.deepcopy(list(states.values())), strict=True)
            )
            group["params"][-1] = 1
            with pytest.raises(TypeError, match="must be a Tensor"):
                optimizer.step()
            optimizer.state, group["params"][-1] = states, params[-1]
        optimizer.step()
        found.append([*params, *(v for state in optimizer.state.values() for v in state.values())])
    assert all(map(torch.equal, *found))
