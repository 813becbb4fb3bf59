"""``python -m benchmarks``: measure, print Markdown tables on stdout, append to a CSV file and draw a plot."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import dracopt_ext

from . import report
from .cases import SUITES
from .measure import Result, measure
from .peers import OURS, PEERS, deepspeed_missing


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="default: all")
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, help="besides dracopt and each case's baseline; default: all"
    )
    parser.add_argument("--rounds", type=int, help="timed steps of each optimizer; large cases take a fifth (200)")
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads (2)")
    parser.add_argument("--out", type=Path, help="folder of the CSV file and the plot (benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="tiny tensors and few rounds, to see that everything runs")
    args = parser.parse_args(argv)
    if args.quick and args.out is None:
        parser.error("--quick measures nothing worth keeping: give it an --out of its own")
    if args.rounds is None:
        args.rounds = 3 if args.quick else 200
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads take positive numbers")
    args.out = args.out or report.ROOT / "benchmarks" / "results"
    return args


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    reason = dracopt_ext.backends()["native:cpu"]
    if reason is not None:
        sys.exit(f"nothing to measure: {reason}")
    report.check_csv(args.out / "cpu.csv")
    torch.set_num_threads(args.threads)

    left_out = set() if args.peers is None else set(PEERS) - {*OURS, *args.peers}
    missing = None if "DeepSpeed CPUAdam" in left_out else deepspeed_missing()
    if missing is not None:
        left_out.add("DeepSpeed CPUAdam")
        say(f"DeepSpeed CPUAdam is left out: {missing}")
    results: list[Result] = []
    for name in args.suite:
        for case in SUITES[name].cases:
            say(f"{name}: {case.name}")
            measured = measure(name, SUITES[name], case.shrunk() if args.quick else case, args.rounds, left_out)
            for result in measured:
                say(f"  {result.peer:18} {result.median:10.4f} ms")
            others = measured[0].others
            if others is not None and others > 0.05:
                say(f"  WARNING: other processes took {others:.0%} of the processors: do not trust these numbers")
            results += measured

    rows = report.compare(results)
    print(report.markdown(rows))
    report.append_csv(args.out / "cpu.csv", rows)
    say(f"appended {len(rows)} rows to {args.out / 'cpu.csv'}")
    in_plot = [row for row in rows if row.result.suite == "cpu"]
    if in_plot:
        try:
            report.plot(args.out / "cpu.png", in_plot)
        except ImportError as error:
            say(f"no plot: {error}")
        else:
            say(f"drew {args.out / 'cpu.png'}")


if __name__ == "__main__":
    main()
