"""Room on the disk: what a run is going to write, against what is free. It writes nothing itself."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from meshift.runtime.run_state import KeptRole

MASTER = "master/"
MASTER_BYTES, KEPT_BYTES = 4, 12  # of a trained number: in a model at most; in a checkpoint, with Adam's moments


def bytes_to_write(roles: Mapping[str, KeptRole], *, with_checkpoints: bool) -> int:
    """Upper bound of the models that are trained, and of two checkpoints: a new one stands beside the last."""
    total = 0
    for role in roles.values():
        trained = sum(t.numel() for name, t in role.state().tensors.items() if name.startswith(MASTER))
        if trained:
            fixed = sum(t.numel() for t in role.fixed_weights().values())
            total += MASTER_BYTES * (trained + fixed) + 2 * KEPT_BYTES * trained * with_checkpoints
        role.leave()
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
