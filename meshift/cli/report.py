"""`meshift report`: one HTML page about a run, or one that compares several.

It knows nothing of how the page is made.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from meshift.cli.command import Command, UsageError


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run's folder; several are compared")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="default: report.html in the run's folder, comparison.html here for several",
    )


def _run(args: argparse.Namespace) -> int:
    if not args.runs:
        raise UsageError("a run is needed: meshift report RUN [RUN ...], where RUN is the output_dir of one")
    from meshift.report.write import REPORT, write_report

    runs = [Path(run) for run in args.runs]
    default = runs[0] / REPORT if len(runs) == 1 else Path("comparison.html")
    print(write_report(runs, Path(args.output) if args.output else default))
    return 0


REPORT = Command(
    name="report",
    summary="write an HTML page about a run, or compare several",
    description=(
        "Write one HTML file that opens without a network: curves, seconds per call, completions of the\n"
        "same prompts through training, config, environment, and diagnoses in sentences. Of several runs\n"
        "it lays the curves over each other and lists what differs in their configs. A run that is still\n"
        "going, or was killed, can be reported on too."
    ),
    example="meshift report runs/ppo-a runs/ppo-b --output comparison.html",
    configure=_configure,
    run=_run,
)
