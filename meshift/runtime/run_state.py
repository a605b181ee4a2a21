"""What a run's checkpoint holds: the state of every role and algorithm, and proof that the rest is as it was.

The rest are weights that no step changes (they are not stored, only their sha256) and the data (the sha256 of all
rows, and of the last step's batch). It knows nothing of when checkpoints are made, nor of files and their names.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from meshift import __version__
from meshift.batch import Batch, column_key
from meshift.errors import CheckpointError, DataError, ModelError
from meshift.kernels.cpu import who_multiplies
from meshift.runtime.ahead import Queue
from meshift.step import Role
from meshift.training.checkpoint import Remembers, State, fingerprint, read_state, write_state
from meshift.training.flops import Work

RUN = "run"
"""The folder beside those of the roles: what is of no role."""
VALUES = ("num_done", "memories", "fixed_weights", "last_batch", "rows")


class FixedRole(Protocol):
    """A role of which a run is told which weights no step changes."""

    def fixed_weights(self) -> Mapping[str, Tensor]:
        """The parameters that no step has changed."""

    def leave(self) -> None:
        """Leave the device, if the role is one that does between calls."""


class KeptRole(Role, FixedRole, Protocol):
    """A role that can be written into a checkpoint and read back, and that counts its work."""

    @property
    def num_numbers(self) -> tuple[int, int]:
        """Numbers of the whole model that are trained, and those that are not."""

    @property
    def work(self) -> Work:
        """What training has computed so far, and in what time."""

    @property
    def peak_flops(self) -> float:
        """FLOP/s that the device reaches at best in the type that the model computes in."""

    def state(self) -> State:
        """All that steps have changed."""

    def load_state(self, state: State) -> None:
        """Continue from a checkpoint."""


class RunState(ABC):
    """The roles and memories of a run, to be written after a step and read back before one."""

    def __init__(
        self,
        roles: Mapping[str, FixedRole],
        memories: Mapping[str, Remembers],
        next_batch: Callable[[int], Batch],
        rows: Sequence[Any] = (),
        queue: Queue | None = None,
    ) -> None:
        self._roles = roles
        self._memories = memories
        self._next_batch = next_batch
        self._rows = rows
        self._queue = queue
        self._rows_fingerprint: str | None = None
        self._fingerprints: dict[tuple[str, frozenset[str]], str] = {}

    def write(self, folder: Path, num_done: int) -> None:
        """Fill a folder with the state after `num_done` steps. Raises `OSError` where that cannot be done."""
        values = {
            "num_done": num_done,
            "memories": {name: memory.state_dict() for name, memory in self._memories.items()},
            "fixed_weights": {name: self._fixed(name) for name in self._roles},
            "last_batch": batch_fingerprint(self._next_batch(num_done - 1)),
            "rows": self._fingerprint_of_rows(),
        }
        write_state(folder / RUN, State(values=values))
        if self._queue is not None:
            self._queue.write(folder)
        self._write_roles(folder)

    def begin(self, folder: Path | None, num_done: int) -> None:
        """Before this process's first step, after `num_done` of the run's: continue from a folder, if given."""
        del num_done
        if folder is not None:
            self.restore(folder)

    @abstractmethod
    def end_step(self) -> None:
        """After each step, when its checkpoint, if it has one, is written."""

    def restore(self, folder: Path) -> None:
        """Continue from what `write` wrote.

        Raises `DataError` where the data now give other rows, `ModelError` where a model that the run only
        reads is another, `CheckpointError` where a trained model has another shape.
        """
        values = read_state(folder / RUN).values
        if not values.keys() >= set(VALUES):
            raise CheckpointError(f"{folder} is of another version of meshift; go on with the one that wrote it")
        self._check_data(folder, values)
        self._load_roles(folder)
        for name in self._roles:
            if self._fixed(name) != values["fixed_weights"][name]:
                raise ModelError(
                    f"the {name} model is not the one that {folder} was trained with (its weights have another "
                    "sha256); resume with the models that the run began with"
                )
        for name, memory in self._memories.items():
            memory.load_state_dict(values["memories"][name])
        if self._queue is not None:
            self._queue.read(folder)

    @abstractmethod
    def _write_roles(self, folder: Path) -> None:
        """Write each role's state into a folder of its name."""

    @abstractmethod
    def _load_roles(self, folder: Path) -> None:
        """Let each role continue from there."""

    def _check_data(self, folder: Path, values: Mapping[str, Any]) -> None:
        num_done = values["num_done"]
        if batch_fingerprint(self._next_batch(num_done - 1)) != values["last_batch"]:
            change = f"step {num_done} would get other rows or other tokens"
        elif self._fingerprint_of_rows() != values["rows"]:
            change = "a row of another step, its text or its tokens are others"
        else:
            return
        raise DataError(
            f"the data are not those that {folder} was trained on: {change}; resume with the data and the "
            "tokenizer that the run began with"
        )

    def _fingerprint_of_rows(self) -> str:
        if self._rows_fingerprint is None:
            self._rows_fingerprint = rows_fingerprint(self._rows)
        return self._rows_fingerprint

    def _fixed(self, name: str) -> str:
        """Weights that stay need to be read once only."""
        weights = self._roles[name].fixed_weights()
        key = (name, frozenset(weights))
        if key not in self._fingerprints:
            self._fingerprints[key] = fingerprint(weights)
        self._roles[name].leave()
        return self._fingerprints[key]


class LocalRunState(RunState):
    """`RunState` of roles in this process."""

    def __init__(self, roles: Mapping[str, KeptRole], *given: Any) -> None:
        """`given` is what `RunState` takes after its roles."""
        super().__init__(roles, *given)
        self._kept = roles

    def end_step(self) -> None:
        """Nobody waits for it."""

    def _write_roles(self, folder: Path) -> None:
        for name, role in self._kept.items():
            write_state(folder / name, role.state())
            role.leave()

    def _load_roles(self, folder: Path) -> None:
        for name, role in self._kept.items():
            role.load_state(read_state(folder / name))
            role.leave()


def batch_fingerprint(batch: Batch) -> str:
    """A sha256 over the whole numbers and the data's columns in a batch.

    Fields of floats are left out: what a model computed may differ in its last bits on another machine. So are
    columns that are not of the data, such as the place of a row, which may be another after a move.
    """
    columns = {key: list(values) for key, values in batch.columns.items() if key.startswith(column_key(""))}
    digest = hashlib.sha256(json.dumps(columns, sort_keys=True, default=str).encode())
    for key, ragged in sorted(batch.fields.items()):
        if not ragged.values.is_floating_point():
            digest.update(fingerprint({f"{key}.values": ragged.values, f"{key}.lengths": ragged.lengths}).encode())
    return digest.hexdigest()


def rows_fingerprint(rows: Sequence[Any]) -> str:
    """A sha256 over the data's rows (dataclasses) in their order, but for where each stood."""
    digest = hashlib.sha256()
    for row in rows:
        values = {part.name: getattr(row, part.name) for part in fields(row) if part.name != "where"}
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def environment() -> dict[str, str]:
    """What the last bits of a run depend on besides its config."""
    cuda = torch.cuda.is_available()
    return {
        "meshift": __version__,
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name() if cuda else f"CPU with {torch.backends.cpu.get_cpu_capability()}",
        "num_threads": str(torch.get_num_threads()),
        "cpu_kernels": who_multiplies(),
    }
