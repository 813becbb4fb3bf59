"""Checks that the documentation's links lead somewhere and that the README's programs run."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dracopt_ext

from .cases import classes, rule_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_can_be_found() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+)", (ROOT / "README.md").read_text()))
    assert linked == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


def row_of(name: str) -> str:
    """Describes a class in the table of docs/torch.md."""
    rule, kind = rule_of(name), getattr(dracopt_ext, name)._dracopt_kind
    signature = inspect.signature(getattr(dracopt_ext, name)).parameters
    numbers = ", ".join(f"`{key}={signature[key].default}`" for key in rule.kinds if key in signature)
    moments = [f"`{moment}`" + (f" (with `{switch}`)" if switch else "") for moment, switch in rule.moments.items()]
    state = ", ".join([*(f"`{scalar}`" for scalar in rule.state_scalars), *moments])
    sparse = "torch's step" if kind.takes_sparse else "raise"
    return f"| `{name}` | {'yes' if hasattr(torch.optim, name) else 'no'} | {numbers} | {state} | {sparse} |"


def test_table_of_classes() -> None:
    """Declarations say what the table must be. An error shows the right one."""
    table = "\n".join(map(row_of, classes()))
    assert table in (ROOT / "docs/torch.md").read_text(), f"put this into docs/torch.md:\n{table}"


@pytest.mark.parametrize("name", classes())
def test_every_class_is_named_for_users(name: str) -> None:
    assert name in dracopt_ext.__all__
    assert f"`{name}`" in (ROOT / "README.md").read_text(), f"name {name} in the README"


def programs_in(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("number", [0, 1])
def test_programs_of_the_readme_run(number: int, tmp_path: Path) -> None:
    output = output_of(programs_in("README.md")[number], tmp_path)
    assert number == 1 or output == "{'cpu': frozenset({'native'})}\n"


def output_of(program: str, folder: Path) -> str:
    command = [sys.executable, "-W", "error", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_program_of_the_tail_runs(tmp_path: Path) -> None:
    assert float(output_of(programs_in("docs/tail.md")[1], tmp_path)) > 0


def test_program_for_bf16_runs(tmp_path: Path) -> None:
    assert output_of(programs_in("docs/precision.md")[0], tmp_path) == "torch.float32\n"


def test_distributed_program_runs(tmp_path: Path) -> None:
    """``torchrun`` starts it in two processes."""
    program = programs_in("docs/distributed.md")[0]
    (tmp_path / "train.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    run = subprocess.run(torchrun, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    # The exit code does not count, because gloo rarely aborts a process at its end (PyTorch #179291).
    assert run.stdout.count("{'cpu': frozenset({'native'})}") == 2, run.stderr
