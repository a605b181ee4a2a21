"""`meshift check --plan`: a plan by hand held against a run's config, its models and a cluster's devices.

What is wrong is listed; else what each call is predicted to take. It knows nothing of how plans are found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from meshift.cli.plan_request import TakenLengths, compute_type, planned_step, read_hardware, taken_lengths
from meshift.cli.tables import make_console, print_problems
from meshift.config.loading import config_problems, make_config, read_plan, read_yaml
from meshift.config.runs import RunConfig
from meshift.errors import ConfigError, LayoutError, MeshiftError
from meshift.layout.layout import Placement
from meshift.planner.checking import on_hosts, shortages, would_fit
from meshift.planner.evaluate import Event, Placements, evaluate
from meshift.planner.figures import figure
from meshift.planner.footprint import footprints, tightest
from meshift.planner.hardware import KNOWN, Hardware, from_values
from meshift.planner.workload import ComputeType, Step

ASSUMED = ("prompt_tokens", "completion_tokens", "devices")
"""Numbers that a plan's file says it assumes."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a plan is checked for. None: for hardware what the plan's file says, else this machine; any devices."""

    hardware: str | None = None
    devices: int | None = None
    per_host: int | None = None
    prompt_tokens: float | None = None
    completion_tokens: float | None = None


@dataclass(frozen=True, kw_only=True)
class PlanVerdict:
    """Problems, and what would help; or the events of a step on a device of that name, and where each call runs.

    `notes` say what its texts are taken to be, and what else there is to know.
    """

    problems: tuple[str, ...] = ()
    advice: str = ""
    events: tuple[Event, ...] = ()
    calls: Mapping[str, Placement] = field(default_factory=dict)
    device: str = ""
    notes: tuple[str, ...] = ()


def check_plan(
    values: Mapping[str, Any], schema: type[RunConfig], file: str, plan: Path, cluster: Cluster
) -> PlanVerdict:
    """Hold the plan of a file against a config's values. Raises `ConfigError` for files that cannot be read."""
    given = {**values, "plan": read_plan(plan)}
    problems = config_problems(schema, given, f"{file} with {plan}")
    if problems:
        return PlanVerdict(problems=tuple(problems))
    from meshift.runtime.plans import with_plan_settings
    from meshift.runtime.spread_run import METHODS

    config = make_config(schema, given, file)
    try:
        config = with_plan_settings(config, METHODS[type(config)].models(config))
    except ConfigError as error:
        return PlanVerdict(problems=(str(error),))
    problems = list(_placing_problems(config))
    if problems:
        return PlanVerdict(problems=tuple(problems))
    told = _told(plan)
    return _on_devices(config, told, cluster if cluster.devices else replace(cluster, devices=told.devices))


def _placing_problems(config: RunConfig) -> Iterator[str]:
    """Every placement that cannot be read; if all can, what is wrong with them together, and with each cut."""
    from meshift.runtime.plans import as_written, check_cuts, num_processes
    from meshift.runtime.spread_run import METHODS

    if config.plan.auto is not None:
        yield "`plan.auto` leaves the plan to the planner; there is nothing to check"
        return
    unread = False
    for role, plan in config.plan.roles.items():
        for kind, given in plan.placements.items():
            try:
                Placement.parse(given.mesh, given.layout)
            except LayoutError as error:
                unread = True
                yield f"`plan.{role}.{kind}`: {error}"
    if unread:
        return
    method = METHODS[type(config)]
    try:
        placements = as_written(config.plan, method.uses(config))
    except ConfigError as error:
        yield str(error)
        return
    if not any(d.host for kinds in placements.values() for p in kinds.values() for d in p.mesh.devices):
        yield from _sentence(partial(num_processes, placements))
    from meshift.models.hf.load import load_config
    from meshift.runtime.models import HEADS, model_folder

    for role, name in method.models(config).items():
        model = load_config(model_folder(name))
        for kind, placement in placements[role].items():
            yield from _sentence(partial(check_cuts, role, model, HEADS.get(role, "lm"), {kind: placement}))


def _sentence(probe: Any) -> Iterator[str]:
    try:
        probe()
    except MeshiftError as error:
        yield str(error)


@dataclass(frozen=True, kw_only=True)
class Told:
    """What `meshift plan --out` wrote beside a plan; None where the file does not say."""

    file: Path
    prompt: float | None = None
    completion: float | None = None
    devices: int | None = None
    hardware: Hardware | None = None


def _told(plan: Path) -> Told:
    """Of a plan's file. Raises `ConfigError` for what cannot have been written there."""
    values = _json(plan) if plan.suffix == ".json" else read_yaml(plan)
    assumed = values.get("assumed", {})
    if not isinstance(assumed, dict):
        raise ConfigError(f"`assumed` of {plan} must hold what `meshift plan` wrote: {assumed!r}")
    for key in ASSUMED:
        value = assumed.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
            raise ConfigError(f"`assumed.{key}` of {plan} is {value!r}; write a number above 0, or take it out")
    prompt, completion, devices = map(assumed.get, ASSUMED)
    named = KNOWN.get(str(assumed.get("hardware")).lower())
    hardware = _described(values["hardware"], plan) if isinstance(values.get("hardware"), dict) else named
    return Told(
        file=plan,
        prompt=prompt,
        completion=completion,
        devices=None if devices is None else int(devices),
        hardware=hardware,
    )


def _json(plan: Path) -> dict[str, Any]:
    """As `read_yaml`, which has read it already; but to YAML 1e-05 is a word."""
    try:
        values: dict[str, Any] = json.loads(plan.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{plan} is not valid JSON: {error}") from None
    return values


def _described(values: Mapping[str, Any], plan: Path) -> Hardware | None:
    """None of a run's CPU without its profile, which is its machine's."""
    try:
        found = from_values(values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"`hardware` of {plan} is no description of a device: {error}") from None
    return None if found.profile is None and found.machine.packs else found


def _hardware(config: RunConfig, told: Told, cluster: Cluster) -> tuple[Hardware, ComputeType]:
    """The named one; else the one that the plan was made for; else this machine. And what it computes in."""
    from meshift.runtime.outlook import dtype_name
    from meshift.runtime.this_hardware import hardware_of_run

    if cluster.hardware is not None:
        found = read_hardware(cluster.hardware, config)
        dtype = compute_type(config, found)
    else:
        here, of_plan = dtype_name(config), told.hardware
        found, dtype = (
            (of_plan, compute_type(config, of_plan)) if of_plan else (hardware_of_run(None, here)[0], here)
        )
    return (found if cluster.per_host is None else replace(found, per_host=cluster.per_host)), dtype


def _on_devices(config: RunConfig, told: Told, cluster: Cluster) -> PlanVerdict:
    from meshift.runtime.plans import as_written
    from meshift.runtime.spread_run import METHODS
    from meshift.runtime.this_hardware import turns_taken

    hardware, dtype = _hardware(config, told, cluster)
    lengths = _lengths(config, told, cluster)
    step = planned_step(config, lengths.means, dtype)
    written = as_written(config.plan, METHODS[type(config)].uses(config))
    placements = on_hosts({name: written[name] for name in step.roles}, hardware.per_host)
    problems = [*_beyond(placements, hardware, cluster)]
    if problems:
        return PlanVerdict(problems=tuple(problems))
    short = shortages(step, hardware, placements)
    if short:
        changes = would_fit(step, hardware, placements)
        advice = f"it would fit with {'; or '.join(changes)}" if changes else _elsewhere(step, hardware, cluster)
        return PlanVerdict(problems=tuple(short), advice=advice)
    events = evaluate(step, hardware, placements, streaming=config.launch.stream)
    calls = {call.name: placements[call.role][call.kind] for call in step.calls}
    used = {device for kinds in placements.values() for p in kinds.values() for device in p.mesh.devices}
    turns = turns_taken(len(used)) if cluster.hardware is None and hardware.machine.packs else None
    found = {call.name: footprints(step, hardware, placements, call) for call in step.calls}
    memory = tightest(found, hardware.shared_by(len(used)).usable)
    notes = (lengths.in_words(step), memory, *([f"{turns}."] if turns is not None else []))
    return PlanVerdict(events=tuple(events), calls=calls, device=hardware.name, notes=notes)


def _lengths(config: RunConfig, told: Told, cluster: Cluster) -> TakenLengths:
    """Those of the options, else those that the plan was made for, else the data's."""
    prompt, completion = cluster.prompt_tokens, cluster.completion_tokens
    found, of_plan = (
        taken_lengths(config, prompt or told.prompt, completion or told.completion),
        f"as {told.file} says",
    )
    return replace(
        found,
        prompt=of_plan if prompt is None and told.prompt else found.prompt,
        completion=of_plan if completion is None and told.completion else found.completion,
    )


def _beyond(placements: Placements, hardware: Hardware, cluster: Cluster) -> Iterator[str]:
    """Devices that the cluster lacks."""
    used = {d for kinds in placements.values() for p in kinds.values() for d in p.mesh.devices}
    if cluster.devices is not None and len(used) > cluster.devices:
        yield f"the plan uses {len(used)} devices, and there are {cluster.devices}"
    beyond = sorted(str(d) for d in used if d.host and d.index >= hardware.per_host)
    if beyond:
        yield f"the device {beyond[0]} is named, and a host has {hardware.per_host}, numbered from 0"


def _elsewhere(step: Step, hardware: Hardware, cluster: Cluster) -> str:
    """What the planner would do, where no single change of this plan helps."""
    from meshift.planner.planning import make_plan

    count = cluster.devices or hardware.per_host
    planned = make_plan(step, hardware, count, seconds=5.0)
    if planned.lacking == 0:
        return f"no single change makes it fit, but other plans on {count} devices do; `meshift plan` finds them"
    return f"no plan on {count} devices fits; what would: {'; or '.join(planned.changes) or 'more devices'}"


def show_plan(file: str, plan: Path, verdict: PlanVerdict) -> bool:
    """Print it; returns whether the plan can run."""
    if verdict.problems:
        print_problems(f"{plan} for {file}", verdict.problems)
        if verdict.advice:
            print(f"  {verdict.advice}")
        return False
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("call", "layout", "devices", "begins, s", "takes, s", "memory, GB"):
        table.add_column(name, justify="left" if name in ("call", "layout", "devices") else "right")
    for event in verdict.events:
        placement = verdict.calls.get(event.name)
        if placement is None and event.end == event.start:
            continue
        placed = ("", "") if placement is None else (str(placement.layout), str(placement.mesh))
        memory = "" if placement is None else f"{event.peak / 1e9:.2f}"
        row = (event.name, *placed, figure(event.start), figure(event.end - event.start), memory)
        table.add_row(*map(Text, row))
    console = make_console()
    seconds = max(event.end for event in verdict.events)
    title = f"{plan} for {file}: a plan that can run; {figure(seconds)} s a step on {verdict.device}, predicted"
    console.print(title, style="bold", markup=False, soft_wrap=True)
    console.print(table)
    for note in verdict.notes:
        print(f"  {note}")
    return True
