"""START HERE. One step of any algorithm: a prompt enters, each `train` call is where a gradient leaves.

The step runs the calls of a graph one after another; that is the specification. A controller may overlap
whatever the graph allows and must end with the same batch. It knows nothing of devices, nor of any algorithm:
the graph is the algorithm (`meshift/algorithms/`), and a role is a model with an engine (`meshift/training/`,
`meshift/generation/`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from meshift.batch import Batch, Outcome
from meshift.graph.calls import Call, Graph, HostCall, LoopCall, ModelCall, SyncCall


class Role(Protocol):
    """A model and what it can do."""

    @property
    def version(self) -> int:
        """Optimizer steps that the weights have seen."""

    def generate(self, task: Any, batch: Batch) -> Outcome:
        """Sample completions for the batch's prompts."""

    def infer(self, task: Any, batch: Batch) -> Outcome:
        """Read log-probs, values or scores, without gradients."""

    def train(self, task: Any, batch: Batch, *, step: int) -> Outcome:
        """Update the weights with the task's loss; every update adds one to `version`."""

    def master_weights(self) -> Mapping[str, Any]:
        """Every parameter by name, as exact as the role has it: what another role mixes in."""

    def mix(self, source: Role, rate: float) -> None:
        """`self <- rate * source + (1 - rate) * self`, in place."""


def run_step(
    graph: Graph,
    roles: Mapping[str, Role],
    batch: Batch,
    step: int,
    on_call: Callable[[str], None] = lambda name: None,
) -> Outcome:
    """Run every call of the graph once, in order, on one batch of prompts (or pairs).

    Returns the batch with all that the calls wrote, and the metrics of all calls, with `timing_s/<call>`.
    `step` counts from 0. `on_call` hears each call's name before it runs.
    """
    metrics: dict[str, float] = {}
    for call in graph.order():
        on_call(call.name)
        started = time.perf_counter()
        outcome = run_call(call, roles, batch, step, on_call)
        metrics[f"timing_s/{call.name}"] = time.perf_counter() - started
        metrics.update(outcome.metrics)
        replaced = isinstance(call, LoopCall) and call.replaces_batch
        batch = outcome.batch if replaced else batch.union(outcome.batch)
    return Outcome(batch=batch, metrics=metrics)


def run_call(
    call: Call,
    roles: Mapping[str, Role],
    batch: Batch,
    step: int,
    on_call: Callable[[str], None] = lambda name: None,
) -> Outcome:
    """Run one call on the keys it reads. `on_call` hears the calls within it, if there are any."""
    match call:
        case HostCall():
            return call.function(batch.select(call.reads))
        case SyncCall():
            if (step + 1) % call.every == 0:
                roles[call.target].mix(roles[call.source], call.rate)
            return Outcome()
        case LoopCall():
            given, outcomes = batch.select(call.reads), list[Outcome]()
            while (fed := call.feed(given, outcomes)) is not None:
                outcomes.append(run_step(call.graph, roles, fed, step, on_call))
            return call.collect(given, outcomes)
        case ModelCall(kind="generate"):
            return roles[call.role].generate(call.task, batch.select(call.reads))
        case ModelCall(kind="infer"):
            return roles[call.role].infer(call.task, batch.select(call.reads))
        case ModelCall():
            return roles[call.role].train(call.task, batch.select(call.reads), step=step)
