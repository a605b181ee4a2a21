"""`meshift orpo` and `simpo`: preference pairs and an actor brought to a method's graph; no reference.

It knows nothing of the losses, nor of how many processes run them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from meshift.algorithms.orpo import orpo_graph, orpo_loss
from meshift.algorithms.preference_losses import ReferenceFreeLoss
from meshift.algorithms.simpo import simpo_graph, simpo_loss
from meshift.config.runs import ORPORunConfig, ReferenceFreeRunConfig, SimPORunConfig
from meshift.data.preferences import Pair
from meshift.graph.calls import Graph
from meshift.runtime.dpo_run import heldout_metrics
from meshift.runtime.given_rows import (
    actor_spec,
    check_before_reading,
    closing_rows,
    held_out_calls,
    held_out_due,
)
from meshift.runtime.models import (
    compute_dtype,
    model_folder,
    open_tokenizer,
    resident_bytes,
    shortest_limit,
)
from meshift.runtime.observer import Observer
from meshift.runtime.pairs import PairSets, PairSource, load_pairs, num_pair_tokens, pair_batch, weights_in_words
from meshift.runtime.planned_run import Method, start_run
from meshift.runtime.plans import Uses, uses_of
from meshift.runtime.role_spec import LocalOpener, Opener, save_role
from meshift.runtime.run import Job, RunResult, steps_of


class ReferenceFree(NamedTuple):
    """A method by its name, its graph, and its loss for held-out pairs."""

    title: str
    graph: Callable[[Any], Graph]
    loss: Callable[[Any], ReferenceFreeLoss]


METHODS: Mapping[type[ReferenceFreeRunConfig], ReferenceFree] = MappingProxyType(
    {
        ORPORunConfig: ReferenceFree("ORPO", orpo_graph, orpo_loss),
        SimPORunConfig: ReferenceFree("SimPO", simpo_graph, simpo_loss),
    }
)


def run_pairs(config: ReferenceFreeRunConfig, observer: Observer) -> RunResult:
    """Align the actor. Its folder `final/` loads with `AutoModelForCausalLM`."""
    return start_run(config, PAIR_METHOD, observer)


def check_pairs(config: ReferenceFreeRunConfig) -> list[tuple[str, str]]:
    """Validate data and model and say what the run would do, without training."""
    data, name = _check(config), _models(config)["actor"]
    pairs, dtype = data.train.pairs, compute_dtype(config.dtype)
    sizes = [len(p.chosen) + len(p.rejected) for p in pairs]
    memory = resident_bytes(name, "lm", dtype, config.actor)
    return [
        ("actor model", str(model_folder(name))),
        ("compute type", str(dtype).removeprefix("torch.")),
        *data.described(),
        *weights_in_words(config.data, pairs),
        ("batch", f"{config.data.batch_size} pairs = {2 * config.data.batch_size} texts per update"),
        *closing_rows(
            config,
            PAIR_METHOD,
            sizes,
            "pairs",
            names=_models(config),
            trained={"actor": config.actor},
            memory=memory,
        ),
    ]


def build_pair_job(config: ReferenceFreeRunConfig, opener: Opener | None = None) -> Job:
    """The actor, pairs and graph. Without an opener the actor is in this process."""
    opener = opener or LocalOpener(None, config.plan.offloaded)
    method, data, name = METHODS[type(config)], _check(config), _models(config)["actor"]
    max_steps = steps_of(config, len(data.train.pairs))
    actor, tokenizer = opener.open(actor_spec(config, config.actor, max_steps)), open_tokenizer(name)
    heldout = pair_batch(data.heldout.pairs) if data.heldout else None

    def evaluate(step: int) -> dict[str, float]:
        if heldout is None or not held_out_due(config, step, max_steps):
            return {}
        return heldout_metrics(method.loss(config), actor, heldout)

    return Job(
        title=f"{method.title} on {len(data.train.pairs)} pairs",
        graph=method.graph(config),
        roles={"actor": actor},
        max_steps=max_steps,
        next_batch=PairSource(config.data, data.train.pairs, config.seed).next_batch,
        save=lambda folder: save_role(actor, folder, tokenizer),
        evaluate=evaluate,
        num_tokens=num_pair_tokens,
        rows=data.train.pairs,
        messages=(*data.messages(), *data.unread_margins(method.title)),
    )


def pair_uses(config: ReferenceFreeRunConfig) -> Uses:
    """The calls of the actor."""
    return uses_of(METHODS[type(config)].graph(config), *held_out_calls(config, "actor"))


def _models(config: ReferenceFreeRunConfig) -> dict[str, str]:
    return {"actor": str(config.actor.model_name_or_path)}


def _rows(config: ReferenceFreeRunConfig) -> list[Pair]:
    return _check(config).train.pairs


PAIR_METHOD = Method(build=build_pair_job, uses=pair_uses, models=_models, rows=_rows)


def _check(config: ReferenceFreeRunConfig) -> PairSets:
    """The data, when it and the model fit together; a dry run and a run both begin with it."""
    check_before_reading(config, "actor", config.actor)
    names = _models(config)
    data = load_pairs(config.data, names["actor"])
    role, limit = shortest_limit(names)
    data.check_lengths(role, names[role], limit)
    return data
