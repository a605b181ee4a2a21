"""A run of any method as its config says: in this process, or by a plan in as many as it names devices.

What a method brings is how its job is built, and which calls it makes of which role. It knows no method.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from meshift.config.runs import RunConfig
from meshift.config.sections import TrainableConfig
from meshift.counted import heard_by
from meshift.models.hf.load import load_config
from meshift.runtime.auto_plan import Settled, settle
from meshift.runtime.hosts import refuse_hosts
from meshift.runtime.launch.launcher import launch
from meshift.runtime.launch.restarts import run_with_restarts
from meshift.runtime.models import HEADS, check_frozen_layers, model_folder
from meshift.runtime.observer import Observer
from meshift.runtime.outlook import Outlook, dtype_name, lengths_of, outlook
from meshift.runtime.peaks import memory_in_use
from meshift.runtime.plans import (
    Placements,
    Uses,
    as_written,
    check_cuts,
    in_words,
    mesh_of,
    num_processes,
    placements_of,
    with_plan_settings,
)
from meshift.runtime.role_spec import LocalOpener, Opener
from meshift.runtime.run import Job, PlanFile, RunResult, finished_run, run_job
from meshift.runtime.this_hardware import PROCESS_BYTES, hardware_of_run, turns_taken

C = TypeVar("C", bound=RunConfig)
SHARE = "meshift.runtime.spread_run:run_share"


@dataclass(frozen=True, kw_only=True)
class Method:
    """`build(config, opener)` makes the job; `uses(config)` says which calls it makes, before anything is read.

    `models(config)` names the model of each role, `rows(config)` reads the data that it learns from.
    """

    build: Callable[[Any, Opener], Job]
    uses: Callable[[Any], Uses]
    models: Callable[[Any], Mapping[str, str]]
    rows: Callable[[Any], Sequence[Any]]


def start_run(config: RunConfig, method: Method, observer: Observer) -> RunResult:
    """The whole run, which `observer` hears of. Raises `ConfigError` for a plan that cannot be."""
    with heard_by(observer.on_count):
        return _run(config, method, observer)


def _run(config: RunConfig, method: Method, observer: Observer) -> RunResult:
    settled = _settled(config, method, observer)
    if not settled.config.plan.is_given:
        before = memory_in_use()

        def build(config: Any) -> Job:
            job = method.build(config, LocalOpener(observer, config.plan.offloaded))
            return replace(job, plan=plan_file(Settled(config=config, found=settled.found), method, job, before))

        return run_job(settled.config, build, observer)
    planned(settled.config, method)
    mesh = mesh_of(settled.config.plan, method.uses(settled.config))

    def run(config: RunConfig, observer: Observer) -> RunResult:
        finished = finished_run(config, observer)  # it may have been lost after the last thing it had to do
        if finished is not None:
            return finished
        told = {"run": type(config).__name__, "config": config.model_dump_json(), "found": settled.found}
        found = launch(config, mesh, SHARE, json.dumps(told), observer)
        folders = {key: Path(found[key]) for key in ("output_dir", "final_dir")}
        return RunResult(**folders, metrics=found["metrics"])

    return run_with_restarts(settled.config, config.launch.max_restarts, run, observer)


def plan_file(settled: Settled, method: Method, job: Job, before: float) -> PlanFile:
    """What a run writes of its plan; `before` is what the process had in memory before it built the job."""
    config = settled.config
    plan = config.plan.model_dump(mode="json", exclude_none=True, exclude={"auto"})
    placements = placements_of(config.plan, method.uses(config))
    expected = outlook(config, placements, lengths_of(config, job.rows), settled.hardware, before)
    return PlanFile(values={"plan": plan, **settled.found, **expected.values()}, metrics=expected.metrics)


def settled_config(config: C, method: Method, observer: Observer) -> C:
    """The config with a plan in place of `plan: auto`, for a dry run."""
    found: C = _settled(config, method, observer).config
    return found


def _settled(config: RunConfig, method: Method, observer: Observer) -> Settled:
    """With its plan, after what would else be found by each process, or not understood by the planner."""
    for role, name in method.models(config).items():
        trained = getattr(config, role, None)
        if isinstance(trained, TrainableConfig) and trained.num_frozen_layers:
            check_frozen_layers(role, name, trained)
    settled = settle(config, method.rows, observer)
    return replace(settled, config=with_plan_settings(settled.config, method.models(config)))


def plan_row(config: RunConfig, method: Method) -> list[tuple[str, str]]:
    """A dry run's rows of the plan, if there is one. Raises `ConfigError` for a plan that cannot be."""
    if not config.plan.is_given:
        return []
    placements = planned(config, method)
    turns = turns_taken(num_processes(placements)) if config.launch.launcher == "local" else None
    return [("plan", in_words(placements)), *([("processes", turns)] if turns is not None else [])]


def expected_of(config: RunConfig, method: Method) -> Outlook:
    """What a run by this config's plan is predicted to take, before anything but its data is read."""
    placements = planned(config, method)
    hardware = hardware_of_run(config.launch.hardware, dtype_name(config))
    return outlook(config, placements, lengths_of(config, method.rows(config)), hardware, PROCESS_BYTES)


def planned(config: RunConfig, method: Method) -> Placements:
    """The plan's placements, found right for the models. Raises `ConfigError`."""
    if config.launch.launcher == "local":
        refuse_hosts(as_written(config.plan, method.uses(config)))
    placements = placements_of(config.plan, method.uses(config))
    for role, name in method.models(config).items():
        own = config.plan.roles.get(role)
        given = () if own is None else tuple(own.placements)
        check_cuts(role, load_config(model_folder(name)), HEADS.get(role, "lm"), placements[role], given)
    return placements
