"""Preference pairs for the runs that learn from them (reward, dpo): loaded, weighted, batched, counted in words.

It knows nothing of models or losses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from meshift.batch import WHERE, Batch, Ragged
from meshift.config.sections import PairDataConfig
from meshift.data.loader import Loader
from meshift.data.preferences import Pair, PreferenceData, load_preferences
from meshift.errors import ConfigError, DataError
from meshift.runtime.given_rows import left_out_notes, loaded_rows


@dataclass(frozen=True, kw_only=True)
class PairSets:
    """The pairs to train on, and those held out."""

    train: PreferenceData
    heldout: PreferenceData | None

    def described(self) -> list[tuple[str, str]]:
        """Lines of a dry run."""
        heldout = _counted(self.heldout) if self.heldout else "none"
        return [("pairs", _counted(self.train)), ("held-out pairs", heldout)]

    def messages(self) -> tuple[str, ...]:
        """What was left out, and where."""
        heldout = _messages(self.heldout, "held-out pairs") if self.heldout else ()
        return (*_messages(self.train, "pairs"), *heldout)

    def unread_margins(self, method: str) -> tuple[str, ...]:
        """A note where rows have a margin, which `method` does not read."""
        where = next((pair.where for pair in self.train.pairs if pair.margin is not None), None)
        note = f"the column margin is for reward models; {method} does not read it, as at {where}"
        return () if where is None else (note,)

    def check_lengths(self, role: str, name: str, limit: int) -> None:
        """Raise `ConfigError` for a pair with a text that is longer than the role's model takes."""
        for pair in (*self.train.pairs, *(self.heldout.pairs if self.heldout else ())):
            longest = max(len(pair.chosen), len(pair.rejected))
            if longest > limit:
                raise ConfigError(
                    f"the pair at {pair.where} has a text of {longest} tokens, but the {role} model {name} takes "
                    f"{limit}; set `data.max_length` to at most {limit}"
                )


def load_pairs(config: PairDataConfig, model: str) -> PairSets:
    """Read both files, tokenised for the model of this name. Raises `DataError` for a row that is no pair."""
    train, heldout = loaded_rows(load_preferences, config, model)
    if heldout is not None:
        heldout = replace(heldout, pairs=heldout.pairs[: config.max_eval_samples])
    return PairSets(train=train, heldout=heldout)


class PairSource:
    """Batches of pairs. `known` may hold more keys with one row per pair, in the pairs' order."""

    def __init__(self, config: PairDataConfig, pairs: Sequence[Pair], seed: int) -> None:
        self.pairs = pairs
        self.weights = pair_weights(pairs, by_prompt=config.weight_by_prompt)
        self.loader = Loader(len(pairs), config.batch_size, seed, config.shuffle)
        self.known: Batch | None = None

    def rows(self, step: int) -> list[int]:
        """The step's pairs, as indices."""
        return self.loader.batch(step)

    def next_batch(self, step: int) -> Batch:
        """The step's pairs."""
        rows = self.rows(step)
        batch = pair_batch([self.pairs[i] for i in rows], [self.weights[i] for i in rows])
        return batch if self.known is None else batch.union(self.known.index(rows))


def pair_batch(pairs: Sequence[Pair], weights: Sequence[float] | None = None) -> Batch:
    """Pairs as the keys that readings and losses of pairs take; without `weights` each counts as one."""
    return Batch(
        {
            "chosen": Ragged.from_rows([p.chosen for p in pairs], torch.int64),
            "rejected": Ragged.from_rows([p.rejected for p in pairs], torch.int64),
            "num_prompt_tokens": Ragged.scalars([p.num_prompt_tokens for p in pairs], torch.int64),
            "required_margin": Ragged.scalars([p.margin or 0.0 for p in pairs], torch.float32),
            "pair_weight": Ragged.scalars(weights or [1.0] * len(pairs), torch.float32),
        },
        {WHERE: [p.where for p in pairs]},
    )


def pair_weights(pairs: Sequence[Pair], *, by_prompt: bool) -> list[float]:
    """The weight of each pair, scaled to a mean of 1 over all of them, so that weights leave the rate alone.

    `by_prompt` divides a pair's weight by the sum of its prompt's, so that every prompt counts as one in a pass
    over the data, whatever the batches. A pair without prompt has one of its own. Raises `DataError` where no
    pair has a weight.
    """
    weights = [pair.weight for pair in pairs]
    if by_prompt:
        sums: dict[tuple[int, ...], float] = defaultdict(float)
        prompts = [_prompt_of(pair, place) for place, pair in enumerate(pairs)]
        for prompt, weight in zip(prompts, weights, strict=True):
            sums[prompt] += weight
        weights = [w / sums[p] if sums[p] > 0 else 0.0 for w, p in zip(weights, prompts, strict=True)]
    total = sum(weights)
    if total <= 0:
        raise DataError(f"{pairs[0].where}: this pair and all others have weight 0: give some of them a weight.")
    return [weight * len(pairs) / total for weight in weights]


def num_pair_tokens(batch: Batch) -> int:
    """Tokens of both texts of all pairs."""
    return sum(int(batch[side].lengths.sum()) for side in ("chosen", "rejected"))


def weights_in_words(config: PairDataConfig, pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """A dry run's line on weights, where there are any."""
    if config.weight_by_prompt:
        num_prompts = len({_prompt_of(pair, place) for place, pair in enumerate(pairs)})
        return [
            ("weights", f"{num_prompts} prompts, each counts as one ({len(pairs) / num_prompts:.2f} pairs each)")
        ]
    given = [pair.weight for pair in pairs]
    if min(given) == max(given):
        return []
    return [("weights", f"from the data, {min(given):g} to {max(given):g}, scaled to a mean of 1")]


def _prompt_of(pair: Pair, place: int) -> tuple[int, ...]:
    """What pairs of one prompt have in common: its tokens; no token has a negative id."""
    return tuple(pair.chosen[: pair.num_prompt_tokens]) or (-1 - place,)


def _counted(data: PreferenceData) -> str:
    others = ((data.unpaired, "rows without a counterpart"), (data.blank, "with a blank response"))
    more = "".join(f"; {len(places)} {which}" for places, which in others if places)
    return f"{len(data.pairs)} ({data.num_overlong} over-long and {data.num_identical} identical left out{more})"


def _messages(data: PreferenceData, what: str) -> tuple[str, ...]:
    notes = left_out_notes(
        (data.overlong, f"{what} over data.max_length"),
        (data.identical, f"{what} with equal texts"),
        (data.unpaired, f"rows for {what} that have no counterpart"),
        (data.blank, f"{what} with a blank response"),
    )
    return tuple(notes)
