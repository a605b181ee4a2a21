"""Completions drawn before their step: by weights that lack the updates of at most `max_staleness` steps.

With `max_staleness` k the completions of step t are drawn at the start of step t - k (of the first k steps at the
first), by the weights that the actor has then. So which weights draw what follows from the step alone, and no
completion is ever thrown away for its age. It knows nothing of calls, nor of processes (`spread_ahead.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from meshift.batch import Batch, Outcome
from meshift.config.runs import RolloutRunConfig
from meshift.errors import CheckpointError
from meshift.graph.ahead import Halves
from meshift.step import Role, run_step

FOLDER, VALUES = "ahead", "state.json"
MEASURED = ("timing_s/", "start_s/", "perf/")
"""Metrics of the step in which a call ran; the others go with the completions."""
DIFFERENCE = "sync/logprob_diff_"


def stale_notes(config: RolloutRunConfig) -> tuple[str, ...]:
    """A sentence where completions of older weights are trained on as if they were the current ones'."""
    if not config.ignores_staleness:
        return ()
    return (
        f"`max_staleness` is {config.max_staleness}, and importance ratios are against the trainer's log-probs "
        "(recompute_logprobs) without importance_correction: that older weights drew the tokens is not corrected",
    )


class Queue:
    """Completions that wait for their step, each with its batch. A process keeps of them what its calls read."""

    def __init__(self, max_staleness: int, max_steps: int) -> None:
        self.max_staleness, self.max_steps = max_staleness, max_steps
        self._next = 0
        self._drawn: dict[int, Outcome] = {}

    def due(self, step: int) -> range:
        """The steps whose completions are to be drawn while `step` runs: its own too, if nothing was drawn yet."""
        return range(self._next, min(step + self.max_staleness, self.max_steps - 1) + 1)

    def put(self, step: int, outcome: Outcome) -> None:
        """Keep the completions of a step, with what was found out about them."""
        kept = {key: value for key, value in outcome.metrics.items() if not key.startswith(MEASURED)}
        self._drawn[step] = replace(outcome, metrics=kept)
        self._next = step + 1

    def take(self, step: int) -> Outcome:
        """The completions of a step, whose turn it is."""
        return self._drawn.pop(step)

    def write(self, folder: Path) -> None:
        """All that waits, into a new folder within a checkpoint's. Raises `OSError`."""
        inside = folder / FOLDER
        inside.mkdir()
        metrics = {str(step): dict(outcome.metrics) for step, outcome in self._drawn.items()}
        values = {"next": self._next, "metrics": metrics}
        (inside / VALUES).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        for step, outcome in self._drawn.items():
            _file_of(inside, step).write_bytes(outcome.batch.to_bytes())

    def read(self, folder: Path) -> None:
        """What `write` wrote, in any process. Raises `CheckpointError`."""
        inside = folder / FOLDER
        try:
            values: Mapping[str, Any] = json.loads((inside / VALUES).read_text(encoding="utf-8"))
            self._drawn = {
                int(step): Outcome(
                    batch=Batch.from_bytes(_file_of(inside, int(step)).read_bytes()), metrics=metrics
                )
                for step, metrics in values["metrics"].items()
            }
            self._next = int(values["next"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"{inside} cannot be read ({' '.join(str(error).split())})") from error


def _file_of(folder: Path, step: int) -> Path:
    return folder / f"completions-{step}.safetensors"


@dataclass(frozen=True, kw_only=True)
class AheadStep:
    """Steps in this process: first what is due is drawn, then the step's own completions are learned from."""

    halves: Halves
    roles: Mapping[str, Role]
    queue: Queue
    next_batch: Callable[[int], Batch]

    def run(self, batch: Batch, step: int, on_call: Callable[[str], None] = lambda name: None) -> Outcome:
        """A step on its batch, as `run_step`; the batch is that of its own completions."""
        drawn = []
        for due in self.queue.due(step):
            fed = batch if due == step else self.next_batch(due)
            drawn.append(run_step(self.halves.drawing, self.roles, fed, due, on_call))
            self.queue.put(due, drawn[-1])
        own = self.queue.take(step)
        learned = run_step(self.halves.learning, self.roles, own.batch, step, on_call)
        return Outcome(batch=learned.batch, metrics=step_metrics(own, drawn, learned))


def step_metrics(own: Outcome, drawn: Iterable[Outcome], learned: Outcome) -> dict[str, float]:
    """Of a step: what is known of its own completions, how long it took to draw others, and what was learned.

    How far the trainer's log-probs are from the sampler's says nothing of the two where updates lie between them.
    """
    metrics = {**own.metrics, **measured(drawn), **learned.metrics}
    if metrics.get("off_policy/staleness_max", 0.0) > 0:
        moved = [key for key in metrics if key.startswith(DIFFERENCE)]
        metrics |= {f"off_policy/{key.removeprefix('sync/')}": metrics.pop(key) for key in moved}
    return metrics


def measured(drawn: Iterable[Outcome]) -> dict[str, float]:
    """Seconds and counts of all that a step drew, added up; the largest peaks; when the first began."""
    found: dict[str, float] = {}
    for outcome in drawn:
        for key, value in outcome.metrics.items():
            if key.startswith("perf/peak_memory_gb/"):
                found[key] = max(found.get(key, value), value)
            elif key.startswith("start_s/"):
                found.setdefault(key, value)
            elif key.startswith(MEASURED):
                found[key] = found.get(key, 0.0) + value
    return found
