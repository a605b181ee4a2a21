"""Which training commands a config may be of, by its keys, its name, its comments and the columns of its data.

It knows nothing of what the commands do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshift.cli.train import Training
from meshift.config.loading import config_problems, unknown_keys

MOST_NAMED = 3


def training_commands() -> dict[str, Training]:
    """Those that train, by name."""
    from meshift.cli.main import COMMANDS

    return {name: command.run for name, command in COMMANDS.items() if isinstance(command.run, Training)}


def commands_for(values: Mapping[str, Any], file: str, commands: Mapping[str, Training]) -> list[str]:
    """The commands that a config may be of: by fewest unknown keys, fewest problems, its name, its comments.

    Where these leave several, the columns of its data decide.
    """
    text = Path(file).read_text(encoding="utf-8")

    def strangeness(name: str) -> tuple[int, int, bool, bool]:
        schema = commands[name].schema
        unknown, problems = sum(1 for _ in unknown_keys(schema, values)), len(config_problems(schema, values))
        return unknown, problems, not _named(name, Path(file).stem), f"meshift {name} " not in text

    found = {name: strangeness(name) for name in commands}
    least = min(found.values())
    fitting = [name for name in commands if found[name] == least]
    if len(fitting) == 1:
        return fitting
    from meshift.runtime.preflight import commands_of_rows

    of_rows = commands_of_rows(values)
    return [name for name in fitting if name in of_rows] or fitting


def _named(name: str, stem: str) -> bool:
    return name in re.split(r"[^a-z]+", stem.lower())


def of_another_command(values: Mapping[str, Any], file: str, training: Training) -> str | None:
    """One sentence where a config that was given to one command has keys of another, which it fits better."""
    unknown = list(unknown_keys(training.schema, values))
    if not unknown:
        return None
    commands = training_commands()
    fitting = commands_for(values, file, commands)
    strange = {key for name in fitting for key in unknown_keys(commands[name].schema, values)}
    theirs = [key for key in unknown if key not in strange and key not in training.schema.NOT_HERE]
    if not theirs or len(fitting) > MOST_NAMED:
        return None
    key = next((key for key in theirs if "." not in key), theirs[0])
    given = next(name for name, one in commands.items() if one is training)
    of = " or ".join(filter(None, (", ".join(f"`meshift {n}`" for n in fitting[:-1]), f"`meshift {fitting[-1]}`")))
    return (
        f"`{key}` is a key of {of}, not of `meshift {given}`; did you mean `meshift {fitting[0]} --config {file}`?"
    )
