"""`meshift kto`: completions that were liked or not, an actor and a reference brought to the graph of KTO.

It knows nothing of the loss, nor of how many processes run it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from meshift.algorithms.kto import (
    MATCHED,
    MISMATCHED,
    REF_MISMATCHED,
    kl_term,
    kto_graph,
    kto_loss,
    mismatched,
)
from meshift.algorithms.preference_losses import side_means
from meshift.batch import WHERE, Batch, Ragged
from meshift.config.runs import KTORunConfig
from meshift.config.sections import UnpairedDataConfig
from meshift.data.columns import has
from meshift.data.dataset import dataset_rows
from meshift.data.loader import Loader
from meshift.data.preferences import load_preferences
from meshift.data.unpaired import Judged, UnpairedData, load_unpaired
from meshift.errors import ConfigError
from meshift.runtime.fixed_samples import Infers
from meshift.runtime.given_rows import (
    actor_and_reference,
    actor_spec,
    check_actor_and_reference,
    closing_rows,
    held_out_calls,
    held_out_due,
    left_out_notes,
    loaded_rows,
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
from meshift.runtime.planned_run import Method, start_run
from meshift.runtime.plans import Uses, uses_of
from meshift.runtime.role_spec import LocalOpener, Opener, save_role
from meshift.runtime.run import Job, RunResult, steps_of


def run_kto(config: KTORunConfig, observer: Observer) -> RunResult:
    """Align the actor. Its folder `final/` loads with `AutoModelForCausalLM`."""
    return start_run(config, KTO_METHOD, observer)


def check_kto(config: KTORunConfig) -> list[tuple[str, str]]:
    """Validate data and models and say what the run would do, without training."""
    data, names, dtype = _check(config), actor_and_reference(config), compute_dtype(config.dtype)
    rows = data.train.judged
    sizes = [len(one.tokens) for one in rows]
    trained = {"actor": config.actor}
    kept = kept_models(names, trained, config.plan, moves=config.reference.sync_ref_model)
    memory = sum(resident_bytes(name, "lm", dtype, trained.get(role)) for role, name in kept.items())
    return [
        *model_rows(names, kept),
        ("compute type", str(dtype).removeprefix("torch.")),
        ("completions", _counted(data.train)),
        ("held-out completions", _counted(data.heldout) if data.heldout else "none"),
        ("weights", _balance(config, rows)),
        ("batch", f"{config.data.batch_size} completions per update"),
        *(("KL term", note) for note in one_prompt_notes(config, rows)),
        *closing_rows(config, KTO_METHOD, sizes, "completions", names=names, trained=trained, memory=memory),
    ]


def build_kto_job(config: KTORunConfig, opener: Opener | None = None) -> Job:
    """Roles, completions and graph. Without an opener the roles are in this process."""
    opener = opener or LocalOpener(None, config.plan.offloaded)
    data, names = _check(config), actor_and_reference(config)
    rows = data.train.judged
    max_steps = steps_of(config, len(rows))
    specs = actor_spec(config, config.actor, max_steps), reference_spec(config)
    roles = {spec.name: opener.open(spec) for spec in specs}
    loader = Loader(len(rows), config.data.batch_size, config.seed, config.data.shuffle)
    heldout = judged_batch(data.heldout.judged, data.longest) if data.heldout else None
    tokenizer = open_tokenizer(names["actor"])

    def evaluate(step: int) -> dict[str, float]:
        if heldout is None or not held_out_due(config, step, max_steps):
            return {}
        return heldout_metrics(config, roles, heldout)

    return Job(
        title=f"KTO on {len(rows)} completions",
        graph=kto_graph(config),
        roles=roles,
        max_steps=max_steps,
        next_batch=lambda step: judged_batch([rows[i] for i in loader.batch(step)], data.longest),
        save=lambda folder: save_role(roles["actor"], folder, tokenizer),
        evaluate=evaluate,
        num_tokens=lambda batch: int(batch["tokens"].lengths.sum()),
        rows=rows,
        messages=(*data.messages(), *one_prompt_notes(config, rows)),
    )


def one_prompt_notes(config: KTORunConfig, rows: Sequence[Judged]) -> tuple[str, ...]:
    """A sentence where steps have completions of one prompt only, and so no other to hold them against."""
    prompts = [tuple(one.tokens[: one.num_prompt_tokens]) for one in rows]
    size, num_steps = config.data.batch_size, steps_of(config, len(rows))
    if 2 * max(Counter(prompts).values()) < min(size, len(rows)):  # a batch has a row twice at most
        return ()
    loader = Loader(len(rows), size, config.seed, config.data.shuffle)
    alone = sum(len({prompts[i] for i in loader.batch(step)}) == 1 for step in range(num_steps))
    if alone == 0:
        return ()
    return (
        f"in {alone} of {num_steps} steps all completions are of one prompt, so z is of texts that belong "
        "together, and too large: shuffle the data, raise data.batch_size, or add prompts",
    )


def kto_uses(config: KTORunConfig) -> Uses:
    """The calls of each role."""
    return uses_of(kto_graph(config), *held_out_calls(config, "actor"))


def _rows(config: KTORunConfig) -> list[Judged]:
    return _check(config).train.judged


KTO_METHOD = Method(build=build_kto_job, uses=kto_uses, models=actor_and_reference, rows=_rows)


def judged_batch(rows: Sequence[Judged], max_length: int) -> Batch:
    """Completions as the keys of KTO's graph, and each prompt with the completion of another."""
    tokens = Ragged.from_rows([one.tokens for one in rows], torch.int64)
    num_prompt_tokens = torch.tensor([one.num_prompt_tokens for one in rows])
    return Batch(
        {
            "tokens": tokens,
            "mismatched": mismatched(tokens, num_prompt_tokens, max_length),
            "num_prompt_tokens": Ragged.scalars(num_prompt_tokens),
            "label": Ragged.scalars([one.label for one in rows], torch.bool),
        },
        {WHERE: [one.where for one in rows]},
    )


def heldout_metrics(config: KTORunConfig, roles: Mapping[str, Infers], batch: Batch) -> dict[str, float]:
    """`eval/loss` and, of held-out completions with both labels, `eval/margin` of their mean rewards."""
    for role, reading in (("reference", MATCHED), ("reference", REF_MISMATCHED), ("actor", MISMATCHED)):
        batch = batch.union(roles[role].infer(reading, batch).batch)
    batch, loss = batch.union(kl_term(batch).batch), kto_loss(config)
    result = loss(roles["actor"].infer(loss.reading, batch).batch.fields, batch)
    means = side_means({key: float(value) for key, value in result.sums.items()})
    metrics = {"eval/loss": float(result.total) / len(batch)}
    both = 0 < int(result.sums["num_chosen"]) < len(batch)
    return metrics | ({"eval/margin": means["chosen"] - means["rejected"]} if both else {})


@dataclass(frozen=True, kw_only=True)
class _Completions:
    """The completions to train on, and those held out; a mismatched one is cut at `longest` tokens."""

    train: UnpairedData
    heldout: UnpairedData | None
    longest: int

    def messages(self) -> tuple[str, ...]:
        """What was left out, and where."""
        notes: list[str] = []
        for data, what in ((self.train, "completions"), (self.heldout, "held-out completions")):
            if data is not None:
                notes += left_out_notes(
                    (data.overlong, f"{what} over data.max_length"), (data.blank, f"blank {what}")
                )
        return tuple(notes)


def _check(config: KTORunConfig) -> _Completions:
    """The data, when it and the models fit together; a dry run and a run both begin with it."""
    names = check_actor_and_reference(config)
    role, limit = shortest_limit(names)
    data = _load(config.data, names["actor"], longest=min(limit, config.data.max_length))
    for one in (*data.train.judged, *(data.heldout.judged if data.heldout else ())):
        if len(one.tokens) > limit:
            raise ConfigError(
                f"the text at {one.where} has {len(one.tokens)} tokens, but the {role} model {names[role]} takes "
                f"{limit}; set `data.max_length` to at most {limit}"
            )
    return data


def _load(config: UnpairedDataConfig, model: str, longest: int) -> _Completions:
    train, heldout = loaded_rows(_load_rows, config, model)
    if heldout is not None:
        heldout = replace(heldout, judged=heldout.judged[: config.max_eval_samples])
    return _Completions(train=train, heldout=heldout, longest=longest)


def _load_rows(dataset_name: str, **how: Any) -> UnpairedData:
    """Judged completions, or pairs taken apart: the chosen text was liked, the rejected one was not."""
    first = next(iter(dataset_rows(dataset_name)), None)
    if first is None or not has(first, "chosen"):
        return load_unpaired(dataset_name, **how)
    pairs = load_preferences(dataset_name, **how)
    judged = [
        Judged(tokens=tokens, num_prompt_tokens=pair.num_prompt_tokens, label=label, where=pair.where)
        for pair in pairs.pairs
        for tokens, label in ((pair.chosen, True), (pair.rejected, False))
    ]
    return UnpairedData(judged=judged, overlong=pairs.overlong, blank=pairs.blank)


def _counted(data: UnpairedData) -> str:
    liked = sum(one.label for one in data.judged)
    left_out = f"{data.num_overlong} over-long and {len(data.blank)} blank left out"
    return f"{len(data.judged)}, {liked} of them desirable ({left_out})"


def _balance(config: KTORunConfig, rows: Sequence[Judged]) -> str:
    """The paper advises a ratio of 1 to 4/3 (section 4.2, equation 9)."""
    liked = sum(one.label for one in rows)
    weights = config.kto.desirable_weight * liked, config.kto.undesirable_weight * (len(rows) - liked)
    ratio = f"{weights[0] / weights[1]:.2f}" if weights[1] > 0 else "infinite"
    return f"desirable to undesirable, weighted: {ratio} (the paper advises 1 to 1.33)"
