"""By plan, whoever draws for a later step does so while others train; or before, where one device does both."""

import time
from dataclasses import dataclass

import pytest
import torch
from gang import run_gang

from meshift.batch import Batch, Outcome, Ragged
from meshift.graph.ahead import halves_of
from meshift.graph.calls import Graph, HostCall, ModelCall
from meshift.layout.layout import Placement
from meshift.layout.mesh import Device
from meshift.parallel.groups import new_group
from meshift.runtime.ahead import Queue
from meshift.runtime.spread_ahead import SpreadAhead
from meshift.runtime.world import World

STEPS, AHEAD, LONGEST_S = 4, 1, 60.0


@dataclass(kw_only=True)
class MeetingRole:
    """A role whose weight is its number of updates. With a folder, drawing and training wait for each other there.

    Only if both are under way at the same time does either of them end.
    """

    placements: dict
    world: World
    folder: object = None
    weight: int = 0
    published: int = 0

    @property
    def home(self):
        return self.placements["train"]

    def members(self, kind):
        return self.world.members(self.placements[kind])

    def generate(self, task, batch, on_part=None):
        step = int(batch["prompts"].values[0])
        if self.folder is not None and 0 < step < STEPS:
            self._meet(f"drawing-for-{step}", f"training-in-{step - 1}")
        drawn = Ragged.scalars([self.published] * len(batch), torch.int64)
        return Outcome(batch=Batch({"tokens": drawn, "versions": drawn}))

    def train(self, task, batch, *, step):
        if self.folder is not None and step < STEPS - 1:
            self._meet(f"training-in-{step}", f"drawing-for-{step + 1}")
        self.weight += 1
        return Outcome(
            metrics={"version": float(batch["versions"].values[0]), "seen": float(batch["x"].values[0])}
        )

    def publish(self):
        self.weight = self.published = self.published + 1
        return {"published": float(self.published)}

    def _meet(self, mine, other):
        (self.folder / mine).touch()
        until = time.monotonic() + LONGEST_S
        while not (self.folder / other).exists():
            assert time.monotonic() < until, f"{mine} has waited for {other}: they are not at the same time"
            time.sleep(0.002)


def graph():
    def host(batch):
        return Outcome(batch=Batch({"x": Ragged.scalars(10 * batch["tokens"].values)}))

    calls = (
        ModelCall(
            name="rollout",
            role="actor",
            kind="generate",
            task=None,
            reads=("prompts",),
            writes=("tokens", "versions"),
        ),
        HostCall(name="x", function=host, reads=("tokens",), writes=("x",)),
        ModelCall(name="train", role="actor", kind="train", task=None, reads=("x", "versions")),
    )
    return Graph(calls, frozenset(("prompts",)))


def next_batch(step):
    return Batch({"prompts": Ragged.scalars([step] * 3, torch.int64)})


def steps_of(rank, folder, generate, train, meets):
    world = World(
        rank=rank, ranks={Device(index=i): i for i in range(3)}, group=new_group(range(3), backend="gloo")
    )
    placements = {"generate": Placement.parse(generate, "d1"), "train": Placement.parse(train, "d2")}
    role = MeetingRole(placements=placements, world=world, folder=folder if meets else None)
    queue = Queue(AHEAD, STEPS)
    run = SpreadAhead(halves_of(graph()), {"actor": role}, world, queue, next_batch)
    assert run.overlaps == meets
    for step in range(STEPS):
        outcome = run.run(next_batch(step), step)
        if rank == 0:
            assert outcome.metrics["version"] == max(0, step - AHEAD), "weights moved when a step had ended"
            assert outcome.metrics["seen"] == 10 * max(0, step - AHEAD), "the batch of one step, not of another"
            assert outcome.metrics["published"] == step + 1
            assert outcome.batch["prompts"].values.tolist() == [step] * 3


@pytest.mark.parametrize(("generate", "train"), [("2", "0-1"), ("0", "1-2")])
def test_drawing_and_training_would_wait_for_each_other(tmp_path, generate, train):
    """Also where process 0 draws: its host calls come first, so that the others can train."""
    (tmp_path / "meet").mkdir()
    run_gang(3, steps_of, tmp_path, tmp_path / "meet", generate, train, True)


def test_a_device_that_draws_and_trains_would_draw_with_weights_of_the_next_step(tmp_path):
    run_gang(3, steps_of, tmp_path, None, "1", "1-2", False)
