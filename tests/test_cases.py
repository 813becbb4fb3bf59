"""No rule and no class is left out of a table, and the rows of the table of cases can find faults."""

from __future__ import annotations

import pytest
import torch

import dracopt_ext
from dracopt_ext.rule import NUMBER, RULES

from .cases import CASES, Case, classes, inputs, train
from .mutants import MUTANTS
from .test_bits import FP32_ULPS
from .triton_compiler import variants


@pytest.mark.parametrize("name", classes())
def test_every_class_has_rows(name: str) -> None:
    assert any(case.algorithm == name for case in CASES), f"add rows for {name} to CASES in tests/cases.py"


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_its_formula(rule: str) -> None:
    assert ".. math::" in (RULES[rule].update.__doc__ or ""), f"write the formula of {rule!r} into its docstring"


def test_every_rule_has_a_class() -> None:
    of_classes = {getattr(dracopt_ext, name)._dracopt_kind.rule.name for name in classes()}
    for rule in RULES:
        assert rule in of_classes, f"no class in dracopt_ext/optim/__init__.py has the rule {rule!r}: add one"


@pytest.mark.parametrize("rule", RULES)
def test_every_hyperparameter_changes_in_a_row(rule: str) -> None:
    rows = [case for case in CASES if case.rule.name == rule]
    changed = set()
    for case in rows:
        defaults, group = (case.ours([torch.ones(1)], **o).param_groups[0] for o in ({}, case.options))
        changed |= {key for key in (*RULES[rule].kinds, "maximize") if defaults[key] != group[key]}
    for key in (*RULES[rule].kinds, "maximize"):
        assert key in changed, f"add a row to CASES in tests/cases.py in which {key!r} of {rule!r} is not the default"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_row_bites(case: Case) -> None:
    """A hundredth of an update must be more than the tolerance of the comparisons with exact arithmetic."""
    initial, steps = inputs([4096], torch.float32, 1)
    p, before = train(case.ours, case.options, initial, steps)["0.0"], initial[0]
    tolerance = FP32_ULPS * torch.finfo(p.dtype).eps * before.abs().clamp(min=before.abs().mean())
    bites = 0.01 * (p - before).abs() > tolerance
    assert bites.any(), f"{case} moves parameters by {(p - before).abs().max():.1e} only: raise its learning rate"


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_compiled_ahead_of_time_and_has_mutants(rule: str) -> None:
    """The compilations are those of tests/test_triton.py. Kernels for CPUs and CUDA all come from csrc/rules/all.h."""
    triton_rules = pytest.importorskip("dracopt_ext.triton_kernels.rules").RULES
    assert rule in triton_rules, f"add {rule!r} to RULES in triton_kernels/rules.py"
    assert any(variant.rule == rule for variant in variants(False)), f"add {rule!r} to tests/triton_compiler.py"
    header = f"csrc/rules/{rule}.h"
    assert any(mutant.file == header for mutant in MUTANTS), f"add a fault in {header} to tests/mutants.py"


def test_a_moment_that_is_switched_off_by_a_number_or_a_flag() -> None:
    assert {NUMBER, "flag"} == {
        rule.kinds[switch] for rule in RULES.values() for switch in rule.moments.values() if switch is not None
    }
    assert RULES["sgd"].moments_of({"momentum": 0.0}) == []
    assert RULES["sgd"].moments_of({"momentum": torch.tensor(0.5)}) == ["momentum_buffer"]
    assert RULES["adam"].moments_of({"amsgrad": 0}) == ["exp_avg", "exp_avg_sq"]
