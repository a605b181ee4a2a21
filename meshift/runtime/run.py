"""The run: data in, a step of the graph, metrics out, until the last step; then the model is saved.

It knows nothing of what the graph computes. `ppo_run.py` and `reward_run.py` build graph and roles for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from meshift.batch import Batch
from meshift.config.runs import RunConfig
from meshift.graph.calls import Graph
from meshift.runtime.observer import Observer
from meshift.runtime.run_folder import RunFolder, check_output_dir
from meshift.step import Role, run_step


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Where a run left its files, and its last step's metrics."""

    output_dir: Path
    final_dir: Path
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a run needs: a graph, its roles, where batches come from, and what to do around steps.

    `next_batch` is a function of the step alone; `num_tokens` counts what a finished step has trained on.
    """

    title: str
    graph: Graph
    roles: Mapping[str, Role]
    max_steps: int
    next_batch: Callable[[int], Batch]
    save: Callable[[Path], None]
    num_tokens: Callable[[Batch], int]
    samples: Callable[[int, Batch], list[dict[str, Any]]] = lambda step, batch: []
    evaluate: Callable[[int], dict[str, float]] = lambda step: {}
    messages: tuple[str, ...] = field(default=())


class JobBuilder(Protocol):
    """Builds a job from a config, refusing one that would have the run delete its own inputs."""

    def __call__(self, config: Any) -> Job:
        """Load models and data."""


def run_job(config: RunConfig, build: JobBuilder, observer: Observer) -> RunResult:
    """Run every step and save `final/`. Metrics and samples are on disk as soon as their step is done.

    An old run in the folder is removed only when models and data of the new one are there.
    """
    path = Path(config.output_dir)
    check_output_dir(path, overwrite=config.overwrite_output_dir)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    job = build(config)
    with RunFolder(path, config.report_to, overwrite=config.overwrite_output_dir) as folder:
        folder.write_config(config)
        for text in job.messages:
            observer.on_message(text)
        observer.on_start(job.max_steps, job.title)
        metrics: dict[str, float] = {}
        for step in range(job.max_steps):
            metrics = _one_step(job, step, folder, observer)
        final = folder.path / "final"
        job.save(final)
        observer.on_finish()
    return RunResult(output_dir=folder.path, final_dir=final, metrics=metrics)


def _one_step(job: Job, step: int, folder: RunFolder, observer: Observer) -> dict[str, float]:
    started = time.perf_counter()
    outcome = run_step(
        job.graph, job.roles, job.next_batch(step), step, on_call=lambda name: observer.on_call(step, name)
    )
    seconds = time.perf_counter() - started
    metrics = {"training/global_step": step + 1, **outcome.metrics, "perf/time_per_step": seconds}
    metrics["perf/tokens_per_s"] = job.num_tokens(outcome.batch) / seconds
    metrics.update(job.evaluate(step))
    folder.write_metrics(step + 1, metrics)
    folder.write_samples(job.samples(step, outcome.batch))
    observer.on_step(step, metrics)
    return metrics


def steps_of(config: RunConfig, num_rows: int) -> int:
    """`max_steps`, or as many steps as `num_train_epochs` over the rows take."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, math.ceil(config.num_train_epochs * num_rows / config.data.batch_size))
