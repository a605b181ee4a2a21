"""What was predicted of a run's calls, beside what was measured: seconds, memory, the largest error and its cause.

The prediction is in `plan.json`, made as the run began. It knows nothing of how predictions are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from meshift.report.numbers import duration, percent, short
from meshift.report.run_data import RunData
from meshift.report.timeline import PREFIX, STEP_TIME

PEAK, PREDICTED = "perf/peak_memory_gb/", "perf/predicted_memory_gb/"
LENGTH = "response_length/mean"
FIRST_STEPS = 1
"""Left out where there are more: memory is touched for the first time, and kernels are chosen."""
SMALL = 0.01
"""Of a step: calls below this part of it are compared, and not spoken of."""
GOOD = 0.10
"""An error below this share is none worth a cause."""
ALIKE = 1.5
"""Times as long as predicted: where all calls took that, it is the machine, and no call of its own."""
SPREAD = 0.25
"""Between steps, from the lower to the upper quarter, as a share of the median: more is other work beside it."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A call. `drawn` is what is predicted for completions as long as they became; memory in GB, if known."""

    name: str
    predicted: float
    drawn: float
    measured: float
    spread: float = 0.0
    predicted_gb: float | None = None
    measured_gb: float | None = None

    @property
    def error(self) -> float:
        """Of the prediction as it was made, as a share of what was measured."""
        return self.predicted / self.measured - 1 if self.measured > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Reconciled:
    """All calls of a step that were both predicted and timed, and the step."""

    calls: tuple[Compared, ...]
    step: Compared
    sentences: tuple[str, ...]


def reconcile(run: RunData) -> Reconciled | None:
    """None where nothing was predicted or no step is done."""
    predicted = _predicted(run)
    calls = [one for name in predicted if (one := _compared(run, name, predicted[name])) is not None]
    times = _settled(run, STEP_TIME)
    if not calls or not times:
        return None
    seconds = _number(_mapping(run.plan.get("predicted")).get("step_s"))
    step = Compared(name="step", predicted=seconds, drawn=seconds, measured=median(times), spread=_spread(times))
    sentences = (*_of_seconds(run, calls, step), *_of_memory(calls))
    return Reconciled(calls=tuple(calls), step=step, sentences=sentences)


def factors(run: RunData) -> dict[str, float]:
    """By which a prediction's seconds of each call are to be multiplied to be those of this run."""
    found = reconcile(run)
    return {} if found is None else {one.name: one.measured / one.drawn for one in found.calls if one.drawn > 0}


def host_seconds(run: RunData) -> dict[str, float]:
    """Of what process 0 did between model calls: calls timed and not predicted; medians of steps."""
    known = {str(event.get("timed_as") or event.get("name")) for event in _events(run)}
    known |= {str(event.get("name")) for event in _events(run)}
    timed = (key.removeprefix(PREFIX) for key in run.metrics if key.startswith(PREFIX))
    return {name: median(times) for name in timed if name not in known and (times := _settled(run, PREFIX + name))}


def _predicted(run: RunData) -> dict[str, float]:
    """Seconds of each call as a run times it, rounds of a loop together."""
    found: dict[str, float] = {}
    for event in _events(run):
        if event.get("kind") == "call":
            name = str(event.get("timed_as", event.get("name")))
            found[name] = found.get(name, 0.0) + _number(event.get("end_s")) - _number(event.get("start_s"))
    return found


def _compared(run: RunData, name: str, predicted: float) -> Compared | None:
    times = _settled(run, PREFIX + name)
    if not times or predicted <= 0:
        return None
    memory, peak = run.series(PREDICTED + name).finite, run.series(PEAK + name).finite
    return Compared(
        name=name,
        predicted=predicted,
        drawn=_at_length(run, name, predicted),
        measured=median(times),
        spread=_spread(times),
        predicted_gb=float(memory.max()) if memory.size else None,
        measured_gb=float(peak.max()) if peak.size else None,
    )


def _at_length(run: RunData, name: str, predicted: float) -> float:
    """The prediction for the mean length that completions had, between those that were made in advance."""
    lengths = _settled(run, LENGTH)
    listed = _mapping(run.plan.get("predicted")).get("by_completion")
    known = [
        (_number(one.get("completion")), _number(_mapping(one.get("calls_s")).get(name)))
        for one in (listed if isinstance(listed, list) else [])
        if isinstance(one, Mapping)
    ]
    if not lengths or not known:
        return predicted
    tokens, seconds = zip(*sorted(known), strict=True)
    return float(np.interp(median(lengths), tokens, seconds)) or predicted


def _of_seconds(run: RunData, calls: Sequence[Compared], step: Compared) -> list[str]:
    notable = [one for one in calls if max(one.measured, one.predicted) >= SMALL * step.measured]
    if not notable:
        return []
    off = [one for one in notable if abs(one.error) > GOOD]
    if not off:
        return [f"Every call took what was predicted within {percent(max(abs(one.error) for one in notable))}."]
    worst = max(off, key=lambda one: abs(one.predicted - one.measured))
    which = f" over {percent(GOOD)}" if len(off) < len(notable) else ""
    return [
        f"The largest error{which}, in seconds, is in {worst.name}: predicted {duration(worst.predicted)}, "
        f"measured {duration(worst.measured)} ({_times(worst.predicted, worst.measured)}). "
        f"{_cause(run, worst, notable)}"
    ]


def _cause(run: RunData, worst: Compared, notable: Sequence[Compared]) -> str:
    """The likeliest, of what the run knows: lengths, guessed rates, rounds, other work, or the model of costs."""
    left = abs(np.log(worst.drawn / worst.measured)) if worst.drawn > 0 else np.inf
    if left < 0.5 * abs(np.log(worst.predicted / worst.measured)):
        return (
            f"Completions had {short(median(_settled(run, LENGTH)))} tokens in the mean, which was not known: for "
            f"that length {duration(worst.drawn)} are predicted."
        )
    if run.plan.get("hardware_is_measured") is False:
        return "The rates of this machine were guesses: `meshift profile` measures them."
    if run.plan.get("hardware_was_busy") is True:
        return (
            "This machine was measured while other work ran on it, so its rates are off: `meshift profile`, with "
            "nothing else running, measures them again."
        )
    rounds = _settled(run, "sampling/num_rounds")
    expected = sum(event.get("timed_as") == worst.name for event in _events(run))
    if rounds and worst.name in ("rollout", "score") and abs(median(rounds) - expected) >= 1:
        return f"{short(median(rounds))} rounds of drawing were needed, and {expected} were expected."
    ratios = [one.measured / one.drawn for one in notable if one.drawn > 0]
    if len(ratios) > 1 and min(ratios) > ALIKE:
        return (
            f"All calls took {short(min(ratios))} to {short(max(ratios))} times what was predicted: the machine "
            "had other work to do, or is not the one that was profiled."
        )
    if worst.spread > SPREAD:
        return f"Its seconds differ by {percent(worst.spread)} between steps: the machine had other work to do."
    part = _largest_part(run, worst.name)
    where = f" (most of it: {part})" if part else ""
    return (
        f"Either the machine had other work to do, or the model of costs is wrong here{where}: then "
        f"`meshift plan` with `--measured {run.path}` plans by what was measured."
    )


def _largest_part(run: RunData, name: str) -> str:
    parts: dict[str, float] = {}
    for event in _events(run):
        if event.get("timed_as") == name:
            for part, seconds in _mapping(event.get("parts_s")).items():
                parts[part] = parts.get(part, 0.0) + _number(seconds)
    return max(parts, key=lambda part: parts[part], default="")


def _of_memory(calls: Sequence[Compared]) -> list[str]:
    known = [(one, one.predicted_gb, one.measured_gb) for one in calls]
    both = [(one, gave, took) for one, gave, took in known if gave is not None and took is not None and took > 0]
    if not both:
        return []
    errors = [abs(gave / took - 1) for _, gave, took in both]
    if max(errors) <= GOOD:
        return [f"Memory was predicted within {percent(max(errors))}."]
    off = [row for row, error in zip(both, errors, strict=True) if error > GOOD]
    one, gave, took = max(off, key=lambda row: abs(row[1] - row[2]))
    which = f" over {percent(GOOD)}" if len(off) < len(both) else ""
    why = (
        "predictions are for the longest texts that the config allows, and freed memory may have been used again"
        if gave > took
        else "allocators keep what was freed, and libraries and data are not counted"
    )
    return [
        f"Of memory the largest error{which} is in {one.name}: predicted {short(gave)} GB, measured "
        f"{short(took)} GB ({_times(gave, took)}); {why}."
    ]


def _times(predicted: float, measured: float) -> str:
    return f"{short(measured / predicted)} times the prediction" if predicted > 0 else "not predicted"


def _settled(run: RunData, key: str) -> list[float]:
    """A metric's values, without the first step where there are more."""
    values: list[float] = run.series(key).finite.tolist()
    return values[FIRST_STEPS:] if len(values) > FIRST_STEPS else values


def _spread(times: Sequence[float]) -> float:
    low, high = np.quantile(times, (0.25, 0.75))
    return float((high - low) / np.median(times)) if np.median(times) > 0 else 0.0


def _events(run: RunData) -> list[Mapping[str, Any]]:
    events = _mapping(run.plan.get("predicted")).get("events")
    return [one for one in events if isinstance(one, Mapping)] if isinstance(events, list) else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else 0.0
