"""Room on the disk: what a run is going to write, against what is free. It writes nothing itself."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

MASTER_BYTES, KEPT_BYTES = 4, 12  # of a trained number: in a model at most; in a checkpoint, with Adam's moments


class Sized(Protocol):
    """A role that knows how large it is, wherever its parts are."""

    @property
    def num_numbers(self) -> tuple[int, int]:
        """Numbers of the whole model that are trained, and those that are not."""


def bytes_to_write(roles: Iterable[Sized], *, with_checkpoints: bool) -> int:
    """Upper bound of the models that are trained, and of two checkpoints: a new one stands beside the last."""
    total = 0
    for trained, fixed in (role.num_numbers for role in roles):
        if trained:
            total += MASTER_BYTES * (trained + fixed) + 2 * KEPT_BYTES * trained * with_checkpoints
    return total


def space_note(output_dir: Path, num_bytes: int) -> str | None:
    """A note where less than that is free where the folder is, or will be."""
    place = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free >= num_bytes:
        return None
    return (
        f"`output_dir` {output_dir} has {free / 1e9:.2f} GB free, and this run is going to write up to "
        f"{num_bytes / 1e9:.2f} GB: free space before its end, or name another"
    )
