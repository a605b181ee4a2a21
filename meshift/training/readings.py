"""What can be read from a model's hidden states: token log-probs, token values, scores of whole texts.

A reading says which sequences to run, which packed rows the head must see, and what comes out. It knows nothing
of losses, optimizers or micro-batches. Logits exist for `logits_chunk` tokens at a time, never for all.

Keys of a rollout batch, one row per sequence (prompt and completion together):
`tokens` [prompt + completion], `completion_lengths` [1]; where the sampled distribution was restricted:
`support` (allowed token ids of every completion token, concatenated) with `support_counts` [completion],
and `num_stop_forbidden` [1]: how many leading completion tokens could not be one of `stop_token_ids`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from meshift.batch import Batch, Ragged, ranges
from meshift.models.heads import values_of
from meshift.training.token_logprobs import Wanted, token_logprobs

SUSPECT_REWARDS = "look for extreme rewards in samples.jsonl"


class Reading(Protocol):
    """Which rows of a packed batch the head reads, and what it makes of them."""

    @property
    def suspects(self) -> str:
        """What to look at where a loss of this is no number: an imperative that ends a sentence."""

    def sizes(self, batch: Batch) -> list[int]:
        """Tokens that each row of the batch costs."""

    def sequences(self, batch: Batch) -> Ragged:
        """The token sequences to run, packed."""

    def rows(self, batch: Batch) -> Tensor:
        """Indices into the packed rows whose hidden states are read, int64 [N]."""

    def read(self, head: nn.Module, hidden: Tensor, batch: Batch, chunk: int) -> dict[str, Ragged]:
        """Outputs from the read rows' hidden states [N, hidden]; `chunk` rows of logits at a time."""


class _OneSequence:
    """What these readings have in common: a row is a prompt with its completion."""

    @property
    def suspects(self) -> str:
        """Where a NaN may come from."""
        return SUSPECT_REWARDS

    def sizes(self, batch: Batch) -> list[int]:
        """Tokens of prompt and completion."""
        return batch["tokens"].lengths.tolist()

    def sequences(self, batch: Batch) -> Ragged:
        """Prompt and completion."""
        return batch["tokens"]


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs(_OneSequence):
    """Log-probability of every completion token under the distribution that was sampled from.

    Logits are divided by `temperature`; where the batch carries a support, tokens outside it have probability
    zero. Writes `key` [completion length per row] and, if asked, `entropy` of the same shape, in nats.
    """

    key: str = "new_logprobs"
    temperature: float = 1.0
    with_entropy: bool = False
    entropy_gradient: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def rows(self, batch: Batch) -> Tensor:
        """The row before each completion token: its hidden state predicts that token."""
        tokens, lengths = batch["tokens"], batch["completion_lengths"].values
        return ranges(tokens.starts + tokens.lengths - lengths - 1, lengths)

    def read(self, head: nn.Module, hidden: Tensor, batch: Batch, chunk: int) -> dict[str, Ragged]:
        """See the class."""
        lengths = batch["completion_lengths"].values
        targets = batch["tokens"].values[self.rows(batch) + 1].to(hidden.device)
        allowed = _Support.of(batch, self.stop_token_ids)
        wanted = Wanted(
            temperature=self.temperature,
            forbid=allowed.forbidden_positions if allowed else None,
            entropy=self.with_entropy,
            entropy_gradient=self.entropy_gradient,
        )
        table = token_logprobs(head, hidden, targets, chunk, wanted)
        out = {self.key: Ragged(table.logprobs, lengths)}
        if self.with_entropy:
            out["entropy"] = Ragged(table.entropy, lengths)
        return out


@dataclass(frozen=True)
class _Support:
    """The sampled distribution's support of every completion token, held as indices."""

    ids: Tensor | None
    offsets: Tensor | None
    stop_forbidden: Tensor | None
    stop_token_ids: tuple[int, ...]

    @staticmethod
    def of(batch: Batch, stop_token_ids: tuple[int, ...]) -> _Support | None:
        """The batch's support, or None where every token was allowed everywhere."""
        lengths = batch["completion_lengths"].values
        stop_forbidden = None
        if "num_stop_forbidden" in batch and stop_token_ids:
            counts = batch["num_stop_forbidden"].values.minimum(lengths)
            if int(counts.sum()) > 0:
                stop_forbidden = ranges(torch.zeros_like(lengths), lengths) < counts.repeat_interleave(lengths)
        if "support" not in batch:
            return _Support(None, None, stop_forbidden, stop_token_ids) if stop_forbidden is not None else None
        counts = batch["support_counts"].values
        offsets = torch.cat([counts.new_zeros(1), torch.cumsum(counts, 0)])
        return _Support(batch["support"].values, offsets, stop_forbidden, stop_token_ids)

    def forbidden_positions(self, start: int, stop: int, logits: Tensor) -> Tensor:
        """Boolean [stop - start, vocab], like the logits: True where the token was outside the support."""
        if self.ids is None or self.offsets is None:
            forbidden = torch.zeros(logits.shape, dtype=torch.bool)
        else:
            forbidden = torch.ones(logits.shape, dtype=torch.bool)
            counts = self.offsets[start + 1 : stop + 1] - self.offsets[start:stop]
            row = torch.repeat_interleave(torch.arange(stop - start), counts)
            forbidden[row, self.ids[self.offsets[start] : self.offsets[stop]].long()] = False
        if self.stop_forbidden is not None:
            early = self.stop_forbidden[start:stop].nonzero()[:, 0]
            forbidden[early[:, None], torch.tensor(self.stop_token_ids)] = True
        return forbidden.to(logits.device)


@dataclass(frozen=True, kw_only=True)
class TokenValues(_OneSequence):
    """The critic's value before each completion token and after the last: `key` [completion length + 1].

    Values are as the head gives them (normalised, where value normalisation is on), in fp32.
    """

    key: str = "values"

    def rows(self, batch: Batch) -> Tensor:
        """From the prompt's last row to the sequence's last row."""
        tokens, lengths = batch["tokens"], batch["completion_lengths"].values
        return ranges(tokens.starts + tokens.lengths - lengths - 1, lengths + 1)

    def read(self, head: nn.Module, hidden: Tensor, batch: Batch, chunk: int) -> dict[str, Ragged]:
        """See the class."""
        del chunk  # one number per row: nothing large to hold back
        return {self.key: Ragged(values_of(head, hidden), batch["completion_lengths"].values + 1)}


@dataclass(frozen=True, kw_only=True)
class LogprobsAndValues(_OneSequence):
    """Both readings in one pass of a model with two heads, each under its own key."""

    logprobs: TokenLogprobs
    values: TokenValues

    def rows(self, batch: Batch) -> Tensor:
        """Those of the values: the last of each sequence has no token to predict."""
        return self.values.rows(batch)

    def read(self, head: nn.Module, hidden: Tensor, batch: Batch, chunk: int) -> dict[str, Ragged]:
        """See the class."""
        lengths = batch["completion_lengths"].values
        starts = torch.cumsum(lengths + 1, 0) - lengths - 1
        predicting = hidden[ranges(starts, lengths).to(hidden.device)]
        found = self.logprobs.read(head, predicting, batch, chunk)
        return {**found, **self.values.read(head, hidden, batch, chunk)}


@dataclass(frozen=True, kw_only=True)
class SequenceScores(_OneSequence):
    """The reward head at each sequence's last token: `key` [1], in fp32."""

    key: str = "scores"

    def rows(self, batch: Batch) -> Tensor:
        """The last row of every sequence."""
        tokens = batch["tokens"]
        return tokens.starts + tokens.lengths - 1

    def read(self, head: nn.Module, hidden: Tensor, batch: Batch, chunk: int) -> dict[str, Ragged]:
        """See the class."""
        del chunk  # one number per sequence
        return {self.key: Ragged.scalars(head(hidden).float())}


@dataclass(frozen=True, kw_only=True)
class TokenScores(_OneSequence):
    """The reward head at each completion token: `key` [completion length per row], in fp32.

    The last is what `SequenceScores` reads.
    """

    key: str = "process_scores"

    def rows(self, batch: Batch) -> Tensor:
        """The row of every completion token."""
        tokens, lengths = batch["tokens"], batch["completion_lengths"].values
        return ranges(tokens.starts + tokens.lengths - lengths, lengths)

    def read(self, head: nn.Module, hidden: Tensor, batch: Batch, chunk: int) -> dict[str, Ragged]:
        """See the class."""
        del chunk  # one number per row
        return {self.key: Ragged(head(hidden).float(), batch["completion_lengths"].values)}


def detach(outputs: Mapping[str, Ragged]) -> dict[str, Ragged]:
    """The outputs without their graph, on the CPU, as a batch holds them."""
    return {key: Ragged(value.values.detach().cpu(), value.lengths) for key, value in outputs.items()}
