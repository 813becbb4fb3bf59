"""A pytest plugin: what is asked of the native backend is planned in Python, and done on the CPU by what AS_NATIVE
names: ``triton`` in its interpreter, or the ``compiled`` kernels without their binding.
"""

from __future__ import annotations

import os

import pytest

from . import interpreted


@pytest.fixture(autouse=True)
def _planned_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    from dracopt_ext.backend import NATIVE
    from dracopt_ext.portable import compiled
    from dracopt_ext.portable.plan import Kernels, StepPlan

    kernels: Kernels
    if os.environ["AS_NATIVE"] == "triton":
        from dracopt_ext.triton_kernels import step

        interpreted.set_up(monkeypatch)
        kernels = step.Kernels(on_cpu=True)
    else:
        kernels = compiled.Kernels(compiled.load(NATIVE))
    monkeypatch.setattr(
        "dracopt_ext.backend.step_plan", lambda name, rule, optimizer, asked_for: StepPlan(rule, optimizer, kernels)
    )
