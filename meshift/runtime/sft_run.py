"""`meshift sft`: demonstrations to a model that imitates them, with its loss on held-out ones.

It knows nothing of the loss, nor of which tokens are trained on, nor of how many processes run it; it brings
data and model to the graph of `algorithms/sft.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from meshift.algorithms.sft import sft_graph
from meshift.batch import WHERE, Batch, Ragged
from meshift.config.runs import SFTRunConfig
from meshift.config.sections import DemonstrationDataConfig
from meshift.data.demonstrations import Demonstration, DemonstrationData, load_demonstrations
from meshift.data.loader import Loader
from meshift.errors import ConfigError, DataError
from meshift.runtime.fixed_samples import Infers
from meshift.runtime.given_rows import (
    actor_spec,
    check_before_reading,
    closing_rows,
    held_out_calls,
    held_out_due,
    left_out_notes,
    loaded_rows,
)
from meshift.runtime.models import (
    compute_dtype,
    model_folder,
    open_tokenizer,
    resident_bytes,
    shortest_limit,
)
from meshift.runtime.observer import Observer
from meshift.runtime.planned_run import Method, start_run
from meshift.runtime.plans import Uses, uses_of
from meshift.runtime.role_spec import LocalOpener, Opener, save_role
from meshift.runtime.run import Job, RunResult, steps_of
from meshift.training.text_readings import TrainedTokens


def run_sft(config: SFTRunConfig, observer: Observer) -> RunResult:
    """Fine-tune the model. Its folder `final/` loads with `AutoModelForCausalLM`."""
    return start_run(config, SFT_METHOD, observer)


def check_sft(config: SFTRunConfig) -> list[tuple[str, str]]:
    """Validate data and model and say what the run would do, without training."""
    data = _check(config)
    texts = data.train.demonstrations
    sizes = [len(text.tokens) for text in texts]
    name, dtype = str(config.model.model_name_or_path), compute_dtype(config.dtype)
    memory = resident_bytes(name, "lm", dtype, config.model)
    per_step = config.data.batch_size / len(texts)
    total = sum(map(num_trained, texts))
    return [
        ("model", str(model_folder(name))),
        ("compute type", str(dtype).removeprefix("torch.")),
        ("texts", _counted(data.train)),
        ("held-out texts", _counted(data.heldout) if data.heldout else "none"),
        ("trained tokens", f"{total} of {sum(sizes)} (loss on {config.data.loss_on})"),
        (
            "batch",
            f"{config.data.batch_size} texts per update, about {round(per_step * sum(sizes))} tokens, "
            f"{round(per_step * total)} of them trained; packed without padding",
        ),
        *closing_rows(
            config,
            SFT_METHOD,
            sizes,
            "texts",
            names=_models(config),
            trained={"actor": config.model},
            memory=memory,
        ),
    ]


def build_sft_job(config: SFTRunConfig, opener: Opener | None = None) -> Job:
    """Model, data and graph. Without an opener the model is in this process."""
    data = _check(config)
    texts = data.train.demonstrations
    max_steps = steps_of(config, len(texts))
    name = str(config.model.model_name_or_path)
    tokenizer = open_tokenizer(name)
    spec = actor_spec(config, config.model, max_steps)
    role = (opener or LocalOpener(None, config.plan.offloaded)).open(spec)
    source = TextSource(config.data, texts, config.seed)

    def measure(step: int) -> dict[str, float]:
        metrics: dict[str, float] = {"num_tokens": source.num_tokens_until(step)}
        if data.heldout is not None and held_out_due(config, step, max_steps):
            metrics |= heldout_metrics(role, data.heldout.demonstrations)
        return metrics

    return Job(
        title=f"fine-tuning on {len(texts)} texts",
        graph=sft_graph(),
        roles={"actor": role},
        max_steps=max_steps,
        next_batch=source.next_batch,
        save=lambda folder: save_role(role, folder, tokenizer),
        evaluate=measure,
        num_tokens=lambda batch: int(batch["tokens"].lengths.sum()),
        rows=texts,
        messages=data.messages(),
    )


def sft_uses(config: SFTRunConfig) -> Uses:
    """The calls of the model."""
    return uses_of(sft_graph(), *held_out_calls(config, "actor"))


def _models(config: SFTRunConfig) -> dict[str, str]:
    return {"actor": str(config.model.model_name_or_path)}


def _rows(config: SFTRunConfig) -> list[Demonstration]:
    return _check(config).train.demonstrations


SFT_METHOD = Method(build=build_sft_job, uses=sft_uses, models=_models, rows=_rows)


class TextSource:
    """Batches of demonstrations."""

    def __init__(self, config: DemonstrationDataConfig, texts: Sequence[Demonstration], seed: int) -> None:
        self.texts = texts
        self._loaders = [Loader(len(texts), config.batch_size, seed, config.shuffle) for _ in range(2)]
        self._counted = (0, 0)

    def next_batch(self, step: int) -> Batch:
        """The step's texts."""
        return text_batch([self.texts[i] for i in self._loaders[0].batch(step)])

    def num_tokens_until(self, step: int) -> int:
        """Tokens of all steps up to and with this one, trained or not: a function of the step alone."""
        num_steps, total = self._counted if self._counted[0] <= step else (0, 0)
        for earlier in range(num_steps, step + 1):
            total += sum(len(self.texts[i].tokens) for i in self._loaders[1].batch(earlier))
        self._counted = (step + 1, total)
        return total


def text_batch(texts: Sequence[Demonstration]) -> Batch:
    """Demonstrations as the keys `tokens` and `loss_mask`."""
    return Batch(
        {
            "tokens": Ragged.from_rows([t.tokens for t in texts], torch.int64),
            "loss_mask": Ragged.from_rows([t.loss_mask for t in texts], torch.bool),
        },
        {WHERE: [t.where for t in texts]},
    )


def heldout_metrics(role: Infers, texts: Sequence[Demonstration]) -> dict[str, float]:
    """`eval/loss` (nats per trained token, over all texts), `eval/perplexity` and `eval/mean_token_accuracy`."""
    read = role.infer(TrainedTokens(), text_batch(texts)).batch
    loss = -float(read["logprobs"].values.double().mean())
    return {
        "eval/loss": loss,
        "eval/perplexity": math.exp(min(loss, 700.0)),  # beyond that a float has no room
        "eval/mean_token_accuracy": float(read["correct"].values.mean()),
    }


@dataclass(frozen=True, kw_only=True)
class _Texts:
    """The demonstrations to train on, and those held out."""

    train: DemonstrationData
    heldout: DemonstrationData | None

    def messages(self) -> tuple[str, ...]:
        """What was left out or cut, and where."""
        heldout = _messages(self.heldout, "held-out texts") if self.heldout else ()
        return (*_messages(self.train, "texts"), *heldout)


def _check(config: SFTRunConfig) -> _Texts:
    """The data, when it and the model fit together; a dry run and a run both begin with it."""
    check_before_reading(config, "model", config.model)
    name = str(config.model.model_name_or_path)
    data = _load_data(config.data, name)
    _, limit = shortest_limit({"actor": name})
    for texts in (data.train, data.heldout):
        if texts is not None:
            _check_texts(texts.demonstrations, name, limit)
    return data


def _load_data(config: DemonstrationDataConfig, model: str) -> _Texts:
    more = {"loss_on": config.loss_on, "truncate": config.truncate}
    train, heldout = loaded_rows(load_demonstrations, config, model, **more)
    if heldout is not None:
        heldout = replace(heldout, demonstrations=heldout.demonstrations[: config.max_eval_samples])
    return _Texts(train=train, heldout=heldout)


def _check_texts(texts: Sequence[Demonstration], name: str, limit: int) -> None:
    for text in texts:
        if len(text.tokens) > limit:
            raise ConfigError(
                f"the text at {text.where} has {len(text.tokens)} tokens, but the model {name} takes {limit}; "
                f"set `data.max_length` to at most {limit}"
            )
    if not any(map(num_trained, texts)):
        raise DataError(
            f"{texts[0].where}: in this text and all others there is no token to train on: raise data.max_length, "
            "or set data.loss_on to all."
        )


def num_trained(text: Demonstration) -> int:
    """Tokens of the text that are trained on; the first is not, since nothing predicts it."""
    return sum(text.loss_mask[1:])


def _counted(data: DemonstrationData) -> str:
    others = ((data.disliked, "labelled false"), (data.blank, "blank"))
    left_out = [f"{data.num_overlong} over-long", *(f"{len(places)} {why}" for places, why in others if places)]
    return f"{len(data.demonstrations)} ({' and '.join(left_out)} left out, {data.num_truncated} cut)"


def _messages(data: DemonstrationData, what: str) -> tuple[str, ...]:
    notes = left_out_notes(
        (data.overlong, f"{what} over data.max_length"),
        (data.disliked, f"{what} labelled false"),
        (data.blank, f"{what} with a blank answer"),
    )
    if data.num_truncated:
        first = next(text.where for text in data.demonstrations if text.truncated)
        notes.append(f"{data.num_truncated} {what} were cut at data.max_length, the first at {first}")
    return tuple(notes)
