"""Reports a run: rows in a CSV file, Markdown tables and a plot."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import dracopt_ext
from dracopt_ext.backend import BUILD_INFO, isa

from .cases import ONE_LARGE, OWN, SUITES
from .measure import DEVICE, END_TO_END, HOST, Result
from .peers import BANDWIDTHS, OURS

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
        "clock",
        "launches",
    ),
)

COLORS = {
    "dracopt": "#1f6feb",
    "dracopt triton": "#1a7f37",
    "torch fused": "#57606a",
    "torch foreach": "#bf8700",
    "torch for-loop": "#cf222e",
    "DeepSpeed CPUAdam": "#8250df",
}
MARKERS = {
    "dracopt triton": "P",
    "torch fused": "^",
    "torch foreach": "o",
    "torch for-loop": "s",
    "DeepSpeed CPUAdam": "D",
}


@dataclass(frozen=True)
class Row:
    """A result, compared with the others of its run."""

    result: Result
    ratio: float | None
    """How many times faster the peer is than the case's baseline; None if there is none."""
    share: float | None
    """The share of a reference bandwidth; None if it was not measured. On a GPU the reference is a stream with the same
    reads and writes. On the CPU it is ours in this case on contiguous fp32 tensors, else ours on one large tensor."""


def compare(results: Sequence[Result]) -> list[Row]:
    medians = {(r.suite, r.case.name, r.clock, r.peer): r.median for r in results}
    measured = {(r.suite, r.case.name, r.clock, r.peer): r.gb_per_s for r in results}
    peak = next((r.gb_per_s for r in results if r.peer == "dracopt" and r.case.name == ONE_LARGE.name), None)
    rows = []
    for r in results:
        this = (r.suite, r.case.name, r.clock)
        baseline = medians.get((*this, r.case.baseline or ""))
        if SUITES[r.suite].device == "cpu":
            bandwidth = measured.get((*this, "dracopt plain"), peak)
        else:
            bandwidth = measured.get((*this, "stream")) if r.clock == DEVICE else None
        ratio = None if r.peer in BANDWIDTHS else baseline and baseline / r.median
        rows.append(Row(r, ratio, bandwidth and r.gb_per_s / bandwidth))
    return rows


def check_csv(path: Path) -> None:
    """Raises if a file has other columns than our rows."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        header = next(csv.reader(file), [])
    if header != list(COLUMNS):
        raise ValueError(f"{path} has other columns than this version writes; move it away or choose another --out")


def append_csv(path: Path, rows: Iterable[Row], run: Mapping[str, object]) -> None:
    """Appends rows of a run, which ``environment`` describes."""
    check_csv(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({**run, **_cells(row)} for row in rows)


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    """Returns the last run in a file: rows of cases that still exist, and what ``environment`` said of the run."""
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    found = [row for row in found if row["utc"] == found[-1]["utc"]]
    cases = {(name, case.name): case for name, suite in SUITES.items() for case in suite.cases}
    results = [
        Result(
            suite=row["suite"],
            case=cases[row["suite"], row["case"]],
            peer=row["peer"],
            clock=row["clock"],
            launches=int(row["launches"]) if row["launches"] else None,
            rounds=int(row["rounds"]),
            median=float(row["median_ms"]),
            p10=float(row["p10_ms"]),
            p90=float(row["p90_ms"]),
            others=float(row["others_cpu_share"]) if row["others_cpu_share"] else None,
        )
        for row in found
        if (row["suite"], row["case"]) in cases
    ]
    return compare(results), found[-1]


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
        "clock": result.clock,
        "launches": "" if result.launches is None else result.launches,
    }


def _backend(peer: str) -> str:
    if peer in OURS:
        return OURS[peer]
    if peer in BANDWIDTHS:
        return ""
    return "torch" if peer.startswith("torch") else f"deepspeed {metadata.version('deepspeed')}"


def environment(device_type: str) -> dict[str, object]:
    """Returns a run's machine, versions and time, by the columns of the CSV file."""
    return {
        "utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": _commit(),
        "dracopt": dracopt_ext.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device(device_type),
        "threads": torch.get_num_threads(),
    }


def device(device_type: str) -> str:
    """Names the GPU and its driver, or the processor and the instruction set that our kernels use on it."""
    if device_type != "cpu":
        return f"{torch.cuda.get_device_name()}{_driver()}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {isa() or 'no kernels'}"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return ", driver " + subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def _commit() -> str:
    """Returns the measured commit, marked if the tree differs from it. Outside a repository, returns the build's."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        # Results are excluded, because those of one run would mark the next one.
        changes = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return str(BUILD_INFO.get("commit") or "")
    return f"{commit}+dirty" if changes else commit


def _git(*arguments: str) -> str:
    # The ceiling keeps a copy of the sources inside another repository from taking that repository's commit.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(ROOT.parent)}
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def markdown(rows: Sequence[Row]) -> str:
    """Makes one table for each suite, and also a short one for suites on a GPU."""
    tables = []
    for suite in _suites(rows):
        of_suite = [row for row in rows if row.result.suite == suite]
        tables.append(_table(of_suite))
        if SUITES[suite].device != "cpu":
            tables.append(_short_table(of_suite))
    return "\n\n".join(tables)


def _short_table(rows: Sequence[Row]) -> str:
    """Puts each case beside its baseline, timed from end to end."""
    lines = [
        "| Work | ours (p90) | torch (p90) | torch over ours | GPU's clock | of stream | Triton's | launches | host |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case in {row.result.case.name: row.result.case for row in rows}.values():
        found = {(row.result.peer, row.result.clock): row for row in rows if row.result.case.name == case.name}
        ours = found["dracopt", END_TO_END]
        theirs = found.get((case.baseline or "", END_TO_END))
        on_gpu, by_triton = (found.get((peer, DEVICE)) for peer in ("dracopt", "dracopt triton"))
        cells = [
            case.name,
            _with_p90(ours.result),
            f"{theirs.result.peer.removeprefix('torch ')} {_with_p90(theirs.result)}" if theirs else "",
            f"**{_short(ours.ratio)}x**" if ours.ratio else "",
            "" if on_gpu is None or on_gpu.ratio is None else f"{_short(on_gpu.ratio)}x",
            "" if on_gpu is None or on_gpu.share is None else f"{on_gpu.share:.1%}",
            "" if by_triton is None or by_triton.share is None else f"{by_triton.share:.1%}",
            str(ours.result.launches),
            f"{1e3 * found['dracopt', HOST].result.median:.0f} µs",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_p90(result: Result) -> str:
    return f"{_short(result.median)} ms ({_short(result.p90)})"


def _suites(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.result.suite for row in rows))


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| case | optimizer | time | launches | median ms | p10 to p90 | faster than | GB/s | share of bandwidth |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    case = peer = ""
    for row in rows:
        result = row.result
        first = (result.case.name, result.peer) != (case, peer)
        cells = [
            result.case.name if result.case.name != case else "",
            "" if not first else f"**{result.peer}**" if result.peer == "dracopt" else result.peer,
            result.clock,
            str(result.launches) if first and result.launches is not None else "",
            _short(result.median),
            f"{_short(result.p10)} to {_short(result.p90)}",
            "" if row.ratio is None else f"{result.case.baseline}: {_short(row.ratio)}x",
            _short(result.gb_per_s),
            "" if row.share is None else f"{row.share:.1%}",
        ]
        case, peer = result.case.name, result.peer
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    """Formats a number with three digits."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def plot(path: Path, rows: Sequence[Row], run: Mapping[str, object]) -> None:
    """Draws one suite's speed-up over torch's fused implementation and, where known, its share of bandwidth.

    The speed-up is from end to end on the CPU. On a GPU it is by the GPU's clock, as the tables show the host's time.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    on_cpu = all(SUITES[row.result.suite].device == "cpu" for row in rows)
    clock = END_TO_END if on_cpu else DEVICE
    # Classes that torch lacks are compared with ours alone.
    rows = [row for row in rows if row.result.peer not in BANDWIDTHS and row.result.case.optimizer not in OWN]
    shares = [(row, 100 * row.share) for row in rows if row.share is not None]
    speed_ups = [row for row in rows if row.ratio is not None and row.result.clock == clock]
    shown = {row.result.case.name for row in [*speed_ups, *(row for row, _ in shares)]}
    cases = [name for name in dict.fromkeys(row.result.case.name for row in rows) if name in shown]
    figure, axes = plt.subplots(
        1, 2 if shares else 1, sharey=True, squeeze=False, figsize=(10, 1.6 + 0.65 * len(cases)), layout="constrained"
    )
    left = axes[0, 0]
    left.set_xscale("log")
    _panel(left, cases, [(row, row.ratio or 1) for row in speed_ups], 1, "x")
    left.axvline(1, color=COLORS[FUSED], linewidth=1)
    left.set_title("times as fast as torch fused" + ("" if on_cpu else ", on the GPU's clock"), fontsize=10)
    left.set_yticks(range(len(cases)), cases)
    left.set_ylim(len(cases) - 0.4, -0.5)
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    least, most = left.get_xlim()
    left.set_xlim(least / 1.3, most * 3)
    if shares:
        right = axes[0, 1]
        _panel(right, cases, shares, 0, " %")
        right.set_xlim(0, right.get_xlim()[1] * 1.08)
        right.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        of = "ours on 64M" if on_cpu else "a stream's"
        right.set_title(f"bandwidth, in % of {of}", fontsize=10)
    handles = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    peers = [peer for peer in COLORS if peer in handles]
    figure.legend([handles[peer] for peer in peers], peers, loc="outside lower center", ncols=len(peers), frameon=False)
    threads = f", {run['threads']} threads" if on_cpu else ""
    title = f"{run['device']}{threads}, torch {run['torch']}"
    figure.suptitle(title, fontsize=9, color=COLORS[FUSED])
    figure.savefig(path, dpi=180)
    plt.close(figure)


def _panel(axes: Axes, cases: Sequence[str], values: Sequence[tuple[Row, float]], start: float, unit: str) -> None:
    """Draws a bar for ours and, below, a marker for each other peer, on its own line so that none hides another."""
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
