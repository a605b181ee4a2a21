"""`plan: auto`: the planner chooses a run's plan before the launch, for the devices that there are.

What comes out is a config with a plan as a user would write one; nothing after this knows that it was found. It
knows no method.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from meshift.config.loading import load_config, make_config
from meshift.config.plan import KINDS, AutoPlan, PlanConfig
from meshift.config.runs import RunConfig
from meshift.errors import ConfigError
from meshift.layout.mesh import Device, Mesh
from meshift.planner.figures import figure
from meshift.planner.hardware import Hardware, as_values, from_values
from meshift.planner.planning import Planned, make_plan
from meshift.planner.shortage import shortage
from meshift.runtime.observer import Observer
from meshift.runtime.outlook import dtype_name, lengths_of, planned_step
from meshift.runtime.run_folder import CONFIG, METRICS, written_by_run
from meshift.runtime.this_hardware import hardware_of_run, num_devices

C = TypeVar("C", bound=RunConfig)
QUIET_S = 5.0
"""A longer search is announced."""
HARDWARE = "hardware"


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A config whose plan is written out, and what the search said of it (nothing where there was none)."""

    config: Any
    found: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hardware(self) -> tuple[Hardware, bool]:
        """What the plan was searched for, so that what was told then is what is reconciled; else the run's."""
        if HARDWARE in self.found:
            return from_values(self.found[HARDWARE]), bool(self.found["hardware_is_measured"])
        return hardware_of_run(self.config.launch.hardware, dtype_name(self.config))


def settle(config: C, rows: Callable[[C], Sequence[Any]], observer: Observer) -> Settled:
    """The config with a plan in place of `plan: auto`; as it is where it has none.

    A run that is resumed keeps the plan that it began with. `rows(config)` reads the data, whose lengths count.
    Raises `ConfigError` where no plan fits, with what is short and what would fit.
    """
    auto = config.plan.auto
    if auto is None:
        return Settled(config=config)
    begun = _begun_plan(config) if config.resume else None
    if begun is not None:
        observer.on_message(f"the plan is the one that the run in {config.output_dir} was begun with")
        return Settled(config=_with_plan(config, begun))
    if config.launch.launcher == "ray" and auto.devices is None:
        raise ConfigError(
            "`plan: auto` over Ray has to be told how many devices there are; set `plan.auto.devices`"
        )
    step = planned_step(
        config, lengths_of(config, rows(config))
    )  # a wrong name is told before a device is measured
    hardware, measured = hardware_of_run(
        config.launch.hardware, dtype_name(config), measure=True, observer=observer
    )
    count = auto.devices or num_devices()
    if auto.seconds > QUIET_S:
        observer.on_message(f"searching for a plan, for at most about {auto.seconds:g} s")
    planned = make_plan(step, hardware, count, seconds=auto.seconds, streaming=config.launch.stream)
    if planned.lacking > 0:
        raise ConfigError(f"{'; '.join(shortage(planned))}; what would fit: {'; or '.join(planned.changes)}")
    plan = _plan_config(config, planned)
    observer.on_message(_in_a_sentence(planned, count, measured=measured))
    known = {HARDWARE: as_values(hardware), "hardware_is_measured": measured}
    return Settled(config=_with_plan(config, plan), found=_found(planned, auto, count) | known)


def _with_plan(config: C, plan: PlanConfig) -> C:
    """The config with a plan, both held against each other as where a user writes them."""
    values = config.model_dump(mode="json", exclude_unset=True)
    values["plan"] = plan.model_dump(mode="json", exclude_unset=True)
    return make_config(type(config), values, "the plan that was found")


def _begun_plan(config: C) -> PlanConfig | None:
    """The plan in the run's folder; None where no run has begun there."""
    folder = Path(config.output_dir)
    if not (folder / METRICS).is_file() or not written_by_run(folder / CONFIG):
        return None
    plan = load_config(type(config), folder / CONFIG).plan
    return None if plan.auto is not None else plan


def _plan_config(config: RunConfig, planned: Planned) -> PlanConfig:
    """The choice as the config's `plan`; nothing of placements where one process is all."""
    values = planned.values
    used = {device for event in planned.events for device in event.devices}
    if len(used) == 1:
        bare = {role: {k: v for k, v in given.items() if k not in KINDS} for role, given in values.items()}
        values = {role: given for role, given in bare.items() if given}
    elif any(device.host for device in used):
        numbers = _numbers(used)
        values = {role: _counted_through(given, numbers) for role, given in values.items()}
    return make_config(type(config.plan), values, "the plan that was found")


def _numbers(used: Collection[Device]) -> dict[Device, int]:
    """Devices with work, counted without gaps: a run starts a process for each.

    Hosts of which most is used come first, so that processes that are started host by host meet as planned.
    """
    sizes = Counter(device.host for device in used)
    order = sorted(used, key=lambda d: (-sizes[d.host], int(d.host.removeprefix("node") or 0), d.index))
    return {device: number for number, device in enumerate(order)}


def _counted_through(given: Mapping[str, Any], numbers: Mapping[Device, int]) -> dict[str, Any]:
    """A role's placements with devices that count through all hosts, since their names are not known."""
    found: dict[str, Any] = {}
    for kind, placement in given.items():
        if kind not in KINDS:
            found[kind] = placement
            continue
        devices = Mesh.parse(placement["mesh"]).devices
        mesh = Mesh(devices=tuple(Device(index=numbers[device]) for device in devices))
        found[kind] = {**placement, "mesh": str(mesh)}
    return found


def _in_a_sentence(planned: Planned, count: int, *, measured: bool) -> str:
    used = len({device for event in planned.events for device in event.devices})
    where = "one process" if used == 1 else f"{used} processes"
    rivals = [rival for rival in planned.rivals if rival.seconds is not None and rival.lacking == 0]
    best = min(rivals, key=lambda rival: rival.seconds or 0.0, default=None)
    beside = "" if best is None or best.seconds is None else f"; {best.name}: {figure(best.seconds)} s"
    fewer = [spot.candidate.slots for spot in planned.choice.values() if spot.candidate.slots is not None]
    tuned = "".join(f"; {count} completions at a time, since more do not fit" for count in fewer)
    tuned += "".join(f"; with {one}, which it sets" for one in planned.settings if one.value not in fewer)
    guess = "" if measured else " (by guesses, since this machine has no profile; `meshift profile` makes one)"
    bound = f"no plan below {figure(planned.proof.bound)} s"
    return (
        f"the planner chose {where} of at most {count} on {planned.problem.hardware.name}: "
        f"{figure(planned.seconds)} s a step predicted{guess}, {bound}{beside}{tuned}"
    )


def _found(planned: Planned, auto: AutoPlan, count: int) -> dict[str, Any]:
    return {
        "search": {
            "seconds": auto.seconds,
            "devices": count,
            "bound_s": planned.proof.bound,
            "proven": planned.proof.proven,
            "rivals": [vars(rival) for rival in planned.rivals],
        }
    }
