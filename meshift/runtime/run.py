"""The run: data in, a step of the graph, metrics out, until the last step; then the model is saved.

Every `save_steps` steps it writes a checkpoint, from which `resume` goes on bit for bit. It knows nothing of what
the graph computes: `ppo_run.py` and its neighbours build graph and roles for it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from meshift.batch import Batch, Outcome
from meshift.config.runs import RunConfig
from meshift.config.sections import TrainableConfig
from meshift.errors import StoppedRunError
from meshift.graph.ahead import halves_of
from meshift.graph.calls import Graph, LoopCall
from meshift.runtime.ahead import AheadStep, Queue
from meshift.runtime.checkpoints import write_checkpoint
from meshift.runtime.disk import Sized, bytes_to_write, space_note
from meshift.runtime.environment import write_environment
from meshift.runtime.interrupts import StopRequest
from meshift.runtime.models import device_for_run
from meshift.runtime.observer import Observer
from meshift.runtime.peaks import PeakMeter
from meshift.runtime.resume import Start, check_environment, check_length, find_start, last_metrics, replaced
from meshift.runtime.run_folder import FINAL, RunFolder, check_output_dir
from meshift.runtime.run_state import KeptRole, LocalRunState, RunState, environment
from meshift.step import run_step
from meshift.training.checkpoint import Remembers
from meshift.training.flops import Work

CHECKPOINT, SAVING = "checkpoint", "saving"
"""What an observer hears beside the calls of a step."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Where a run left its files, and its last step's metrics."""

    output_dir: Path
    final_dir: Path
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class PlanFile:
    """What `plan.json` holds of a run's plan, and the predicted `metrics` beside which a step's are measured."""

    values: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


Advance = Callable[[Batch, int, Callable[[str], None]], Outcome]
"""Runs a step: its batch, its number, and who hears of each call."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a run needs: a graph, its roles, where batches come from, and what to do around steps.

    `next_batch` is a function of the step alone, so a resumed run needs no position in the data; `num_tokens`
    counts what a finished step has trained on. `samples` are rows of the log made from a step's batch, `fixed`
    those made after so many steps without it; `advance` runs a step, if not `run_step`. `memories` are what an
    algorithm carries from step to step; `rows` are the data that batches are made of (dataclasses), by which a
    resumed run knows that they are the same; `make_state` makes what writes and reads checkpoints of all that.
    `placements` says in which processes each call runs, where they are several, and `spread` are the roles that
    are in these; `plan` is what was predicted of that. With a `queue` completions are drawn before their step.
    """

    title: str
    graph: Graph
    roles: Mapping[str, KeptRole]
    max_steps: int
    next_batch: Callable[[int], Batch]
    save: Callable[[Path], None]
    num_tokens: Callable[[Batch], int]
    samples: Callable[[int, Batch], list[dict[str, Any]]] = lambda step, batch: []
    fixed: Callable[[int], list[dict[str, Any]]] = lambda num_done: []
    advance: Advance | None = None
    evaluate: Callable[[int], dict[str, float]] = lambda step: {}
    memories: Mapping[str, Remembers] = field(default_factory=dict)
    rows: Sequence[Any] = ()
    make_state: Callable[..., RunState] = LocalRunState
    queue: Queue | None = None
    placements: Mapping[str, Sequence[int]] = field(default_factory=dict)
    spread: Sequence[Sized] = ()
    plan: PlanFile = PlanFile()
    messages: tuple[str, ...] = field(default=())


class JobBuilder(Protocol):
    """Builds a job from a config, refusing one that would have the run delete its own inputs."""

    def __call__(self, config: Any) -> Job:
        """Load models and data."""


def run_job(config: RunConfig, build: JobBuilder, observer: Observer) -> RunResult:
    """Run every step and save `final/`. Metrics and samples are on disk as soon as their step is done.

    An old run in the folder is removed only when models and data of the new one are there. With `config.resume`
    the run goes on after its last whole checkpoint. Raises `StoppedRunError` when SIGTERM ended it.
    """
    path = Path(config.output_dir)
    start = find_start(config) if config.resume else Start()
    overwrite = config.overwrite_output_dir or config.resume
    check_output_dir(path, overwrite=overwrite)
    for note in (*start.notes, *replaced(config)):
        observer.on_message(note)
    if start.finished:
        return _finished_before(path)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    job = build(config)
    state = job.make_state(job.roles, job.memories, job.next_batch, job.rows, job.queue)
    if start.checkpoint is not None:
        check_length(config, start.checkpoint, job.max_steps)
    state.begin(None if start.checkpoint is None else start.checkpoint.folder, start.num_done)
    if start.checkpoint is not None:
        for note in check_environment(start.checkpoint, environment()):
            observer.on_message(note)
    with RunFolder(path, config.report_to, overwrite=overwrite, num_done=start.num_done) as folder:
        folder.write_config(config.model_copy(update={"resume": False}))
        write_environment(folder.path)
        folder.write_placements(job.placements)
        folder.write_plan(job.plan.values)
        for text in (*job.messages, *_space(config, job), *_long_warmups(config, job.max_steps)):
            observer.on_message(text)
        observer.on_start(job.max_steps, job.title)
        metrics = _all_steps(config, job, state, start.num_done, folder, observer)
        observer.on_call(job.max_steps - 1, SAVING)
        final = folder.save_models(job.save)
        observer.on_finish()
    return RunResult(output_dir=folder.path, final_dir=final, metrics=metrics)


def finished_run(config: RunConfig, observer: Observer) -> RunResult | None:
    """The result of a run that was to be resumed and is finished, else None: before processes are started."""
    start = find_start(config) if config.resume else Start()
    if not start.finished:
        return None
    for note in start.notes:
        observer.on_message(note)
    return _finished_before(Path(config.output_dir))


def _finished_before(path: Path) -> RunResult:
    return RunResult(output_dir=path, final_dir=path / FINAL, metrics=last_metrics(path))


def _space(config: RunConfig, job: Job) -> tuple[str, ...]:
    num_bytes = bytes_to_write([*job.roles.values(), *job.spread], with_checkpoints=config.save_steps is not None)
    note = space_note(Path(config.output_dir), num_bytes)
    return () if note is None else (note,)


def _long_warmups(config: RunConfig, max_steps: int) -> tuple[str, ...]:
    sections = {name: getattr(config, name) for name in type(config).model_fields}
    return tuple(
        f"`{name}.warmup_steps` is {section.warmup_steps}, and the run has {max_steps} steps: its rate never "
        "reaches learning_rate"
        for name, section in sections.items()
        if isinstance(section, TrainableConfig) and section.warmup_steps >= max_steps
    )


def _all_steps(
    config: RunConfig, job: Job, state: RunState, num_done: int, folder: RunFolder, observer: Observer
) -> Mapping[str, float]:
    """Run the steps that are left, with a checkpoint where one is due; returns the last step's metrics."""
    metrics: Mapping[str, float] = last_metrics(folder.path)
    with StopRequest() as stop:
        for step in range(num_done, job.max_steps):
            metrics = _one_step(config, job, step, folder, observer)
            done = step + 1
            due = config.save_steps is not None and done % config.save_steps == 0
            if done < job.max_steps and (due or stop.asked):
                observer.on_call(step, CHECKPOINT)
                saved = _save_checkpoint(config, job, state, done, folder)
                if stop.asked:
                    raise StoppedRunError(f"ended by SIGTERM after step {done}; --resume goes on from {saved}")
            state.end_step()
    return metrics


def _save_checkpoint(config: RunConfig, job: Job, state: RunState, num_done: int, folder: RunFolder) -> Path:
    folder.sync()
    facts = {
        "run": type(config).__name__,
        "config": config.model_dump(mode="json"),
        "max_steps": job.max_steps,
        "environment": environment(),
    }
    limit = config.save_total_limit
    return write_checkpoint(folder.path, num_done, lambda aside: state.write(aside, num_done), facts, limit)


def _one_step(config: RunConfig, job: Job, step: int, folder: RunFolder, observer: Observer) -> dict[str, float]:
    _seed_generators(config.seed, step)
    before = {name: replace(role.work) for name, role in job.roles.items()}
    started = time.perf_counter()
    advance = job.advance or _measured(job)
    outcome = advance(job.next_batch(step), step, lambda name: observer.on_call(step, name))
    seconds = time.perf_counter() - started
    metrics = {"training/global_step": step + 1, **outcome.metrics, "perf/time_per_step": seconds}
    metrics["perf/tokens_per_s"] = job.num_tokens(outcome.batch) / seconds
    metrics.update(_utilisation(job.roles, before))
    metrics.update(job.plan.metrics)
    metrics.update(job.evaluate(step))
    folder.write_metrics(step + 1, metrics)
    folder.write_samples([*job.samples(step, outcome.batch), *job.fixed(step + 1)])
    observer.on_step(step, metrics)
    return metrics


def _measured(job: Job) -> Advance:
    """The job's step in this process, with the peak of memory in each call."""
    meter, run = PeakMeter(device_for_run()), _in_this_process(job)
    loops = {call.name for call in job.graph.order() if isinstance(call, LoopCall)}

    def advance(batch: Batch, step: int, on_call: Callable[[str], None]) -> Outcome:
        def begin(name: str) -> None:
            if name not in loops:  # whose calls are measured one by one
                meter.begin(name)
            on_call(name)

        outcome = run(batch, step, begin)
        return replace(outcome, metrics={**outcome.metrics, **meter.end()})

    return advance


def _in_this_process(job: Job) -> Advance:
    if job.queue is None:
        return partial(run_step, job.graph, job.roles)
    halves = halves_of(job.graph)
    return AheadStep(halves=halves, roles=job.roles, queue=job.queue, next_batch=job.next_batch).run


def _utilisation(roles: Mapping[str, KeptRole], before: Mapping[str, Work]) -> dict[str, float]:
    """`perf/mfu`: the part of the training's seconds that it would take at the device's `perf/peak_tflops`."""
    seconds = sum(role.work.seconds - before[name].seconds for name, role in roles.items())
    moved = [(role, role.work.flops - before[name].flops) for name, role in roles.items()]
    ideal = sum(flops / role.peak_flops for role, flops in moved if flops > 0)
    if seconds <= 0:
        return {}
    peaks = [role.peak_flops for role, flops in moved if flops > 0]
    return {"perf/mfu": ideal / seconds, **({"perf/peak_tflops": max(peaks) / 1e12} if peaks else {})}


def _seed_generators(seed: int, step: int) -> None:
    """Start the generators of Python, numpy and torch anew, from seed and step.

    Meshift draws from none of them, but a reward function may. So a resumed run needs no generator's state.
    """
    number = np.random.SeedSequence([seed, step]).generate_state(1)[0].item()
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def steps_of(config: RunConfig, num_rows: int) -> int:
    """`max_steps`, or as many steps as `num_train_epochs` over the rows take."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, math.ceil(config.num_train_epochs * num_rows / config.data.batch_size))
