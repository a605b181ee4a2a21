"""The section `prediction` of `benchmarks.planner`: a step on this machine as the planner says, and as it is.

A profile of the machine is taken first, in the same run. Then PPO of SmolLM2-135M, as in recipes/ppo_local4.yaml,
by placements over one, two and four processes, in full and by adapters; and the plan that the search chooses
against one layout for all.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isfinite
from pathlib import Path
from statistics import fmean, median
from types import MappingProxyType
from typing import Any

from benchmarks.measured_plans import num_processes
from meshift.config.loading import load_config
from meshift.config.runs import PPORunConfig
from meshift.graph.calls import Kind
from meshift.layout.layout import Placement
from meshift.models.hf.load import load_config as read_model
from meshift.planner.candidates import Problem
from meshift.planner.evaluate import evaluate
from meshift.planner.hardware import Hardware, find_hardware
from meshift.planner.planning import make_plan
from meshift.planner.search import score
from meshift.planner.steps import Lengths, in_one_process, role_names, step_of
from meshift.planner.strategies import one_layout
from meshift.planner.workload import Step
from meshift.planner.written import placements_of as placements_of_choice
from meshift.planner.written import plan_values
from meshift.runtime.models import model_folder, open_tokenizer
from meshift.runtime.plans import placements_of
from meshift.runtime.ppo_run import PPO_METHOD
from meshift.runtime.rollout_prompts import load_data

RECIPE = "recipes/ppo_local4.yaml"
NUM_STEPS = 3
"""Of each placement; the first does not count."""
NUM_PROCESSES = 4
Plan = Mapping[str, Any]


def _on(mesh: str, layout: str) -> dict[str, str]:
    return {"mesh": mesh, "layout": layout}


def _all(mesh: str, layout: str) -> Plan:
    return {
        "actor": {"generate": _on(mesh, layout), "train": _on(mesh, layout)},
        "critic": {"train": _on(mesh, layout)},
        "reference": {"infer": _on(mesh, layout)},
    }


def _each(
    generate: tuple[str, str], train: tuple[str, str], critic: tuple[str, str], reference: tuple[str, str]
) -> Plan:
    return {
        "actor": {"generate": _on(*generate), "train": _on(*train)},
        "critic": {"train": _on(*critic)},
        "reference": {"infer": _on(*reference)},
    }


@dataclass(frozen=True, kw_only=True)
class Case:
    """A placement of the recipe's step (None: one process), with keys over the recipe's."""

    plan: Plan | None
    keys: tuple[str, ...] = ()


LORA = ("actor.lora={rank: 16, alpha: 32}", "critic.lora={rank: 16, alpha: 32}")
PLANS: Mapping[str, Plan | None] = MappingProxyType(
    {
        "one process": None,
        "2: d2": _all("0-1", "d2t1p1"),
        "2: t2": _all("0-1", "d1t2p1"),
        "2: p2": _all("0-1", "d1t1p2"),
        "2: d2, learning d2s": _each(("0-1", "d2t1p1"), ("0-1", "d2t1p1s"), ("0-1", "d2t1p1s"), ("0-1", "d2t1p1")),
        "2: actor beside the others": _each(("0", "d1t1p1"), ("0", "d1t1p1"), ("1", "d1t1p1"), ("1", "d1t1p1")),
        "4: d4": _all("0-3", "d4t1p1"),
        "4: d2t2": _all("0-3", "d2t2p1"),
        "4: the recipe's": _each(("0-3", "d4t1p1"), ("0-3", "d2t2p1"), ("0-1", "d1t2p1"), ("2-3", "d2t1p1")),
        "4: d4, learning d2p2": _each(("0-3", "d4t1p1"), ("0-3", "d2t1p2"), ("0-3", "d2t1p2"), ("0-3", "d4t1p1")),
        "4: actor beside the others": _each(
            ("0-1", "d2t1p1"), ("0-1", "d2t1p1"), ("2-3", "d2t1p1"), ("2-3", "d1t2p1")
        ),
    }
)
BY_ADAPTERS = ("one process", "2: d2", "2: t2", "2: actor beside the others")
CASES: Mapping[str, Case] = MappingProxyType(
    {
        **{name: Case(plan=plan) for name, plan in PLANS.items()},
        **{f"LoRA, {name}": Case(plan=PLANS[name], keys=LORA) for name in BY_ADAPTERS},
    }
)


def config_of(case: Case) -> PPORunConfig:
    """The recipe by this plan, with these keys."""
    values = "null" if case.plan is None else json.dumps(case.plan)
    overrides = [f"plan={values}", "max_steps=1000", "output_dir=/dev/null/none", *case.keys]
    return load_config(PPORunConfig, RECIPE, overrides)


def step_and_lengths(config: PPORunConfig) -> Step:
    """The step as the planner sees it; prompts are as long as those of the data are on average."""
    prompts = load_data(config, open_tokenizer(str(config.actor.model_name_or_path))).prompts
    prompt = fmean(len(one.tokens) for one in prompts)
    models = {role: read_model(model_folder(name)) for role, name in role_names(config).items()}
    completion = config.generation.max_completion_length
    step = step_of(config, models, "float32", Lengths(prompt=prompt, completion=completion))
    return step if config.plan.is_given else in_one_process(config, step)


def predicted(
    step: Step, hardware: Hardware, placements: Mapping[str, Mapping[Kind, Placement]]
) -> dict[str, float]:
    """Seconds of each call and move, and of the step."""
    events = evaluate(step, hardware, placements)
    found = {event.name: event.end - event.start for event in events if event.end > event.start}
    return {**found, "step": max(event.end for event in events)}


def in_prediction(
    seconds: float, prefix: Sequence[str] = (), folder: Path | None = None, wanted: Sequence[str] = ()
) -> dict[str, Any]:
    """All of it. `prefix` begins the commands that measure (as `nice -n 0`); each takes some minutes.

    What is in `folder` already (a profile, seconds) is not measured again, but predicted anew. `wanted` are names
    of placements, or parts of names: these alone, and no plan is searched for then.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="meshift-benchmark-") as own:
            return in_prediction(seconds, prefix, Path(own), wanted)
    cases = {name: case for name, case in CASES.items() if not wanted or any(part in name for part in wanted)}
    if not cases:
        raise SystemExit(f"no placement's name has {' or '.join(wanted)} in it; they are {'; '.join(CASES)}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "profile.json"
    if not path.is_file():
        model = str(config_of(Case(plan=None)).actor.model_name_or_path)
        asked = ["profile", "--model", model, "--dtype", "float32", "--out", str(path)]
        subprocess.run([*prefix, sys.executable, "-m", "meshift.cli.main", *asked], check=True)
    hardware = find_hardware(str(path))
    rows = _rows(cases, hardware, folder, prefix)
    found = {"profile": _in_brief(hardware), "rows": rows, "summary": summary(rows)}
    if wanted:
        return found
    step = step_and_lengths(config_of(CASES["2: d2"]))
    return {**found, "chosen": _chosen(step, hardware, seconds, folder, prefix)}


def _rows(
    cases: Mapping[str, Case], hardware: Hardware, folder: Path, prefix: Sequence[str]
) -> list[dict[str, Any]]:
    configs = {name: config_of(case) for name, case in cases.items()}
    found = _kept(folder / "placements.json", list(configs.values()), prefix)
    rows = []
    for (name, config), seconds in zip(configs.items(), found, strict=True):
        step = step_and_lengths(config)
        said = predicted(step, hardware, placements_of(config.plan, PPO_METHOD.uses(config)))
        calls = {
            call: {"predicted_s": said[call], "measured_s": value, "error": said[call] / value - 1}
            for call, value in seconds.items()
            if call in said
        }
        case = cases[name]
        told = {"placement": name, "processes": num_processes(config), "plan": case.plan, "keys": case.keys}
        rows.append({**told, "calls": calls})
    return rows


def _kept(file: Path, configs: Sequence[PPORunConfig], prefix: Sequence[str]) -> list[dict[str, float]]:
    """Measured, or as the file has it of these very configs; what is measured is added to the file."""
    values = [config.model_dump(mode="json") for config in configs]
    kept: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    left, found = list(kept), dict[int, dict[str, float]]()
    for i, value in enumerate(values):
        one = next((one for one in left if one["config"] == value), None)
        if one is not None:
            left.remove(one)
            found[i] = one["seconds"]
    missing = [i for i in range(len(configs)) if i not in found]
    for i, seconds in zip(missing, measured([configs[i] for i in missing], file.parent, prefix), strict=True):
        found[i] = seconds
        kept.append({"config": values[i], "seconds": seconds})
        file.write_text(json.dumps(kept), encoding="utf-8")
    return [found[i] for i in range(len(configs))]


def measured(configs: Sequence[PPORunConfig], folder: Path, prefix: Sequence[str]) -> list[dict[str, float]]:
    """Seconds of each config's calls, in processes of their own."""
    found: list[dict[str, float]] = []
    turns: list[list[PPORunConfig]] = []
    for config in configs:
        if not turns or num_processes(turns[-1][0]) != num_processes(config):
            turns.append([])
        turns[-1].append(config)
    for turn in turns:
        source, target = folder / "configs.json", folder / "seconds.json"
        told = {"configs": [config.model_dump(mode="json") for config in turn], "steps": NUM_STEPS}
        source.write_text(json.dumps(told), encoding="utf-8")
        module = "benchmarks.measured_plans"
        subprocess.run([*prefix, sys.executable, "-m", module, str(source), str(target)], check=True)
        found += json.loads(target.read_text(encoding="utf-8"))
    return found


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Errors of steps and of calls, and pairs of placements whose order was foretold."""
    steps = [row["calls"]["step"] for row in rows]
    errors = [abs(step["error"]) for step in steps]
    calls = [
        abs(one["error"])
        for row in rows
        for name, one in row["calls"].items()
        if name != "step" and isfinite(one["error"])
    ]
    pairs = list(combinations(steps, 2))
    right = sum((a["predicted_s"] < b["predicted_s"]) == (a["measured_s"] < b["measured_s"]) for a, b in pairs)
    return {
        "step_median_error": median(errors),
        "step_worst_error": max(errors),
        "call_median_error": median(calls),
        "call_worst_error": max(calls),
        "pairs_in_order": right,
        "pairs": len(pairs),
        "kendall_tau": 2 * right / len(pairs) - 1,
    }


def _chosen(step: Step, hardware: Hardware, seconds: float, folder: Path, prefix: Sequence[str]) -> dict[str, Any]:
    """The search's plan for four processes at most, and one layout for all on all four, in turns, twice each."""
    planned = make_plan(step, hardware, NUM_PROCESSES, seconds=seconds)
    problem = Problem(step, hardware, NUM_PROCESSES)
    by_hand = one_layout(problem)
    assert by_hand is not None  # the model can be cut over so many
    plans: list[Plan] = [plan_values(planned.problem, planned.choice), plan_values(problem, by_hand)]
    alone = planned.problem.num_devices == 1
    configs = [config_of(Case(plan=None if alone else plans[0])), config_of(Case(plan=plans[1]))]
    found = _kept(folder / "chosen.json", configs * 2, prefix)
    times = [fmean(one["step"] for one in found[side::2]) for side in (0, 1)]
    said = [planned.seconds, predicted(step, hardware, placements_of_choice(problem, by_hand))["step"]]
    return {
        "plan": plans[0],
        "one_layout": plans[1],
        "predicted_s": said,
        "measured_s": times,
        "each_measured_s": [[one["step"] for one in found[side::2]] for side in (0, 1)],
        "predicted_ratio": said[1] / said[0],
        "measured_ratio": times[1] / times[0],
        "searched_s": score(planned.problem, planned.choice).seconds,
    }


def _in_brief(hardware: Hardware) -> dict[str, Any]:
    assert hardware.profile is not None
    return {
        "flops": dict(hardware.flops),
        "memory_rate": hardware.memory_rate,
        "crowding": {kind: dict(found) for kind, found in hardware.profile.crowding.items()},
        "speeds": {kind: dict(found) for kind, found in hardware.profile.speeds.items()},
    }
