"""Steps over several processes whose completions are drawn before their step, while others train.

Each process runs its calls of the step that is learned from and then draws what is due, so that whoever only draws
begins at once, with weights that stay what they are until the step's end; then all new weights move. Where the
weights that draw are those that training changes, because devices do both, drawing comes first. Either way the
outcome is that of `AheadStep` in one process. It knows nothing of models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from meshift.batch import Batch, Outcome
from meshift.graph.ahead import Halves, generators
from meshift.runtime.ahead import Queue, step_metrics
from meshift.runtime.spread_role import SpreadRole
from meshift.runtime.spread_step import Hear, Now, Part, SpreadStep
from meshift.runtime.world import World


class SpreadAhead:
    """A graph's steps in this process, in two halves."""

    def __init__(
        self,
        halves: Halves,
        roles: Mapping[str, SpreadRole],
        world: World,
        queue: Queue,
        next_batch: Callable[[int], Batch],
        part_size: int | None = None,
    ) -> None:
        """`part_size` is of streams within loops that draw; the learning half reads what has ended."""
        self._queue, self._next_batch, self._world = queue, next_batch, world
        self._learning = SpreadStep(halves.learning, roles, world, part_size, publishes=False)
        first_tag, onward = self._learning.end_tag, halves.learning.order()
        self._drawing = SpreadStep(halves.drawing, roles, world, part_size, first_tag, onward=onward)
        drawn_with = {role for call in halves.drawing.order() for role in generators(call)}
        self.overlaps = not any(_shares_devices(roles[name]) for name in drawn_with)

    @property
    def placements(self) -> Mapping[str, tuple[int, ...]]:
        """The processes of each call."""
        return {**self._drawing.placements, **self._learning.placements}

    def run(self, batch: Batch, step: int, on_call: Hear = lambda name: None) -> Outcome:
        """This process's part of a step, whose completions were drawn for `batch`. See `SpreadStep.run`."""
        now = Now(step=step, began=time.perf_counter(), on_call=on_call)
        due = self._queue.due(step)
        drawn = [self._drawn(one, self._draw(one, batch, now)) for one in due if one == step]
        own, later = self._queue.take(step), [one for one in due if one != step]
        parts = [] if self.overlaps else [self._draw(one, None, now) for one in later]
        part = self._learning.run_own(own.batch, now)
        parts += [self._draw(one, None, now) for one in later] if self.overlaps else []
        drawn += [self._drawn(one, begun) for one, begun in zip(later, parts, strict=True)]
        learned = self._learning.gather(part)
        moved = self._learning.publish()
        peaks = self._learning.peaks_of_all(self._drawing.take_peaks())
        self._world.finish()
        metrics = {**step_metrics(own, drawn, learned), **moved, **peaks}
        return Outcome(batch=learned.batch, metrics=metrics)

    def _draw(self, step: int, batch: Batch | None, now: Now) -> Part:
        """This process's part of drawing for a step; `batch` is that step's, where it is known already."""
        return self._drawing.run_own(self._next_batch(step) if batch is None else batch, now)

    def _drawn(self, step: int, part: Part) -> Outcome:
        """What was drawn for a step, in the queue."""
        outcome = self._drawing.gather(part)
        self._queue.put(step, outcome)
        return outcome


def _shares_devices(role: SpreadRole) -> bool:
    """Whether a device draws with the role's weights where it changes them."""
    drawing, home = role.placements["generate"], role.home
    return bool(set(drawing.mesh.devices) & set(home.mesh.devices))
