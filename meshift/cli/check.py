"""`meshift check`: what is wrong with a config, its data, its models and its memory, before anything runs.

It knows nothing of what the methods do. torch is imported when the keys of a config have been looked at.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshift.cli.command import Command, UsageError
from meshift.cli.counting import counts_shown
from meshift.cli.numbers import above_zero, whole
from meshift.cli.tables import print_problems, print_rows
from meshift.cli.train import Training
from meshift.cli.which_command import commands_for, training_commands
from meshift.config.loading import config_problems, make_config, read_values
from meshift.errors import InputError, MeshiftError


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
        "words", nargs="*", metavar="CONFIG", help="YAML file, sft:FILE, or a key.sub=value that is set in all"
    )
    parser.add_argument(
        "--command", metavar="NAME", help="of the files without a command before them; default: told from the keys"
    )
    parser.add_argument("--config", metavar="CONFIG", help="as a word of its own")
    parser.add_argument(
        "--plan", metavar="FILE", help="check this plan (.yaml, .json) for one config, and no more"
    )
    parser.add_argument(
        "--hardware",
        metavar="NAME",
        help="with --plan: as `meshift plan` (default: the plan's, else this machine)",
    )
    parser.add_argument("--devices", type=whole(1), metavar="N", help="with --plan: as many there are")
    parser.add_argument("--per-host", type=whole(1), metavar="N", help="with --plan: devices of a host")
    parser.add_argument("--prompt-tokens", type=above_zero, metavar="N", help="with --plan: mean of prompts")
    parser.add_argument(
        "--completion-tokens", type=above_zero, metavar="N", help="with --plan: mean of completions"
    )


def _run(args: argparse.Namespace) -> int:
    commands = training_commands()
    if args.command is not None:
        _check_command(args.command, f"--command {args.command}", commands)
    words = [*args.words, *([args.config] if args.config is not None else [])]
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    named = [_command_and_file(word, commands) for word in words if word not in overrides]
    if not named:
        raise UsageError("no config is named; write `meshift check run.yaml`")
    if args.plan is not None:
        return _run_plan(args, overrides, named, commands)
    with counts_shown():
        verdicts = [(file, check_file(file, overrides, commands, name or args.command)) for name, file in named]
    failed = [file for file, verdict in verdicts if not _show(file, verdict)]
    if failed:
        some = f"{len(failed)} of {len(named)} configs" if len(named) > 1 else failed[0]
        raise CheckFailedError(f"{some} cannot be run; the problems are listed above")
    return 0


def _run_plan(
    args: argparse.Namespace,
    overrides: Sequence[str],
    named: Sequence[tuple[str | None, str]],
    commands: Mapping[str, Training],
) -> int:
    """Check a plan for one config."""
    from meshift.cli.check_plan import Cluster, check_plan, show_plan

    if len(named) > 1:
        raise UsageError(f"--plan is checked for one config, and {len(named)} are named")
    (told, file), plan = named[0], Path(args.plan)
    values = read_values(file, overrides)
    fitting = [told or args.command] if told or args.command else commands_for(values, file, commands)
    if len(fitting) > 1:
        raise UsageError(f"{file} could be of {' or '.join(fitting)}; say which with --command")
    cluster = Cluster(
        hardware=args.hardware,
        devices=args.devices,
        per_host=args.per_host,
        prompt_tokens=args.prompt_tokens,
        completion_tokens=args.completion_tokens,
    )
    verdict = check_plan(values, commands[fitting[0]].schema, file, plan, cluster)
    if not show_plan(file, plan, verdict):
        raise CheckFailedError(f"{plan} cannot be run; the problems are listed above")
    return 0


def _command_and_file(word: str, commands: Mapping[str, Training]) -> tuple[str | None, str]:
    """`sft:a.yaml` as its two parts; a file alone has no command."""
    name, colon, file = word.partition(":")
    if not colon or Path(word).exists() or (name not in commands and not Path(file).exists()):
        return None, word
    _check_command(name, f"`{name}` in {word}", commands)
    return name, file


def _check_command(name: str, said: str, commands: Mapping[str, Training]) -> None:
    if name not in commands:
        raise UsageError(f"{said} trains nothing; give one of {', '.join(commands)}")


def check_file(
    file: str, overrides: Sequence[str], commands: Mapping[str, Training], named: str | None = None
) -> Verdict:
    """Look at one config. Its command is `named`, or the one whose keys it has and whose rows its data are."""
    try:
        values = read_values(file, overrides)
    except InputError as error:
        return Verdict(command="config", problems=[str(error)])
    fitting = [named] if named is not None else commands_for(values, file, commands)
    if len(fitting) > 1:
        return _undecided(fitting, commands, values, file)
    return _verdict(fitting[0], commands[fitting[0]], values, file)


def _undecided(
    fitting: Sequence[str], commands: Mapping[str, Training], values: Mapping[str, Any], file: str
) -> Verdict:
    """What is wrong with the config whichever of the commands it is of, and the question which."""
    found = [_problems(commands[name], values, file) for name in fitting]
    shared = [problem for problem in found[0] if all(problem in others for others in found[1:])]
    either = " or ".join(fitting)
    question = f"{file} could be of {either}; say which, as in `meshift check {fitting[0]}:{file}`"
    return Verdict(command=either, problems=[*shared, question])


def _problems(training: Training, values: Mapping[str, Any], file: str) -> list[str]:
    """What is wrong with the keys, and with the files and models that they name."""
    from meshift.runtime.preflight import file_problems

    return [*config_problems(training.schema, values, file), *file_problems(values)]


def _verdict(name: str, training: Training, values: Mapping[str, Any], file: str) -> Verdict:
    from meshift.runtime.preflight import as_it_would_run, dry_run, memory_of, weight_problems

    problems = _problems(training, values, file)
    if problems:
        return Verdict(command=name, problems=problems)
    try:
        config = as_it_would_run(make_config(training.schema, values, file))
    except MeshiftError as error:
        return Verdict(command=name, problems=[str(error)])
    _, check = training.load()
    rows, problem = dry_run(check, config)
    weights = weight_problems(config)
    if problem is not None or weights:
        return Verdict(command=name, problems=list(dict.fromkeys([*weights, *([problem] if problem else [])])))
    fits, sentence = memory_of(config)
    rows = [(what, sentence if what == "memory" else value) for what, value in rows]
    return Verdict(command=name, problems=() if fits else [sentence], rows=rows)


def _show(file: str, verdict: Verdict) -> bool:
    """Print it; returns whether the config can be run."""
    if not verdict.problems:
        print_rows(f"{file}: {verdict.command}, a run that can start", verdict.rows)
        return True
    print_problems(f"{file} ({verdict.command})", verdict.problems)
    return False


CHECK = Command(
    name="check",
    summary="find what is wrong with a config, its data, models and memory",
    description=(
        "Check configs before anything runs: every key, every row of the data, the headers of the weights,\n"
        "reward functions, the output folder, and whether the models fit into this machine's memory. All\n"
        "problems are listed, not the first alone. With --plan: whether that plan can run the config on such\n"
        "devices, and what it would take. Exit code 0: it can start; 2: it cannot."
    ),
    example="meshift check recipes/quickstart_sft.yaml reward:mine.yaml max_steps=10",
    configure=_configure,
    run=_run,
)
