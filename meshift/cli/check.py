"""`meshift check`: what is wrong with a config, its data, its models and its memory, before anything runs.

It knows nothing of what the methods do. torch is imported when the keys of a config have been looked at.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshift.cli.command import Command, UsageError
from meshift.cli.tables import print_rows
from meshift.cli.train import Training
from meshift.config.loading import config_problems, make_config
from meshift.errors import InputError
from meshift.yaml_values import apply_override, read_yaml


class CheckFailedError(InputError):
    """Configs that cannot be run as they are; what is wrong with them has been printed."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What there is to say of one config: problems, or the rows of its dry run."""

    command: str
    problems: Sequence[str]
    rows: Sequence[tuple[str, str]] = ()


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="+", metavar="CONFIG", help="YAML file, or a key.sub=value that is set in all"
    )
    parser.add_argument("--command", metavar="NAME", help="sft, reward, dpo or ppo; default: told from the keys")


def _run(args: argparse.Namespace) -> int:
    commands = _training_commands()
    if args.command is not None and args.command not in commands:
        raise UsageError(f"--command {args.command} trains nothing; give one of {', '.join(commands)}")
    overrides = [word for word in args.words if "=" in word and not Path(word).exists()]
    files = [word for word in args.words if word not in overrides]
    if not files:
        raise UsageError("no config is named; write `meshift check run.yaml`")
    failed = [file for file in files if not _show(file, check_file(file, overrides, commands, args.command))]
    if failed:
        some = f"{len(failed)} of {len(files)} configs" if len(files) > 1 else failed[0]
        raise CheckFailedError(f"{some} cannot be run; the problems are listed above")
    return 0


def _training_commands() -> dict[str, Training]:
    from meshift.cli.main import COMMANDS

    return {name: command.run for name, command in COMMANDS.items() if isinstance(command.run, Training)}


def check_file(
    file: str, overrides: Sequence[str], commands: Mapping[str, Training], named: str | None = None
) -> Verdict:
    """Look at one config. Its command is `named`, or the one whose keys it has."""
    try:
        values = read_yaml(Path(file))
        for override in overrides:
            apply_override(values, override)
    except InputError as error:
        return Verdict(command="config", problems=[str(error)])
    fitting = [named] if named is not None else _fitting(values, file, commands)
    if len(fitting) > 1:
        choices = " or ".join(f"--command {name}" for name in fitting)
        return Verdict(
            command="config", problems=[f"{file} could be of {' or '.join(fitting)}; say which with {choices}"]
        )
    return _verdict(fitting[0], commands[fitting[0]], values, file)


def _verdict(name: str, training: Training, values: Mapping[str, Any], file: str) -> Verdict:
    from meshift.runtime.preflight import dry_run, file_problems, memory_of, weight_problems

    problems = [*config_problems(training.schema, values, file), *file_problems(values)]
    if problems:
        return Verdict(command=name, problems=problems)
    config = make_config(training.schema, values, file)
    _, check = training.load()
    rows, problem = dry_run(check, config)
    weights = weight_problems(config)
    if problem is not None or weights:
        return Verdict(command=name, problems=list(dict.fromkeys([*weights, *([problem] if problem else [])])))
    fits, sentence = memory_of(config)
    rows = [(what, sentence if what == "memory" else value) for what, value in rows]
    return Verdict(command=name, problems=() if fits else [sentence], rows=rows)


def _fitting(values: Mapping[str, Any], file: str, commands: Mapping[str, Training]) -> list[str]:
    """The commands that a config may be of: by fewest unknown keys, fewest problems, its name, its comments."""

    def strangeness(name: str) -> tuple[int, int, bool, bool]:
        problems = config_problems(commands[name].schema, values)
        unknown = sum(problem.startswith("unknown key") for problem in problems)
        return unknown, len(problems), not _named(name, Path(file).stem), f"meshift {name} " not in text

    text = Path(file).read_text(encoding="utf-8")
    least = min(strangeness(name) for name in commands)
    return [name for name in commands if strangeness(name) == least]


def _named(name: str, stem: str) -> bool:
    return name in re.split(r"[^a-z]+", stem.lower())


def _show(file: str, verdict: Verdict) -> bool:
    """Print it; returns whether the config can be run."""
    if not verdict.problems:
        print_rows(f"{file}: a {verdict.command} run that can start", verdict.rows)
        return True
    count = "1 problem" if len(verdict.problems) == 1 else f"{len(verdict.problems)} problems"
    print(f"{file} ({verdict.command}): {count}")
    for problem in verdict.problems:
        print(f"  - {problem}")
    return False


CHECK = Command(
    name="check",
    summary="find what is wrong with a config, its data, models and memory",
    description=(
        "Check configs before anything runs: every key, every row of the data, the headers of the weights,\n"
        "reward functions, the output folder, and whether the models fit into this machine's memory. All\n"
        "problems are listed, not the first alone. Exit code 0: it can start; 2: it cannot."
    ),
    example="meshift check recipes/*.yaml max_steps=10",
    configure=_configure,
    run=_run,
)
