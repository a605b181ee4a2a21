"""The checkpoints of a run: `checkpoint-<step>/` folders with a manifest, and `LATEST`, which names one of them.

It knows nothing of what a checkpoint holds. A checkpoint is written aside, synced and renamed, and only then does
`LATEST` name it, so that a process that is killed at any moment leaves the last good one findable. The manifest
lists every file with its size and sha256, so that one that is torn or was changed since is found out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshift.errors import CheckpointError, OtherFormatError, SaveError
from meshift.runtime.durable import folder_aside, put_in_place, remove_folder, sha256_of, sync_tree, write_bytes

LATEST, MANIFEST = "LATEST", "manifest.json"
FORMAT = 1
NAME = re.compile(r"checkpoint-(\d+)")
KEYS = {"format", "step", "facts", "files"}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was verified: its folder, the number of steps done, and what its writer noted."""

    folder: Path
    step: int
    facts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The checkpoint to go on from, if there is one, and one sentence for each that had to be passed over."""

    checkpoint: Checkpoint | None
    broken: list[str] = field(default_factory=list)


def checkpoint_folders(run: Path) -> list[Path]:
    """Folders of the name of a checkpoint, that of the highest step first; they may be broken."""
    numbered = [(int(m[1]), p) for p in run.glob("checkpoint-*") if (m := NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(numbered, reverse=True)]


def latest_name(run: Path) -> str | None:
    """The folder that `LATEST` names; None where there is no such file, or not a name in it."""
    try:
        name = (run / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if NAME.fullmatch(name) else None


def find_checkpoint(run: Path) -> Found:
    """The checkpoint that `LATEST` names, or where that one is broken, the next one before it that is whole.

    Later ones come last: they may be of a future that the run has left. Raises `OtherFormatError` where a whole
    one cannot be read, since going on from an older one would in the end delete it.
    """
    broken: list[str] = []
    for folder in _in_order(run):
        try:
            return Found(checkpoint=verify(folder), broken=broken)
        except OtherFormatError:
            raise
        except CheckpointError as error:
            broken.append(str(error))
    return Found(checkpoint=None, broken=broken)


def _in_order(run: Path) -> list[Path]:
    folders, name = checkpoint_folders(run), latest_name(run)
    if name is None:
        return folders
    named = run / name
    earlier = [folder for folder in folders if _step(folder) < _step(named)]
    return [named, *earlier, *(folder for folder in folders if _step(folder) > _step(named))]


def write_checkpoint(
    run: Path, step: int, fill: Callable[[Path], None], facts: Mapping[str, Any], limit: int | None = None
) -> Path:
    """Write `checkpoint-<step>` with the files that `fill` makes, name it in `LATEST`, keep at most `limit`.

    Raises `SaveError` where the disk is full or cannot be written. Then, as after a kill at any moment, every
    earlier checkpoint and `LATEST` are as they were, and nothing half-written has the name of a checkpoint.
    """
    target = run / f"checkpoint-{step}"
    try:
        with folder_aside(target) as aside:
            fill(aside)
            (aside / MANIFEST).write_bytes(_manifest(aside, step, facts))
            sync_tree(aside)
            put_in_place(aside, target)
        write_bytes(run / LATEST, f"{target.name}\n".encode())
    except OSError as error:
        raise SaveError(
            f"the checkpoint {target} could not be written ({error.strerror or error}); {kept(run)}"
        ) from error
    _prune(run, step, limit)
    return target


def verify(folder: Path, *, sizes_only: bool = False) -> Checkpoint:
    """The checkpoint, if every file is as it was written. Raises `CheckpointError` naming one that is not.

    With `sizes_only` no file but the manifest is read: that finds what was torn, and not what was changed.
    """
    manifest = _read_manifest(folder)
    for name, expected in manifest["files"].items():
        _check_file(folder / name, expected["bytes"], None if sizes_only else expected["sha256"])
    return Checkpoint(folder=folder, step=manifest["step"], facts=manifest["facts"])


def _check_file(path: Path, num_bytes: int, sha256: str | None) -> None:
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != num_bytes:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {num_bytes}")
        if sha256 is not None and sha256_of(path) != sha256:
            raise CheckpointError(f"{path} is not as it was written (its sha256 is another)")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None


def _manifest(folder: Path, step: int, facts: Mapping[str, Any]) -> bytes:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {"format": FORMAT, "step": step, "facts": facts, "files": files}
    return (json.dumps({**content, "sha256": _digest(content)}, indent=2) + "\n").encode()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        digest = manifest.pop("sha256")
        intact = digest == _digest(manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path} cannot be read as a manifest") from None
    if not intact:
        raise CheckpointError(f"{path} is not as it was written (its sha256 is another)")
    # After the sha256, which every format has: a bit that flipped in the number is damage, not another format.
    if manifest.get("format") != FORMAT or not manifest.keys() >= KEYS:
        raise OtherFormatError(
            f"{path} is of format {manifest.get('format')}, and this version of meshift reads format {FORMAT}; go "
            "on with the version that wrote it, or delete that checkpoint to go on from an earlier one"
        )
    if folder.name != f"checkpoint-{manifest['step']}":
        raise CheckpointError(f"{path} is of step {manifest['step']}, which is not what its folder is called")
    return dict(manifest)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _prune(run: Path, step: int, limit: int | None) -> None:
    """Delete all but the `limit` newest up to `step`; a torn one does not count, or it would push out a whole one.

    Later ones are of a future that this run has left.
    """
    if limit is None:
        return
    newest = run / f"checkpoint-{step}"
    earlier = [f for f in checkpoint_folders(run) if _step(f) < step and _looks_whole(f)]
    try:
        for folder in checkpoint_folders(run):
            if folder not in [newest, *earlier][:limit]:
                remove_folder(folder)
    except OSError as error:
        raise SaveError(
            f"{newest} is written, but older checkpoints in {run} could not be deleted "
            f"({error.strerror or error}); see to that, and go on with --resume"
        ) from error


def _looks_whole(folder: Path) -> bool:
    try:
        verify(folder, sizes_only=True)
    except CheckpointError:
        return False
    return True


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def kept(run: Path) -> str:
    """For the sentence of a run whose disk is full: what it can go on from."""
    name = latest_name(run)
    if name is None:
        return "there is no earlier one; free space, and start the run again with --resume"
    return f"{name} is as it was: free space, and go on from there with --resume"
