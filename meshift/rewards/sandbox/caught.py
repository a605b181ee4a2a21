"""Keeps whatever a block raises, SystemExit and KeyboardInterrupt too: for code that is not ours.

Only processes that run such code have a use for it.
"""

from __future__ import annotations

from types import TracebackType


class Caught:
    """After the block, `error` is what it raised, or None."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __enter__(self) -> Caught:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.error = error
        return True
