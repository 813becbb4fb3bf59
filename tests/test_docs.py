"""Checks that the documentation's links lead somewhere and that the README's programs run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
