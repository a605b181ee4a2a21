"""Tensors that leave a device for the host's memory and come back, under the same names, views and references.

A tensor's storage is emptied and later filled again, so that parameters, optimizer state and whatever points to
them stay the objects they are; in between nothing may read them. On a GPU the host's copy is pinned, and copies go
at the bus's speed. It knows nothing of roles or of when anything is idle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Kept = Callable[[], Iterable[Tensor]]


@dataclass(kw_only=True)
class Moved:
    """What moving has cost so far."""

    num_bytes: int = 0
    seconds: float = 0.0


@dataclass(kw_only=True)
class Offload:
    """`tensors` gives what leaves with its numbers, `blanks` what is all zeros whenever it leaves.

    Both are asked anew each time. Views of one storage may be among them.
    """

    tensors: Kept
    blanks: Kept = tuple
    moved: Moved = field(default_factory=Moved)
    _away: list[tuple[torch.UntypedStorage, int, Tensor | None]] = field(default_factory=list)
    _host: dict[int, Tensor] = field(default_factory=dict)

    @property
    def is_away(self) -> bool:
        """Whether the tensors cannot be used."""
        return bool(self._away)

    @property
    def num_bytes_away(self) -> int:
        """Device memory that is free for others now."""
        return sum(size for _, size, _ in self._away)

    @torch.no_grad()
    def leave(self) -> None:
        """Free the tensors' memory on the device. Nothing happens where that is done."""
        if self._away:
            return
        started = time.perf_counter()
        copies = []
        for number, storage in enumerate(_storages(self.tensors())):
            copies.append((storage, storage.nbytes(), self._copy(number, storage)))
        blanks = [(storage, storage.nbytes(), None) for storage in _storages(self.blanks())]
        _wait_for({storage.device for storage, _, _ in copies})  # copies are whole before sources are freed
        self._away = [*copies, *blanks]
        for storage, _, _ in self._away:
            storage.resize_(0)
        self._account(started, copies)

    @torch.no_grad()
    def come(self) -> None:
        """Bring the tensors back to where they were. Nothing happens where they are there."""
        if not self._away:
            return
        started = time.perf_counter()
        copies = [(storage, size, copy) for storage, size, copy in self._away if copy is not None]
        for storage, size, copy in self._away:
            storage.resize_(size)
            if copy is None:
                _bytes_of(storage).zero_()
            else:
                _bytes_of(storage).copy_(copy, non_blocking=True)
        _wait_for({storage.device for storage, _, _ in copies})  # the host's copy will be written to again
        self._away = []
        self._account(started, copies)

    def _copy(self, number: int, storage: torch.UntypedStorage) -> Tensor:
        """The numbers in the host's memory, which is kept from one time to the next."""
        host = self._host.get(number)
        if host is None or host.numel() != storage.nbytes():
            pinned = storage.device.type == "cuda"
            host = self._host[number] = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
        return host.copy_(_bytes_of(storage), non_blocking=True)

    def _account(self, started: float, copies: list[tuple[torch.UntypedStorage, int, Tensor]]) -> None:
        self.moved.seconds += time.perf_counter() - started
        self.moved.num_bytes += sum(size for _, size, _ in copies)


def pays_on(device: torch.device) -> bool:
    """Whether leaving a device frees anything: a CPU's memory is the host's."""
    return device.type != "cpu"


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Every storage once, in order, those left out that are empty."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors if tensor.numel()}
    return list(found.values())


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _wait_for(devices: Iterable[torch.device]) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
