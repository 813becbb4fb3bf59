"""A pytest plugin that replaces the native backend: Python plans its steps. The CPU runs what AS_NATIVE names:
``triton`` in its interpreter, or the ``compiled`` kernels without their binding.
"""

from __future__ import annotations

import os

import pytest

from . import interpreted


@pytest.fixture(autouse=True)
def _planned_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    from dracopt_ext.backend import NATIVE
    from dracopt_ext.portable import compiled
    from dracopt_ext.portable.plan import PlanBackend, StepPlan

    kernels: PlanBackend
    if os.environ["AS_NATIVE"] == "triton":
        from dracopt_ext.triton_kernels import launcher

        interpreted.set_up(monkeypatch)
        kernels = launcher.TritonBackend(on_cpu=True)
    else:
        kernels = compiled.CompiledBackend(compiled.load(NATIVE))
    monkeypatch.setattr(
        "dracopt_ext.backend.step_plan", lambda name, rule, optimizer, asked_for: StepPlan(rule, optimizer, kernels)
    )
