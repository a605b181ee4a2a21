"""What a run by its plan is predicted to take: seconds of each call, bytes of each process, before it is started.

The models of costs and memory are the planner's (`planner/cost.py`, `planner/memory.py`); here they are asked for
the config, the placements, the data and the machine of a run. It knows nothing of how plans are found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from meshift.config.runs import RolloutRunConfig, RunConfig
from meshift.data.demonstrations import Demonstration
from meshift.data.preferences import Pair
from meshift.data.prompts import Prompt
from meshift.data.unpaired import Judged
from meshift.layout.mesh import Device
from meshift.models.hf.load import load_config
from meshift.planner.cost import Cost, Costs
from meshift.planner.evaluate import Event, evaluate, offloading_there, replay
from meshift.planner.hardware import Hardware, as_values
from meshift.planner.memory import Memory
from meshift.planner.rollout_steps import Lengths
from meshift.planner.steps import in_one_process, role_names, step_of
from meshift.planner.workload import ComputeType, PlannedCall, Step
from meshift.runtime.models import compute_dtype, model_folder
from meshift.runtime.plans import Placements

PREFIX = "perf/predicted_memory_gb/"
LENGTH_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Of the longest completion: means that are predicted too, since what is drawn is known only afterwards."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """A step as predicted. `measured` says whether the hardware's numbers are (else they are guesses).

    `peaks` are bytes of each process at most. `before` is what a process had in memory before any model.
    `by_completion` is the same step with other means of completions, where they are still to be drawn: tokens, and
    seconds of each call.
    """

    hardware: Hardware
    measured: bool
    lengths: Lengths
    events: tuple[Event, ...]
    timed_as: Mapping[str, str]
    peaks: tuple[float, ...]
    before: float = 0.0
    by_completion: tuple[tuple[float, Mapping[str, float]], ...] = ()

    @property
    def seconds(self) -> float:
        """Of a step."""
        return max(event.end for event in self.events)

    @property
    def worst(self) -> Event:
        """The call that needs the most memory."""
        return max((event for event in self.events if event.kind == "call"), key=lambda event: event.peak)

    @property
    def metrics(self) -> dict[str, float]:
        """`perf/predicted_memory_gb/<call>`, beside which `perf/peak_memory_gb/<call>` is measured."""
        found: dict[str, float] = {}
        for event in self.events:
            if event.kind == "call":
                key = PREFIX + self.timed_as[event.name]
                found[key] = max(found.get(key, 0.0), (self.before + event.peak) / 1e9)
        return found

    def values(self) -> dict[str, Any]:
        """For `plan.json`."""
        return {
            "hardware": as_values(replace(self.hardware, profile=None)),  # of which there is a file
            "hardware_is_measured": self.measured,
            "hardware_was_busy": self.hardware.profile is not None and self.hardware.profile.is_disturbed,
            "lengths": {
                "prompt": self.lengths.prompt,
                "completion": self.lengths.completion,
                "signal": self.lengths.signal,
            },
            "predicted": {
                "step_s": self.seconds,
                "process_bytes_before": self.before,
                "process_peak_bytes": list(self.peaks),
                "events": [self._event(event) for event in self.events],
                "by_completion": [
                    {"completion": tokens, "calls_s": dict(calls)} for tokens, calls in self.by_completion
                ],
            },
        }

    def _event(self, event: Event) -> dict[str, Any]:
        return {
            "name": event.name,
            "kind": event.kind,
            "timed_as": self.timed_as.get(event.name, event.name),
            "start_s": event.start,
            "end_s": event.end,
            "peak_bytes": event.peak,
            "devices": sorted(device.index for device in event.devices),
            "parts_s": {} if event.cost is None else dict(event.cost.parts),
        }


def dtype_name(config: RunConfig) -> ComputeType:
    """What a run computes in on this machine."""
    return "float32" if str(compute_dtype(config.dtype)) == "torch.float32" else "bfloat16"


def planned_step(config: RunConfig, lengths: Lengths) -> Step:
    """The step of a run on this machine."""
    models = {role: load_config(model_folder(name)) for role, name in role_names(config).items()}
    return step_of(config, models, dtype_name(config), lengths).with_offloaded(config.plan.offloaded)


def outlook(
    config: RunConfig,
    placements: Placements,
    lengths: Lengths,
    hardware: tuple[Hardware, bool],
    before: float = 0.0,
) -> Outlook:
    """The prediction for a config with a plan, or none; `hardware` and whether it is measured."""
    step, (device, measured) = planned_step(config, lengths), hardware
    if not config.plan.is_given:
        step = in_one_process(config, step)
    step = offloading_there(step, device)
    placements = {name: placements[name] for name in step.roles}  # what is read before the steps is in none
    events = evaluate(step, device, placements, streaming=config.launch.stream)
    timed_as = {call.name: call.timed_as for call in step.calls}
    return Outlook(
        hardware=device,
        measured=measured,
        lengths=lengths,
        events=tuple(events),
        timed_as=timed_as,
        peaks=tuple(before + peak for peak in process_peaks(step, device, placements)),
        before=before,
        by_completion=tuple(_by_completion(config, step, device, placements)),
    )


def _by_completion(
    config: RunConfig, step: Step, hardware: Hardware, placements: Placements
) -> Iterator[tuple[float, Mapping[str, float]]]:
    """Seconds of each call as a run times it, by the mean of completions."""
    if not isinstance(config, RolloutRunConfig):
        return
    means = [max(1.0, share * config.generation.max_completion_length) for share in LENGTH_SHARES]
    shared = hardware.shared_by(len(device_numbers(placements)))
    drawn = ({call.name: _cost(step, shared, placements, call, mean) for call in step.calls} for mean in means)
    played = replay(step, hardware, placements, drawn, streaming=config.launch.stream)
    timed_as = {call.name: call.timed_as for call in step.calls}
    for mean, events in zip(means, played, strict=True):
        seconds: dict[str, float] = {}
        for event in (one for one in events if one.kind == "call"):
            name = timed_as[event.name]
            seconds[name] = seconds.get(name, 0.0) + event.end - event.start
        yield mean, seconds


def _cost(step: Step, hardware: Hardware, placements: Placements, call: PlannedCall, mean: float) -> Cost:
    """Of a call whose completions have this mean."""
    read = call.num_read if call.num_read <= 1.0 else mean
    drawn = replace(call, texts=replace(call.texts, completion=mean), num_read=read)
    return Costs(step.roles[call.role], hardware).of(drawn, placements[call.role][call.kind].layout)


def process_peaks(step: Step, hardware: Hardware, placements: Placements) -> list[float]:
    """Bytes that each process needs at most, for models and calls."""
    memories = {name: Memory(role, hardware.machine) for name, role in step.roles.items()}
    placed = {name: placements[name] for name in memories}
    away = {name for name, role in step.roles.items() if role.offloaded}
    kept = {
        device: {name: memories[name].on_device(of_role, device).total for name, of_role in placed.items()}
        for device in device_numbers(placed)
    }
    peaks = {device: float(sum(sizes[n] for n in sizes if n not in away)) for device, sizes in kept.items()}
    for call in step.calls:
        placement = placed[call.role][call.kind]
        for rank, device in enumerate(placement.mesh.devices):
            working = memories[call.role].working(call, placement.layout, placement.layout.coordinates(rank)).total
            resident = sum(s for name, s in kept[device].items() if name == call.role or name not in away)
            peaks[device] = max(peaks[device], float(resident + working))
    return [peaks[device] for device in sorted(peaks)]


def lengths_of(config: RunConfig, rows: Iterable[Any]) -> Lengths:
    """Means over a run's data; completions that are still to be drawn are as long as the config says, or None."""
    given = list(rows)
    if isinstance(config, RolloutRunConfig):
        prompts: Sequence[Prompt] = given
        told = None if config.plan.auto is None else config.plan.auto.completion_tokens
        return Lengths(prompt=fmean(len(p.tokens) for p in prompts), completion=told)
    if given and isinstance(given[0], Pair):
        pairs: Sequence[Pair] = given
        prompt = max(1.0, fmean(pair.num_prompt_tokens for pair in pairs))
        both = fmean((len(pair.chosen) + len(pair.rejected)) / 2 for pair in pairs)
        return Lengths(prompt=prompt, completion=max(1.0, both - prompt))
    if given and isinstance(given[0], Judged):
        judged: Sequence[Judged] = given
        prompt = max(1.0, fmean(one.num_prompt_tokens for one in judged))
        return Lengths(prompt=prompt, completion=max(1.0, fmean(len(one.tokens) for one in judged) - prompt))
    texts: Sequence[Demonstration] = given
    learned = fmean(sum(text.loss_mask) for text in texts)
    whole = fmean(len(text.tokens) for text in texts)
    return Lengths(prompt=max(1.0, whole - learned), completion=max(1.0, learned))


def device_numbers(placements: Placements) -> list[Device]:
    """All devices of the placements, in order."""
    return sorted({d for kinds in placements.values() for p in kinds.values() for d in p.mesh.devices})
