"""A gang over the nodes of a Ray cluster, one actor to a device: the only file that knows Ray.

Ray starts the processes, says which have died, and carries text between this process and a keeper on each node
(`outpost.py`). What they send each other in the run is not Ray's: they meet at a port of the first one's node.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

import meshift
from meshift.config.plan import LaunchConfig
from meshift.errors import ConfigError, LayoutError, LostWorkerError, WorkerError
from meshift.layout.mesh import Mesh
from meshift.runtime.launch.cluster import Node, nodes_of, seats
from meshift.runtime.launch.conduct import GRACE_S, conduct
from meshift.runtime.launch.gang import Ending
from meshift.runtime.launch.member import LOST_PEER, Post
from meshift.runtime.launch.outpost import Keeper, Surroundings, Worker
from meshift.runtime.launch.watch import Limits
from meshift.runtime.observer import Observer

POLL_S = 0.5
"""How long a keeper waits for something to be said before it answers that nothing was."""
QUIET_S = 5.0
"""A keeper that has not answered for so long is taken to be dead, where other signs say that somebody is."""
DEATH_S = 30.0
"""Ray may take as long to say that a node is dead."""
ANSWER_S = 20.0
"""How long a node is given to start its keeper, or to reserve its devices, before it is asked again."""
START_S = 300.0
"""How long all processes together are given to start."""
END_S = 10.0
"""How long a node is given to end its processes."""
FORGOTTEN_S = 10.0
"""At least so long a keeper goes on though nobody asks it anything."""
OBJECTS = 128 * 2**20
"""Bytes for Ray's object store, where the cluster is ours: nothing of a run goes through it."""


def run_on_ray(
    settings: LaunchConfig,
    mesh: Mesh,
    work: tuple[str, str],
    surroundings: Surroundings,
    observer: Observer,
    limits: Limits,
) -> Any:
    """As `run_gang`, with a process for each device of the mesh, on the cluster that the settings name.

    `work` is entry and argument. Raises `WorkerError` where devices are missing for longer than the settings wait.
    """
    limits = replace(limits, death_s=DEATH_S)
    with _connected(settings, len(mesh)):
        return conduct(RayGang(settings, mesh, work, surroundings, observer, limits), observer, limits)


@contextmanager
def _connected(settings: LaunchConfig, num_devices: int) -> Iterator[None]:
    """Joined to the cluster that is named, or to one of this machine alone that ends with the run."""
    wanted = settings.ray_address
    if ray.is_initialized():
        found = ray.get_runtime_context().gcs_address
        if wanted not in ("auto", found):
            raise ConfigError(
                f"`launch.ray_address` is {wanted}, but this process has joined the Ray cluster at {found}; "
                "name that, or call ray.shutdown() before"
            )
        yield
        return
    on_term = signal.getsignal(signal.SIGTERM)  # Ray puts in its own
    folder = tempfile.mkdtemp(prefix="meshift-ray-") if wanted is None else None
    try:
        _join(wanted, folder, num_devices)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_term)
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _join(address: str | None, folder: str | None, num_devices: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if folder is not None:
            quiet |= {"include_dashboard": False, "object_store_memory": OBJECTS, "num_cpus": num_devices}
            ray.init(address="local", _temp_dir=folder, **quiet)
            return
        if address != "auto":  # Ray tries for minutes where nobody answers
            host, _, port = str(address).rpartition(":")
            socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
        ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise ConfigError(
            f"`launch.ray_address` is {address or 'not set'}, and Ray could not be joined ({_first(error)})"
        ) from None


class RayGang:
    """See `Gang`. A process is an actor in a bundle of a placement group, on the node that the mesh says."""

    def __init__(
        self,
        settings: LaunchConfig,
        mesh: Mesh,
        work: tuple[str, str],
        surroundings: Surroundings,
        observer: Observer,
        limits: Limits,
    ) -> None:
        self._settings, self._mesh, self._work, self._limits = settings, mesh, work, limits
        self._surroundings, self._observer = json.dumps(asdict(surroundings)), observer
        self._term_asked = False
        self._seats: list[Node] = []
        self._group: Any = None
        self._keepers: dict[str, Any] = {}
        self._workers: list[Any] = []
        self._runs: list[Any] = []
        self._asked: dict[str, tuple[Any, float]] = {}
        self._speaking: set[int] = set()
        self._known: set[int] = set()

    def __len__(self) -> int:
        return len(self._mesh)

    def start(self) -> None:
        """See `Gang`. Waits for devices as long as the settings say."""
        kind = self._reserve()
        options: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if kind == "GPU" else {"num_cpus": 1}
        for rank in range(len(self)):
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
            actor = ray.remote(Worker).options(max_restarts=0, scheduling_strategy=strategy, **options)
            self._workers.append(actor.remote())
        places = {node: json.loads(told) for node, told in self._enter().items()}
        first = self._seats[0].address
        entered = [
            worker.enter.remote(self._surroundings, None if rank else first)
            for rank, worker in enumerate(self._workers)
        ]
        port = self._answers(entered)[0]
        for rank, worker in enumerate(self._workers):
            node = self._seats[rank]
            _, folder, num_cpus, _ = places[node.id]
            post = Post(
                entry=self._work[0],
                argument=self._work[1],
                rank=rank,
                num_processes=len(self),
                num_threads=max(1, num_cpus // self._seats.count(node)),
                timeout_s=self._limits.hang_s + GRACE_S,
                folder=folder,
                gpu=0 if kind == "GPU" else None,  # Ray shows a process no other
                meeting=(first, port),
                host=node.address,
            )
            self._runs.append(worker.run.remote(json.dumps(asdict(post))))
        self._speaking = set(range(len(self)))
        for node_id in self._keepers:
            self._ask(node_id)

    def hear(self, timeout_s: float) -> Iterator[tuple[int, bytes | None]]:
        """See `Gang`. A process whose node does not answer any more, as far as Ray knows, has no more to say."""
        if self._term_asked:
            self._term_asked = False
            self._keepers[self._seats[0].id].terminate.remote(0)
        runs = {self._runs[rank]: rank for rank in self._speaking - self._known}
        asked = {ref: node_id for node_id, (ref, _) in self._asked.items()}
        waiting = [*runs, *asked]
        ready, _ = ray.wait(waiting, timeout=timeout_s)
        for ref in ray.wait(waiting, num_returns=len(waiting), timeout=0)[0] if ready else []:
            if ref in asked:
                yield from self._heard_at(asked[ref], ref)
            elif (ending := self.ending(runs[ref])) is not None and ending.kind != "done":
                yield from self._close(runs[ref])

    def ending(self, rank: int) -> Ending | None:
        """See `Gang`."""
        node = self._seats[rank]
        if node.id not in self._asked:
            return Ending(kind="killed", how=f"was lost with its node {node.name}")
        try:
            code = ray.get(self._runs[rank], timeout=0)
        except GetTimeoutError:
            if self._quiet_s(node.id) > QUIET_S:
                return Ending(kind="killed", how=f"was lost with its node {node.name}, which does not answer")
            return None
        except RayTaskError as error:
            self._observer.on_message(str(error))
            return Ending(kind="failed", how=f"failed on {node.name} (its traceback stands above)")
        except RayError:  # Ray may say that an actor is dead long before it says so of the node
            dead = self._quiet_s(node.id) > 2 * POLL_S
            return Ending(kind="killed", how=f"was {'lost with its node' if dead else 'killed on'} {node.name}")
        kinds = {0: Ending(kind="done"), LOST_PEER: Ending(kind="deserted", how="could not reach another")}
        return kinds.get(code, Ending(kind="failed", how=f"failed on {node.name}"))

    def look(self) -> list[tuple[str, str]]:
        """See `Gang`. Of a node that does not answer there is nothing to see."""
        refs = [keeper.look.remote() for keeper in self._keepers.values()]
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=QUIET_S)
        seen: dict[int, tuple[str, str]] = {}
        for ref in ready:
            with suppress(RayError):
                seen |= {rank: (state, stacks) for rank, state, stacks in json.loads(ray.get(ref))}
        names = [node.name for node in self._seats]
        unseen = [(f"not seen on {name}", "") for name in names]
        return [
            (f"{seen[rank][0]} on {names[rank]}", seen[rank][1]) if rank in seen else unseen[rank]
            for rank in range(len(self))
        ]

    def terminate(self) -> None:
        """See `Gang`."""
        self._term_asked = True

    def end(self) -> None:
        """See `Gang`."""
        self._kill(self._workers)
        ended = [keeper.end.remote() for keeper in self._keepers.values()]  # those that are stopped, too
        if ended:
            ray.wait(ended, num_returns=len(ended), timeout=END_S)
        self._kill(self._keepers.values())
        self._release()

    def _reserve(self) -> str:
        """Get a keeper on each node and a bundle for each device; gives what a device is."""
        deadline, told = time.monotonic() + self._settings.ray_wait_s, False
        silent: set[str] = set()
        while True:
            kind, nodes = nodes_of(ray.nodes())
            lack = self._take([node for node in nodes if node.id not in silent], kind, silent)
            if lack is None:
                return kind
            if silent:
                continue  # without them
            lack += f" (nodes and their devices: {', '.join(map(str, nodes)) or 'none'})"
            if self._term_asked:
                raise LostWorkerError(f"the run was waiting for devices: {lack}")
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"{lack}; the run waited {self._settings.ray_wait_s:.0f} s (`launch.ray_wait_s`) for "
                    f"{len(self)} devices: add nodes to the Ray cluster, or give a plan for fewer"
                )
            if not told:
                self._observer.on_message(f"{lack}; waiting for up to {self._settings.ray_wait_s:.0f} s")
            told = True
            time.sleep(1.0)

    def _take(self, nodes: Sequence[Node], kind: str, silent: set[str]) -> str | None:
        """Try to get all devices on these nodes; gives what is in the way, and adds to those that are `silent`."""
        try:
            self._seats = seats(self._mesh, nodes)
        except LayoutError as error:
            silent.clear()  # they may have come back
            return str(error).rstrip(".")
        for node in self._seats:
            if node.id not in self._keepers:
                strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
                actor = ray.remote(Keeper).options(
                    num_cpus=0, max_restarts=0, max_concurrency=4, scheduling_strategy=strategy
                )
                self._keepers[node.id] = actor.remote(max(self._limits.heartbeat_s, FORGOTTEN_S))
        fault = self._silence({node.id: node for node in self._seats}, silent)
        if fault is not None:
            return fault
        where = [{"ray.io/node-id": node.id} for node in self._seats]
        self._group = placement_group([{kind: 1}] * len(self), strategy="PACK", bundle_label_selector=where)
        if self._group.wait(ANSWER_S):
            return None
        self._release()
        return "other work holds devices of the cluster"

    def _silence(self, nodes: dict[str, Node], silent: set[str]) -> str | None:
        """Drop keepers that nobody needs or that do not answer; gives a sentence on the first such node."""
        for node_id in [node_id for node_id in self._keepers if node_id not in nodes]:
            ray.kill(self._keepers.pop(node_id))
        refs = {node_id: keeper.is_here.remote() for node_id, keeper in self._keepers.items()}
        ray.wait(list(refs.values()), timeout=ANSWER_S)
        ray.wait(list(refs.values()), num_returns=len(refs), timeout=QUIET_S)
        fault = None
        for node_id, ref in refs.items():
            try:
                ray.get(ref, timeout=0)
            except (RayError, GetTimeoutError) as error:
                if "No module named" in str(error):
                    raise ConfigError(
                        f"the node {nodes[node_id].name} cannot import Meshift ({_last(error)}); install the same "
                        "packages on every node"
                    ) from None
                silent.add(node_id)
                fault = f"the node {nodes[node_id].name} does not answer"
                ray.kill(self._keepers.pop(node_id))
        return fault

    def _enter(self) -> dict[str, str]:
        """What each node says of itself. Raises `ConfigError` where one does not see what the run needs."""
        nodes = {node.id: node.name for node in self._seats}
        asked = [self._keepers[node_id].enter.remote(self._surroundings) for node_id in nodes]
        told = dict(zip(nodes, self._answers(asked), strict=True))
        for node_id, answer in told.items():
            missing, _, _, version = json.loads(answer)
            if missing is not None:
                raise ConfigError(
                    f"the node {nodes[node_id]} does not see {missing} as this machine does; the run's working "
                    "directory, models, data and `output_dir` have to be on a file system that all nodes share"
                )
            if version != meshift.__version__:
                raise ConfigError(
                    f"the node {nodes[node_id]} has Meshift {version}, this machine {meshift.__version__}; "
                    "install the same on all"
                )
        return told

    def _answers(self, refs: list[Any]) -> list[Any]:
        try:
            return list(ray.get(refs, timeout=START_S))
        except RayTaskError as error:
            raise WorkerError(f"a process could not be started: {_last(error)}") from error
        except (RayError, GetTimeoutError) as error:
            raise LostWorkerError(f"a process was lost while all were started ({_first(error)})") from None

    def _quiet_s(self, node_id: str) -> float:
        """How long a keeper has owed an answer."""
        ref, asked = self._asked[node_id]
        try:
            ray.get(ref, timeout=0)
        except GetTimeoutError:
            return time.monotonic() - asked
        except RayError:
            return math.inf
        return 0.0

    def _ask(self, node_id: str) -> None:
        self._asked[node_id] = self._keepers[node_id].hear.remote(POLL_S), time.monotonic()

    def _heard_at(self, node_id: str, ref: Any) -> Iterator[tuple[int, bytes | None]]:
        try:
            said = json.loads(ray.get(ref))
        except RayError:
            del self._asked[node_id]
            for rank in [rank for rank in self._speaking if self._seats[rank].id == node_id]:
                yield from self._close(rank)
            return
        self._ask(node_id)
        for rank, message in said:
            self._known.add(rank)
            if message is None:
                yield from self._close(rank)
            else:
                yield rank, message.encode()

    def _close(self, rank: int) -> Iterator[tuple[int, None]]:
        """Say once that a process has no more to say."""
        if rank in self._speaking:
            self._speaking.remove(rank)
            yield rank, None

    @staticmethod
    def _kill(actors: Iterable[Any]) -> None:
        for actor in actors:
            with suppress(RayError):
                ray.kill(actor)

    def _release(self) -> None:
        if self._group is not None:
            with suppress(RayError):
                remove_placement_group(self._group)
        self._group = None


def _first(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _last(error: Exception) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
