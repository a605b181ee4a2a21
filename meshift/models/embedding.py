"""Token ids to rows: a vector for each token, scaled or with a vector for its position where the family has that.

Knows nothing of the head, which may read the same matrix.
"""

import torch
from torch import Tensor, nn

from meshift.models.config import DecoderConfig
from meshift.models.vocabulary import Vocabulary, WholeVocabulary


class Embedding(nn.Module):
    """`weight[token] * scale`, and `position.weight[position]` added where positions are learned."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        nn.init.normal_(self.weight)
        self.vocabulary: Vocabulary = WholeVocabulary()
        self.scale = config.embedding_scale
        self.position: nn.Embedding | None = None
        if config.positions == "learned":
            self.position = nn.Embedding(config.max_positions, config.hidden_size)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens and positions, int64 [T] each -> [T, hidden] in the weight's dtype."""
        rows = self.vocabulary.look_up(tokens, self.weight)
        if self.scale is not None:
            # `transformers` rounds the factor to the dtype first: sqrt(3072) is 55.5 in bfloat16.
            rows = rows * float(torch.tensor(self.scale, dtype=rows.dtype))
        return rows if self.position is None else rows + self.position(positions)
