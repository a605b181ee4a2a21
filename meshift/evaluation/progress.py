"""Who hears how far an evaluation is.

It knows nothing of how that is shown.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Hears what is being counted ("completions"), how many are done and of how many, and how many of those that
    are done failed; in any thread.

    `work`, where things are not alike, is what is done and what is left in a measure of its own, such as steps of
    decoding.
    """

    def __call__(
        self, what: str, done: int, total: int, failed: int = 0, /, *, work: tuple[float, float] | None = None
    ) -> None:
        """Hear it."""
