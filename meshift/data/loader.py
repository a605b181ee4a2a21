"""Which rows make up the next batch: an endless, resumable walk over shuffled epochs; it knows no data."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from meshift.errors import DataError


class Loader(Iterator[list[int]]):
    """Yields lists of `batch_size` indices in [0, num_items), forever.

    Each epoch is one permutation of all items. Nothing is dropped: a batch that the epoch's end leaves
    short is filled from the next epoch, so every batch is full, every item comes once per epoch, and only a
    batch across the edge can hold an item twice. The order depends on seed and epoch only; `batch_size` may
    change on resuming.
    """

    def __init__(self, num_items: int, batch_size: int, seed: int, shuffle: bool = True) -> None:
        if num_items < 1 or batch_size < 1 or seed < 0:
            raise DataError(
                f"cannot draw batches of {batch_size} from {num_items} rows with seed {seed}: "
                "rows and batch size must be at least 1, the seed at least 0."
            )
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self._epoch = 0
        self._cursor = 0
        self._order = self._permutation()

    @property
    def num_drawn(self) -> int:
        """How many indices have been yielded since the very beginning, over all epochs."""
        return self._epoch * self.num_items + self._cursor

    def batch(self, step: int) -> list[int]:
        """Batch `step` (from 0) of the walk, whatever was drawn before; `next` goes on from there."""
        self._seek(step * self.batch_size)
        return next(self)

    def __next__(self) -> list[int]:
        batch: list[int] = []
        while len(batch) < self.batch_size:
            if self._cursor == self.num_items:
                self._epoch, self._cursor = self._epoch + 1, 0
                self._order = self._permutation()
            part = self._order[self._cursor : self._cursor + self.batch_size - len(batch)]
            batch += part
            self._cursor += len(part)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the walk stands, JSON-ready: epoch and cursor, and what the order depends on."""
        return {"epoch": self._epoch, "cursor": self._cursor, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises DataError when data, seed or order were others."""
        for key, value in self._identity().items():
            if state[key] != value:
                raise DataError(
                    f"the saved position in the data has {key}={state[key]}, this run has {key}={value}: "
                    "resume with the data and seed the run began with."
                )
        self._epoch, self._cursor = state["epoch"], state["cursor"]
        self._order = self._permutation()

    def _seek(self, num_drawn: int) -> None:
        epoch, self._cursor = divmod(num_drawn, self.num_items)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = self._permutation()

    def _identity(self) -> dict[str, Any]:
        return {"num_items": self.num_items, "seed": self.seed, "shuffle": self.shuffle}

    def _permutation(self) -> list[int]:
        """This epoch's order, by sorting raw generator bits: those numpy keeps the same in all versions."""
        if not self.shuffle:
            return list(range(self.num_items))
        keys = np.random.PCG64([self.seed, self._epoch]).random_raw(self.num_items)
        order: list[int] = np.argsort(keys, kind="stable").tolist()
        return order
