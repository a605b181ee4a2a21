"""What can be read of given texts: log-probs of a demonstration's trained tokens, and of both texts of a pair.

It knows nothing of losses or optimizers. Rollouts are read by `readings.py`; the texts here were not sampled, so
there is no temperature and no support.

Keys of demonstrations, one row per text: `tokens` [length] and `loss_mask` [length], true where trained on.
Keys of pairs, one row per pair: `chosen` and `rejected` [length], both with the prompt, `num_prompt_tokens` [1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meshift.batch import Batch, Ragged, ranges
from meshift.training.token_logprobs import Wanted, token_logprobs

SIDES = ("chosen", "rejected")
PAIR_TEXTS = (*SIDES, "num_prompt_tokens")
"""The keys of pairs."""
SUSPECT_PAIRS = "look at the texts of these pairs, their weights and their margins"


@dataclass(frozen=True, kw_only=True)
class TrainedTokens:
    """`logprobs` of every trained token and `correct`, 1 where it is the likeliest: [trained tokens per row].

    Nothing predicts the first token of a text, so it is never trained on, whatever the mask says.
    """

    @property
    def suspects(self) -> str:
        """Where a NaN may come from."""
        return "look at these texts"

    def sizes(self, batch: Batch) -> list[int]:
        """Tokens of each text."""
        return batch["tokens"].lengths.tolist()

    def sequences(self, batch: Batch) -> Ragged:
        """The texts."""
        return batch["tokens"]

    def rows(self, batch: Batch) -> Tensor:
        """The row before each trained token: its hidden state predicts that token."""
        return _trained_mask(batch).values.nonzero()[:, 0] - 1

    def read(self, head: nn.Module, hidden: Tensor, batch: Batch, chunk: int) -> dict[str, Ragged]:
        """See the class."""
        targets = batch["tokens"].values[self.rows(batch) + 1].to(hidden.device)
        table = token_logprobs(head, hidden, targets, chunk, Wanted(likeliest=True))
        lengths = num_trained_tokens(batch)
        return {"logprobs": Ragged(table.logprobs, lengths), "correct": Ragged(table.correct, lengths)}


def num_trained_tokens(batch: Batch) -> Tensor:
    """How many tokens of each text are trained on, int64 [n]."""
    return _trained_mask(batch).sum_rows()


def _trained_mask(batch: Batch) -> Ragged:
    mask = batch["loss_mask"]
    trained = mask.values.to(torch.int64, copy=True)
    trained[mask.starts[mask.lengths > 0]] = 0
    return Ragged(trained, mask.lengths)


class _OfPairs:
    """What readings of both texts of a pair have in common."""

    @property
    def suspects(self) -> str:
        """Where a NaN may come from."""
        return SUSPECT_PAIRS

    def sizes(self, batch: Batch) -> list[int]:
        """Tokens of both texts of each pair."""
        return (batch["chosen"].lengths + batch["rejected"].lengths).tolist()

    def sequences(self, batch: Batch) -> Ragged:
        """All chosen texts, then all rejected texts, so that both run in one pass."""
        chosen, rejected = (batch[side] for side in SIDES)
        return Ragged(torch.cat([chosen.values, rejected.values]), torch.cat([chosen.lengths, rejected.lengths]))


@dataclass(frozen=True, kw_only=True)
class PairLogprobs(_OfPairs):
    """Log-probs of the two completions of a pair, each a sum over its tokens, in nats.

    Writes `<prefix>chosen_logps` [1] and `<prefix>rejected_logps` [1], in fp32. Logits are divided by
    `temperature`, where the completions were drawn so.
    """

    prefix: str = ""
    temperature: float = 1.0

    @property
    def keys(self) -> tuple[str, str]:
        """What it writes."""
        return f"{self.prefix}chosen_logps", f"{self.prefix}rejected_logps"

    def rows(self, batch: Batch) -> Tensor:
        """The row before each completion token."""
        texts, lengths = self.sequences(batch), _both_lengths(batch)
        return ranges(texts.starts + texts.lengths - lengths - 1, lengths)

    def read(self, head: nn.Module, hidden: Tensor, batch: Batch, chunk: int) -> dict[str, Ragged]:
        """See the class."""
        targets = self.sequences(batch).values[self.rows(batch) + 1].to(hidden.device)
        logprobs = token_logprobs(head, hidden, targets, chunk, Wanted(temperature=self.temperature)).logprobs
        sums = Ragged(logprobs, _both_lengths(batch)).sum_rows().chunk(2)
        return {key: Ragged.scalars(side) for key, side in zip(self.keys, sums, strict=True)}


@dataclass(frozen=True, kw_only=True)
class CompletionLogprobs:
    """Log-prob of one text's completion, a sum over its tokens, in nats: `key` [1], in fp32.

    The texts stand under `texts` [length]; of each the first `num_prompt_tokens` [1] are the prompt.
    """

    key: str = "logps"
    texts: str = "tokens"

    @property
    def suspects(self) -> str:
        """Where a NaN may come from."""
        return "look at these texts"

    def sizes(self, batch: Batch) -> list[int]:
        """Tokens of each text."""
        return batch[self.texts].lengths.tolist()

    def sequences(self, batch: Batch) -> Ragged:
        """The texts."""
        return batch[self.texts]

    def rows(self, batch: Batch) -> Tensor:
        """The row before each completion token."""
        texts, lengths = batch[self.texts], num_completion_tokens(batch, self.texts)
        return ranges(texts.starts + texts.lengths - lengths - 1, lengths)

    def read(self, head: nn.Module, hidden: Tensor, batch: Batch, chunk: int) -> dict[str, Ragged]:
        """See the class."""
        targets = batch[self.texts].values[self.rows(batch) + 1].to(hidden.device)
        logprobs = token_logprobs(head, hidden, targets, chunk, Wanted()).logprobs
        sums = Ragged(logprobs, num_completion_tokens(batch, self.texts)).sum_rows()
        return {self.key: Ragged.scalars(sums)}


@dataclass(frozen=True, kw_only=True)
class PairScores(_OfPairs):
    """Scores of the two texts of preference pairs: `chosen_scores` [1] and `rejected_scores` [1]."""

    def rows(self, batch: Batch) -> Tensor:
        """The last row of every text."""
        texts = self.sequences(batch)
        return texts.starts + texts.lengths - 1

    def read(self, head: nn.Module, hidden: Tensor, batch: Batch, chunk: int) -> dict[str, Ragged]:
        """See the class."""
        del chunk  # one number per text
        chosen, rejected = head(hidden).float().chunk(2)
        return {"chosen_scores": Ragged.scalars(chosen), "rejected_scores": Ragged.scalars(rejected)}


def num_completion_tokens(batch: Batch, texts: str) -> Tensor:
    """Tokens of each text's completion that something predicts, int64 [n]; without prompt all but the first."""
    return batch[texts].lengths - batch["num_prompt_tokens"].values.clamp(min=1)


def _both_lengths(batch: Batch) -> Tensor:
    return torch.cat([num_completion_tokens(batch, side) for side in SIDES])
