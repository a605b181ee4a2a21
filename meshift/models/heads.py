"""What stands on top of the decoder's rows: logits over the vocabulary, one number per row, or both."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshift.models.config import DecoderConfig, HeadKind
from meshift.models.embedding import Embedding
from meshift.models.vocabulary import Vocabulary, WholeVocabulary


class LanguageModelHead(nn.Module):
    """[N, hidden] -> logits [N, vocab]; with `config.value_head`, `value` is a second head on the same rows.

    Tied, it has no parameter of its own and reads the embedding's weight at every call, so that a replaced or
    moved embedding is never missed.
    """

    def __init__(self, config: DecoderConfig, embedding: Embedding) -> None:
        super().__init__()
        # A tuple keeps the embedding from being registered as a child of the head.
        self._tied_to = (embedding,) if config.tie_word_embeddings else None
        if self._tied_to is None:
            self.weight = nn.Parameter(embedding.weight.new_empty(config.vocab_size, config.hidden_size))
            nn.init.normal_(self.weight, std=0.02)
        self.vocabulary: Vocabulary = WholeVocabulary()
        self.vocab_size = config.vocab_size
        self.softcap = config.logit_softcap
        self.value = ScalarHead(config) if config.value_head else None

    @property
    def projection(self) -> Tensor:
        """What makes logits, wherever it lives: [vocab, hidden], or the rows of it that are here."""
        return self.weight if self._tied_to is None else self._tied_to[0].weight

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N, vocab] in the weights' dtype; with a softcap c, each logit s is c tanh(s / c)."""
        return self.vocabulary.whole(self.part(self.vocabulary.enter(hidden)))

    def part(self, hidden: Tensor) -> Tensor:
        """As the call, but only the columns of the vocabulary that are here."""
        return self.cap(F.linear(hidden, self.projection))

    def cap(self, logits: Tensor) -> Tensor:
        """The logits of what the projection gives."""
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def cap_slope(self, logits: Tensor) -> Tensor | None:
        """How fast each capped logit s moves with what the projection gives: 1 - (s / c)^2; None without a cap."""
        return None if self.softcap is None else 1.0 - (logits / self.softcap).square()


class ScalarHead(nn.Module):
    """[N, hidden] -> [N]: a value or a reward per row, without a bias."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(config.hidden_size, 1, bias=False).weight.detach())

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N] in fp32: bfloat16 would round a score of 3 to steps of 0.016."""
        return F.linear(hidden.float(), self.weight.float()).squeeze(-1)


def values_of(head: nn.Module, hidden: Tensor) -> Tensor:
    """[N, hidden] -> [N] in fp32: by a scalar head, or by the second head of a language model."""
    scalar = head.value if isinstance(head, LanguageModelHead) else head
    assert scalar is not None, "this language model has no head for values"
    return torch.as_tensor(scalar(hidden)).float()


def make_head(config: DecoderConfig, kind: HeadKind, embedding: Embedding) -> nn.Module:
    """The head of a kind; `embedding` is read by a tied language-model head."""
    return LanguageModelHead(config, embedding) if kind == "lm" else ScalarHead(config)
