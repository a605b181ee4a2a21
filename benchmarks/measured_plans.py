"""`python -m benchmarks.measured_plans IN OUT`: steps of a run by one plan after another, in as many processes.

A gang of processes builds each plan's roles by the runtime's own code and runs some steps; the first one, which
warms up, does not count. Nothing is saved or logged. It knows nothing of predictions.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from meshift.config.runs import PPORunConfig
from meshift.layout.mesh import Device
from meshift.parallel.exchange import gather_facts
from meshift.parallel.groups import new_group
from meshift.runtime.launch.local import run_gang
from meshift.runtime.observer import Observer, SilentObserver
from meshift.runtime.plans import mesh_of
from meshift.runtime.ppo_run import PPO_METHOD
from meshift.runtime.role_spec import LocalOpener
from meshift.runtime.spread_run import build_share
from meshift.runtime.world import World
from meshift.step import run_step

ENTRY = "benchmarks.measured_plans:share"
TIMING = "timing_s/"


def num_processes(config: PPORunConfig) -> int:
    """That a run of this config has."""
    return len(mesh_of(config.plan, PPO_METHOD.uses(config)).devices) if config.plan.is_given else 1


def measure(configs: Sequence[PPORunConfig], num_steps: int) -> list[dict[str, float]]:
    """Seconds of each call, of moves and of a step by each config's plan: medians over the steps."""
    told = json.dumps({"configs": [config.model_dump_json() for config in configs], "steps": num_steps})
    (count,) = {num_processes(config) for config in configs}
    found: list[dict[str, float]] = run_gang(count, ENTRY, told, SilentObserver())
    return found


def share(argument: str, rank: int, count: int, observer: Observer) -> list[dict[str, float]]:
    """One process's part; the first one gives what was measured."""
    told = json.loads(argument)
    ranks = {Device(index=i): i for i in range(count)}
    world = World(rank=rank, ranks=ranks, group=new_group(range(count), backend="gloo"))
    found = []
    for text in told["configs"]:
        found.append(_of_plan(PPORunConfig.model_validate_json(text), world, told["steps"]))
        gc.collect()
    return found


def _of_plan(config: PPORunConfig, world: World, num_steps: int) -> dict[str, float]:
    moved: dict[str, float] = {}
    if config.plan.is_given:
        job, roles = build_share(config, world, SilentObserver())
        for name, role in roles.items():
            if role._moves:
                role.publish = _timed(role.publish, f"{TIMING}{name} to generate", moved)  # type: ignore[method-assign]
        assert job.advance is not None
        advance = job.advance
    else:
        job = PPO_METHOD.build(config, LocalOpener())

        def advance(batch: Any, step: int, on_call: Callable[[str], None]) -> Any:
            return run_step(job.graph, job.roles, batch, step, on_call)

    rows = []
    for step in range(num_steps):
        moved.clear()
        started = time.perf_counter()
        outcome = advance(job.next_batch(step), step, lambda name: None)
        seconds = time.perf_counter() - started
        # Who comes last to a move waits for nobody: it takes as long as it takes that process.
        moves = [one for one in gather_facts(dict(moved), world.everybody) if one]
        least = {name: min(one[name] for one in moves) for name in (moves[0] if moves else {})}
        times = {name: value for name, value in outcome.metrics.items() if name.startswith(TIMING)}
        rows.append({**times, **least, f"{TIMING}step": seconds})
    names = rows[-1] if world.rank == 0 else {}
    return {name.removeprefix(TIMING): median(row[name] for row in rows[1:]) for name in names}


def _timed(call: Callable[[], Any], name: str, into: dict[str, float]) -> Callable[[], Any]:
    def run() -> Any:
        started = time.perf_counter()
        found = call()
        into[name] = time.perf_counter() - started
        return found

    return run


def main(arguments: Sequence[str] | None = None) -> int:
    """Read configs (values of `PPORunConfig`), run those of one number of processes together, write seconds."""
    source, target = sys.argv[1:] if arguments is None else arguments
    told: Mapping[str, Any] = json.loads(Path(source).read_text(encoding="utf-8"))
    configs = [PPORunConfig.model_validate(values) for values in told["configs"]]
    found: list[dict[str, float]] = []
    turn: list[PPORunConfig] = []
    for config in [*configs, None]:
        if turn and (config is None or num_processes(config) != num_processes(turn[0])):
            found += measure(turn, told["steps"])
            turn = []
        turn += [] if config is None else [config]
    Path(target).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
