"""Parameters in memory that all processes of one machine map: a receiver copies from where the sender has them.

The memory has no name: it is a `memfd`, which other processes open through `/proc` while its maker keeps it open,
and which is gone with the last process that maps it, however that one ends. It knows nothing of plans.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64
Form = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Of each tensor by name its shape and type. They lie in the order of their names."""


@dataclass(kw_only=True)
class NearMemory:
    """Tensors that lie in one piece of memory which others may map, by `where`, until `close`."""

    tensors: dict[str, Tensor]
    _file: int = field(default=-1)

    @staticmethod
    def is_possible() -> bool:
        """Whether this system has such memory."""
        return hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir()

    @classmethod
    def make(cls, form: Form) -> NearMemory:
        """New memory for tensors of this form; what they hold is zero."""
        file = os.memfd_create("meshift")
        os.ftruncate(file, max(1, _num_bytes(form)))
        return cls(tensors=_mapped(f"/proc/self/fd/{file}", form), _file=file)

    @property
    def where(self) -> list[Any]:
        """What another process has to be told to map it: the machine, this process, and the file's number."""
        return [machine(), os.getpid(), self._file]

    @staticmethod
    def open(where: list[Any], form: Form) -> dict[str, Tensor]:
        """The tensors of another process on this machine, which must not have closed its memory yet."""
        _, process, file = where
        return _mapped(f"/proc/{process}/fd/{file}", form)

    def close(self) -> None:
        """Nobody else can map it from now on; whoever has keeps it."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def machine() -> str:
    """The same for all processes that can see one another."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = os.readlink("/proc/self/ns/pid") if Path("/proc/self/ns/pid").exists() else ""
    return f"{boot.read_text().strip() if boot.is_file() else os.uname().nodename} {namespace}"


def _num_bytes(form: Form) -> int:
    return sum(_rounded(_size(*one)) for one in form.values())


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _mapped(path: str, form: Form) -> dict[str, Tensor]:
    memory = torch.from_file(path, shared=True, size=max(1, _num_bytes(form)), dtype=torch.uint8)
    tensors, start = {}, 0
    for name, (shape, dtype) in sorted(form.items()):
        size = _size(shape, dtype)
        tensors[name] = memory[start : start + size].view(dtype).view(shape)
        start += _rounded(size)
    return tensors
