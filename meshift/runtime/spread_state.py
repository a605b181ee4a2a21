"""Checkpoints of a run over several processes: each writes its boxes of the roles, and reads back what it needs.

Process 0 leads: it says from where all go on, and after each step whether there is a checkpoint to be written, and
where; the others follow. The files are those of a run in one process, in boxes (`training/stored_tensors.py`), so
that a run goes on under any other plan, or none. It knows nothing of when checkpoints are due.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from meshift.errors import CheckpointError
from meshift.parallel.exchange import gather_facts
from meshift.runtime.observer import Observer
from meshift.runtime.run import Job
from meshift.runtime.run_state import RunState
from meshift.runtime.spread_role import SpreadRole
from meshift.runtime.world import World


class SpreadRunState(RunState):
    """`RunState` in process 0, whose `roles` are spread over all."""

    def __init__(self, spread: Mapping[str, SpreadRole], world: World, *given: Any) -> None:
        """`given` is what `RunState` takes after its roles."""
        super().__init__(spread, *given)
        self._spread, self._world = spread, world
        self._known: dict[tuple[str, bool], str] = {}

    def begin(self, folder: Path | None, num_done: int) -> None:
        """See `RunState`; the others hear of it."""
        self._world.tell({"folder": None if folder is None else str(folder), "num_done": num_done})
        super().begin(folder, num_done)

    def end_step(self) -> None:
        """See `RunState`."""
        self._world.tell({"write": None})

    def _fixed(self, name: str) -> str:
        """Once only: the whole model has to be opened for it."""
        key = name, self._spread[name].is_mixed
        if key not in self._known:
            self._known[key] = super()._fixed(name)
        return self._known[key]

    def _write_roles(self, folder: Path) -> None:
        for name in self._spread:
            (folder / name).mkdir()
        self._world.tell({"write": str(folder)})
        _write_shares(self._spread, self._world, folder)

    def _load_roles(self, folder: Path) -> None:
        _load_shares(self._spread, self._world, folder)


def follow(job: Job, spread: Mapping[str, SpreadRole], world: World, observer: Observer) -> None:
    """What a process other than the first does in a run: the same steps, and its share of the checkpoints."""
    start = world.hear()
    if start["folder"] is not None:
        _load_shares(spread, world, Path(start["folder"]))
        if job.queue is not None:
            job.queue.read(Path(start["folder"]))
    for step in range(start["num_done"], job.max_steps):
        assert job.advance is not None
        job.advance(job.next_batch(step), step, partial(observer.on_call, step))
        job.evaluate(step)
        job.fixed(step + 1)
        while (order := world.hear())["write"] is not None:
            _write_shares(spread, world, Path(order["write"]))


def _write_shares(spread: Mapping[str, SpreadRole], world: World, folder: Path) -> None:
    """Every process's boxes, on the disk when it returns. Raises `OSError` in process 0 where one failed."""
    fault: str | None = None
    try:
        for name, role in spread.items():
            role.write_share(folder / name)
    except OSError as error:
        fault = error.strerror or str(error)
    _hear_faults(world, fault, OSError)


def _load_shares(spread: Mapping[str, SpreadRole], world: World, folder: Path) -> None:
    """Every process's boxes, from whoever wrote them; then the parameters move to where else they are used."""
    fault: str | None = None
    try:
        for name, role in spread.items():
            role.load_share(folder / name)
    except CheckpointError as error:
        fault = str(error)
    _hear_faults(world, fault, CheckpointError)
    for role in spread.values():
        role.publish()


def _hear_faults(world: World, own: str | None, kind: type[Exception]) -> None:
    """Raise the first fault of any process, in process 0; the others go on, and are ended with it."""
    faults: Sequence[str | None] = gather_facts(own, world.everybody)
    if world.rank == 0:
        for fault in faults:
            if fault is not None:
                raise kind(fault)
