"""The training engine: packed micro-batches through the decoder, forwards to read, backwards to learn.

It knows nothing of algorithms: what is read is a `Reading`, what is learned a `Loss`. The loss of an update is a
mean over the units (tokens, pairs) of the *whole* mini-batch, so its gradient does not depend on how many
micro-batches carry it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from meshift.batch import WHERE, Batch, Ragged
from meshift.config.sections import TrainableConfig
from meshift.errors import NonFiniteError
from meshift.kernels.cpu import release_scratch
from meshift.models.decoder import Decoder
from meshift.parallel.data import Ranks, Statistics
from meshift.parallel.groups import Place
from meshift.parallel.sharded import passes_of
from meshift.training.checkpoint import State
from meshift.training.flops import Work
from meshift.training.micro_batch import MicroBatch
from meshift.training.optimizer import MasterAdamW, freeze
from meshift.training.pipelined import Pipeline
from meshift.training.prefixes import share_in_micro_batches
from meshift.training.readings import Reading, detach


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """A loss over one micro-batch, as sums over its units; the engine divides by the mini-batch's count.

    `total` carries the gradient. `sums` become means over the mini-batch, `maxima` stay maxima.
    """

    total: Tensor
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    maxima: Mapping[str, Tensor] = field(default_factory=dict)


class Loss(Protocol):
    """What an update minimises."""

    @property
    def reading(self) -> Reading:
        """What the loss reads from the model."""

    def count(self, batch: Batch) -> int:
        """Units (tokens, pairs) of a mini-batch: what the loss is a mean over."""

    def teaches(self, batch: Batch) -> bool:
        """Whether anything in a mini-batch has a weight in the loss; if nothing has, no update is made of it."""

    def __call__(self, outputs: Mapping[str, Ragged], batch: Batch) -> LossSums:
        """The loss of a micro-batch from the reading's outputs."""

    def stop_reason(self, stats: Mapping[str, float]) -> str | None:
        """Why this update and the rest of the step's must not be made, or None."""

    def summarise(self, updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Metrics of the step from the statistics of its updates."""


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """A loss, and how often and in how many parts a batch is gone through.

    `max_staleness` is how many steps' updates the weights that drew the batch may lack.
    """

    loss: Loss
    num_epochs: int = 1
    num_mini_batches: int = 1
    max_staleness: int = 0


class TrainingEngine:
    """One decoder with forwards and, given an optimizer's config, updates. `version` counts the updates.

    `name` is the role's, for what is said of failures; `work` is what training has computed, and in what time.
    """

    def __init__(
        self,
        model: Decoder,
        config: TrainableConfig,
        *,
        trainable: bool,
        name: str = "model",
        place: Place | None = None,
    ) -> None:
        """With a `place`, `model` is cut for it, and every process of the placement makes the same calls.

        The model may still be in the host's memory: what this process keeps of it goes to the place's device.
        `work` is then that of all of them together.
        """
        self.name = name
        self.model = model
        self.config = config
        self.version = 0
        self.work = Work()
        self.passes = passes_of(model, place)
        self.ranks = None if place is None else Ranks(model, place)
        self.pipeline: Pipeline | None = None
        if self.ranks is not None and self.ranks.stages is not None:
            self.pipeline = Pipeline(model, self.ranks.stages, config)
        self.optimizer: MasterAdamW | None = None
        if trainable:
            freeze(model, config)
            self.optimizer = MasterAdamW(model, config, self.ranks)

    def infer(self, reading: Reading, batch: Batch) -> Batch:
        """The reading of every row, without gradients, in the batch's row order."""
        if self.ranks is None:
            return self._infer(reading, batch)
        sizes = reading.sizes(batch)
        rows = self.ranks.own_rows(sizes)
        with self._together(learning=False):
            own = self._infer(reading, batch.index(rows)) if rows else Batch({})
        self.passes.end()
        return self.ranks.whole(own, sizes)

    def _infer(self, reading: Reading, batch: Batch) -> Batch:
        parts = self._micro_batches(reading, batch)
        if self.pipeline is None:
            with torch.no_grad():
                pieces = [Batch(detach(self.forward(reading, piece))) for piece in batch.split(parts)]
        else:
            passes = [MicroBatch.of(reading, piece, self.config) for piece in batch.split(parts)]
            pieces = self.pipeline.read(passes)
        order = torch.tensor([row for part in parts for row in part])
        return Batch.concat(pieces).index(torch.argsort(order))

    def train(self, task: TrainTask, batch: Batch, *, rate: float, seed: int) -> list[dict[str, float]]:
        """Update the weights; one dictionary of statistics per update, the last with `early_stop` if stopped.

        A mini-batch that teaches nothing is read for its statistics, which then hold `skipped` and no `grad_norm`:
        momentum and weight decay would move the weights without it, and no version would say why. Mini-batches are
        drawn anew each epoch from `seed`. Raises `NonFiniteError` before a NaN or infinite
        loss or gradient can touch the weights.
        """
        assert self.optimizer is not None, "this engine was built without an optimizer"
        started = time.perf_counter()
        updates: list[dict[str, float]] = []
        advice = f"the update was not made: lower learning_rate ({rate:g} here), or {task.loss.reading.suspects}"
        for rows in mini_batch_rows(len(batch), task.num_epochs, task.num_mini_batches, seed):
            update = f"update {len(updates) + 1} of the {self.name}"
            mini_batch = batch.index(rows)
            try:
                stats = self.accumulate(task.loss, mini_batch)
            except NonFiniteError as error:
                raise NonFiniteError(f"in {update} {error}; {advice}") from None
            updates.append(stats)
            reason = task.loss.stop_reason(stats)
            if reason is not None:
                stats["early_stop"] = 1.0
                self.optimizer.discard()
                break
            if not task.loss.teaches(mini_batch):
                stats["skipped"] = 1.0
                self.optimizer.discard()
                continue
            stats["grad_norm"] = self.optimizer.step(rate)
            if not math.isfinite(stats["grad_norm"]):
                raise NonFiniteError(f"in {update} the gradient's norm is {stats['grad_norm']}; {advice}")
            self.version += 1
        release_scratch()
        self.work.seconds += time.perf_counter() - started
        return updates

    def accumulate(self, loss: Loss, batch: Batch) -> dict[str, float]:
        """Add the mini-batch's gradient, in micro-batches under the token budget. Returns its statistics.

        Raises `NonFiniteError` for a NaN or infinite loss, saying of which rows; no gradient is then left.
        """
        count = max(1, loss.count(batch))
        if self.ranks is None:
            return self._accumulate(loss, batch, count).by_name()
        rows = self.ranks.own_rows(loss.reading.sizes(batch))
        own, done = Statistics(), self.work.flops
        with self._together(learning=True):
            try:
                own = self._accumulate(loss, batch.index(rows), count) if rows else own
            except NonFiniteError as error:  # the others must hear of it, or they would wait for this rank
                own = Statistics(trouble=str(error))
        self.passes.end()
        own.flops = self.work.flops - done
        whole = self.ranks.settle(own)
        self.work.flops = done + whole.flops
        if whole.trouble is not None:
            if self.optimizer is not None:
                self.optimizer.discard()
            raise NonFiniteError(whole.trouble)
        return whole.by_name()

    def _together(self, *, learning: bool) -> AbstractContextManager[None]:
        """What sharded stages keep of their layers is brought together for all their passes, not for each: the
        order of passes is the pipeline's, and data ranks would wait for stages that wait for them.
        """
        return nullcontext() if self.pipeline is None else self.passes.gathered(learning=learning)

    def _accumulate(self, loss: Loss, batch: Batch, count: int) -> Statistics:
        stats = Statistics()
        pieces = batch.split(self._micro_batches(loss.reading, batch))

        def mean_of(outputs: Mapping[str, Ragged], piece: Batch) -> Tensor:
            result = loss(outputs, piece)
            mean = result.total / count
            sums = {key: float(value) / count for key, value in result.sums.items()}
            stats.add({"loss": mean.item(), **sums}, {key: float(value) for key, value in result.maxima.items()})
            return mean

        if self.pipeline is not None:
            passes = [MicroBatch.of(loss.reading, piece, self.config) for piece in pieces]
            trouble = self.pipeline.learn(passes, mean_of)
            self.work.flops += sum(one.flops(self.model) for one in passes)
            if trouble is not None:
                raise self._non_finite(trouble[1], loss, pieces[trouble[0]])
            return stats
        for piece in pieces:
            mean = mean_of(self.forward(loss.reading, piece), piece)
            if not torch.isfinite(mean):
                raise self._non_finite(mean.item(), loss, piece)
            self.passes.backward(mean)
        return stats

    def _non_finite(self, value: float, loss: Loss, piece: Batch) -> NonFiniteError:
        if self.optimizer is not None:
            self.optimizer.discard()
        return NonFiniteError(f"the loss is {value} {self._blamed(loss, piece)}")

    def _blamed(self, loss: Loss, piece: Batch) -> str:
        """Which of a micro-batch's rows give no number: each is read once more, alone."""
        rows = [piece.index([i]) for i in range(len(piece))]
        with torch.no_grad():
            if self.pipeline is None:
                outputs: list[Mapping[str, Ragged]] = [self.forward(loss.reading, row) for row in rows]
            else:
                passes = [MicroBatch.of(loss.reading, row, self.config) for row in rows]
                outputs = [read.fields for read in self.pipeline.read(passes)]
            losses = [loss(out, row).total for out, row in zip(outputs, rows, strict=True)]
        found = [row for row, value in zip(rows, losses, strict=True) if not torch.isfinite(value)]
        if not found:
            return f"over {len(rows)} rows, though in none of them alone"
        if len(found) == len(rows) > 1:
            return f"in each of {len(rows)} rows"
        places = [str(row.columns[WHERE][0]) for row in found if WHERE in row]
        named = f" ({', '.join(places[:3])}{', ...' if len(places) > 3 else ''})" if places else ""
        return f"in {len(found)} of {len(rows)} rows{named}"

    def forward(self, reading: Reading, batch: Batch) -> Mapping[str, Ragged]:
        """One packed pass: the decoder over all rows, the head over those that are read."""
        one = MicroBatch.of(reading, batch, self.config)
        self.passes.forward()
        hidden = one.run(self.model, checkpoint=self.config.gradient_checkpointing)
        if torch.is_grad_enabled():
            self.work.flops += one.flops(self.model)
        return one.read(self.model, hidden, self.config.logits_chunk)

    def _micro_batches(self, reading: Reading, batch: Batch) -> list[list[int]]:
        sizes, most = reading.sizes(batch), self.config.max_tokens_per_micro_batch
        if self.pipeline is not None:
            most = self.pipeline.max_tokens(sum(sizes))
        sequences, read = reading.sequences(batch), reading.rows(batch)
        return share_in_micro_batches(sequences, sizes, most, read=read, share=self.config.share_prefixes)

    def master_weights(self) -> dict[str, Tensor]:
        """Every parameter by name, the trained ones from their fp32 masters."""
        weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        if self.optimizer is not None:
            trained = (name for name, p in self.model.named_parameters() if p.requires_grad)
            weights.update(zip(trained, (m.detach() for m in self.optimizer.masters), strict=True))
        return weights

    def state(self) -> State:
        """What a checkpoint keeps: nothing but the version where nothing is trained."""
        tensors = self.optimizer.state() if self.optimizer is not None else {}
        return State(tensors=tensors, values={"version": self.version})

    def load_state(self, state: State) -> None:
        """Continue from a checkpoint. Raises `CheckpointError` where it is of another model."""
        if self.optimizer is not None:
            self.optimizer.load_state(state.tensors)
        self.version = int(state.values["version"])


def mini_batch_rows(num_rows: int, num_epochs: int, num_parts: int, seed: int) -> Iterator[list[int]]:
    """Row lists of every update: each epoch cuts a fresh permutation into parts that differ by one at most."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_epochs):
        order = torch.randperm(num_rows, generator=generator)
        for part in torch.tensor_split(order, min(num_parts, num_rows)):
            yield part.tolist()


def mean_over_updates(updates: Sequence[Mapping[str, float]], key: str) -> float:
    """Mean of a statistic over the updates that have it; NaN if none has."""
    values = [stats[key] for stats in updates if key in stats]
    return sum(values) / len(values) if values else math.nan
