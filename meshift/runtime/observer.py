"""What a run tells whoever watches it: a terminal, a notebook, a test.

It knows nothing of how it is shown, and no run depends on anybody watching.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Observer(Protocol):
    """Hears what happens in a run, in this order; steps count from 0."""

    def on_message(self, text: str) -> None:
        """A warning or a note, at any time: "12 prompts over data.max_prompt_length were left out"."""

    def on_count(self, what: str, done: int, total: int | None) -> None:
        """Of something long ("rows of hh.jsonl"), at any time: so many of so many, if that is known, are done."""

    def on_start(self, total_steps: int, title: str) -> None:
        """Data and models are there; `total_steps` steps follow."""

    def on_call(self, step: int, name: str) -> None:
        """The call `name` of this step begins, or what is done after its calls, as writing a checkpoint."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """This step is done, and its metrics are on disk."""

    def on_finish(self) -> None:
        """The last step is done."""


class SilentObserver:
    """Shows nothing."""

    def on_message(self, text: str) -> None:
        """See `Observer`."""

    def on_count(self, what: str, done: int, total: int | None) -> None:
        """See `Observer`."""

    def on_start(self, total_steps: int, title: str) -> None:
        """See `Observer`."""

    def on_call(self, step: int, name: str) -> None:
        """See `Observer`."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Observer`."""

    def on_finish(self) -> None:
        """See `Observer`."""
