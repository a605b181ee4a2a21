"""Files and folders that survive a kill or a power cut whole or not at all: written aside, synced, renamed.

It knows nothing of what they hold. Names of things underway are `.<name>.tmp-<pid>` (being written) and
`.<name>.old-<pid>` (being deleted); whatever a dead process left of them, `remove_leftovers` removes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LEFTOVER = re.compile(r"\.(LATEST|[a-z]+\.(yaml|jsonl?|html)|tensorboard|final\w*|checkpoint-\d+)\.(tmp|old)-\d+")


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` for everything below a folder and for the folder itself."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file; whoever reads it, whenever, finds the old content or the new."""
    unfinished = _underway(path, "tmp")
    try:
        unfinished.write_bytes(content)
        sync(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` to fill; it is removed on leaving, whatever happened."""
    aside = _underway(target, "tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def put_in_place(source: Path, target: Path) -> None:
    """Rename a synced folder to `target`; a folder that had the name is deleted once the new one has it."""
    old = _underway(target, "old")
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder; broken off midway, no half of it keeps the name."""
    old = _underway(path, "old")
    os.rename(path, old)
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what processes that are gone left unfinished directly in a folder. No run may be writing there."""
    for path in list(folder.iterdir()):
        if not LEFTOVER.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _underway(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}-{os.getpid()}")
