"""`python -m recipes.study`: "Is DPO Superior to PPO for LLM Alignment?" again, as one command with a report.

What is done is kept: a study that was broken off goes on where it was, and a changed setting runs only what it
changes. The report is written anew after every point.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from meshift import __version__
from meshift.config.loading import load_config
from meshift.errors import MeshiftError
from recipes.study.code import run_code
from recipes.study.page import Done, study_page
from recipes.study.sentiment import SentimentStudy
from recipes.study.setting import StudySetting
from recipes.study.theory import run_theory

SMALL = Path(__file__).parent / "small.yaml"
PARTS = ("theory", "sentiment", "code")


def main(arguments: list[str] | None = None) -> int:
    """Run what is left and write the report. Returns the exit code."""
    options = parse(arguments)
    try:
        run(load_config(StudySetting, options.setting, options.overrides), options.only or PARTS)
    except MeshiftError as error:
        print(f"study: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("study: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(prog="python -m recipes.study", description=__doc__)
    parser.add_argument("--setting", type=Path, default=SMALL, help="small.yaml, full.yaml, or your own")
    parser.add_argument(
        "--only", choices=PARTS, action="append", help="a part to run; may be given again (default: all)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="set a key, over what the file says")
    return parser.parse_args(arguments)


def run(setting: StudySetting, parts: Sequence[str]) -> None:
    """The parts, one after another, and the report after each of their points."""
    folder = Path(setting.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    done = Done()
    if "theory" in parts:
        done = replace(done, theory=run_theory(setting.theory, folder, print))
    if "sentiment" in parts and setting.sentiment is not None:
        study = SentimentStudy(setting.sentiment, folder, print)
        results = study.run(lambda results: write_page(setting, folder, replace(done, sentiment=results)))
        done = replace(done, sentiment=results)
    if "code" in parts and setting.code is not None:
        done = replace(done, code=run_code(setting.code, folder, print))
    print(f"report  {write_page(setting, folder, done)}")


def write_page(setting: StudySetting, folder: Path, done: Done) -> Path:
    """`report.html`, of what is done so far."""
    path = folder / "report.html"
    path.write_text(study_page(setting, done, machine_facts()), encoding="utf-8")
    return path


def machine_facts() -> dict[str, str]:
    """When, on what, with which versions."""
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    )
    return {
        "date": date.today().isoformat(),
        "machine": f"{_processor()}, {device}",
        "versions": f"meshift {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }


def _processor() -> str:
    """The processor's own name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
