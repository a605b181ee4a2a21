"""One packed pass over the rows of a micro-batch: how they are laid out, run and read.

It knows nothing of losses, of optimizers or of which layers are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from meshift.batch import Batch, Ragged
from meshift.config.sections import TrainableConfig
from meshift.models.attention import PackedAttention
from meshift.models.decoder import Decoder
from meshift.models.rows import repeat
from meshift.training.flops import training_flops
from meshift.training.prefixes import Arranged, arrange
from meshift.training.readings import Reading


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows of a batch as they run.

    Packed `rows` leave the last layer; of those that are read, the i-th is `rows[back[i]]`.
    """

    reading: Reading
    batch: Batch
    arranged: Arranged
    tokens: Tensor
    rows: Tensor
    back: Tensor

    @classmethod
    def of(cls, reading: Reading, batch: Batch, config: TrainableConfig) -> MicroBatch:
        """What common beginnings there are run once, if the config says so."""
        packed, read = reading.sequences(batch), reading.rows(batch)
        arranged = arrange(packed, share=config.share_prefixes)
        rows, back = torch.unique(arranged.place[read], return_inverse=True)
        tokens = packed.values[arranged.take]
        return cls(reading=reading, batch=batch, arranged=arranged, tokens=tokens, rows=rows, back=back)

    @property
    def num_rows(self) -> int:
        """Packed rows that run."""
        return len(self.tokens)

    def run(self, model: Decoder, *, checkpoint: bool, entering: Tensor | None = None) -> Tensor:
        """What leaves the model's layers: `rows` of the last ones, all rows of earlier ones."""
        device = model.device
        hidden: Tensor = model(
            self.tokens.to(device),
            self.arranged.positions.to(device),
            PackedAttention(self.arranged.lengths, self.arranged.before),
            entering=entering,
            rows=self.rows.to(device) if len(self.rows) < self.num_rows else None,
            checkpoint=checkpoint and torch.is_grad_enabled(),
        )
        return hidden

    def read(self, model: Decoder, hidden: Tensor, chunk: int) -> Mapping[str, Ragged]:
        """The reading's outputs, by the model's head, `chunk` rows of logits at a time."""
        if not torch.equal(self.back, torch.arange(len(self.rows))):  # several sequences', or in another order
            hidden = repeat(hidden, self.back)
        return self.reading.read(model.head, hidden, self.batch, chunk)

    def flops(self, model: Decoder) -> float:
        """Operations of learning from it in the layers that are here."""
        return training_flops(model, self.arranged.spans, len(self.back), len(self.rows))
