"""What became of a run: rows in a CSV file, Markdown tables and a plot."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import dracopt_ext
from dracopt_ext.backend import _C

from .cases import ONE_LARGE
from .measure import Result
from .peers import OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FUSED = "torch fused"
ROOT = Path(__file__).resolve().parent.parent

COLUMNS = (
    *("utc", "commit", "dracopt", "torch", "python", "device", "threads"),
    *("suite", "case", "peer", "backend", "tensors", "groups", "parameters", "bytes"),
    *(
        "rounds",
        "median_ms",
        "p10_ms",
        "p90_ms",
        "ratio_to_torch_fused",
        "gb_per_s",
        "bandwidth_share",
        "others_cpu_share",
    ),
)

COLORS = {
    "dracopt": "#1f6feb",
    "torch fused": "#57606a",
    "torch foreach": "#bf8700",
    "torch for-loop": "#cf222e",
    "DeepSpeed CPUAdam": "#8250df",
}
MARKERS = {"torch fused": "^", "torch foreach": "o", "torch for-loop": "s", "DeepSpeed CPUAdam": "D"}


@dataclass(frozen=True)
class Row:
    """A result beside the others of its run."""

    result: Result
    ratio: float | None
    """How many times faster than the case's baseline; None if there is none."""
    share: float | None
    """Of the bandwidth that ours reaches in the same case on contiguous fp32 tensors, else on one large tensor; None if
    neither was measured."""


def compare(results: Sequence[Result]) -> list[Row]:
    medians = {(r.suite, r.case.name, r.peer): r.median for r in results}
    plain = {(r.suite, r.case.name): r.gb_per_s for r in results if r.peer == "dracopt plain"}
    peak = next((r.gb_per_s for r in results if r.peer == "dracopt" and r.case.name == ONE_LARGE.name), None)
    rows = []
    for r in results:
        baseline = medians.get((r.suite, r.case.name, r.case.baseline or ""))
        bandwidth = plain.get((r.suite, r.case.name), peak)
        rows.append(Row(r, baseline and baseline / r.median, bandwidth and r.gb_per_s / bandwidth))
    return rows


def check_csv(path: Path) -> None:
    """Raise if rows of ours do not belong into this file."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        header = next(csv.reader(file), [])
    if header != list(COLUMNS):
        raise ValueError(f"{path} has other columns than this version writes; move it away or choose another --out")


def append_csv(path: Path, rows: Iterable[Row]) -> None:
    check_csv(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    run = _environment()
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({**run, **_cells(row)} for row in rows)


def _cells(row: Row) -> dict[str, object]:
    result, case = row.result, row.result.case
    return {
        "suite": result.suite,
        "case": case.name,
        "peer": result.peer,
        "backend": _backend(result.peer),
        "tensors": len(case.shapes),
        "groups": case.groups,
        "parameters": case.parameters,
        "bytes": result.floor_bytes,
        "rounds": result.rounds,
        "median_ms": f"{result.median:.5g}",
        "p10_ms": f"{result.p10:.5g}",
        "p90_ms": f"{result.p90:.5g}",
        "ratio_to_torch_fused": f"{row.ratio:.4g}" if row.ratio and case.baseline == FUSED else "",
        "gb_per_s": f"{result.gb_per_s:.4g}",
        "bandwidth_share": "" if row.share is None else f"{row.share:.4g}",
        "others_cpu_share": "" if result.others is None else f"{result.others:.2f}",
    }


def _backend(peer: str) -> str:
    if peer in OURS:
        return "native"
    return "torch" if peer.startswith("torch") else f"deepspeed {metadata.version('deepspeed')}"


def _environment() -> dict[str, object]:
    return {
        "utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "dracopt": dracopt_ext.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device(),
        "threads": torch.get_num_threads(),
    }


def device() -> str:
    """The processor and the instruction set that our kernels use on it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {_C.isa() if _C is not None else 'no kernels'}"


def _commit() -> str:
    """The commit that was measured, marked if the tree differs from it; empty outside of a repository."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        # Else the results of one run would mark the next one.
        changes = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{commit}+dirty" if changes else commit


def _git(*arguments: str) -> str:
    # The ceiling keeps a copy of the sources that lies in another repository from taking that one's commit.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(ROOT.parent)}
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def markdown(rows: Sequence[Row]) -> str:
    """One table for each suite."""
    return "\n\n".join(_table([row for row in rows if row.result.suite == suite]) for suite in _suites(rows))


def _suites(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.result.suite for row in rows))


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| case | optimizer | median ms | p10 to p90 | faster than | GB/s | share of bandwidth |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    case = ""
    for row in rows:
        result = row.result
        cells = [
            result.case.name if result.case.name != case else "",
            f"**{result.peer}**" if result.peer == "dracopt" else result.peer,
            _short(result.median),
            f"{_short(result.p10)} to {_short(result.p90)}",
            "" if row.ratio is None else f"{result.case.baseline}: {_short(row.ratio)}x",
            _short(result.gb_per_s),
            "" if row.share is None else f"{row.share:.1%}",
        ]
        case = result.case.name
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def plot(path: Path, rows: Sequence[Row]) -> None:
    """The speed-up over torch's fused implementation and, where known, the share of bandwidth. Of the suite ``cpu``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys(row.result.case.name for row in rows))
    shares = [(row, 100 * row.share) for row in rows if row.share is not None]
    figure, axes = plt.subplots(
        1, 2 if shares else 1, sharey=True, squeeze=False, figsize=(10, 1.6 + 0.65 * len(cases)), layout="constrained"
    )
    left = axes[0, 0]
    left.set_xscale("log")
    _panel(left, cases, [(row, row.ratio) for row in rows if row.ratio is not None], 1, "x")
    left.axvline(1, color=COLORS[FUSED], linewidth=1)
    left.set_title("times as fast as torch fused")
    left.set_yticks(range(len(cases)), cases)
    left.set_ylim(len(cases) - 0.4, -0.5)
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    left.set_xlim(right=left.get_xlim()[1] * 3)
    if shares:
        right = axes[0, 1]
        _panel(right, cases, shares, 0, " %")
        right.set_xlim(0, right.get_xlim()[1] * 1.08)
        right.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        right.set_title("bandwidth, in % of ours on 64M")
    handles = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    peers = [peer for peer in COLORS if peer in handles]
    figure.legend([handles[peer] for peer in peers], peers, loc="outside lower center", ncols=len(peers), frameon=False)
    title = f"{device()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    figure.suptitle(title, fontsize=9, color=COLORS[FUSED])
    figure.savefig(path, dpi=180)
    plt.close(figure)


def _panel(axes: Axes, cases: Sequence[str], values: Sequence[tuple[Row, float]], start: float, unit: str) -> None:
    """A bar for ours; below it a marker for each other peer, on a line of its own so that none hides another."""
    lines = {peer: 0.15 + 0.1 * line for line, peer in enumerate(MARKERS)}
    labelled: set[str] = set()
    for row, value in values:
        peer, middle = row.result.peer, cases.index(row.result.case.name)
        label = None if peer in labelled else peer
        labelled.add(peer)
        if peer == "dracopt":
            bar = axes.barh(middle - 0.17, value - start, left=start, height=0.42, color=COLORS[peer], label=label)
            text = [_short(value) + unit]
            axes.bar_label(bar, text, padding=5, weight="bold")
        else:
            dot = axes.scatter(value, middle + lines[peer], s=26, marker=MARKERS[peer], color=COLORS[peer], label=label)
            dot.set(zorder=3, clip_on=False)
    for case in range(1, len(cases)):
        axes.axhline(case - 0.45, color="#d0d7de", linewidth=0.8, zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
