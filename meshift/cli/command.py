"""What a command of the command line is, and the argument parser all commands share.

It knows no command. Mistakes on the command line are `UsageError`s: one sentence, with what was probably meant.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from meshift.cli.termination import EXIT_CODE
from meshift.errors import InputError, MeshiftError

DOCS = "README.md and docs/ of the source"
RESUME = "--resume"


class UsageError(InputError):
    """The command line cannot be understood."""


class InterruptedRunError(MeshiftError):
    """Ctrl-C ended a command; the message says what was kept. The exit code is a shell's for SIGINT."""

    exit_code = 130


class TerminatedRunError(InterruptedRunError):
    """SIGTERM did."""

    exit_code = EXIT_CODE


@dataclass(frozen=True, kw_only=True)
class Command:
    """One word after `meshift`. `configure` adds its options; `run` does the work and returns the exit code.

    `summary` is one line for `meshift --help`; `description` and `example` are for the command's own help.
    """

    name: str
    summary: str
    description: str
    example: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UsageError`, in one sentence, instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raise."""
        raise UsageError(f"{message}; `{self.prog} --help` shows what there is")

    def options(self) -> list[str]:
        """Every option that the parser knows, in its long form."""
        return [option for option in self._option_string_actions if option.startswith("--")]


def command_parser(command: Command) -> Parser:
    """The parser of one command."""
    parser = Parser(
        prog=f"meshift {command.name}",
        description=command.description,
        epilog=f"example:\n  {command.example}\n\ndocumentation: {DOCS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.configure(parser)
    return parser


def parse_command(command: Command, arguments: Sequence[str]) -> argparse.Namespace:
    """The command's options. Options and `key=value` may stand in any order. Raises `UsageError`."""
    parser = command_parser(command)
    parsed, unknown = parser.parse_known_intermixed_args(list(arguments))
    refuse_unknown(parser, unknown)
    return parsed


def refuse_unknown(parser: Parser, words: Sequence[str]) -> None:
    """Raise `UsageError` for the first of the words that a parser could not place, if there is one."""
    if words:
        raise UsageError(_unknown_option(parser, words[0]))


def add_way_on(error: MeshiftError, output_dir: str) -> None:
    """Let the sentence of a run that failed end with the checkpoint that `--resume` goes on from, if there is one.

    What is wrong with the input (exit code 2) must be mended first, and a sentence that speaks of it says enough.
    """
    from meshift.runtime.checkpoints import latest_name

    latest = latest_name(Path(output_dir))
    if latest is not None and error.exit_code == MeshiftError.exit_code and RESUME not in str(error):
        error.args = (f"{error}; {RESUME} goes on from {Path(output_dir) / latest}",)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean `x`?` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else ""


def _unknown_option(parser: Parser, word: str) -> str:
    hint = did_you_mean(word.partition("=")[0], parser.options())
    takes_keys = any(action.dest == "overrides" for action in parser._actions)
    if not hint and takes_keys and word.startswith("--"):
        hint = f"configuration keys go without dashes: {word.removeprefix('--').partition('=')[0]}=value"
    return f"unknown option `{word}`; {hint or f'`{parser.prog} --help` shows what there is'}"
