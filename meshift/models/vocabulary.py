"""Which part of the vocabulary the embedding and the head of this process hold: all of it, unless told otherwise.

What they do with their part goes through a `Vocabulary`, so that the same code serves a process with a part
(`parallel/` has the `Vocabulary` of that). Knows nothing of processes.
"""

from typing import Protocol

from torch import Tensor
from torch.nn import functional as F


class Vocabulary(Protocol):
    """Rows of the embedding, and the same columns of the logits, that are here.

    `tokens` and `targets` are ids of the whole vocabulary, `logits` [n, part] the columns that are here.
    """

    def look_up(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """The embedding's rows [T, hidden] of any tokens, from the rows that are here."""
        ...

    def enter(self, hidden: Tensor) -> Tensor:
        """The rows that a head multiplies by its part: their gradient is the sum over all parts."""
        ...

    def columns(self, whole: Tensor) -> Tensor:
        """What belongs to this part of [n, vocab]."""
        ...

    def whole(self, logits: Tensor) -> Tensor:
        """[n, vocab] from every part's columns. Differentiable."""
        ...

    def pick(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The logits of the targets, [n, 1]. Not differentiable."""
        ...

    def add_at(self, logits: Tensor, targets: Tensor, values: Tensor) -> None:
        """Add `values` [n, 1] to the targets' columns, where they are here."""
        ...

    def likeliest(self, logits: Tensor) -> Tensor:
        """The token with the largest logit of all parts, int64 [n]."""
        ...

    def sum(self, parts: Tensor) -> Tensor:
        """The sum of what the parts found. Not differentiable."""
        ...

    def max(self, parts: Tensor) -> Tensor:
        """The largest of what the parts found. Not differentiable."""
        ...


class WholeVocabulary:
    """All of it is here: see `Vocabulary`."""

    def look_up(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return F.embedding(tokens, weight)

    def enter(self, hidden: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return hidden

    def columns(self, whole: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return whole

    def whole(self, logits: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return logits

    def pick(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return logits.gather(1, targets[:, None])

    def add_at(self, logits: Tensor, targets: Tensor, values: Tensor) -> None:
        """See `Vocabulary`."""
        logits.scatter_add_(1, targets[:, None], values)

    def likeliest(self, logits: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return logits.argmax(-1)

    def sum(self, parts: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return parts

    def max(self, parts: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return parts
