"""Ragged random demonstrations and preference pairs, in memory."""

import torch
from tiny_rl import random_rollout

from meshift.batch import WHERE, Batch, Ragged


def random_demonstrations(num_rows=7, *, vocab_size=13, seed=3):
    """Texts of 1 to 11 tokens with scattered masks: some begin with a trained token, one has none at all."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (num_rows,), generator=draw)
    total = int(lengths.sum())
    mask = torch.rand(total, generator=draw) < 0.6
    mask[: int(lengths[0])] = False
    return Batch(
        {
            "tokens": Ragged(torch.randint(vocab_size, (total,), generator=draw), lengths),
            "loss_mask": Ragged(mask, lengths),
        },
        {WHERE: [f"texts.jsonl:{i + 1}" for i in range(num_rows)]},
    )


def random_pairs(num_pairs=6, *, vocab_size=13, seed=3):
    """Pairs that share prompts of 0 to 3 tokens, with a reference's log-probs, margins and weights."""
    draw = torch.Generator().manual_seed(seed)
    prompts = torch.arange(num_pairs) % 4
    sides = [random_rollout(num_pairs, vocab_size=vocab_size, seed=seed + i)["tokens"].rows() for i in (1, 2)]
    shared = [torch.randint(vocab_size, (n,), generator=draw) for n in prompts.tolist()]
    chosen, rejected = ([torch.cat(two) for two in zip(shared, rows, strict=True)] for rows in sides)

    def numbers(scale, shift):
        return Ragged.scalars(shift + scale * torch.rand(num_pairs, generator=draw))

    return Batch(
        {
            "chosen": Ragged.from_rows(chosen),
            "rejected": Ragged.from_rows(rejected),
            "num_prompt_tokens": Ragged.scalars(prompts),
            "ref_chosen_logps": numbers(6.0, -30.0),
            "ref_rejected_logps": numbers(6.0, -30.0),
            "required_margin": numbers(2.0, 0.0),
            "pair_weight": numbers(2.0, 0.1),
        },
        {WHERE: [f"pairs.jsonl:{i + 1}" for i in range(num_pairs)]},
    )
