"""``python -m benchmarks``: measures, prints Markdown tables on stdout, appends to a CSV file and draws a plot."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import dracopt_ext

from . import report
from .cases import SUITES
from .measure import Result, measure
from .peers import BANDWIDTHS, OURS, PEERS, deepspeed_missing

NAMES = {"cpu": "cpu", "cuda": "gpu"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", nargs="+", choices=SUITES, help="default: all that this machine can run")
    parser.add_argument("--case", nargs="+", default=[""], help="only cases that have one of these in their names")
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, help="besides dracopt and each case's baseline; default: all"
    )
    parser.add_argument("--rounds", type=int, help="timed steps of each optimizer; large cases take a fifth (200)")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads (2; for GPUs torch's own choice)")
    parser.add_argument("--out", type=Path, help="folder of the CSV file and the plot (benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="tiny tensors and few rounds, to see that everything runs")
    parser.add_argument("--show", type=Path, help="measure nothing: print and draw the last run in this CSV file")
    args = parser.parse_args(argv)
    if args.quick and args.out is None:
        parser.error("--quick measures nothing worth keeping: give it an --out of its own")
    if args.rounds is None:
        args.rounds = 3 if args.quick else 200
    if args.rounds < 1 or (args.threads is not None and args.threads < 1):
        parser.error("--rounds and --threads take positive numbers")
    args.out = args.out or report.ROOT / "benchmarks" / "results"
    return args


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.show is not None:
        show(args.show)
        return
    reasons = {device: dracopt_ext.backends()[f"native:{device}"] for device in ("cpu", "cuda")}
    suites = args.suite or [name for name, suite in SUITES.items() if reasons[suite.device] is None]
    for device in {SUITES[name].device for name in suites}:
        if reasons[device] is not None:
            sys.exit(f"nothing to measure: {reasons[device]}")
        report.check_csv(args.out / f"{NAMES[device]}.csv")

    left_out = set() if args.peers is None else set(PEERS) - {*OURS, *BANDWIDTHS, *args.peers}
    if any(SUITES[name].device == "cpu" for name in suites) and "DeepSpeed CPUAdam" not in left_out:
        missing = deepspeed_missing()
        if missing is not None:
            left_out.add("DeepSpeed CPUAdam")
            say(f"DeepSpeed CPUAdam is left out: {missing}")
    without_triton = dracopt_ext.backends()["triton"]
    if any(SUITES[name].device == "cuda" for name in suites) and without_triton is not None:
        left_out |= {"dracopt triton", *BANDWIDTHS}
        say(f"our Triton kernels and the streams are left out: {without_triton}")
    torchs_threads = torch.get_num_threads()
    runs: dict[str, dict[str, object]] = {}
    results: list[Result] = []
    failed = False
    for name in suites:
        device = SUITES[name].device
        torch.set_num_threads(args.threads or (2 if device == "cpu" else torchs_threads))
        runs.setdefault(device, report.environment(device))
        for case in (case for case in SUITES[name].cases if any(part in case.name for part in args.case)):
            say(f"{name}: {case.name}")
            try:
                measured = measure(name, SUITES[name], case.shrunk() if args.quick else case, args.rounds, left_out)
            except Exception as error:
                failed = True
                say(f"  FAILED: {type(error).__name__}: {error}")
                continue
            results += measured
            write(args.out, report.compare(results)[-len(measured) :], runs)
    if not results and not failed:
        sys.exit(f"no case has {' or '.join(args.case)} in its name")
    for device in dict.fromkeys(SUITES[result.suite].device for result in results):
        show(args.out / f"{NAMES[device]}.csv")
    sys.exit(failed)


def write(out: Path, rows: Sequence[report.Row], runs: Mapping[str, Mapping[str, object]]) -> None:
    """Writes the results of a case at once, because later cases may take too long, or fail."""
    for row in rows:
        say(f"  {row.result.peer:18} {row.result.median:10.4f} ms {row.result.clock}")
    device, others = SUITES[rows[0].result.suite].device, rows[0].result.others
    if others is not None and others > 0.05:
        say(f"  WARNING: other processes took {others:.0%} of the processors: do not trust these numbers")
    report.append_csv(out / f"{NAMES[device]}.csv", rows, runs[device])


def show(path: Path) -> None:
    """Prints the last run in a CSV file, and draws the suite that the file is named for into a plot beside it."""
    rows, run = report.read_csv(path)
    print(report.markdown(rows))
    drawn = [row for row in rows if row.result.suite == path.stem]
    if not drawn:
        return
    try:
        report.plot(path.with_suffix(".png"), drawn, run)
    except ImportError as error:
        say(f"no plot: {error}")


if __name__ == "__main__":
    main()
