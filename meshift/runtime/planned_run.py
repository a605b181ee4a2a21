"""A run of any method as its config says: in this process, or by a plan in as many as it names devices.

What a method brings is how its job is built, and which calls it makes of which role. It knows no method.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshift.config.runs import RunConfig
from meshift.models.hf.load import load_config
from meshift.runtime.hosts import refuse_hosts
from meshift.runtime.launch.launcher import launch
from meshift.runtime.launch.restarts import run_with_restarts
from meshift.runtime.models import HEADS, model_folder
from meshift.runtime.observer import Observer
from meshift.runtime.plans import Placements, Uses, as_written, check_cuts, in_words, mesh_of, placements_of
from meshift.runtime.role_spec import LocalOpener, Opener
from meshift.runtime.run import Job, RunResult, finished_run, run_job

SHARE = "meshift.runtime.spread_run:run_share"


@dataclass(frozen=True, kw_only=True)
class Method:
    """`build(config, opener)` makes the job; `uses(config)` says which calls it makes, before anything is read.

    `models(config)` names the model of each role.
    """

    build: Callable[[Any, Opener], Job]
    uses: Callable[[Any], Uses]
    models: Callable[[Any], Mapping[str, str]]


def start_run(config: RunConfig, method: Method, observer: Observer) -> RunResult:
    """The whole run. Raises `ConfigError` for a plan that cannot be."""
    if not config.plan.is_given:
        opener = LocalOpener(observer, config.plan.offloaded)
        return run_job(config, lambda whole: method.build(whole, opener), observer)
    planned(config, method)
    mesh = mesh_of(config.plan, method.uses(config))

    def run(config: RunConfig, observer: Observer) -> RunResult:
        finished = finished_run(config, observer)  # it may have been lost after the last thing it had to do
        if finished is not None:
            return finished
        told = json.dumps({"run": type(config).__name__, "config": config.model_dump_json()})
        found = launch(config, mesh, SHARE, told, observer)
        folders = {key: Path(found[key]) for key in ("output_dir", "final_dir")}
        return RunResult(**folders, metrics=found["metrics"])

    return run_with_restarts(config, config.launch.max_restarts, run, observer)


def plan_row(config: RunConfig, method: Method) -> list[tuple[str, str]]:
    """A dry run's row of the plan, if there is one. Raises `ConfigError` for a plan that cannot be."""
    if not config.plan.is_given:
        return []
    return [("plan", in_words(planned(config, method)))]


def planned(config: RunConfig, method: Method) -> Placements:
    """The plan's placements, found right for the models. Raises `ConfigError`."""
    if config.launch.launcher == "local":
        refuse_hosts(as_written(config.plan, method.uses(config)))
    placements = placements_of(config.plan, method.uses(config))
    for role, name in method.models(config).items():
        check_cuts(role, load_config(model_folder(name)), HEADS.get(role, "lm"), placements[role])
    return placements
