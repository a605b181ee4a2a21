"""`meshift dpo`: preference pairs, an actor and a reference brought to the graph of `algorithms/dpo.py`.

It knows nothing of the loss, nor of how many processes run it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from meshift.algorithms.dpo import REFERENCE_READING, dpo_graph, dpo_loss
from meshift.algorithms.losses import DPOLoss
from meshift.algorithms.preference_losses import ReferenceFreeLoss
from meshift.batch import Batch, Ragged
from meshift.config.runs import DPORunConfig
from meshift.counted import counted
from meshift.data.preferences import Pair
from meshift.errors import ModelError
from meshift.runtime.fixed_samples import Infers
from meshift.runtime.given_rows import (
    actor_and_reference,
    actor_spec,
    check_actor_and_reference,
    closing_rows,
    held_out_calls,
    held_out_due,
    reference_spec,
)
from meshift.runtime.models import (
    compute_dtype,
    kept_models,
    model_rows,
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
from meshift.runtime.run_state import FixedRole
from meshift.training.checkpoint import Remembers, fingerprint


def run_dpo(config: DPORunConfig, observer: Observer) -> RunResult:
    """Align the actor. Its folder `final/` loads with `AutoModelForCausalLM`."""
    return start_run(config, DPO_METHOD, observer)


def check_dpo(config: DPORunConfig) -> list[tuple[str, str]]:
    """Validate data and models and say what the run would do, without training."""
    data, names = _check(config), actor_and_reference(config)
    pairs = data.train.pairs
    sizes = [len(p.chosen) + len(p.rejected) for p in pairs]
    once = config.dpo.precompute_ref_log_probs
    return [
        *model_rows(names, {**names} if config.dpo.precompute_ref_log_probs else _kept(config, names)),
        ("compute type", str(compute_dtype(config.dtype)).removeprefix("torch.")),
        *data.described(),
        *weights_in_words(config.data, pairs),
        ("batch", f"{config.data.batch_size} pairs = {2 * config.data.batch_size} texts per update"),
        ("reference", "read once, before the first step, then dropped" if once else "read in every step"),
        *closing_rows(
            config,
            DPO_METHOD,
            sizes,
            "pairs",
            names=names,
            trained={"actor": config.actor},
            memory=_resident_bytes(config, names),
        ),
    ]


def _resident_bytes(config: DPORunConfig, names: Mapping[str, str]) -> int:
    dtype = compute_dtype(config.dtype)
    once = config.dpo.precompute_ref_log_probs
    kept = {"actor": names["actor"]} if once else _kept(config, names)
    return sum(resident_bytes(names[r], "lm", dtype, config.actor if r == "actor" else None) for r in kept)


def _kept(config: DPORunConfig, names: Mapping[str, str]) -> dict[str, str]:
    return kept_models(names, {"actor": config.actor}, config.plan, moves=config.reference.sync_ref_model)


def build_dpo_job(config: DPORunConfig, opener: Opener | None = None) -> Job:
    """Roles, pairs and graph. Without an opener the roles are in this process.

    A reference that is read once is read and dropped in here, telling the opener's observer.
    """
    opener = opener or LocalOpener(None, config.plan.offloaded)
    data, names = _check(config), actor_and_reference(config)
    max_steps = steps_of(config, len(data.train.pairs))
    source = PairSource(config.data, data.train.pairs, config.seed)
    heldout = pair_batch(data.heldout.pairs) if data.heldout else None
    roles: dict[str, Any] = {}
    memories: dict[str, Remembers] = {}
    if config.dpo.precompute_ref_log_probs:
        reference = opener.open(reference_spec(config))
        reader = _ReferenceReader(reference, opener.observer)
        heldout = reader.read_heldout(heldout)
        source.known = reader.read_pairs(source, max_steps, config.data.batch_size)
        memories["read_reference"] = _SameReference(reference)
        del reader, reference  # and the reference with it, before the actor is loaded
    roles["actor"] = opener.open(actor_spec(config, config.actor, max_steps))
    if not config.dpo.precompute_ref_log_probs:
        roles["reference"] = opener.open(reference_spec(config))  # what the actor leaves frozen may serve as it
    evaluation = _Evaluation(config, roles, heldout)
    tokenizer = open_tokenizer(names["actor"])
    return Job(
        title=f"DPO on {len(data.train.pairs)} pairs",
        graph=dpo_graph(config),
        roles=roles,
        max_steps=max_steps,
        next_batch=source.next_batch,
        save=lambda folder: save_role(roles["actor"], folder, tokenizer),
        evaluate=lambda step: evaluation.metrics() if held_out_due(config, step, max_steps) else {},
        num_tokens=num_pair_tokens,
        memories=memories,
        rows=data.train.pairs,
        messages=(*data.messages(), *data.unread_margins("DPO")),
    )


def dpo_uses(config: DPORunConfig) -> Uses:
    """The calls of each role; the reference is read, in every step or once before them."""
    return uses_of(dpo_graph(config), ("reference", "infer"), *held_out_calls(config, "actor"))


def _rows(config: DPORunConfig) -> list[Pair]:
    return _check(config).train.pairs


DPO_METHOD = Method(build=build_dpo_job, uses=dpo_uses, models=actor_and_reference, rows=_rows)


class _ReferenceReader:
    """Reads the reference's log-probs of every pair that the run will see, once."""

    def __init__(self, reference: Infers, observer: Observer) -> None:
        self.reference = reference
        self.observer = observer

    def read_heldout(self, batch: Batch | None) -> Batch | None:
        """The held-out pairs with the reference's log-probs."""
        return None if batch is None else batch.union(self._read(batch))

    def read_pairs(self, source: PairSource, max_steps: int, batch_size: int) -> Batch:
        """One row per pair, in the pairs' order; not a number for pairs that no step will read.

        The pairs are read in the batches of the first epoch, so that its steps see to the last bit what a
        reference in memory would have given.
        """
        num_pairs = len(source.pairs)
        num_batches = min(max_steps, math.ceil(num_pairs / batch_size))
        known = {key: torch.full((num_pairs,), math.nan) for key in REFERENCE_READING.keys}
        seen = torch.zeros(num_pairs, dtype=torch.bool)
        total = min(num_pairs, num_batches * batch_size)
        self.observer.on_message(f"the reference reads {total} pairs, once")
        for number in counted(range(num_batches), "batches that the reference has read", lambda: num_batches):
            rows = torch.tensor(source.rows(number))
            read = self._read(source.next_batch(number))
            fresh = ~seen[rows]  # the last batch may begin the next epoch
            for key, values in known.items():
                values[rows[fresh]] = read[key].values[fresh]
            seen[rows] = True
        return Batch({key: Ragged.scalars(values) for key, values in known.items()})

    def _read(self, batch: Batch) -> Batch:
        return self.reference.infer(REFERENCE_READING, batch).batch


class _SameReference:
    """Of a reference that was read and dropped, the sha256: a resumed run must have read the same."""

    def __init__(self, reference: FixedRole) -> None:
        self.sha256 = fingerprint(reference.fixed_weights())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"sha256": self.sha256}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare. Raises `ModelError`."""
        if state["sha256"] != self.sha256:
            raise ModelError(
                "the reference model is not the one that the checkpoint was trained with (its weights have "
                "another sha256); resume with the models that the run began with"
            )


class _Evaluation:
    """The loss on held-out pairs. What a reference that stands still said of them is remembered."""

    def __init__(self, config: DPORunConfig, roles: Mapping[str, Infers], batch: Batch | None) -> None:
        self.loss = dpo_loss(config)
        self.roles = roles
        self.batch = batch
        self.reference_moves = config.reference.sync_ref_model

    def metrics(self) -> dict[str, float]:
        """`eval/loss`, `eval/accuracy` and `eval/margin`, means over pairs; nothing without held-out pairs."""
        if self.batch is None:
            return {}
        batch = self.batch
        if not all(key in batch for key in REFERENCE_READING.keys):
            batch = batch.union(self.roles["reference"].infer(REFERENCE_READING, batch).batch)
            if not self.reference_moves:
                self.batch = batch
        return heldout_metrics(self.loss, self.roles["actor"], batch)


def heldout_metrics(loss: DPOLoss | ReferenceFreeLoss, actor: Infers, batch: Batch) -> dict[str, float]:
    """Loss, accuracy and margin of the actor on pairs; reference log-probs, where read, are in the batch."""
    result = loss(actor.infer(loss.reading, batch).batch.fields, batch)
    sums = {"loss": result.total, "accuracy": result.sums["accuracy"], "margin": result.sums["margin"]}
    return {f"eval/{name}": float(value) / len(batch) for name, value in sums.items()}


def _check(config: DPORunConfig) -> PairSets:
    """The data, when it and the models fit together; a dry run and a run both begin with it."""
    names = check_actor_and_reference(config)
    data = load_pairs(config.data, names["actor"])
    role, limit = shortest_limit(names)
    data.check_lengths(role, names[role], limit)
    return data
