"""A pytest plugin: what is asked of the native backend is done by Triton's, in the interpreter, on the CPU."""

from __future__ import annotations

import pytest

from . import interpreted


@pytest.fixture(autouse=True)
def _triton_as_native(monkeypatch: pytest.MonkeyPatch) -> None:
    from dracopt_ext.triton_kernels.plan import StepPlan

    interpreted.set_up(monkeypatch)
    monkeypatch.setattr(
        "dracopt_ext.backend.step_plan", lambda name, rule, optimizer, asked_for: StepPlan(rule, optimizer, on_cpu=True)
    )
