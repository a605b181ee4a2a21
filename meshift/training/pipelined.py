"""Micro-batches through pipeline stages: forward only, or one forward, one backward (1F1B).

Each stage runs as many micro-batches ahead as there are stages behind it, then a backward for every forward, and
keeps no more activations than that (PipeDream-Flush: Narayanan et al. 2021, arXiv:2006.09503). All stages have the
batch and lay it out alike, hence shapes need not travel. It knows nothing of losses or optimizers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meshift.batch import Batch, Ragged
from meshift.config.sections import TrainableConfig
from meshift.models.decoder import Decoder
from meshift.parallel.exchange import gather_batches, gather_facts
from meshift.parallel.pipeline import Stages
from meshift.training.micro_batch import MicroBatch
from meshift.training.readings import detach

PER_STAGE = 4
"""Micro-batches for each stage, if there are tokens for them: (P - 1) of (P - 1 + 4 P) steps are idle then."""

Learn = Callable[[Mapping[str, Ragged], Batch], Tensor]
"""From outputs and rows of a micro-batch to what is minimised."""


@dataclass(frozen=True, kw_only=True)
class _Flight:
    """A micro-batch between its forward and its backward: what came in and what went out, or was minimised."""

    entering: Tensor | None
    leaving: Tensor


class Pipeline:
    """A stage's passes over micro-batches. All stages of a pipeline call the same, with the same micro-batches."""

    def __init__(self, model: Decoder, stages: Stages, config: TrainableConfig) -> None:
        """`model` has this stage's layers."""
        self.model, self.stages, self.config = model, stages, config
        first = model.first_layer.attention.layer.index
        frozen = config.num_frozen_layers
        # Gradients go back to where something is learned, and no further.
        self._passes_back = not stages.is_first and (frozen == 0 or frozen < first)
        self._learns_below = frozen == 0 or frozen < first + len(model.layers)

    def max_tokens(self, num_tokens: int) -> int:
        """The token budget of a micro-batch, of a batch with so many: all stages are to have something to do."""
        share = -(-num_tokens // (PER_STAGE * len(self.stages.peers)))
        return max(1, min(self.config.max_tokens_per_micro_batch, share))

    def read(self, passes: Sequence[MicroBatch]) -> list[Batch]:
        """The outputs of every micro-batch, in all stages, without gradients."""
        found = []
        with torch.no_grad():
            for one in passes:
                hidden = one.run(
                    self.model, checkpoint=False, entering=self.stages.enter(one.num_rows, self.model)
                )
                if self.stages.is_last:
                    found.append(Batch(detach(one.read(self.model, hidden, self.config.logits_chunk))))
                else:
                    self.stages.pass_on(hidden)
        self.stages.finish()
        sizes = [len(one.batch) for one in passes]
        whole = gather_batches(Batch.concat(found) if found else Batch({}), self.stages.peers)[-1]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [whole.index(list(range(a, a + n))) for a, n in zip(starts, sizes, strict=True)]

    def learn(self, passes: Sequence[MicroBatch], learn: Learn) -> tuple[int, float] | None:
        """Add up gradients. Where a loss is no number: the first such micro-batch, and the loss; in all stages.

        `learn` is called in the last stage.
        """
        num_ahead = len(self.stages.peers) - 1 - self.stages.peers.index
        flights: deque[_Flight] = deque()
        troubles: list[tuple[int, float]] = []
        for number, one in enumerate(passes):
            flights.append(self._forward(one, learn))
            if self.stages.is_last and not torch.isfinite(flights[-1].leaving):
                troubles.append((number, flights[-1].leaving.item()))
            if number >= num_ahead:
                self._backward(flights.popleft())
        while flights:
            self._backward(flights.popleft())
        self.stages.finish()
        found = gather_facts(troubles[:1], self.stages.peers)[-1]
        return (int(found[0][0]), float(found[0][1])) if found else None

    def _forward(self, one: MicroBatch, learn: Learn) -> _Flight:
        entering = self.stages.enter(one.num_rows, self.model)
        if entering is not None and self._passes_back:
            entering.requires_grad_()
        hidden = one.run(self.model, checkpoint=self.config.gradient_checkpointing, entering=entering)
        if not self.stages.is_last:
            self.stages.pass_on(hidden)
            return _Flight(entering=entering, leaving=hidden)
        outputs = one.read(self.model, hidden, self.config.logits_chunk)
        return _Flight(entering=entering, leaving=learn(outputs, one.batch))

    def _backward(self, flight: _Flight) -> None:
        if self.stages.is_last:
            if torch.isfinite(flight.leaving):  # else nothing is learned, but the stages before wait for a word
                flight.leaving.backward()
        elif self._learns_below:
            torch.autograd.backward(flight.leaving, self.stages.receive_back(flight.leaving))
        entering = flight.entering
        if entering is not None and self._passes_back:
            self.stages.pass_back(torch.zeros_like(entering) if entering.grad is None else entering.grad)
