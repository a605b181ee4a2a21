"""A few log-probs where a role is trained and where it generates: weights may arrive and yet be read wrongly.

Fingerprints say that every number arrived; this says that the layout they arrived in makes the same model of them,
by the very products that completions are drawn with. It knows nothing of how weights move.
"""

from __future__ import annotations

import torch

from meshift.batch import Batch, Ragged
from meshift.errors import ReallocationError
from meshift.parallel.exchange import gather_facts
from meshift.parallel.groups import Peers
from meshift.runtime.role import LocalRole
from meshift.training.readings import TokenLogprobs

READING = TokenLogprobs()
NUM_TEXTS, LENGTH = 2, 12
MAX_MEAN_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""How far the log-probs of two layouts may be apart on average: rounding may do that, another model does more."""


def probe(trainer: LocalRole | None, target: LocalRole | None, peers: Peers, where: tuple[str, str]) -> float:
    """The largest difference between the log-probs of `trainer`'s placement and those of `target`'s.

    Every process of both placements calls this with what it has of them; `where` names target and trainer.
    Raises `ReallocationError`, in all of them, where the difference is more than rounding.
    """
    known = next(role for role in (trainer, target) if role is not None)
    batch = _texts(known.model.config.vocab_size)
    read = None if trainer is None else trainer.infer(READING, batch).batch[READING.key].values.tolist()
    drawn = None
    if target is not None and target.generator is not None:
        target.come()
        with target.trainer.passes.gathered():
            drawn = target.generator.logprobs([row.tolist() for row in batch["tokens"].rows()])
    told = gather_facts([read, drawn], peers)
    expected = torch.tensor(next(read for read, _ in told if read is not None), dtype=torch.float64)
    largest = 0.0
    for rank, (_, found) in zip(peers.ranks, told, strict=True):
        if found is None:
            continue
        differences = (torch.tensor(found, dtype=torch.float64) - expected).abs()
        if not float(differences.mean()) <= MAX_MEAN_DIFFERENCE.get(known.model.dtype, 0.5):
            raise ReallocationError(
                f"{where[0]} (process {rank}) gives tokens other log-probs than {where[1]}, where it is trained: "
                f"{float(differences.mean()):.3g} apart on average, though its weights arrived. The step was "
                "stopped; resume from the last checkpoint, and report this with your plan."
            )
        largest = max(largest, float(differences.max()))
    return largest


def _texts(vocab_size: int) -> Batch:
    """Tokens from the whole vocabulary, each text but its first token to be read."""
    ids = torch.arange(NUM_TEXTS * LENGTH) * 7919 % vocab_size
    texts = Ragged(ids, torch.tensor([LENGTH] * NUM_TEXTS))
    return Batch({"tokens": texts, "completion_lengths": Ragged.scalars([LENGTH - 1] * NUM_TEXTS, torch.int64)})
