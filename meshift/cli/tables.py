"""Tables on the terminal: the keys of a config, the rows of a dry run, a few metrics.

It knows nothing of commands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshift.config.loading import describe_keys
from meshift.config.section import Section

WIDTH_WITHOUT_TERMINAL = 160


def make_console() -> Console:
    """The terminal's width; for a file or a pipe, one that keeps keys whole."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH_WITHOUT_TERMINAL)


def print_keys(schema: type[Section]) -> None:
    """Every key with its default and its meaning."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("key", no_wrap=True)
    table.add_column("default", overflow="fold")
    table.add_column("meaning", overflow="fold")
    for key, default, description in describe_keys(schema):
        # Text, not str: rich would take `[tensorboard]` for a style.
        table.add_row(Text(key), Text(default), Text(description))
    console = make_console()
    console.print(table)
    console.print("Set a key in the YAML file of --config, or on the command line: key.sub=value", markup=False)


def print_rows(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Pairs of what and value, one below the other."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for what, value in rows:
        table.add_row(Text(what), Text(value))
    console = make_console()
    console.print(title, style="bold", markup=False)
    console.print(table)


def print_problems(what: str, problems: Sequence[str]) -> None:
    """How many there are, and each on a line of its own."""
    print(f"{what}: {len(problems)} problem{'' if len(problems) == 1 else 's'}")
    for problem in problems:
        print(f"  - {problem}")


def print_metrics(title: str, metrics: Mapping[str, float]) -> None:
    """Metrics with four significant digits; nothing if there is none."""
    if metrics:
        print_rows(title, [(key, f"{value:.4g}") for key, value in metrics.items()])
